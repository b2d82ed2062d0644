// The kernels of one instruction set, in GCC and Clang vector extensions. The including file defines ISA (a namespace),
// TABLE (the name of the table), LANES (floats a register), TILE (vectors that four rows meet at once: as many as leave
// the accumulators in registers) and TARGET (a function attribute).
//
// Everything has internal linkage and no standard library function is instantiated here: one compiled for AVX-512
// could otherwise be the copy that the linker keeps for all.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace jsparse {
namespace ISA {
namespace {

#define KERNEL TARGET
#define INLINE TARGET inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

constexpr int kLanes = LANES;
constexpr int kBytes = 4 * kLanes;  // of a register
constexpr int kCacheLine = 64;
constexpr int kRowsAtOnce = 4;

typedef float vf __attribute__((vector_size(kBytes)));
typedef int32_t vi __attribute__((vector_size(kBytes)));
typedef uint32_t vu __attribute__((vector_size(kBytes)));
typedef int16_t vh __attribute__((vector_size(kBytes)));
typedef uint16_t vuh __attribute__((vector_size(kBytes)));

template <class V>
INLINE V Load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
INLINE void Store(void* p, const V& v) {
  memcpy(p, &v, sizeof v);
}

INLINE vf Splat(float value) { return vf{} + value; }

INLINE float Sum(const vf& v) {
#if LANES == 16
  return _mm512_reduce_add_ps((__m512)v);
#elif LANES == 8
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// sums[i] = Sum(v[i]), the four of them together.
INLINE void Sum4(const vf (&v)[4], float* sums) {
#if defined(__x86_64__)
#if LANES == 16
#define OF(operation) _mm512_##operation
  typedef __m512 native;
#elif LANES == 8
#define OF(operation) _mm256_##operation
  typedef __m256 native;
#else
#define OF(operation) _mm_##operation
  typedef __m128 native;
#endif
  const native a = (native)v[0], b = (native)v[1], c = (native)v[2], d = (native)v[3];
  const native ab = OF(add_ps)(OF(unpacklo_ps)(a, b), OF(unpackhi_ps)(a, b));
  const native cd = OF(add_ps)(OF(unpacklo_ps)(c, d), OF(unpackhi_ps)(c, d));
  const native quarters = OF(add_ps)(OF(shuffle_ps)(ab, cd, 0x44), OF(shuffle_ps)(ab, cd, 0xee));
#undef OF
#if LANES == 16
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  const __m128 all = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
#elif LANES == 8
  const __m128 all = _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1));
#else
  const __m128 all = quarters;
#endif
  _mm_storeu_ps(sums, all);
#else
  for (int i = 0; i < 4; ++i) sums[i] = Sum(v[i]);
#endif
}

// ---- Element types. A register of packed elements has kParts parts of kLanes elements: lane l of part p is element
// l * kParts + p.

template <Type type>
struct Packed;

template <>
struct Packed<Type::kF32> {
  static constexpr int kParts = 1;
  INLINE static vf Part(const vu& raw, int) { return (vf)raw; }
};

template <>
struct Packed<Type::kBF16> {
  static constexpr int kParts = 2;
  INLINE static vf Part(const vu& raw, int part) { return (vf)(part ? raw & 0xffff0000u : raw << 16); }
};

template <>
struct Packed<Type::kF16> {
  static constexpr int kParts = 2;
  INLINE static vf Part(const vu& raw, int part) {
    const vu half = part ? raw >> 16 : raw & 0xffffu;
    const vu magnitude = (half & 0x7fffu) << 13;
    const vu exponent = half & 0x7c00u;
    // Subnormals by a subtraction of normal numbers, so that a thread which flushes denormals reads them too.
    const vu subnormal = (vu)((vf)(magnitude + 0x38800000u) - Splat(6.103515625e-5f));
    const vu normal = magnitude + 0x38000000u + ((vu)(exponent == 0x7c00u) & 0x38000000u);
    const vu is_subnormal = (vu)(exponent == 0u);
    return (vf)((subnormal & is_subnormal) | (normal & ~is_subnormal) | ((half & 0x8000u) << 16));
  }
};

template <>
struct Packed<Type::kI8> {
  static constexpr int kParts = 4;
  INLINE static vf Part(const vu& raw, int part) {
    return __builtin_convertvector((vi)(raw << (24 - 8 * part)) >> 24, vf);
  }
};

template <>
struct Packed<Type::kI4> {
  static constexpr int kParts = 8;
  INLINE static vf Part(const vu& raw, int part) {
#if LANES == 16
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (vf)_mm512_permutexvar_ps((__m512i)(raw >> (4 * part)), values);
#else
    return __builtin_convertvector((vi)((raw ^ 0x88888888u) << (28 - 4 * part)) >> 28, vf);
#endif
  }
};

template <Type type>
constexpr int64_t kGroup = kLanes * Packed<type>::kParts;

template <Type type>
struct Arrangement {
  static constexpr int kParts = Packed<type>::kParts;

