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
  float lane[kLanes];
  Store(lane, v);
  UNROLL
  for (int half = kLanes / 2; half > 0; half /= 2) {
    UNROLL
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
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
    return __builtin_convertvector((vi)((raw ^ 0x88888888u) << (28 - 4 * part)) >> 28, vf);
  }
};

template <Type type>
constexpr int64_t kGroup = kLanes * Packed<type>::kParts;

// The last, incomplete register of a row, with zero bytes behind it: nothing past the row is read.
INLINE vu LoadTail(const uint8_t* row, int64_t begin, int64_t end) {
  alignas(kBytes) uint8_t bytes[kBytes] = {};
  memcpy(bytes, row + begin, end - begin);
  return Load<vu>(bytes);
}

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

template <int kRows>
INLINE void Prefetch(const uint8_t* const* rows, int64_t offset) {
  if (kBytes < kCacheLine && offset % kCacheLine) return;
  UNROLL
  for (int r = 0; r < kRows; ++r) __builtin_prefetch(rows[r] + offset, 0, 2);
}

template <Type type, int kRows, int kNumX>
INLINE void TileStep(const vu (&raw)[kRows], const float* x, int64_t ldx, vf (&total)[kRows][kNumX]) {
  UNROLL
  for (int part = 0; part < Packed<type>::kParts; ++part) {
    vf value[kNumX];
    UNROLL
    for (int m = 0; m < kNumX; ++m) value[m] = Load<vf>(x + m * ldx + part * kLanes);
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      const vf weight = Packed<type>::Part(raw[r], part);
      UNROLL
      for (int m = 0; m < kNumX; ++m) total[r][m] += weight * value[m];
    }
  }
}

// sums[r][m] = row r . x_m. Where there is `next`, its cache lines are fetched on the way.
template <Type type, int kRows, int kNumX>
INLINE void Tile(const uint8_t* const* rows, const uint8_t* const* next, const float* x, int64_t ldx, int64_t n,
                 float (&sums)[kRows][kNumX]) {
  vf total[kRows][kNumX] = {};
  vu raw[kRows];
  const int64_t bytes = n / kGroup<type> * kBytes;
  for (int64_t offset = 0; offset < bytes; offset += kBytes, x += kGroup<type>) {
    if (next) Prefetch<kRows>(next, offset);
    UNROLL
    for (int r = 0; r < kRows; ++r) raw[r] = Load<vu>(rows[r] + offset);
    TileStep<type, kRows, kNumX>(raw, x, ldx, total);
  }
  if (n % kGroup<type>) {
    UNROLL
    for (int r = 0; r < kRows; ++r) raw[r] = LoadTail(rows[r], bytes, RowBytes(type, n));
    TileStep<type, kRows, kNumX>(raw, x, ldx, total);
  }
  UNROLL
  for (int r = 0; r < kRows; ++r) {
    UNROLL
    for (int m = 0; m < kNumX; ++m) sums[r][m] = Sum(total[r][m]);
  }
}

template <Type type, int kRows, int kNumX>
KERNEL void TileInto(const uint8_t* const* rows, const uint8_t* const* next, const float* x, int64_t ldx, int64_t n,
                     const float* scale, float* out, int64_t ldo, bool add) {
  float sums[kRows][kNumX];
  Tile<type, kRows, kNumX>(rows, next, x, ldx, n, sums);
  for (int m = 0; m < kNumX; ++m) {
    float* to = out + m * ldo;
    for (int r = 0; r < kRows; ++r) to[r] = sums[r][m] * scale[r] + (add ? to[r] : 0.0f);
  }
}

// kRows rows times every vector, TILE at a time.
template <Type type, int kRows>
KERNEL void TileAll(const uint8_t* const* rows, const uint8_t* const* next, const float* x, int64_t ldx, int64_t num_x,
                    int64_t n, const float* scale, float* out, int64_t ldo, bool add) {
  int64_t m = 0;
  for (; m + TILE <= num_x; m += TILE) {
    TileInto<type, kRows, TILE>(rows, next, x + m * ldx, ldx, n, scale, out + m * ldo, ldo, add);
    next = nullptr;
  }
  const float* rest = x + m * ldx;
  float* to = out + m * ldo;
  switch (num_x - m) {
    case 1: return TileInto<type, kRows, 1>(rows, next, rest, ldx, n, scale, to, ldo, add);
    case 2: return TileInto<type, kRows, 2>(rows, next, rest, ldx, n, scale, to, ldo, add);
#if TILE > 3
    case 3: return TileInto<type, kRows, 3>(rows, next, rest, ldx, n, scale, to, ldo, add);
    case 4: return TileInto<type, kRows, 4>(rows, next, rest, ldx, n, scale, to, ldo, add);
    case 5: return TileInto<type, kRows, 5>(rows, next, rest, ldx, n, scale, to, ldo, add);
#endif
  }
}

