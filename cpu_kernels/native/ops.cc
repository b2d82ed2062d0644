#include "ops.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace jsparse {

namespace {

// Sums over neurons are taken in this many parts, whatever the number of threads, and the parts in order.
constexpr int64_t kSlots = 16;
constexpr int64_t kChunkRows = kPanelRows;  // rows of a matrix a thread takes at a time
constexpr int64_t kFew = 8;           // vectors that a pass over the rows takes without widening them first
constexpr int64_t kDownRows = 32;     // rows that stay in cache while several vectors take them
constexpr int64_t kSplit = 64;        // slots of a KV cache a thread takes at a time
constexpr int64_t kSlotsAtOnce = 4;   // of a KV cache, for one head after another; or more, of at most so many bytes:
constexpr int64_t kBlockBytes = 1 << 14;
constexpr int64_t kReduceColumns = 1024;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t Bytes(const Matrix& w) { return w.rows * w.stride; }
int64_t Bytes(const Ffn& ffn) { return Bytes(ffn.gate) + Bytes(ffn.up) + Bytes(ffn.down_t); }

// x arranged for the types of several matrices, each type once; many vectors stand side by side.
class Arranged {
 public:
  Arranged(const Context& context, Arena& arena, const float* x, int64_t num_x, int64_t n)
      : kernels_(context.kernels), arena_(arena), x_(x), num_x_(num_x), n_(n) {}

  struct View {
    const float* x;
    int64_t stride;  // from one vector to the next, of few
  };

  // To be called before the phases run: for many vectors the arranging itself becomes two of them.
  View For(Type type, Phases& phases) {
    View& view = views_[static_cast<int>(type)];
    if (view.x) return view;
    const int64_t size = kernels_.arranged_size(type, n_);
    float* rows = arena_.Take<float>(num_x_ * size);
    view = {rows, size};
    const auto arrange = [this, type, size, rows](int64_t m) {
      kernels_.arrange(type, x_ + m * n_, n_, 1.0f, rows + m * size);
    };
    if (num_x_ <= kFew) {
      for (int64_t m = 0; m < num_x_; ++m) arrange(m);
      return view;
    }
    float* columns = arena_.Take<float>(kernels_.padded(num_x_) * size);
    view.x = columns;
    phases.Add(num_x_, arrange);
    phases.Add(CeilDiv(size, kChunkRows), [this, size, rows, columns](int64_t chunk) {
      const int64_t begin = chunk * kChunkRows;
      kernels_.transpose(rows, size, num_x_, begin, std::min(size, begin + kChunkRows), columns);
    });
    return view;
  }

 private:
  const Kernels& kernels_;
  Arena& arena_;
  const float* x_;
  const int64_t num_x_, n_;
  View views_[5] = {};
};

// The rows of several matrices in chunks.
struct RowChunks {
  explicit RowChunks(const std::vector<Matrix>& matrices) : matrices(matrices) {
    for (const Matrix& matrix : matrices) total += CeilDiv(matrix.rows, kChunkRows);
  }

  // Which matrix chunk i belongs to, and its rows there.
  std::pair<size_t, Rows> operator[](int64_t i) const {
    size_t which = 0;
    for (; i >= CeilDiv(matrices[which].rows, kChunkRows); ++which) i -= CeilDiv(matrices[which].rows, kChunkRows);
    const int64_t first = i * kChunkRows;
    return {which, {nullptr, first, std::min(kChunkRows, matrices[which].rows - first)}};
  }

