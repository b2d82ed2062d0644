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

template <Type type>
struct LowBit {
  static constexpr int kParts = Integers<type>::kParts;

  KERNEL static int64_t Registers(int64_t n) { return (n + kIntegerGroup<type> - 1) / kIntegerGroup<type>; }

  // Behind the features, what the sums of every window begin with, which takes the offset of the elements away again:
  // kLanes of 32 bits each, and one window more than are full.
  KERNEL static int64_t Size(int64_t n) {
    return Registers(n) * kIntegerGroup<type> + (Registers(n) / kFlush + 1) * kShorts;
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
    int16_t* begin = features + Registers(n) * kIntegerGroup<type>;
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