// Calls body(kRowsAtOnce rows at i, the four after them or null) and then body for each row left.
struct Cursor {
  const uint8_t* rows[kRowsAtOnce];
  const uint8_t* following[kRowsAtOnce];
  float scale[kRowsAtOnce];
  const uint8_t* const* next;

  INLINE Cursor(const Matrix& w, const Rows& list, int64_t i, int count) {
    const bool more = i + 2 * kRowsAtOnce <= list.count;
    next = count == kRowsAtOnce && (more || w.ahead) ? following : nullptr;
    for (int r = 0; r < count; ++r) {
      const int64_t row = list[i + r];
      rows[r] = w.Row(row);
      scale[r] = w.scale ? w.scale[row] : 1.0f;
      if (next) following[r] = w.ahead ? rows[r] + w.ahead : w.Row(list[i + kRowsAtOnce + r]);
    }
  }
};

template <Type type>
KERNEL void Dots(const Matrix& w, Rows list, const float* x, int64_t ldx, int64_t num_x, float* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + kRowsAtOnce <= list.count; i += kRowsAtOnce) {
    const Cursor at(w, list, i, kRowsAtOnce);
    TileAll<type, kRowsAtOnce>(at.rows, at.next, x, ldx, num_x, w.cols, at.scale, out + i, ldo, false);
  }
  for (; i < list.count; ++i) {
    const Cursor at(w, list, i, 1);
    TileAll<type, 1>(at.rows, nullptr, x, ldx, num_x, w.cols, at.scale, out + i, ldo, false);
  }
}

template <Type type, int kRows>
INLINE void AddStep(const vu (&raw)[kRows], const vf (&coefficient)[kRows], float* sum) {
  UNROLL
  for (int part = 0; part < Packed<type>::kParts; ++part) {
    vf total = Load<vf>(sum + part * kLanes);
    UNROLL
    for (int r = 0; r < kRows; ++r) total += coefficient[r] * Packed<type>::Part(raw[r], part);
    Store(sum + part * kLanes, total);
  }
}

template <Type type, int kRows>
INLINE void Add(const Cursor& at, const float* coefficients, int64_t n, float* sum) {
  vf coefficient[kRows];
  vu raw[kRows];
  UNROLL
  for (int r = 0; r < kRows; ++r) coefficient[r] = Splat(coefficients[r] * at.scale[r]);
  const int64_t bytes = n / kGroup<type> * kBytes;
  for (int64_t offset = 0; offset < bytes; offset += kBytes, sum += kGroup<type>) {
    if (at.next) Prefetch<kRows>(at.next, offset);
    UNROLL
    for (int r = 0; r < kRows; ++r) raw[r] = Load<vu>(at.rows[r] + offset);
    AddStep<type, kRows>(raw, coefficient, sum);
  }
  if (n % kGroup<type>) {
    UNROLL
    for (int r = 0; r < kRows; ++r) raw[r] = LoadTail(at.rows[r], bytes, RowBytes(type, n));
    AddStep<type, kRows>(raw, coefficient, sum);
  }
}