  const std::vector<Matrix>& matrices;
  int64_t total = 0;
};

// The product of some rows with num_x vectors, the way that suits their number.
void Multiply(const Kernels& kernels, const Matrix& w, Rows rows, Arranged::View x, int64_t num_x, float* out,
              int64_t ldo) {
  if (num_x <= kFew) return kernels.dots(w, rows, x.x, x.stride, num_x, out, ldo);
  float* panel = Arena::OfChunk().Take<float>(kernels.panel_size);
  kernels.multiply_rows(w, rows, x.x, num_x, panel, out, ldo);
}

void LinearBlock(const Context& context, const float* x, int64_t num_x, const std::vector<Matrix>& weights,
                 const std::vector<float*>& outs) {
  Arena& arena = Arena::OfCall();
  arena.Begin();
  Phases phases;
  Arranged arranged(context, arena, x, num_x, weights[0].cols);
  std::vector<Arranged::View> views;
  for (const Matrix& w : weights) views.push_back(arranged.For(w.type, phases));
  const RowChunks chunks(weights);
  phases.Add(chunks.total, [&](int64_t chunk) {
    Arena::OfChunk().Begin();
    const auto [which, rows] = chunks[chunk];
    const Matrix& w = weights[which];
    Multiply(context.kernels, w, rows, views[which], num_x, outs[which] + rows.first, w.rows);
  });
  int64_t bytes = 0;
  for (const Matrix& w : weights) bytes += Bytes(w);
  phases.Run(context.pool, bytes * CeilDiv(num_x, kFew));
}

float Phi(const FfnSpec& spec, float gate, float threshold) {
  switch (spec.activation) {
    case Activation::kRelu: return gate > threshold ? gate : 0.0f;
    case Activation::kRelu2: return gate > threshold ? gate * gate : 0.0f;
    case Activation::kSilu: return gate / (1.0f + std::exp(-gate));
  }
  return 0;
}

float Psi(const FfnSpec& spec, float up) { return spec.up == UpActivation::kRelu ? std::max(up, 0.0f) : up; }
bool HasUp(const FfnSpec& spec) { return spec.up != UpActivation::kNone; }

// hidden = phi(hidden) * psi(up) of n neurons that follow one another.
void Activate(const FfnSpec& spec, const float* threshold, int64_t n, const float* up, float* hidden) {
  for (int64_t i = 0; i < n; ++i) hidden[i] = Phi(spec, hidden[i], threshold[i]);
  for (int64_t i = 0; i < n && HasUp(spec); ++i) hidden[i] *= Psi(spec, up[i]);
}

// Sums over neurons by slot: slot s of token m is accumulated at Slot(s, m), then the slots are added in order.
class SlotSums {
 public:
  SlotSums(const Context& context, Arena& arena, const Matrix& down_t, int64_t num_x)
      : kernels_(context.kernels), down_t_(down_t), num_x_(num_x) {
    size_ = kernels_.arranged_size(down_t.type, down_t.cols);
    sums_ = arena.Take<float>(kSlots * num_x * size_);
  }

  // The last slots are a third of the first: what threads do before they wait for one another is short.
  Rows NeuronsOf(int64_t slot) const {
    const auto begin = [rows = down_t_.rows](int64_t s) { return rows * s * (3 * kSlots - s) / (2 * kSlots * kSlots); };
    return {nullptr, begin(slot), begin(slot + 1) - begin(slot)};
  }

  void Clear(int64_t slot) { std::memset(Of(slot, 0), 0, num_x_ * size_ * sizeof(float)); }
  float* Of(int64_t slot, int64_t m) { return sums_ + (slot * num_x_ + m) * size_; }

  void AddPhase(Phases& phases, float* y) {
    const int64_t pieces = CeilDiv(down_t_.cols, kReduceColumns);
    phases.Add(num_x_ * pieces, [this, pieces, y](int64_t chunk) {
      const int64_t m = chunk / pieces, begin = chunk % pieces * kReduceColumns;
      const int64_t n = std::min(kReduceColumns, down_t_.cols - begin);
      kernels_.combine(down_t_.type, Of(0, m) + begin, kSlots, num_x_ * size_, n, y + m * down_t_.cols + begin);
    });
  }

