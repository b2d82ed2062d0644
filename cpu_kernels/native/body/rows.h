// Products of a matrix's rows with few vectors, and sums of its rows: each row is read once, from memory. A part of
// kernels_body.h.

// All is fetched for one use (the last argument of a prefetch, 0): a token reads a weight once. What is fetched so has
// little room in the cache, which is why scattered rows are not fetched further ahead.
constexpr int64_t kAhead = 1280;        // bytes, within scattered rows
constexpr int64_t kStreamAhead = 8192;  // where rows follow one another

// The rows of one step, and what to fetch meanwhile: of scattered rows the bytes kAhead further on, and at their end
// the first of the rows that come next; of a stream of rows what lies kStreamAhead further on.
template <int kRows>
struct Cursor {
  const uint8_t* rows[kRows];
  const uint8_t* next[kRows];
  float scale[kRows];
  int64_t turn = 0;  // bytes of the rows before what is fetched is `next`
  bool has_next = true;

  INLINE Cursor(const Matrix& w, const Rows& list, int64_t i, int64_t row_bytes) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = list[i + r];
      rows[r] = w.Row(row);
      scale[r] = w.scale ? w.scale[row] : 1.0f;
    }
    if (!list.list) {
      for (int r = 0; r < kRows; ++r) next[r] = rows[r] + (w.ahead ? w.ahead : kStreamAhead);
      return;
    }
    turn = row_bytes > kAhead ? (row_bytes - kAhead) / kBytes * kBytes : 0;
    has_next = i + 2 * kRows <= list.count;
    for (int r = 0; r < kRows; ++r) next[r] = has_next ? w.Row(list[i + kRows + r]) : rows[r];
  }
};

// Hands the rows to sum.Take, kBytes of each at a time, the last with zeros behind the row's end: nothing past it is read.
template <int kRows, class Sum>
INLINE void Walk(const Cursor<kRows>& at, int64_t row_bytes, Sum& sum) {
  const uint8_t* from[kRows];
  const int64_t bytes = row_bytes / kBytes * kBytes;
  int64_t offset = 0;
  _Pragma("GCC unroll 2")
  for (; offset < at.turn; offset += kBytes) {
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      from[r] = at.rows[r] + offset;
      if (kBytes == kCacheLine || offset % kCacheLine == 0) __builtin_prefetch(from[r] + kAhead, 0, 0);
    }
    sum.Take(from);
  }
  _Pragma("GCC unroll 2")
  for (; offset < bytes; offset += kBytes) {
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      from[r] = at.rows[r] + offset;
      if (at.has_next && (kBytes == kCacheLine || offset % kCacheLine == 0)) {
        __builtin_prefetch(at.next[r] + offset - at.turn, 0, 0);
      }
    }
    sum.Take(from);
  }
  if (offset < row_bytes) {
    alignas(kBytes) uint8_t tail[kRows][kBytes] = {};
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      memcpy(tail[r], at.rows[r] + offset, row_bytes - offset);
      from[r] = tail[r];
    }
    sum.Take(from);
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

  INLINE void Take(const uint8_t* const (&from)[kRows]) {
    UNROLL
    for (int part = 0; part < kParts; ++part) {
      vf value[kNumX];
      UNROLL
      for (int m = 0; m < kNumX; ++m) value[m] = Load<vf>(x + m * ldx + part * kLanes);
      UNROLL
      for (int r = 0; r < kRows; ++r) {
        const vf weight = Packed<type>::Part(from[r], part);
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
    SumAll(sum, sums);
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

// kRows rows times every vector, at most TILE at a time.
template <Type type, int kRows>
KERNEL void TileAll(Cursor<kRows> at, const float* x, int64_t ldx, int64_t num_x, int64_t n, float* out,
                    int64_t ldo) {
  const int64_t tiles = (num_x + TILE - 1) / TILE;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t m = num_x * tile / tiles;
    const float* from = x + m * ldx;
    float* to = out + m * ldo;
    switch (num_x * (tile + 1) / tiles - m) {
#define CASE(k) \
  case k: TileInto<type, kRows, k>(at, from, ldx, n, to, ldo); break
      CASE(1);
      CASE(2);
      CASE(3);
#if TILE == 6
      CASE(4);
      CASE(5);
      CASE(6);
#endif
#undef CASE
    }
    at.has_next = false;  // fetched already
  }
}

template <Type type>
KERNEL void Dots(const Matrix& w, Rows list, const float* x, int64_t ldx, int64_t num_x, float* out, int64_t ldo) {
  int64_t i = 0;
  // One row after another is one sequential stream, which memory likes best; scattered rows want several under way.
  const bool stream = !list.list && !w.ahead && num_x == 1;
  for (; !stream && i + kRowsAtOnce <= list.count; i += kRowsAtOnce) {
    TileAll<type, kRowsAtOnce>(Cursor<kRowsAtOnce>(w, list, i, RowBytes(type, w.cols)), x, ldx, num_x, w.cols, out + i, ldo);
  }
  for (; i < list.count; ++i) TileAll<type, 1>(Cursor<1>(w, list, i, RowBytes(type, w.cols)), x, ldx, num_x, w.cols, out + i, ldo);
}

// Adds kRows rows, each times its coefficient, to a vector in the rows' arrangement.
template <Type type, int kRows>
struct AddTo {
  float* sum;
  vf coefficient[kRows];

  INLINE void Take(const uint8_t* const (&from)[kRows]) {
    UNROLL
    for (int part = 0; part < Packed<type>::kParts; ++part, sum += kLanes) {
      vf total = Load<vf>(sum);
      UNROLL
      for (int r = 0; r < kRows; ++r) total += coefficient[r] * Packed<type>::Part(from[r], part);
      Store(sum, total);
    }
  }
};

template <Type type, int kRows>
INLINE void AddRows(const Matrix& w, const Rows& list, int64_t i, const float* coefficients, float* sum) {
  const Cursor<kRows> at(w, list, i, RowBytes(type, w.cols));
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
        __builtin_prefetch(row + ahead + g * kBytes, 0, 0);
      }
      UNROLL
      for (int part = 0; part < kParts; ++part) {
        const vf value = Packed<type>::Part(row + g * kBytes, part);
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
  constexpr int kRegisters = 2;
  const int64_t block = kRegisters * kBytes, row_bytes = RowBytes(type, w.cols);
  if (row_bytes % block) {
    for (int64_t m = 0; m < num_x; ++m) Accumulate<type>(w, list, p + m * ldp, sums + m * lds);
    return;
  }
  const int64_t tiles = (num_x + TILE - 1) / TILE;
  for (int64_t at = 0; at < row_bytes; at += block) {
    const uint8_t* row = w.Row(list.first) + at;
    float* to = sums + at / kBytes * kGroup<type>;
    for (int64_t tile = 0; tile < tiles; ++tile) {  // of equal size, or nearly
      const int64_t m = num_x * tile / tiles, ahead = m ? 0 : w.ahead;
      const float* from = p + m * ldp;
      float* sum = to + m * lds;
      switch (num_x * (tile + 1) / tiles - m) {
#define CASE(n) \
  case n: WeightedTile<type, n, kRegisters>(row, list.count, w.stride, ahead, from, ldp, sum, lds); break
        CASE(1);
        CASE(2);
        CASE(3);
#if TILE == 6
        CASE(4);
        CASE(5);
        CASE(6);
#endif
#undef CASE
      }
    }
  }
}