template <Type type>
KERNEL void Accumulate(const Matrix& w, Rows list, const float* coefficients, float* sum) {
  int64_t i = 0;
  for (; i + kRowsAtOnce <= list.count; i += kRowsAtOnce) {
    Add<type, kRowsAtOnce>(Cursor(w, list, i, kRowsAtOnce), coefficients + i, w.cols, sum);
  }
  for (; i < list.count; ++i) Add<type, 1>(Cursor(w, list, i, 1), coefficients + i, w.cols, sum);
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
INLINE void ScoreStep(const vuh (&raw)[kRows], const int16_t* features, vi (&total)[kRows]) {
  UNROLL
  for (int part = 0; part < Integers<type>::kParts; ++part) {
    const vh value = Load<vh>(features + part * kShorts);
    UNROLL
    for (int r = 0; r < kRows; ++r) total[r] += MultiplyAdd(Integers<type>::Part(raw[r], part), value);
  }
}

template <Type type, int kRows>
INLINE void ScoreRows(const Cursor& at, const int16_t* features, int64_t n, float step, float* out) {
  vf sum[kRows] = {};
  vi total[kRows] = {};
  vuh raw[kRows];
  const int64_t bytes = n / kIntegerGroup<type> * kBytes;
  for (int64_t offset = 0; offset < bytes; offset += kBytes, features += kIntegerGroup<type>) {
    if (at.next) Prefetch<kRows>(at.next, offset);
    UNROLL
    for (int r = 0; r < kRows; ++r) raw[r] = Load<vuh>(at.rows[r] + offset);
    ScoreStep<type, kRows>(raw, features, total);
    if (offset / kBytes % kFlush == kFlush - 1) {
      UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum[r] += __builtin_convertvector(total[r], vf);
        total[r] = vi{};
      }
    }
  }
  if (n % kIntegerGroup<type>) {
    UNROLL
    for (int r = 0; r < kRows; ++r) raw[r] = (vuh)LoadTail(at.rows[r], bytes, RowBytes(type, n));
    ScoreStep<type, kRows>(raw, features, total);
  }
  UNROLL
  for (int r = 0; r < kRows; ++r) {
    out[r] = Sum(sum[r] + __builtin_convertvector(total[r], vf)) * (step * at.scale[r]);
  }
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
      ScoreRows<type, kRowsAtOnce>(Cursor(w, list, i, kRowsAtOnce), features, w.cols, step, out + i);
    }
    for (; i < list.count; ++i) ScoreRows<type, 1>(Cursor(w, list, i, 1), features, w.cols, step, out + i);
  }
};

// ---- Many vectors at once: a panel of weights is widened to float32 once and stays in the second-level cache

constexpr int64_t kPanelDepth = 1024;  // elements of a row
constexpr int64_t kColumnVectors = 8;
constexpr int64_t kColumns = kColumnVectors * kLanes;
constexpr int64_t kColumnDepth = 256;  // rows
constexpr float kOnes[kRowsAtOnce] = {1, 1, 1, 1};

// Groups [begin, end) of a row as float32, scaled, in the arrangement of its type.
template <Type type>
INLINE void Widen(const Matrix& w, int64_t row, int64_t begin, int64_t end, float* out) {
  const uint8_t* from = w.Row(row);
  const vf scale = Splat(w.scale ? w.scale[row] : 1.0f);
  for (int64_t group = begin; group < end; ++group) {
    const bool whole = (group + 1) * kGroup<type> <= w.cols;
    const vu raw = whole ? Load<vu>(from + group * kBytes) : LoadTail(from, group * kBytes, RowBytes(type, w.cols));
    UNROLL
    for (int part = 0; part < Packed<type>::kParts; ++part, out += kLanes) {
      Store(out, Packed<type>::Part(raw, part) * scale);
    }
  }
}

template <Type type>
KERNEL void MultiplyRows(const Matrix& w, Rows list, const float* x, int64_t ldx, int64_t num_x, float* panel,
                         float* out, int64_t ldo) {
  constexpr int64_t depth = kPanelDepth / kGroup<type>;
  const int64_t groups = Arrangement<type>::Size(w.cols) / kGroup<type>;
  for (int64_t begin = 0; begin < groups; begin += depth) {
    const int64_t end = begin + depth < groups ? begin + depth : groups;
    const int64_t n = (end - begin) * kGroup<type>;
    for (int64_t i = 0; i < list.count; ++i) Widen<type>(w, list[i], begin, end, panel + i * n);
    for (int64_t m = 0; m < num_x; m += TILE) {
      const int64_t some = num_x - m < TILE ? num_x - m : TILE;
      const float* from = x + m * ldx + begin * kGroup<type>;
      float* to = out + m * ldo;
      int64_t i = 0;
      for (; i < list.count; i += kRowsAtOnce) {
        const uint8_t* rows[kRowsAtOnce];
        for (int r = 0; r < kRowsAtOnce; ++r) rows[r] = reinterpret_cast<const uint8_t*>(panel + (i + r) * n);
        if (i + kRowsAtOnce > list.count) break;
        TileAll<Type::kF32, kRowsAtOnce>(rows, nullptr, from, ldx, some, n, kOnes, to + i, ldo, begin > 0);
      }
      for (; i < list.count; ++i) {
        const uint8_t* row = reinterpret_cast<const uint8_t*>(panel + i * n);
        TileAll<Type::kF32, 1>(&row, nullptr, from, ldx, some, n, kOnes, to + i, ldo, begin > 0);
      }
    }
  }
}