 private:
  const Kernels& kernels_;
  const Matrix& down_t_;
  const int64_t num_x_;
  int64_t size_;
  float* sums_;
};

void DenseFfnFew(const Context& context, const float* x, int64_t num_x, const Ffn& ffn, const FfnSpec& spec, float* y) {
  const Kernels& kernels = context.kernels;
  Arena& arena = Arena::OfCall();
  arena.Begin();
  Phases phases;
  Arranged arranged(context, arena, x, num_x, ffn.gate.cols);
  const auto gate_x = arranged.For(ffn.gate.type, phases);
  const auto up_x = HasUp(spec) ? arranged.For(ffn.up.type, phases) : gate_x;
  SlotSums sums(context, arena, ffn.down_t, num_x);
  phases.Add(kSlots, [&](int64_t slot) {
    sums.Clear(slot);
    const Rows neurons = sums.NeuronsOf(slot);
    Arena& own = Arena::OfChunk();
    own.Begin();
    float* hidden = own.Take<float>(num_x * neurons.count);
    float* up = own.Take<float>(num_x * neurons.count);
    kernels.dots(ffn.gate, neurons, gate_x.x, gate_x.stride, num_x, hidden, neurons.count);
    if (HasUp(spec)) kernels.dots(ffn.up, neurons, up_x.x, up_x.stride, num_x, up, neurons.count);
    for (int64_t m = 0; m < num_x; ++m) {
      Activate(spec, ffn.threshold + neurons.first, neurons.count, up + m * neurons.count, hidden + m * neurons.count);
    }
    const int64_t step = num_x == 1 ? std::max<int64_t>(1, neurons.count) : kDownRows;
    for (int64_t i = 0; i < neurons.count; i += step) {
      const Rows rows{nullptr, neurons.first + i, std::min(step, neurons.count - i)};
      for (int64_t m = 0; m < num_x; ++m) {
        kernels.accumulate(ffn.down_t, rows, hidden + m * neurons.count + i, sums.Of(slot, m));
      }
    }
  });
  sums.AddPhase(phases, y);
  phases.Run(context.pool, Bytes(ffn));
}

void DenseFfnBlock(const Context& context, const float* x, int64_t num_x, const Ffn& ffn, const FfnSpec& spec,
                   float* y) {
  const Kernels& kernels = context.kernels;
  Arena& arena = Arena::OfCall();
  arena.Begin();
  Phases phases;
  const int64_t num_neurons = ffn.gate.rows, width = ffn.down_t.cols;
  Arranged arranged(context, arena, x, num_x, width);
  const auto gate_x = arranged.For(ffn.gate.type, phases);
  const auto up_x = HasUp(spec) ? arranged.For(ffn.up.type, phases) : gate_x;
  float* hidden = arena.Take<float>(num_x * num_neurons);
  phases.Add(CeilDiv(num_neurons, kChunkRows), [&](int64_t chunk) {
    Arena& own = Arena::OfChunk();
    own.Begin();
    const int64_t first = chunk * kChunkRows;
    const Rows rows{nullptr, first, std::min(kChunkRows, num_neurons - first)};
    float* up = own.Take<float>(num_x * rows.count);
    Multiply(kernels, ffn.gate, rows, gate_x, num_x, hidden + first, num_neurons);
    if (HasUp(spec)) Multiply(kernels, ffn.up, rows, up_x, num_x, up, rows.count);
    for (int64_t m = 0; m < num_x; ++m) {
      Activate(spec, ffn.threshold + first, rows.count, up + m * rows.count, hidden + m * num_neurons + first);
    }
  });
  phases.Add(CeilDiv(width, kernels.column_block), [&](int64_t chunk) {
    Arena& own = Arena::OfChunk();
    own.Begin();
    const int64_t column = chunk * kernels.column_block;
    float* panel = own.Take<float>(kernels.panel_size);
    kernels.multiply_columns(ffn.down_t, column, hidden, num_neurons, num_x, panel, y + column, width);
  });
  phases.Run(context.pool, Bytes(ffn) * CeilDiv(num_x, kFew));
}

// The predictor's features of every token, as the scores' kernel wants them: whole numbers where b has few bits.
class Features {
 public:
  Features(const Context& context, Arena& arena, const Predictor& predictor, int64_t num_x)
      : kernels_(context.kernels), predictor_(predictor), num_x_(num_x), rank_(predictor.a.rows) {
    values_ = arena.Take<float>(num_x * rank_);
    low_bit_ = predictor.b.type == Type::kI8 || predictor.b.type == Type::kI4;
    size_ = low_bit_ ? kernels_.features_size(predictor.b.type, rank_) : kernels_.arranged_size(predictor.b.type, rank_);
    arranged_ = arena.Take<float>(low_bit_ ? 0 : num_x * size_);
    integers_ = arena.Take<int16_t>(low_bit_ ? num_x * size_ : 0);
    steps_ = arena.Take<float>(num_x);
  }

  void AddPhases(Phases& phases, Arranged::View x) {
    phases.Add(CeilDiv(rank_, kChunkRows), [this, x](int64_t chunk) {
      const int64_t first = chunk * kChunkRows;
      const Rows rows{nullptr, first, std::min(kChunkRows, rank_ - first)};
      kernels_.dots(predictor_.a, rows, x.x, x.stride, num_x_, values_ + first, rank_);
    });
    phases.Add(num_x_, [this](int64_t m) {
      const float* from = values_ + m * rank_;
      if (low_bit_) {
        steps_[m] = kernels_.quantize(predictor_.b.type, from, rank_, integers_ + m * size_);
      } else {
        kernels_.arrange(predictor_.b.type, from, rank_, 1.0f, arranged_ + m * size_);
      }
    });
  }