  KERNEL static int64_t Size(int64_t n) { return (n + kGroup<type> - 1) / kGroup<type> * kGroup<type>; }

  KERNEL static void Arrange(const float* x, int64_t n, float scale, float* arranged) {
    for (int64_t group = 0; group < n / kGroup<type>; ++group, x += kGroup<type>, arranged += kGroup<type>) {
      UNROLL
      for (int part = 0; part < kParts; ++part) {
        UNROLL
        for (int lane = 0; lane < kLanes; ++lane) arranged[part * kLanes + lane] = scale * x[lane * kParts + part];
      }
    }
    const int64_t rest = n % kGroup<type>;
    if (!rest) return;
    memset(arranged, 0, kGroup<type> * sizeof(float));
    for (int64_t i = 0; i < rest; ++i) arranged[i % kParts * kLanes + i / kParts] = scale * x[i];
  }

  KERNEL static void Restore(const float* arranged, int64_t n, float* x) {
    for (int64_t group = 0; group < n / kGroup<type>; ++group, x += kGroup<type>, arranged += kGroup<type>) {
      UNROLL
      for (int lane = 0; lane < kLanes; ++lane) {
        UNROLL
        for (int part = 0; part < kParts; ++part) x[lane * kParts + part] = arranged[part * kLanes + lane];
      }
    }
    for (int64_t i = 0; i < n % kGroup<type>; ++i) x[i] = arranged[i % kParts * kLanes + i / kParts];
  }

  KERNEL static void Combine(float* sums, int64_t count, int64_t stride, int64_t n, float* x) {
    for (int64_t i = 0; i < Size(n); i += kLanes) {
      vf total = Load<vf>(sums + i);
      for (int64_t s = 1; s < count; ++s) total += Load<vf>(sums + s * stride + i);
      Store(sums + i, total);
    }
    Restore(sums, n, x);
  }
};

// ---- Rows times vectors

// The rows of one step, and what to fetch meanwhile: the bytes kAhead further on in the same rows, and at their end the
// first of the rows that come next.
template <int kRows>
struct Cursor {
  const uint8_t* rows[kRows];
  const uint8_t* next[kRows];
  float scale[kRows];
  bool has_next;

  INLINE Cursor(const Matrix& w, const Rows& list, int64_t i) {
    has_next = i + 2 * kRows <= list.count;
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = list[i + r];
      rows[r] = w.Row(row);
      scale[r] = w.scale ? w.scale[row] : 1.0f;
      next[r] = has_next ? w.Row(list[i + kRows + r]) : rows[r];
    }
    if (w.ahead) {
      has_next = true;
      for (int r = 0; r < kRows; ++r) next[r] = rows[r] + w.ahead;
    }
  }
};

constexpr int64_t kAhead = 2048;

// Hands every register of the rows to sum.Take, the last with zero bytes behind the row's end: nothing past it is read.
template <int kRows, class Sum>
INLINE void Walk(const Cursor<kRows>& at, int64_t row_bytes, Sum& sum) {
  vu raw[kRows];
  const int64_t bytes = row_bytes / kBytes * kBytes, turn = bytes > kAhead ? bytes - kAhead : 0;
  int64_t offset = 0;
  _Pragma("GCC unroll 2")
  for (; offset < turn; offset += kBytes) {
    if (kBytes == kCacheLine || offset % kCacheLine == 0) {
      UNROLL
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(at.rows[r] + offset + kAhead, 0, 3);
    }
    UNROLL
    for (int r = 0; r < kRows; ++r) raw[r] = Load<vu>(at.rows[r] + offset);
    sum.Take(raw);
  }
  _Pragma("GCC unroll 2")
  for (; offset < bytes; offset += kBytes) {
    if (at.has_next && (kBytes == kCacheLine || offset % kCacheLine == 0)) {
      UNROLL
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(at.next[r] + offset - turn, 0, 3);
    }
    UNROLL
    for (int r = 0; r < kRows; ++r) raw[r] = Load<vu>(at.rows[r] + offset);
    sum.Take(raw);
  }
  if (offset < row_bytes) {
    alignas(kBytes) uint8_t tail[kRows][kBytes] = {};
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      memcpy(tail[r], at.rows[r] + offset, row_bytes - offset);
      raw[r] = Load<vu>(tail[r]);
    }
    sum.Take(raw);
  }
}