// out[m][c] += sum over rows of h[m][row] * panel[row][c], for kNumX vectors and four registers of columns.
template <int kNumX>
KERNEL void ColumnTile(const float* panel, int64_t depth, const float* h, int64_t ldh, float* out) {
  constexpr int kVectors = 4;
  vf total[kNumX][kVectors];
  UNROLL
  for (int m = 0; m < kNumX; ++m) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) total[m][v] = Load<vf>(out + m * kColumns + v * kLanes);
  }
  for (int64_t row = 0; row < depth; ++row, panel += kColumns) {
    vf weight[kVectors];
    UNROLL
    for (int v = 0; v < kVectors; ++v) weight[v] = Load<vf>(panel + v * kLanes);
    UNROLL
    for (int m = 0; m < kNumX; ++m) {
      const vf value = Splat(h[m * ldh + row]);
      UNROLL
      for (int v = 0; v < kVectors; ++v) total[m][v] += value * weight[v];
    }
  }
  UNROLL
  for (int m = 0; m < kNumX; ++m) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) Store(out + m * kColumns + v * kLanes, total[m][v]);
  }
}

template <Type type>
KERNEL void MultiplyColumns(const Matrix& w, int64_t column, const float* h, int64_t ldh, int64_t num_x, float* panel,
                            float* out, int64_t ldo) {
  constexpr int kNumX = TILE == 6 ? 6 : 2;  // times four registers of columns
  float* sums = panel + kColumnDepth * kColumns;
  const int64_t first = column / kGroup<type>;
  const int64_t last = Arrangement<type>::Size(w.cols) / kGroup<type>;
  const int64_t end = first + kColumns / kGroup<type> < last ? first + kColumns / kGroup<type> : last;
  memset(sums, 0, num_x * kColumns * sizeof(float));
  memset(panel, 0, kColumnDepth * kColumns * sizeof(float));
  for (int64_t begin = 0; begin < w.rows; begin += kColumnDepth) {
    const int64_t depth = w.rows - begin < kColumnDepth ? w.rows - begin : kColumnDepth;
    for (int64_t i = 0; i < depth; ++i) Widen<type>(w, begin + i, first, end, panel + i * kColumns);
    for (int64_t v = 0; v < kColumnVectors; v += 4) {
      int64_t m = 0;
      for (; m + kNumX <= num_x; m += kNumX) {
        ColumnTile<kNumX>(panel + v * kLanes, depth, h + m * ldh + begin, ldh, sums + m * kColumns + v * kLanes);
      }
      for (; m < num_x; ++m) {
        ColumnTile<1>(panel + v * kLanes, depth, h + m * ldh + begin, ldh, sums + m * kColumns + v * kLanes);
      }
    }
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

void MultiplyRowsOf(const Matrix& w, Rows rows, const float* x, int64_t ldx, int64_t num_x, float* panel, float* out,
                    int64_t ldo) {
  const Type type = w.type;
#define CALL(t) MultiplyRows<t>(w, rows, x, ldx, num_x, panel, out, ldo)
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

constexpr int64_t kRowsPanel = kPanelRows * kPanelDepth;
constexpr int64_t kColumnsPanel = (kColumnDepth + kPanelVectors) * kColumns;

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
    ISA::CombineFor,
    ISA::DotsOf,
    ISA::AccumulateOf,
    ISA::FeaturesSizeOf,
    ISA::QuantizeFor,
    ISA::ScoresOf,
    ISA::MultiplyRowsOf,
    ISA::MultiplyColumnsOf,
    ISA::kRowsPanel > ISA::kColumnsPanel ? ISA::kRowsPanel : ISA::kColumnsPanel,
    ISA::kColumns,
    ISA::Exponentiate,
    ISA::Read,
};

}  // namespace jsparse