  // The list of those neurons whose score is positive; returns how many.
  int64_t Predicted(int64_t m, Rows neurons, float* scores, int32_t* list) const {
    if (low_bit_) {
      kernels_.scores(predictor_.b, neurons, integers_ + m * size_, steps_[m], scores);
    } else {
      kernels_.dots(predictor_.b, neurons, arranged_ + m * size_, size_, 1, scores, neurons.count);
    }
    int64_t count = 0;
    for (int64_t i = 0; i < neurons.count; ++i) {
      list[count] = static_cast<int32_t>(neurons.first + i);
      count += scores[i] + predictor_.bias[neurons.first + i] > 0;
    }
    return count;
  }

 private:
  const Kernels& kernels_;
  const Predictor& predictor_;
  const int64_t num_x_, rank_;
  bool low_bit_;
  int64_t size_;
  float* values_;
  float* arranged_;
  int16_t* integers_;
  float* steps_;
};

// Keeps the neurons with a nonzero value, in order; returns how many.
int64_t Compact(int64_t count, int32_t* list, float* value) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    list[kept] = list[i];
    value[kept] = value[i];
    kept += value[i] != 0;
  }
  return kept;
}

void SparseFfnFew(const Context& context, const float* x, int64_t num_x, const Ffn& ffn, const Predictor& predictor,
                  const FfnSpec& spec, float* y, int32_t* counts) {
  const Kernels& kernels = context.kernels;
  Arena& arena = Arena::OfCall();
  arena.Begin();
  Phases phases;
  Arranged arranged(context, arena, x, num_x, ffn.gate.cols);
  const auto gate_x = arranged.For(ffn.gate.type, phases);
  const auto up_x = HasUp(spec) ? arranged.For(ffn.up.type, phases) : gate_x;
  Features features(context, arena, predictor, num_x);
  features.AddPhases(phases, arranged.For(predictor.a.type, phases));
  SlotSums sums(context, arena, ffn.down_t, num_x);
  int32_t* slot_counts = arena.Take<int32_t>(kSlots * num_x * 2);
  phases.Add(kSlots, [&](int64_t slot) {
    sums.Clear(slot);
    const Rows neurons = sums.NeuronsOf(slot);
    Arena& own = Arena::OfChunk();
    own.Begin();
    int32_t* list = own.Take<int32_t>(neurons.count);
    float* hidden = own.Take<float>(neurons.count);
    float* up = own.Take<float>(neurons.count);
    for (int64_t m = 0; m < num_x; ++m) {
      const int64_t predicted = features.Predicted(m, neurons, up, list);
      kernels.dots(ffn.gate, {list, 0, predicted}, gate_x.x + m * gate_x.stride, gate_x.stride, 1, hidden, predicted);
      for (int64_t i = 0; i < predicted; ++i) hidden[i] = Phi(spec, hidden[i], ffn.threshold[list[i]]);
      int64_t active = spec.parallel && HasUp(spec) ? predicted : Compact(predicted, list, hidden);
      if (HasUp(spec)) {
        kernels.dots(ffn.up, {list, 0, active}, up_x.x + m * up_x.stride, up_x.stride, 1, up, active);
        for (int64_t i = 0; i < active; ++i) hidden[i] *= Psi(spec, up[i]);
        active = Compact(active, list, hidden);
      }
      kernels.accumulate(ffn.down_t, {list, 0, active}, hidden, sums.Of(slot, m));
      int32_t* count = slot_counts + (slot * num_x + m) * 2;
      count[0] = static_cast<int32_t>(predicted);
      count[1] = static_cast<int32_t>(active);
    }
  });
  sums.AddPhase(phases, y);
  // A share of the FFN's rows that is typical of what a predictor lets through.
  phases.Run(context.pool, Bytes(predictor.a) + Bytes(predictor.b) + num_x * Bytes(ffn) / 8);
  for (int64_t i = 0; i < num_x * 2; ++i) {
    counts[i] = 0;
    for (int64_t slot = 0; slot < kSlots; ++slot) counts[i] += slot_counts[slot * num_x * 2 + i];
  }
}

uint16_t ToBF16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

