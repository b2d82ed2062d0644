// Products with many vectors: weights are widened to float32 a panel at a time, which stays in cache while all meet it.
// A part of kernels_body.h.

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
    const uint8_t* at = from + group * kBytes;
    alignas(kBytes) uint8_t tail[kBytes] = {};
    if ((group + 1) * kGroup<type> > w.cols) {
      memcpy(tail, at, RowBytes(type, w.cols) - group * kBytes);
      at = tail;
    }
    UNROLL
    for (int part = 0; part < Packed<type>::kParts; ++part, out += kLanes) {
      Store(out, Packed<type>::Part(at, part) * scale);
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
