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

// Products of kRows rows with kNumX vectors. A row and a vector have one register of sums, to which their terms are added
// in the row's order, however many rows and vectors there are: the result of a vector does not depend on its company.
template <Type type, int kRows, int kNumX>
struct DotSum {
  static constexpr int kParts = Packed<type>::kParts;

  const float* x;
  int64_t ldx;
  vf total[kRows][kNumX] = {};

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
        for (int m = 0; m < kNumX; ++m) total[r][m] += weight * value[m];
      }
    }
    x += kGroup<type>;
  }

  // sums[r] = the product of row r with vector m.
  INLINE void Finish(int m, float (&sums)[kRows]) const {
    vf sum[kRows];
    UNROLL
    for (int r = 0; r < kRows; ++r) sum[r] = total[r][m];
    SumAll(sum, sums);
  }
};

static_assert(TILE == 3 || TILE == 6, "ForTiles has these cases");

// Runs visit.Tile<count>(first) for num_x vectors in tiles of equal size, or nearly, and at most TILE.
template <class Visit>
INLINE void ForTiles(int64_t num_x, Visit& visit) {
  const int64_t tiles = (num_x + TILE - 1) / TILE;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = num_x * tile / tiles;
    switch (num_x * (tile + 1) / tiles - first) {
      case 1: visit.template Tile<1>(first); break;
      case 2: visit.template Tile<2>(first); break;
      case 3: visit.template Tile<3>(first); break;
#if TILE == 6
      case 4: visit.template Tile<4>(first); break;
      case 5: visit.template Tile<5>(first); break;
      case 6: visit.template Tile<6>(first); break;
#endif
    }
  }
}

// kRows rows times vectors.
template <Type type, int kRows>
struct DotRows {
  Cursor<kRows> at;
  int64_t row_bytes;
  const float* x;
  int64_t ldx;
  float* out;
  int64_t ldo;

  template <int kNumX>
  INLINE void Tile(int64_t first) {
    DotSum<type, kRows, kNumX> sum(x + first * ldx, ldx);
    Walk(at, row_bytes, sum);
    UNROLL
    for (int m = 0; m < kNumX; ++m) {
      float* to = out + (first + m) * ldo;
      float sums[kRows];
      sum.Finish(m, sums);
      UNROLL
      for (int r = 0; r < kRows; ++r) to[r] = sums[r] * at.scale[r];
    }
    at.has_next = false;  // fetched already
  }
};

template <Type type, int kRows>
INLINE void DotTiles(const Matrix& w, const Rows& list, int64_t i, const float* x, int64_t ldx, int64_t num_x,
                     float* out, int64_t ldo) {
  const int64_t row_bytes = RowBytes(type, w.cols);
  DotRows<type, kRows> rows{Cursor<kRows>(w, list, i, row_bytes), row_bytes, x, ldx, out + i, ldo};
  ForTiles(num_x, rows);
}

template <Type type>
KERNEL void Dots(const Matrix& w, Rows list, const float* x, int64_t ldx, int64_t num_x, float* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + kRowsAtOnce <= list.count; i += kRowsAtOnce) {
    DotTiles<type, kRowsAtOnce>(w, list, i, x, ldx, num_x, out, ldo);
  }
  for (; i < list.count; ++i) DotTiles<type, 1>(w, list, i, x, ldx, num_x, out, ldo);
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

// sums[x] += sum over rows of p[x][row] * row, for kRegisters registers of the rows.
template <Type type, int kRegisters>
struct WeightedColumns {
  static constexpr int kParts = Packed<type>::kParts;

  const Matrix& w;
  const Rows& list;
  int64_t at;  // bytes before them in a row
  const float* p;
  int64_t ldp;
  float* sums;
  int64_t lds;

  template <int kNumX>
  INLINE void Tile(int64_t first) {
    const int64_t ahead = first ? 0 : w.ahead;  // fetched once
    const uint8_t* row = w.Row(list.first) + at;
    const float* from = p + first * ldp;
    float* to = sums + first * lds + at / kBytes * kGroup<type>;
    vf total[kNumX][kRegisters * kParts];
    UNROLL
    for (int m = 0; m < kNumX; ++m) {
      UNROLL
      for (int v = 0; v < kRegisters * kParts; ++v) total[m][v] = Load<vf>(to + m * lds + v * kLanes);
    }
    for (int64_t i = 0; i < list.count; ++i, row += w.stride) {
      vf weight[kNumX];
      UNROLL
      for (int m = 0; m < kNumX; ++m) weight[m] = Splat(from[m * ldp + i]);
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
      for (int v = 0; v < kRegisters * kParts; ++v) Store(to + m * lds + v * kLanes, total[m][v]);
    }
  }
};

template <Type type>
KERNEL void Weighted(const Matrix& w, Rows list, const float* p, int64_t ldp, int64_t num_x, float* sums,
                     int64_t lds) {
  constexpr int kRegisters = 2;
  const int64_t block = kRegisters * kBytes, row_bytes = RowBytes(type, w.cols);
  if (row_bytes % block) {
    for (int64_t m = 0; m < num_x; ++m) Accumulate<type>(w, list, p + m * ldp, sums + m * lds);
    return;
  }
  for (int64_t at = 0; at < row_bytes; at += block) {
    WeightedColumns<type, kRegisters> columns{w, list, at, p, ldp, sums, lds};
    ForTiles(num_x, columns);
  }
}