// Products of kRows rows with kNumX vectors.
template <Type type, int kRows, int kNumX>
struct DotSum {
  static constexpr int kParts = Packed<type>::kParts;
  // Separate sums where there would be few, so that no addition waits for the one before.
  static constexpr int kMost = kRows * kNumX > 4 ? 1 : kRows * kNumX > 1 ? 2 : 4;
  static constexpr int kSets = kParts < kMost ? kParts : kMost;

  const float* x;
  int64_t ldx;
  vf total[kSets][kRows][kNumX] = {};

  INLINE DotSum(const float* x, int64_t ldx) : x(x), ldx(ldx) {}

  INLINE void Take(const vu (&raw)[kRows]) {
    UNROLL
    for (int part = 0; part < kParts; ++part) {
      vf value[kNumX];
      UNROLL
      for (int m = 0; m < kNumX; ++m) value[m] = Load<vf>(x + m * ldx + part * kLanes);
      UNROLL
      for (int r = 0; r < kRows; ++r) {
        const vf weight = Packed<type>::Part(raw[r], part);
        UNROLL
        for (int m = 0; m < kNumX; ++m) total[part % kSets][r][m] += weight * value[m];
      }
    }
    x += kGroup<type>;
  }

  // sums[r] = the product of row r with vector m.
  INLINE void Finish(int m, float (&sums)[kRows]) const {
    vf sum[kRows];
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r] = total[0][r][m];
      UNROLL
      for (int s = 1; s < kSets; ++s) sum[r] += total[s][r][m];
    }
    if constexpr (kRows == 4) {
      Sum4(sum, sums);
    } else {
      UNROLL
      for (int r = 0; r < kRows; ++r) sums[r] = Sum(sum[r]);
    }
  }
};

template <Type type, int kRows, int kNumX>
KERNEL void TileInto(const Cursor<kRows>& at, const float* x, int64_t ldx, int64_t n, float* out, int64_t ldo) {
  DotSum<type, kRows, kNumX> sum(x, ldx);
  Walk(at, RowBytes(type, n), sum);
  UNROLL
  for (int m = 0; m < kNumX; ++m) {
    float* to = out + m * ldo;
    float sums[kRows];
    sum.Finish(m, sums);
    UNROLL
    for (int r = 0; r < kRows; ++r) to[r] = sums[r] * at.scale[r];
  }
}

// kRows rows times every vector, TILE at a time.
template <Type type, int kRows>
KERNEL void TileAll(const Cursor<kRows>& at, const float* x, int64_t ldx, int64_t num_x, int64_t n, float* out,
                    int64_t ldo) {
  int64_t m = 0;
  for (; m + TILE <= num_x; m += TILE) {
    TileInto<type, kRows, TILE>(at, x + m * ldx, ldx, n, out + m * ldo, ldo);
  }
  const float* rest = x + m * ldx;
  float* to = out + m * ldo;
  switch (num_x - m) {
    case 1: return TileInto<type, kRows, 1>(at, rest, ldx, n, to, ldo);
    case 2: return TileInto<type, kRows, 2>(at, rest, ldx, n, to, ldo);
#if TILE > 3
    case 3: return TileInto<type, kRows, 3>(at, rest, ldx, n, to, ldo);
    case 4: return TileInto<type, kRows, 4>(at, rest, ldx, n, to, ldo);
    case 5: return TileInto<type, kRows, 5>(at, rest, ldx, n, to, ldo);
#endif
  }
}

