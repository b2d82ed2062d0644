// Registers, element types and the arrangement of vectors. A part of kernels_body.h.

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

INLINE float Max(const vf& v) {
#if LANES == 16
  return _mm512_reduce_max_ps((__m512)v);
#elif LANES == 8
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
#else
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
#endif
}

// sums[i] = the sum of v[i]'s lanes, the four of them together.
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
  for (int i = 0; i < 4; ++i) sums[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
#endif
}

// The same of one, added in the same order.
INLINE float Sum(const vf& v) {
  const vf four[4] = {v, v, v, v};
  float sums[4];
  Sum4(four, sums);
  return sums[0];
}

template <int kRows>
INLINE void SumAll(const vf (&v)[kRows], float (&sums)[kRows]) {
  if constexpr (kRows == 4) {
    Sum4(v, sums);
  } else {
    UNROLL
    for (int r = 0; r < kRows; ++r) sums[r] = Sum(v[r]);
  }
}

// The elements of a and b, one after the other, at even and at odd places; and those of a and b in turns.
#if LANES == 16
INLINE __m512i Counting(int first, int step) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(step)), _mm512_set1_epi32(first));
}
INLINE vf Pick(const vf& a, __m512i places, const vf& b) {
  return (vf)_mm512_permutex2var_ps((__m512)a, places, (__m512)b);
}
INLINE __m512i Turns(int first) {  // places first, first + kLanes, first + 1, ...
  const __m512i pairs = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return _mm512_add_epi32(pairs, _mm512_set1_epi32(first));
}
INLINE vf Evens(const vf& a, const vf& b) { return Pick(a, Counting(0, 2), b); }
INLINE vf Odds(const vf& a, const vf& b) { return Pick(a, Counting(1, 2), b); }
INLINE vf FirstTurns(const vf& a, const vf& b) { return Pick(a, Turns(0), b); }
INLINE vf LastTurns(const vf& a, const vf& b) { return Pick(a, Turns(8), b); }
#elif LANES == 8
INLINE vf InOrder(__m256 halves) { return (vf)_mm256_permute4x64_pd(_mm256_castps_pd(halves), 0xd8); }
INLINE vf Evens(const vf& a, const vf& b) { return InOrder(_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88)); }
INLINE vf Odds(const vf& a, const vf& b) { return InOrder(_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd)); }
template <int kHalf>
INLINE vf Turns(const vf& a, const vf& b) {
  const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  return (vf)_mm256_permute2f128_ps(low, high, kHalf ? 0x31 : 0x20);
}
INLINE vf FirstTurns(const vf& a, const vf& b) { return Turns<0>(a, b); }
INLINE vf LastTurns(const vf& a, const vf& b) { return Turns<1>(a, b); }
#else
INLINE vf Evens(const vf& a, const vf& b) { return vf{a[0], a[2], b[0], b[2]}; }
INLINE vf Odds(const vf& a, const vf& b) { return vf{a[1], a[3], b[1], b[3]}; }
INLINE vf FirstTurns(const vf& a, const vf& b) { return vf{a[0], b[0], a[1], b[1]}; }
INLINE vf LastTurns(const vf& a, const vf& b) { return vf{a[2], b[2], a[3], b[3]}; }
#endif

// Makes of registers in order those that hold every kCount-th element: lane l of register p was element l * kCount + p.
template <int kCount>
INLINE void Deinterleave(vf (&v)[kCount]) {
  if constexpr (kCount > 1) {
    vf evens[kCount / 2], odds[kCount / 2];
    UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      evens[i] = Evens(v[2 * i], v[2 * i + 1]);
      odds[i] = Odds(v[2 * i], v[2 * i + 1]);
    }
    Deinterleave(evens);
    Deinterleave(odds);
    UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      v[2 * i] = evens[i];
      v[2 * i + 1] = odds[i];
    }
  }
}

// The other way.
template <int kCount>
INLINE void Interleave(vf (&v)[kCount]) {
  if constexpr (kCount > 1) {
    vf evens[kCount / 2], odds[kCount / 2];
    UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      evens[i] = v[2 * i];
      odds[i] = v[2 * i + 1];
    }
    Interleave(evens);
    Interleave(odds);
    UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      v[2 * i] = FirstTurns(evens[i], odds[i]);
      v[2 * i + 1] = LastTurns(evens[i], odds[i]);
    }
  }
}

// ---- Element types. A register's worth of packed elements has kParts parts of kLanes elements. Shifts widen within lanes:
// lane l of part p is element l * kParts + p of such an interleaved type. An instruction widens in order: it is element
// p * kLanes + l.

