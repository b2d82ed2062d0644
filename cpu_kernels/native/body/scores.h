// Scores of a low-bit predictor in integer arithmetic, on lanes of 16 bits. A part of kernels_body.h.

constexpr int kShorts = 2 * kLanes;
constexpr int kFlush = 16;  // registers of a row whose products are summed in 32 bits, which cannot overflow: a window

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

// The packed elements widened to 16 bits, `kOffset` too large.
template <Type type>
struct Integers;

template <>
struct Integers<Type::kI8> {
  static constexpr int kParts = 2;
  static constexpr int kOffset = 0;
  INLINE static vh Part(const vuh& raw, int part) { return part ? (vh)raw >> 8 : (vh)(raw << 8) >> 8; }
};

template <>
struct Integers<Type::kI4> {
  static constexpr int kParts = 4;
  static constexpr int kOffset = 8;
  INLINE static vh Part(const vuh& raw, int part) { return (vh)(part == 3 ? raw >> 12 : raw >> (4 * part) & 0xfu); }
};

template <Type type>
constexpr int64_t kIntegerGroup = kShorts * Integers<type>::kParts;

// Products of one row with the features.
template <Type type>
struct ScoreSum {
  const int16_t* features;
  const int16_t* begin;  // of the sums of the next window
  vf sum = {};
  vi total;
  int registers = 0;

  INLINE ScoreSum(const int16_t* features, const int16_t* begin) : features(features), begin(begin) { Begin(); }

  INLINE void Take(const uint8_t* const (&from)[1]) {
    UNROLL
    for (int part = 0; part < Integers<type>::kParts; ++part, features += kShorts) {
      total += MultiplyAdd(Integers<type>::Part(Load<vuh>(from[0]), part), Load<vh>(features));
    }
    if (++registers % kFlush == 0) {
      End();
      Begin();
    }
  }

  INLINE void Begin() {
    total = Load<vi>(begin);
    begin += kShorts;
  }

  INLINE void End() { sum += __builtin_convertvector(total, vf); }
};

template <Type type, int kRows>
INLINE void ScoreRows(const Matrix& w, const Rows& list, int64_t i, const int16_t* features, const int16_t* begin,
                      float step, float* out) {
  // One after another, a single stream.
  vf sum[kRows];
  float sums[kRows], scale[kRows];
  UNROLL
  for (int r = 0; r < kRows; ++r) {
    const Cursor<1> at(w, list, i + r, RowBytes(type, w.cols));
    ScoreSum<type> scores(features, begin);
    Walk(at, RowBytes(type, w.cols), scores);
    scores.End();
    sum[r] = scores.sum;
    scale[r] = at.scale[0];
  }
  SumAll(sum, sums);
  UNROLL
  for (int r = 0; r < kRows; ++r) out[i + r] = sums[r] * (step * scale[r]);
}

INLINE float LargestMagnitude(const float* x, int64_t n) {
  vf best = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf magnitude = (vf)(Load<vu>(x + i) & 0x7fffffffu);
    best = magnitude > best ? magnitude : best;
  }
  float largest = Max(best);
  for (; i < n; ++i) largest = __builtin_fabsf(x[i]) > largest ? __builtin_fabsf(x[i]) : largest;
  return largest;
}

template <Type type>
struct LowBit {
  static constexpr int kParts = Integers<type>::kParts;
  static constexpr float kLimit = 32767;

  KERNEL static int64_t Registers(int64_t n) { return (n + kIntegerGroup<type> - 1) / kIntegerGroup<type>; }

  // Behind the features, what the sums of every window begin with, which takes the offset of the elements away again:
  // kLanes of 32 bits each, and one window more than are full.
  KERNEL static int64_t Size(int64_t n) {
    return Registers(n) * kIntegerGroup<type> + (Registers(n) / kFlush + 1) * kShorts;
  }

  // Features of one group, rounded.
  INLINE static void QuantizeGroup(const float* x, float step, int16_t* features) {
    vf v[2 * kParts];
    UNROLL
    for (int i = 0; i < 2 * kParts; ++i) v[i] = Load<vf>(x + i * kLanes);
    Deinterleave(v);
    UNROLL
    for (int part = 0; part < kParts; ++part) {  // element l * kParts + part; pairs of neighbours share 32 bits
      const vu even = Rounded(v[part], step), odd = Rounded(v[part + kParts], step);
      Store(features + part * kShorts, (even & 0xffffu) | odd << 16);
    }
  }

  INLINE static vu Rounded(const vf& x, float step) {
    const vf limit = Splat(kLimit);
    vf value = x / step;
    value = value < limit ? value : limit;
    value = value > -limit ? value : -limit;
    const vf half = (vf)((vu)Splat(0.5f) | ((vu)value & 0x80000000u));
    return (vu)__builtin_convertvector(value + half, vi);
  }

  KERNEL static float Quantize(const float* x, int64_t n, int16_t* features) {
    const float largest = LargestMagnitude(x, n);
    const float step = largest > 0 && largest < __builtin_inff() ? largest / kLimit : 1;
    const int64_t whole = n / kIntegerGroup<type> * kIntegerGroup<type>;
    for (int64_t i = 0; i < whole; i += kIntegerGroup<type>) QuantizeGroup(x + i, step, features + i);
    if (whole < n) {
      float rest[kIntegerGroup<type>] = {};
      memcpy(rest, x + whole, (n - whole) * sizeof(float));
      QuantizeGroup(rest, step, features + whole);
    }
    int16_t* begin = features + Registers(n) * kIntegerGroup<type>;
    memset(begin, 0, (Registers(n) / kFlush + 1) * kShorts * sizeof(int16_t));
    vi offset = {};
    for (int64_t group = 0; group < Registers(n); ++group) {
      UNROLL
      for (int part = 0; part < kParts; ++part, features += kShorts) {
        offset -= MultiplyAdd(vh{} + int16_t{Integers<type>::kOffset}, Load<vh>(features));
      }
      Store(begin, offset);
      if (group % kFlush == kFlush - 1) {
        begin += kShorts;
        offset = vi{};
      }
    }
    return step;
  }

  KERNEL static void Scores(const Matrix& w, Rows list, const int16_t* features, float step, float* out) {
    const int16_t* begin = features + Registers(w.cols) * kIntegerGroup<type>;
    int64_t i = 0;
    for (; i + kRowsAtOnce <= list.count; i += kRowsAtOnce) {
      ScoreRows<type, kRowsAtOnce>(w, list, i, features, begin, step, out);
    }
    for (; i < list.count; ++i) ScoreRows<type, 1>(w, list, i, features, begin, step, out);
  }
};
