// Sums of a matrix's rows for many vectors: rows are widened to float32 a panel at a time, which stays in cache while all
// vectors meet it. A part of kernels_body.h.

constexpr int64_t kColumnVectors = 8;
constexpr int64_t kColumns = kColumnVectors * kLanes;
constexpr int64_t kDepth = 256;  // terms of the sums that one panel has
constexpr int kTileX = TILE == 6 ? 6 : 2;  // times four registers of columns

// Groups [begin, end) of a row as float32, times `scale`, in the arrangement of its type.
template <Type type>
INLINE void Widen(const Matrix& w, int64_t row, float scale, int64_t begin, int64_t end, float* out) {
  const uint8_t* from = w.Row(row);
  const vf factor = Splat(scale);
  for (int64_t group = begin; group < end; ++group) {
    const uint8_t* at = from + group * kBytes;
    alignas(kBytes) uint8_t tail[kBytes] = {};
    if ((group + 1) * kGroup<type> > w.cols) {
      memcpy(tail, at, RowBytes(type, w.cols) - group * kBytes);
      at = tail;
    }
    UNROLL
    for (int part = 0; part < Packed<type>::kParts; ++part, out += kLanes) {
      Store(out, Packed<type>::Part(at, part) * factor);
    }
  }
}

template <Type type>
KERNEL void WidenRow(const Matrix& w, int64_t row, float* arranged) {
  const float scale = w.scale ? w.scale[row] : 1.0f;
  Widen<type>(w, row, scale, 0, Arrangement<type>::Size(w.cols) / kGroup<type>, arranged);
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

// A column of every sum is added in the order of the rows, as by Accumulate. The rows' scales are already in h.
template <Type type>
KERNEL void AddColumns(const Matrix& w, Rows rows, int64_t column, const float* h, int64_t ldh, int64_t num_x,
                       float* panel, float* sums, int64_t lds) {
  const int64_t first = column / kGroup<type>;
  const int64_t last = Arrangement<type>::Size(w.cols) / kGroup<type>;
  const int64_t end = first + kColumns / kGroup<type> < last ? first + kColumns / kGroup<type> : last;
  const int64_t width = (end - first) * kGroup<type>;
  for (int64_t begin = 0; begin < rows.count; begin += kDepth) {
    const int64_t depth = rows.count - begin < kDepth ? rows.count - begin : kDepth;
    for (int64_t i = 0; i < depth; ++i) Widen<type>(w, rows[begin + i], 1.0f, first, end, panel + i * kColumns);
    AddProduct(h + begin, ldh, num_x, panel, kColumns, depth, width, sums, lds);
  }
}