uint16_t ToF16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: in units of 2^-24, rounded to even by the addition
    const float shifted = std::fabs(value) + 0.5f;
    uint32_t units;
    std::memcpy(&units, &shifted, 4);
    return static_cast<uint16_t>(sign | (units - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13));
}

void StoreAs(Type type, const float* from, int64_t n, void* to) {
  if (type == Type::kF32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; ++i) halves[i] = type == Type::kBF16 ? ToBF16(from[i]) : ToF16(from[i]);
}

}  // namespace

void TakeRows(const Context& context, const Matrix& w, const int32_t* indices, int64_t count, float* out) {
  Phases phases;
  phases.Add(count, [&](int64_t i) {
    float* to = out + i * w.cols;
    if (indices[i] < 0 || indices[i] >= w.rows) {
      std::memset(to, 0, w.cols * sizeof(float));
      return;
    }
    Arena::OfChunk().Begin();
    float* arranged = Arena::OfChunk().Take<float>(context.kernels.arranged_size(w.type, w.cols));
    context.kernels.widen(w, indices[i], arranged);
    context.kernels.restore(w.type, arranged, w.cols, to);
  });
  phases.Run(context.pool, count * w.stride);
}

void Linear(const Context& context, const float* x, int64_t num_x, const std::vector<Matrix>& weights,
            const std::vector<float*>& outs) {
  for (int64_t m = 0; m < num_x; m += kPanelVectors) {
    std::vector<float*> some;
    for (size_t i = 0; i < outs.size(); ++i) some.push_back(outs[i] + m * weights[i].rows);
    LinearBlock(context, x + m * weights[0].cols, std::min(kPanelVectors, num_x - m), weights, some);
  }
}

void DenseFfn(const Context& context, const float* x, int64_t num_x, const Ffn& ffn, const FfnSpec& spec, float* y) {
  const int64_t width = ffn.gate.cols;
  if (num_x <= kFew) return DenseFfnFew(context, x, num_x, ffn, spec, y);
  for (int64_t m = 0; m < num_x; m += kPanelVectors) {
    DenseFfnBlock(context, x + m * width, std::min(kPanelVectors, num_x - m), ffn, spec, y + m * width);
  }
}

void SparseFfn(const Context& context, const float* x, int64_t num_x, const Ffn& ffn, const Predictor& predictor,
               const FfnSpec& spec, float* y, int32_t* counts) {
  const int64_t width = ffn.gate.cols;
  for (int64_t m = 0; m < num_x; m += kFew) {
    const int64_t some = std::min(kFew, num_x - m);
    SparseFfnFew(context, x + m * width, some, ffn, predictor, spec, y + m * width, counts + m * 2);
  }
}