template <Type type>
KERNEL void Dots(const Matrix& w, Rows list, const float* x, int64_t ldx, int64_t num_x, float* out, int64_t ldo) {
  int64_t i = 0;
  // One row after another is one sequential stream, which memory likes best; scattered rows want several under way.
  const bool stream = !list.list && !w.ahead && num_x == 1;
  for (; !stream && i + kRowsAtOnce <= list.count; i += kRowsAtOnce) {
    TileAll<type, kRowsAtOnce>(Cursor<kRowsAtOnce>(w, list, i), x, ldx, num_x, w.cols, out + i, ldo);
  }
  for (; i < list.count; ++i) TileAll<type, 1>(Cursor<1>(w, list, i), x, ldx, num_x, w.cols, out + i, ldo);
}

// Adds kRows rows, each times its coefficient, to a vector in the rows' arrangement.
template <Type type, int kRows>
struct AddTo {
  float* sum;
  vf coefficient[kRows];

  INLINE void Take(const vu (&raw)[kRows]) {
    UNROLL
    for (int part = 0; part < Packed<type>::kParts; ++part, sum += kLanes) {
      vf total = Load<vf>(sum);
      UNROLL
      for (int r = 0; r < kRows; ++r) total += coefficient[r] * Packed<type>::Part(raw[r], part);
      Store(sum, total);
    }
  }
};

template <Type type, int kRows>
INLINE void AddRows(const Matrix& w, const Rows& list, int64_t i, const float* coefficients, float* sum) {
  const Cursor<kRows> at(w, list, i);
  AddTo<type, kRows> to;
  to.sum = sum;
  UNROLL
  for (int r = 0; r < kRows; ++r) to.coefficient[r] = Splat(coefficients[i + r] * at.scale[r]);
  Walk(at, RowBytes(type, w.cols), to);
}

template <Type type>
KERNEL void Accumulate(const Matrix& w, Rows list, const float* coefficients, float* sum) {
  int64_t i = 0;
  for (; i + kRowsAtOnce <= list.count; i += kRowsAtOnce) AddRows<type, kRowsAtOnce>(w, list, i, coefficients, sum);
  for (; i < list.count; ++i) AddRows<type, 1>(w, list, i, coefficients, sum);
}

// sums[x] += sum over rows of p[x][row] * row, for kNumX vectors of coefficients and kRegisters registers of the rows.
template <Type type, int kNumX, int kRegisters>
INLINE void WeightedTile(const uint8_t* row, int64_t rows, int64_t stride, int64_t ahead, const float* p, int64_t ldp,
                         float* sums, int64_t lds) {
  constexpr int kParts = Packed<type>::kParts;
  vf total[kNumX][kRegisters * kParts];
  UNROLL
  for (int m = 0; m < kNumX; ++m) {
    UNROLL
    for (int v = 0; v < kRegisters * kParts; ++v) total[m][v] = Load<vf>(sums + m * lds + v * kLanes);
  }
  for (int64_t i = 0; i < rows; ++i, row += stride) {
    vf weight[kNumX];
    UNROLL
    for (int m = 0; m < kNumX; ++m) weight[m] = Splat(p[m * ldp + i]);
    UNROLL
    for (int g = 0; g < kRegisters; ++g) {
      if (ahead && (kBytes == kCacheLine || g * kBytes % kCacheLine == 0)) {
        __builtin_prefetch(row + ahead + g * kBytes, 0, 3);
      }
      const vu raw = Load<vu>(row + g * kBytes);
      UNROLL
      for (int part = 0; part < kParts; ++part) {
        const vf value = Packed<type>::Part(raw, part);
        UNROLL
        for (int m = 0; m < kNumX; ++m) total[m][g * kParts + part] += weight[m] * value;
      }
    }
  }
  UNROLL
  for (int m = 0; m < kNumX; ++m) {
    UNROLL
    for (int v = 0; v < kRegisters * kParts; ++v) Store(sums + m * lds + v * kLanes, total[m][v]);
  }
}

