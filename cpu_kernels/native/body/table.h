// The table of the kernels. A part of kernels_body.h.

#define DISPATCH(call)                        \
  switch (type) {                             \
    case Type::kF32: return call(Type::kF32); \
    case Type::kBF16: return call(Type::kBF16); \
    case Type::kF16: return call(Type::kF16); \
    case Type::kI8: return call(Type::kI8);   \
    case Type::kI4: return call(Type::kI4);   \
  }

int64_t ArrangedSizeOf(Type type, int64_t n) {
#define CALL(t) Arrangement<t>::Size(n)
  DISPATCH(CALL)
#undef CALL
  return 0;
}

void ArrangeFor(Type type, const float* x, int64_t n, float scale, float* arranged) {
#define CALL(t) Arrangement<t>::Arrange(x, n, scale, arranged)
  DISPATCH(CALL)
#undef CALL
}

void RestoreFrom(Type type, const float* arranged, int64_t n, float* x) {
#define CALL(t) Arrangement<t>::Restore(arranged, n, x)
  DISPATCH(CALL)
#undef CALL
}

void CombineFor(Type type, float* sums, int64_t count, int64_t stride, int64_t n, float* x) {
#define CALL(t) Arrangement<t>::Combine(sums, count, stride, n, x)
  DISPATCH(CALL)
#undef CALL
}

void WidenOf(const Matrix& w, int64_t row, float* arranged) {
  const Type type = w.type;
#define CALL(t) WidenRow<t>(w, row, arranged)
  DISPATCH(CALL)
#undef CALL
}

void DotsOf(const Matrix& w, Rows rows, const float* x, int64_t ldx, int64_t num_x, float* out, int64_t ldo) {
  const Type type = w.type;
#define CALL(t) Dots<t>(w, rows, x, ldx, num_x, out, ldo)
  DISPATCH(CALL)
#undef CALL
}

void AccumulateOf(const Matrix& w, Rows rows, const float* coefficients, float* sum) {
  const Type type = w.type;
#define CALL(t) Accumulate<t>(w, rows, coefficients, sum)
  DISPATCH(CALL)
#undef CALL
}

void WeightedOf(const Matrix& w, Rows rows, const float* p, int64_t ldp, int64_t num_x, float* sums, int64_t lds) {
  const Type type = w.type;
#define CALL(t) Weighted<t>(w, rows, p, ldp, num_x, sums, lds)
  DISPATCH(CALL)
#undef CALL
}

void AddColumnsOf(const Matrix& w, Rows rows, int64_t column, const float* h, int64_t ldh, int64_t num_x, float* panel,
                  float* sums, int64_t lds) {
  const Type type = w.type;
#define CALL(t) AddColumns<t>(w, rows, column, h, ldh, num_x, panel, sums, lds)
  DISPATCH(CALL)
#undef CALL
}

int64_t FeaturesSizeOf(Type type, int64_t n) {
  return type == Type::kI8 ? LowBit<Type::kI8>::Size(n) : LowBit<Type::kI4>::Size(n);
}

float QuantizeFor(Type type, const float* x, int64_t n, int16_t* features) {
  return type == Type::kI8 ? LowBit<Type::kI8>::Quantize(x, n, features)
                           : LowBit<Type::kI4>::Quantize(x, n, features);
}

void ScoresOf(const Matrix& w, Rows rows, const int16_t* features, float step, float* out) {
  return w.type == Type::kI8 ? LowBit<Type::kI8>::Scores(w, rows, features, step, out)
                             : LowBit<Type::kI4>::Scores(w, rows, features, step, out);
}

#undef DISPATCH
