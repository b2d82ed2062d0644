// Scores of a low-bit predictor in integer arithmetic, on lanes of 16 bits. A part of kernels_body.h.

constexpr int kShorts = 2 * kLanes;
constexpr int kFlush = 16;  // registers of products, long before 32-bit sums could overflow

// Sums of neighbouring products.
INLINE vi MultiplyAdd(const vh& a, const vh& b) {
#if LANES == 16
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif LANES == 8
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return (((vi)a << 16) >> 16) * (((vi)b << 16) >> 16) + ((vi)a >> 16) * ((vi)b >> 16);
#endif
}

template <Type type>
struct Integers;

template <>
struct Integers<Type::kI8> {
  static constexpr int kParts = 2;
  INLINE static vh Part(const vuh& raw, int part) { return part ? (vh)raw >> 8 : (vh)(raw << 8) >> 8; }
};

template <>
struct Integers<Type::kI4> {
  static constexpr int kParts = 4;
  INLINE static vh Part(const vuh& raw, int part) { return (vh)((raw ^ 0x8888u) << (12 - 4 * part)) >> 12; }
};

template <Type type>
constexpr int64_t kIntegerGroup = kShorts * Integers<type>::kParts;

template <Type type, int kRows>
struct ScoreSum {
  const int16_t* features;
  vf sum[kRows] = {};
  vi total[kRows] = {};
  int registers = 0;

  INLINE explicit ScoreSum(const int16_t* features) : features(features) {}

  INLINE void Take(const uint8_t* const (&from)[kRows]) {
    UNROLL
    for (int part = 0; part < Integers<type>::kParts; ++part, features += kShorts) {
      const vh value = Load<vh>(features);
      UNROLL
      for (int r = 0; r < kRows; ++r) total[r] += MultiplyAdd(Integers<type>::Part(Load<vuh>(from[r]), part), value);
    }
    if (++registers % kFlush == 0) Flush();
  }

  INLINE void Flush() {
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r] += __builtin_convertvector(total[r], vf);
      total[r] = vi{};
    }
  }
};

template <Type type, int kRows>
INLINE void ScoreRows(const Matrix& w, const Rows& list, int64_t i, const int16_t* features, float step, float* out) {
  const Cursor<kRows> at(w, list, i, RowBytes(type, w.cols));
  ScoreSum<type, kRows> scores(features);
  Walk(at, RowBytes(type, w.cols), scores);
  scores.Flush();
  UNROLL
  for (int r = 0; r < kRows; ++r) out[i + r] = Sum(scores.sum[r]) * (step * at.scale[r]);
}

template <Type type>
struct LowBit {
  static constexpr int kParts = Integers<type>::kParts;

  KERNEL static int64_t Size(int64_t n) {
    return (n + kIntegerGroup<type> - 1) / kIntegerGroup<type> * kIntegerGroup<type>;
  }

  KERNEL static float Quantize(const float* x, int64_t n, int16_t* features) {
    constexpr float kLimit = 32767;
    float largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float magnitude = __builtin_fabsf(x[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    const float step = largest > 0 && largest < __builtin_inff() ? largest / kLimit : 1;
    memset(features, 0, Size(n) * sizeof(int16_t));
    for (int64_t i = 0; i < n; ++i) {
      const int64_t within = i % kIntegerGroup<type>;
      float value = x[i] / step;
      value = value < kLimit ? value : kLimit;
      value = value > -kLimit ? value : -kLimit;
      features[i - within + within % kParts * kShorts + within / kParts] =
          static_cast<int16_t>(value + (value < 0 ? -0.5f : 0.5f));
    }
    return step;
  }

  KERNEL static void Scores(const Matrix& w, Rows list, const int16_t* features, float step, float* out) {
    int64_t i = 0;
    for (; i + kRowsAtOnce <= list.count; i += kRowsAtOnce) {
      ScoreRows<type, kRowsAtOnce>(w, list, i, features, step, out);
    }
    for (; i < list.count; ++i) ScoreRows<type, 1>(w, list, i, features, step, out);
  }
};