template <Type type>
KERNEL void Weighted(const Matrix& w, Rows list, const float* p, int64_t ldp, int64_t num_x, float* sums,
                     int64_t lds) {
  constexpr int kRegisters = 4;
  constexpr int kNumX = TILE == 6 ? 2 : 1;  // times the parts of four registers
  const int64_t block = kRegisters * kBytes, row_bytes = RowBytes(type, w.cols);
  if (row_bytes % block) {
    for (int64_t m = 0; m < num_x; ++m) Accumulate<type>(w, list, p + m * ldp, sums + m * lds);
    return;
  }
  for (int64_t at = 0; at < row_bytes; at += block) {
    const uint8_t* row = w.Row(list.first) + at;
    float* to = sums + at / kBytes * kGroup<type>;
    int64_t m = 0;
    for (; m + kNumX <= num_x; m += kNumX) {
      WeightedTile<type, kNumX, kRegisters>(row, list.count, w.stride, m ? 0 : w.ahead, p + m * ldp, ldp,
                                            to + m * lds, lds);
    }
    for (; m < num_x; ++m) {
      WeightedTile<type, 1, kRegisters>(row, list.count, w.stride, m ? 0 : w.ahead, p + m * ldp, ldp, to + m * lds,
                                        lds);
    }
  }
}

// ---- Scores in integer arithmetic, on lanes of 16 bits

constexpr int kShorts = 2 * kLanes;
constexpr int kFlush = 16;  // registers of products after which 32-bit sums could overflow

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

  INLINE void Take(const vu (&raw)[kRows]) {
    UNROLL
    for (int part = 0; part < Integers<type>::kParts; ++part, features += kShorts) {
      const vh value = Load<vh>(features);
      UNROLL
      for (int r = 0; r < kRows; ++r) total[r] += MultiplyAdd(Integers<type>::Part((vuh)raw[r], part), value);
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
  const Cursor<kRows> at(w, list, i);
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

// ---- Many vectors at once: weights are widened to float32 a panel at a time, which stays in cache while all meet it

constexpr int64_t kColumnVectors = 8;
constexpr int64_t kColumns = kColumnVectors * kLanes;
constexpr int64_t kDepth = 256;  // terms of the sums that one panel has
constexpr int kTileX = TILE == 6 ? 6 : 2;  // times four registers of columns

// Groups [begin, end) of a row as float32, scaled, in the arrangement of its type.
template <Type type>
INLINE void Widen(const Matrix& w, int64_t row, int64_t begin, int64_t end, float* out) {
  const uint8_t* from = w.Row(row);
  const vf scale = Splat(w.scale ? w.scale[row] : 1.0f);
  for (int64_t group = begin; group < end; ++group) {
    vu raw;
    if ((group + 1) * kGroup<type> <= w.cols) {
      raw = Load<vu>(from + group * kBytes);
    } else {
      alignas(kBytes) uint8_t tail[kBytes] = {};
      memcpy(tail, from + group * kBytes, RowBytes(type, w.cols) - group * kBytes);
      raw = Load<vu>(tail);
    }
    UNROLL
    for (int part = 0; part < Packed<type>::kParts; ++part, out += kLanes) {
      Store(out, Packed<type>::Part(raw, part) * scale);
    }
  }
}

template <Type type>
KERNEL void WidenRow(const Matrix& w, int64_t row, float* arranged) {
  Widen<type>(w, row, 0, Arrangement<type>::Size(w.cols) / kGroup<type>, arranged);
}

// out[i][c] += sum over k of left[i][k] * right[k][c], for kNumX rows and kVectors registers of columns.
template <int kNumX, int kVectors>
INLINE void ProductTile(const float* left, int64_t ldl, const float* right, int64_t ldr, int64_t depth, float* out,
                        int64_t ldo) {
  vf total[kNumX][kVectors];
  UNROLL
  for (int i = 0; i < kNumX; ++i) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) total[i][v] = Load<vf>(out + i * ldo + v * kLanes);
  }
  for (int64_t k = 0; k < depth; ++k, right += ldr) {
    vf value[kVectors];
    UNROLL
    for (int v = 0; v < kVectors; ++v) value[v] = Load<vf>(right + v * kLanes);
    UNROLL
    for (int i = 0; i < kNumX; ++i) {
      const vf factor = Splat(left[i * ldl + k]);
      UNROLL
      for (int v = 0; v < kVectors; ++v) total[i][v] += factor * value[v];
    }
  }
  UNROLL
  for (int i = 0; i < kNumX; ++i) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) Store(out + i * ldo + v * kLanes, total[i][v]);
  }
}