template <Type type>
struct Packed;

template <>
struct Packed<Type::kF32> {
  static constexpr int kParts = 1;
  static constexpr bool kInterleaved = false;
  INLINE static vf Part(const uint8_t* from, int) { return Load<vf>(from); }
};

template <>
struct Packed<Type::kBF16> {
  static constexpr int kParts = 2;
  static constexpr bool kInterleaved = true;
  INLINE static vf Part(const uint8_t* from, int part) {
    const vu raw = Load<vu>(from);
    return (vf)(part ? raw & 0xffff0000u : raw << 16);
  }
};

template <>
struct Packed<Type::kF16> {
  static constexpr int kParts = 2;
#if LANES == 16  // an instruction, where shifts and masks leave a fast memory waiting
  static constexpr bool kInterleaved = false;
  INLINE static vf Part(const uint8_t* from, int part) {
    return (vf)_mm512_cvtph_ps(Load<__m256i>(from + part * (kBytes / 2)));
  }
#else
  static constexpr bool kInterleaved = true;
  INLINE static vf Part(const uint8_t* from, int part) {
    const vu raw = Load<vu>(from), half = part ? raw >> 16 : raw & 0xffffu;
    const vu magnitude = (half & 0x7fffu) << 13;
    const vu exponent = half & 0x7c00u;
    // Subnormals by a subtraction of normal numbers, so that a thread which flushes denormals reads them too.
    const vu subnormal = (vu)((vf)(magnitude + 0x38800000u) - Splat(6.103515625e-5f));
    const vu normal = magnitude + 0x38000000u + ((vu)(exponent == 0x7c00u) & 0x38000000u);
    const vu is_subnormal = (vu)(exponent == 0u);
    return (vf)((subnormal & is_subnormal) | (normal & ~is_subnormal) | ((half & 0x8000u) << 16));
  }
#endif
};

template <>
struct Packed<Type::kI8> {
  static constexpr int kParts = 4;
  // With an instruction that widens bytes as it loads them, they stay in order; without, shifts do it within lanes.
  static constexpr bool kInterleaved = LANES == 4;
  INLINE static vf Part(const uint8_t* from, int part) {
#if LANES == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Load<__m128i>(from + part * kLanes)));
#elif LANES == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + part * kLanes))));
#else
    return __builtin_convertvector((vi)(Load<vu>(from) << (24 - 8 * part)) >> 24, vf);
#endif
  }
};

template <>
struct Packed<Type::kI4> {
  static constexpr int kParts = 8;
  static constexpr bool kInterleaved = true;
  INLINE static vf Part(const uint8_t* from, int part) {
    const vu raw = Load<vu>(from);
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

  // Where an element of a group stands.
  INLINE static constexpr int64_t PlaceOf(int64_t i) {
    return Packed<type>::kInterleaved ? i % kParts * kLanes + i / kParts : i;
  }

  KERNEL static int64_t Size(int64_t n) { return (n + kGroup<type> - 1) / kGroup<type> * kGroup<type>; }

  KERNEL static void Arrange(const float* x, int64_t n, float scale, float* arranged) {
    for (int64_t group = 0; group < n / kGroup<type>; ++group, x += kGroup<type>, arranged += kGroup<type>) {
      vf v[kParts];
      UNROLL
      for (int part = 0; part < kParts; ++part) v[part] = scale * Load<vf>(x + part * kLanes);
      if constexpr (Packed<type>::kInterleaved) Deinterleave(v);
      UNROLL
      for (int part = 0; part < kParts; ++part) Store(arranged + part * kLanes, v[part]);
    }
    const int64_t rest = n % kGroup<type>;
    if (!rest) return;
    memset(arranged, 0, kGroup<type> * sizeof(float));
    for (int64_t i = 0; i < rest; ++i) arranged[PlaceOf(i)] = scale * x[i];
  }

  KERNEL static void Restore(const float* arranged, int64_t n, float* x) {
    for (int64_t group = 0; group < n / kGroup<type>; ++group, x += kGroup<type>, arranged += kGroup<type>) {
      vf v[kParts];
      UNROLL
      for (int part = 0; part < kParts; ++part) v[part] = Load<vf>(arranged + part * kLanes);
      if constexpr (Packed<type>::kInterleaved) Interleave(v);
      UNROLL
      for (int part = 0; part < kParts; ++part) Store(x + part * kLanes, v[part]);
    }
    for (int64_t i = 0; i < n % kGroup<type>; ++i) x[i] = arranged[PlaceOf(i)];
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