void Attend(const Context& context, const Attention& shape, const float* q, const float* k, const float* v,
            const int32_t* position, void* keys, void* values, float* out) {
  const Kernels& kernels = context.kernels;
  const Type type = shape.cache_type;
  const int64_t head = shape.head_dim, group = shape.num_heads / shape.num_kv_heads;
  const int64_t head_bytes = RowBytes(type, head), slot_bytes = shape.num_kv_heads * head_bytes;
  const int64_t size = kernels.arranged_size(type, head), splits = CeilDiv(shape.slots, kSplit);
  Arena& arena = Arena::OfCall();
  arena.Begin();
  float* queries = arena.Take<float>(shape.batch * shape.num_heads * size);
  // Of every split and head: largest score, sum of exponentials, weighted sum of values.
  const int64_t partial_size = size + 2;
  float* partials = arena.Take<float>(shape.batch * splits * shape.num_heads * partial_size);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t slot = position[b] % shape.slots, at = (b * shape.slots + slot) * slot_bytes;
    const int64_t row = shape.num_kv_heads * head;
    StoreAs(type, k + b * row, row, static_cast<uint8_t*>(keys) + at);
    StoreAs(type, v + b * row, row, static_cast<uint8_t*>(values) + at);
    for (int64_t h = 0; h < shape.num_heads; ++h) {
      const int64_t i = b * shape.num_heads + h;
      kernels.arrange(type, q + i * head, head, shape.scale, queries + i * size);
    }
  }
  // Slots beyond the position hold nothing yet.
  const auto filled = [&](int64_t b) { return std::min<int64_t>(shape.slots, int64_t{position[b]} + 1); };
  Phases phases;
  phases.Add(shape.batch * splits, [&](int64_t chunk) {
    const int64_t b = chunk / splits, first = chunk % splits * kSplit;
    const int64_t count = std::min(kSplit, filled(b) - first);
    float* partial = partials + chunk * shape.num_heads * partial_size;
    if (count <= 0) return;
    Arena& own = Arena::OfChunk();
    own.Begin();
    float* scores = own.Take<float>(shape.num_heads * count);
    // A few slots of all heads at a time: the cache is read front to back, and during the last of them the `next` begins.
    const int64_t at_once = std::max(kSlotsAtOnce, kBlockBytes / slot_bytes);
    const auto for_blocks = [&](const void* cache, const void* next, auto body) {
      const int64_t to_next = reinterpret_cast<intptr_t>(next) - reinterpret_cast<intptr_t>(cache);
      for (int64_t i = 0; i < count; i += at_once) {
        const Rows rows{nullptr, first + i, std::min(at_once, count - i)};
        const int64_t ahead = i + at_once < count ? at_once * slot_bytes : next ? to_next - i * slot_bytes : 0;
        for (int64_t kv = 0; kv < shape.num_kv_heads; ++kv) {
          const uint8_t* data = static_cast<const uint8_t*>(cache) + b * shape.slots * slot_bytes + kv * head_bytes;
          body(Matrix{type, data, nullptr, shape.slots, head, slot_bytes, ahead}, rows, i, kv * group);
        }
      }
    };
    for_blocks(keys, values, [&](const Matrix& side, Rows rows, int64_t i, int64_t h) {
      kernels.dots(side, rows, queries + (b * shape.num_heads + h) * size, size, group, scores + h * count + i, count);
    });
    for (int64_t h = 0; h < shape.num_heads; ++h) {
      float* p = scores + h * count;
      for (int64_t i = 0; i < count && shape.window < shape.slots; ++i) {
        const int64_t age = ((position[b] - first - i) % shape.slots + shape.slots) % shape.slots;
        if (age >= shape.window) p[i] = -INFINITY;
      }
      float* result = partial + h * partial_size;
      result[1] = kernels.exponentiate(p, count, result);
      std::memset(result + 2, 0, size * sizeof(float));
    }
    for_blocks(values, nullptr, [&](const Matrix& side, Rows rows, int64_t i, int64_t h) {
      kernels.weighted(side, rows, scores + h * count + i, count, group, partial + h * partial_size + 2, partial_size);
    });
  });
  phases.Add(shape.batch * shape.num_heads, [&](int64_t chunk) {
    const int64_t b = chunk / shape.num_heads, h = chunk % shape.num_heads;
    const float* of_head = partials + (b * splits * shape.num_heads + h) * partial_size;
    const int64_t stride = shape.num_heads * partial_size;
    const int64_t count = CeilDiv(filled(b), kSplit);
    Arena& own = Arena::OfChunk();
    own.Begin();
    float* factors = own.Take<float>(count);
    float* sum = own.Take<float>(size);
    for (int64_t s = 0; s < count; ++s) factors[s] = of_head[s * stride];
    float largest, total = 0;
    kernels.exponentiate(factors, count, &largest);
    for (int64_t s = 0; s < count; ++s) total += factors[s] * of_head[s * stride + 1];
    for (int64_t s = 0; s < count; ++s) factors[s] /= total;
    std::memset(sum, 0, size * sizeof(float));
    const Matrix values{Type::kF32, of_head + 2, nullptr, count, size, stride * int64_t{sizeof(float)}, 0};
    kernels.accumulate(values, {nullptr, 0, count}, factors, sum);
    kernels.restore(type, sum, head, out + chunk * head);
  });
  int64_t read = 0;
  for (int64_t b = 0; b < shape.batch; ++b) read += 2 * filled(b) * slot_bytes;
  phases.Run(context.pool, read);
}

uint64_t ReadAll(const Context& context, const void* data, int64_t bytes) {
  constexpr int64_t kPiece = 1 << 20;
  std::atomic<uint64_t> total{0};
  Phases phases;
  phases.Add(CeilDiv(bytes, kPiece), [&](int64_t chunk) {
    const int64_t begin = chunk * kPiece;
    total += context.kernels.read(static_cast<const uint8_t*>(data) + begin, std::min(kPiece, bytes - begin));
  });
  phases.Run(context.pool, bytes);
  return total;
}

}  // namespace jsparse