template <int kVectors>
KERNEL void ProductRows(const float* left, int64_t ldl, int64_t rows, const float* right, int64_t ldr, int64_t depth,
                        float* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + kTileX <= rows; i += kTileX) {
    ProductTile<kTileX, kVectors>(left + i * ldl, ldl, right, ldr, depth, out + i * ldo, ldo);
  }
  for (; i < rows; ++i) ProductTile<1, kVectors>(left + i * ldl, ldl, right, ldr, depth, out + i * ldo, ldo);
}

// out (rows, columns) += left (rows, depth) right (depth, columns), columns a multiple of kLanes.
KERNEL void AddProduct(const float* left, int64_t ldl, int64_t rows, const float* right, int64_t ldr, int64_t depth,
                       int64_t columns, float* out, int64_t ldo) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= columns; c += 4 * kLanes) {
    ProductRows<4>(left, ldl, rows, right + c, ldr, depth, out + c, ldo);
  }
  for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
    ProductRows<2>(left, ldl, rows, right + c, ldr, depth, out + c, ldo);
  }
  if (c < columns) ProductRows<1>(left, ldl, rows, right + c, ldr, depth, out + c, ldo);
}

KERNEL int64_t Padded(int64_t num_x) { return (num_x + kLanes - 1) / kLanes * kLanes; }

// Vectors that are arranged already, side by side: out[k * Padded(num_x) + m] = arranged[m * lda + k].
KERNEL void Transpose(const float* arranged, int64_t lda, int64_t num_x, int64_t begin, int64_t end, float* out) {
  const int64_t width = Padded(num_x);
  for (int64_t k = begin; k < end; ++k) {
    float* to = out + k * width;
    for (int64_t m = 0; m < num_x; ++m) to[m] = arranged[m * lda + k];
    for (int64_t m = num_x; m < width; ++m) to[m] = 0;
  }
}

template <Type type>
KERNEL void MultiplyRows(const Matrix& w, Rows list, const float* x, int64_t num_x, float* panel, float* out,
                         int64_t ldo) {
  constexpr int64_t depth = kDepth / kGroup<type>;
  const int64_t groups = Arrangement<type>::Size(w.cols) / kGroup<type>, width = Padded(num_x);
  float* sums = panel + kPanelRows * kDepth;
  memset(sums, 0, list.count * width * sizeof(float));
  for (int64_t begin = 0; begin < groups; begin += depth) {
    const int64_t end = begin + depth < groups ? begin + depth : groups;
    for (int64_t i = 0; i < list.count; ++i) Widen<type>(w, list[i], begin, end, panel + i * kDepth);
    const float* from = x + begin * kGroup<type> * width;
    for (int64_t m = 0; m < width; m += kColumns) {
      const int64_t some = width - m < kColumns ? width - m : kColumns;
      AddProduct(panel, kDepth, list.count, from + m, width, (end - begin) * kGroup<type>, some, sums + m, width);
    }
  }
  for (int64_t m = 0; m < num_x; ++m) {
    for (int64_t i = 0; i < list.count; ++i) out[m * ldo + i] = sums[i * width + m];
  }
}

template <Type type>
KERNEL void MultiplyColumns(const Matrix& w, int64_t column, const float* h, int64_t ldh, int64_t num_x, float* panel,
                            float* out, int64_t ldo) {
  float* sums = panel + kDepth * kColumns;
  const int64_t first = column / kGroup<type>;
  const int64_t last = Arrangement<type>::Size(w.cols) / kGroup<type>;
  const int64_t end = first + kColumns / kGroup<type> < last ? first + kColumns / kGroup<type> : last;
  const int64_t width = (end - first) * kGroup<type>;
  memset(sums, 0, num_x * kColumns * sizeof(float));
  for (int64_t begin = 0; begin < w.rows; begin += kDepth) {
    const int64_t depth = w.rows - begin < kDepth ? w.rows - begin : kDepth;
    for (int64_t i = 0; i < depth; ++i) Widen<type>(w, begin + i, first, end, panel + i * kColumns);
    AddProduct(h + begin, ldh, num_x, panel, kColumns, depth, width, sums, kColumns);
  }
  const int64_t n = w.cols - column < kColumns ? w.cols - column : kColumns;
  for (int64_t m = 0; m < num_x; ++m) Arrangement<type>::Restore(sums + m * kColumns, n, out + m * ldo);
}

// ---- Softmax, and the bandwidth probe

// Cody-Waite reduction to |r| <= ln(2) / 2 and a Taylor polynomial of degree 7: within 2 units in the last place.
INLINE vf Exp(vf x) {
  const vf lowest = Splat(-87.0f);
  const vu under = (vu)(x < lowest);
  x = (vf)(((vu)lowest & under) | ((vu)x & ~under));
  const vf shift = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const vf whole = (x * 1.44269504f + shift) - shift;
  const vf r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  vf y = Splat(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const vf power = (vf)((__builtin_convertvector(whole, vi) + 127) << 23);
  return (vf)((vu)(y * power) & ~under);
}

KERNEL float Exponentiate(float* p, int64_t n, float* max) {
  float largest = p[0];
  for (int64_t i = 1; i < n; ++i) largest = p[i] > largest ? p[i] : largest;
  *max = largest;
  if (largest == -__builtin_inff()) {
    memset(p, 0, n * sizeof(float));
    return 0;
  }
  vf sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf value = Exp(Load<vf>(p + i) - largest);
    Store(p + i, value);
    sum += value;
  }
  if (i < n) {
    float tail[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) tail[l] = i + l < n ? p[i + l] : -__builtin_inff();
    const vf value = Exp(Load<vf>(tail) - largest);
    sum += value;
    Store(tail, value);
    memcpy(p + i, tail, (n - i) * sizeof(float));
  }
  return Sum(sum);
}

KERNEL uint64_t Read(const void* data, int64_t bytes) {
  const uint8_t* from = static_cast<const uint8_t*>(data);
  vu sums[kRowsAtOnce] = {};
  int64_t at = 0;
  for (; at + kRowsAtOnce * kBytes <= bytes; at += kRowsAtOnce * kBytes) {
    __builtin_prefetch(from + at + 4096, 0, 2);
    UNROLL
    for (int r = 0; r < kRowsAtOnce; ++r) sums[r] ^= Load<vu>(from + at + r * kBytes);
  }
  uint32_t lanes[kLanes];
  Store(lanes, sums[0] ^ sums[1] ^ sums[2] ^ sums[3]);
  uint64_t result = 0;
  for (int l = 0; l < kLanes; ++l) result += lanes[l];
  for (; at < bytes; ++at) result += from[at];
  return result;
}

// ---- The table

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

void MultiplyRowsOf(const Matrix& w, Rows rows, const float* x, int64_t num_x, float* panel, float* out, int64_t ldo) {
  const Type type = w.type;
#define CALL(t) MultiplyRows<t>(w, rows, x, num_x, panel, out, ldo)
  DISPATCH(CALL)
#undef CALL
}

void MultiplyColumnsOf(const Matrix& w, int64_t column, const float* h, int64_t ldh, int64_t num_x, float* panel,
                       float* out, int64_t ldo) {
  const Type type = w.type;
#define CALL(t) MultiplyColumns<t>(w, column, h, ldh, num_x, panel, out, ldo)
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

constexpr int64_t kRowsPanel = kPanelRows * (kDepth + kPanelVectors);
constexpr int64_t kColumnsPanel = (kDepth + kPanelVectors) * kColumns;

}  // namespace
}  // namespace ISA

#define NAME_OF(isa) #isa
#define NAME(isa) NAME_OF(isa)

extern const Kernels TABLE;
const Kernels TABLE = {
    NAME(ISA),
    ISA::ArrangedSizeOf,
    ISA::ArrangeFor,
    ISA::RestoreFrom,
    ISA::WidenOf,
    ISA::CombineFor,
    ISA::DotsOf,
    ISA::AccumulateOf,
    ISA::WeightedOf,
    ISA::FeaturesSizeOf,
    ISA::QuantizeFor,
    ISA::ScoresOf,
    ISA::Padded,
    ISA::Transpose,
    ISA::MultiplyRowsOf,
    ISA::MultiplyColumnsOf,
    ISA::kRowsPanel > ISA::kColumnsPanel ? ISA::kRowsPanel : ISA::kColumnsPanel,
    ISA::kColumns,
    ISA::Exponentiate,
    ISA::Read,
};

}  // namespace jsparse
