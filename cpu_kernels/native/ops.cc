#include "ops.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace jsparse {

namespace {

// Sums over neurons are taken in this many parts, whatever the number of threads, and the parts in order.
constexpr int64_t kSlots = 16;
constexpr int64_t kChunkRows = 48;    // rows of a matrix a thread takes at a time; or more, of at least so many bytes:
constexpr int64_t kChunkBytes = 1 << 18;
constexpr int64_t kFew = 8;           // vectors that take the FFN of a slot's neurons one after another
constexpr int64_t kFewLowBit = 32;    // the same where down_t is of a low-bit type
constexpr int64_t kManyVectors = 512;
constexpr int64_t kNearVectors = 48;  // arranged vectors that stay in a core's cache while rows pass by
constexpr int64_t kReduceColumns = 1024;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t Bytes(const Matrix& w) { return w.rows * w.stride; }
int64_t Bytes(const Ffn& ffn) { return Bytes(ffn.gate) + Bytes(ffn.up) + Bytes(ffn.down_t); }

// Operands of x for the types of several matrices, each type once.
class Operands {
 public:
  Operands(const Context& context, Arena& arena, const float* x, int64_t num_x, int64_t n)
      : kernels_(context.kernels), arena_(arena), x_(x), num_x_(num_x), n_(n) {}

  struct View {
    const float* x;
    int64_t stride;  // from one vector to the next
  };

  // To be called before the phases run: for many vectors making operands becomes one of them.
  View For(Type type, Phases& phases) {
    View& view = views_[static_cast<int>(type)];
    if (view.x) return view;
    const int64_t size = kernels_.operand_size(type, n_);
    float* rows = arena_.Take<float>(num_x_ * size);
    view = {rows, size};
    const auto make = [this, type, size, rows](int64_t m) {
      kernels_.operand(type, x_ + m * n_, n_, 1.0f, rows + m * size);
    };
    if (num_x_ > kFew) {
      phases.Add(num_x_, make);
    } else {
      for (int64_t m = 0; m < num_x_; ++m) make(m);
    }
    return view;
  }

 private:
  const Kernels& kernels_;
  Arena& arena_;
  const float* x_;
  const int64_t num_x_, n_;
  View views_[6] = {};
};

// Rows of a matrix in a chunk: what is fetched behind its end is seldom what the thread takes next.
int64_t ChunkRows(const Matrix& w) { return std::max(kChunkRows, kChunkBytes / std::max<int64_t>(1, w.stride)); }

// The rows of several matrices in chunks.
struct RowChunks {
  explicit RowChunks(const std::vector<Matrix>& matrices) : matrices(matrices) {
    for (const Matrix& matrix : matrices) total += CeilDiv(matrix.rows, ChunkRows(matrix));
  }

  // Which matrix chunk i belongs to, and its rows there.
  std::pair<size_t, Rows> operator[](int64_t i) const {
    size_t which = 0;
    for (int64_t chunks; i >= (chunks = CeilDiv(matrices[which].rows, ChunkRows(matrices[which]))); ++which) i -= chunks;
    const int64_t at_once = ChunkRows(matrices[which]), first = i * at_once;
    return {which, {nullptr, first, std::min(at_once, matrices[which].rows - first)}};
  }

  const std::vector<Matrix>& matrices;
  int64_t total = 0;
};

// The product of some rows with num_x vectors.
void Multiply(const Kernels& kernels, const Matrix& w, Rows rows, Operands::View x, int64_t num_x, float* out,
              int64_t ldo) {
  for (int64_t m = 0; m < num_x; m += kNearVectors) {
    kernels.dots(w, rows, x.x + m * x.stride, x.stride, std::min(kNearVectors, num_x - m), out + m * ldo, ldo);
  }
}

void LinearBlock(const Context& context, const float* x, int64_t num_x, const std::vector<Matrix>& weights,
                 const std::vector<float*>& outs) {
  Arena& arena = Arena::OfCall();
  arena.Begin();
  Phases phases;
  Operands operands(context, arena, x, num_x, weights[0].cols);
  std::vector<Operands::View> views;
  for (const Matrix& w : weights) views.push_back(operands.For(w.type, phases));
  const RowChunks chunks(weights);
  phases.Add(chunks.total, [&](int64_t chunk) {
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

// The neurons of a slot. The last slots are a third of the first: what threads do before they wait for one another is short.
Rows SlotNeurons(int64_t num_neurons, int64_t slot) {
  const auto begin = [=](int64_t s) { return num_neurons * s * (3 * kSlots - s) / (2 * kSlots * kSlots); };
  return {nullptr, begin(slot), begin(slot + 1) - begin(slot)};
}

// Sums over neurons by slot: slot s of token m is accumulated at Slot(s, m), then the slots are added in order.
class SlotSums {
 public:
  SlotSums(const Context& context, Arena& arena, const Matrix& down_t, int64_t num_x)
      : kernels_(context.kernels), down_t_(down_t), num_x_(num_x) {
    size_ = kernels_.sum_size(down_t.type, down_t.cols);
    sums_ = arena.Take<float>(kSlots * num_x * size_);
  }

  void Clear(int64_t slot) { std::memset(Of(slot, 0), 0, num_x_ * size_ * sizeof(float)); }
  int64_t size() const { return size_; }
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
  Operands operands(context, arena, x, num_x, ffn.gate.cols);
  const auto gate_x = operands.For(ffn.gate.type, phases);
  const auto up_x = HasUp(spec) ? operands.For(ffn.up.type, phases) : gate_x;
  SlotSums sums(context, arena, ffn.down_t, num_x);
  phases.Add(kSlots, [&](int64_t slot) {
    sums.Clear(slot);
    const Rows neurons = SlotNeurons(ffn.gate.rows, slot);
    Arena& own = Arena::OfChunk();
    own.Begin();
    float* hidden = own.Take<float>(num_x * neurons.count);
    float* up = own.Take<float>(num_x * neurons.count);
    kernels.dots(ffn.gate, neurons, gate_x.x, gate_x.stride, num_x, hidden, neurons.count);
    if (HasUp(spec)) kernels.dots(ffn.up, neurons, up_x.x, up_x.stride, num_x, up, neurons.count);
    for (int64_t m = 0; m < num_x; ++m) {
      Activate(spec, ffn.threshold + neurons.first, neurons.count, up + m * neurons.count, hidden + m * neurons.count);
    }
    int32_t* scratch = own.Take<int32_t>(kernels.scratch_size(ffn.down_t, num_x));
    kernels.accumulate(ffn.down_t, neurons, hidden, neurons.count, num_x, sums.Of(slot, 0), sums.size(), scratch);
  });
  sums.AddPhase(phases, y);
  phases.Run(context.pool, Bytes(ffn));
}

// Of many vectors, and a down_t of floats.
void DenseFfnBlock(const Context& context, const float* x, int64_t num_x, const Ffn& ffn, const FfnSpec& spec,
                   float* y) {
  const Kernels& kernels = context.kernels;
  Arena& arena = Arena::OfCall();
  arena.Begin();
  Phases phases;
  const int64_t num_neurons = ffn.gate.rows, width = ffn.down_t.cols;
  Operands operands(context, arena, x, num_x, width);
  const auto gate_x = operands.For(ffn.gate.type, phases);
  const auto up_x = HasUp(spec) ? operands.For(ffn.up.type, phases) : gate_x;
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
  // The same sums as of few vectors: slot by slot, and then the slots in order.
  phases.Add(CeilDiv(width, kernels.column_block), [&](int64_t chunk) {
    Arena& own = Arena::OfChunk();
    own.Begin();
    const int64_t column = chunk * kernels.column_block, size = num_x * kernels.column_block;
    float* panel = own.Take<float>(kernels.panel_size);
    float* sums = own.Take<float>(kSlots * size);
    std::memset(sums, 0, kSlots * size * sizeof(float));
    for (int64_t slot = 0; slot < kSlots; ++slot) {
      const Rows neurons = SlotNeurons(num_neurons, slot);
      kernels.add_columns(ffn.down_t, neurons, column, hidden + neurons.first, num_neurons, num_x, panel,
                          sums + slot * size, kernels.column_block);
    }
    const int64_t n = std::min(kernels.column_block, width - column);
    for (int64_t m = 0; m < num_x; ++m) {
      kernels.combine(ffn.down_t.type, sums + m * kernels.column_block, kSlots, size, n, y + m * width + column);
    }
  });
  phases.Run(context.pool, Bytes(ffn) * CeilDiv(num_x, kFew));
}

// The predictor's features of every token, as operands for its scores.
class Features {
 public:
  Features(const Context& context, Arena& arena, const Predictor& predictor, int64_t num_x)
      : kernels_(context.kernels), predictor_(predictor), num_x_(num_x), rank_(predictor.a.rows) {
    values_ = arena.Take<float>(num_x * rank_);
    size_ = kernels_.operand_size(predictor.b.type, rank_);
    operands_ = arena.Take<float>(num_x * size_);
  }

  void AddPhases(Phases& phases, Operands::View x) {
    const int64_t at_once = ChunkRows(predictor_.a);
    phases.Add(CeilDiv(rank_, at_once), [this, x, at_once](int64_t chunk) {
      const int64_t first = chunk * at_once;
      const Rows rows{nullptr, first, std::min(at_once, rank_ - first)};
      kernels_.dots(predictor_.a, rows, x.x, x.stride, num_x_, values_ + first, rank_);
    });
    phases.Add(num_x_, [this](int64_t m) {
      kernels_.operand(predictor_.b.type, values_ + m * rank_, rank_, 1.0f, operands_ + m * size_);
    });
  }

  // The list of those neurons whose score is positive; returns how many.
  int64_t Predicted(int64_t m, Rows neurons, float* scores, int32_t* list) const {
    kernels_.dots(predictor_.b, neurons, operands_ + m * size_, size_, 1, scores, neurons.count);
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
  int64_t size_;
  float* values_;
  float* operands_;
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
                  const FfnSpec& spec, const Route& route, float* y, int32_t* counts) {
  const Kernels& kernels = context.kernels;
  Arena& arena = Arena::OfCall();
  arena.Begin();
  Phases phases;
  Operands operands(context, arena, x, num_x, ffn.gate.cols);
  const auto gate_x = operands.For(ffn.gate.type, phases);
  const auto up_x = HasUp(spec) ? operands.For(ffn.up.type, phases) : gate_x;
  Features features(context, arena, predictor, num_x);
  features.AddPhases(phases, operands.For(predictor.a.type, phases));
  SlotSums sums(context, arena, ffn.down_t, num_x);
  int32_t* slot_counts = arena.Take<int32_t>(kSlots * num_x * 2);
  const int64_t group_size = ffn.gate.rows / route.groups;
  phases.Add(kSlots, [&](int64_t slot) {
    sums.Clear(slot);
    const Rows neurons = SlotNeurons(ffn.gate.rows, slot);
    Arena& own = Arena::OfChunk();
    own.Begin();
    int32_t* list = own.Take<int32_t>(neurons.count);
    float* hidden = own.Take<float>(neurons.count);
    float* up = own.Take<float>(neurons.count);
    int32_t* scratch = own.Take<int32_t>(kernels.scratch_size(ffn.down_t, 1));
    for (int64_t m = 0; m < num_x; ++m) {
      const float* factors = route.factors + m * route.groups;
      int64_t predicted = 0;
      for (int64_t first = neurons.first, end = first + neurons.count, stop; first < end; first = stop) {
        const int64_t group = first / group_size;
        stop = std::min(end, (group + 1) * group_size);
        if (factors[group] != 0) predicted += features.Predicted(m, {nullptr, first, stop - first}, up, list + predicted);
      }
      kernels.dots(ffn.gate, {list, 0, predicted}, gate_x.x + m * gate_x.stride, gate_x.stride, 1, hidden, predicted);
      for (int64_t i = 0; i < predicted; ++i) {
        const float factor = route.groups == 1 ? *factors : factors[list[i] / group_size];
        hidden[i] = Phi(spec, hidden[i], ffn.threshold[list[i]]) * factor;
      }
      int64_t active = spec.parallel && HasUp(spec) ? predicted : Compact(predicted, list, hidden);
      if (HasUp(spec)) {
        kernels.dots(ffn.up, {list, 0, active}, up_x.x + m * up_x.stride, up_x.stride, 1, up, active);
        for (int64_t i = 0; i < active; ++i) hidden[i] *= Psi(spec, up[i]);
        active = Compact(active, list, hidden);
      }
      kernels.accumulate(ffn.down_t, {list, 0, active}, hidden, 0, 1, sums.Of(slot, m), 0, scratch);
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
    float* arranged = Arena::OfChunk().Take<float>(context.kernels.sum_size(w.type, w.cols));
    context.kernels.widen(w, indices[i], arranged);
    context.kernels.restore(w.type, arranged, w.cols, to);
  });
  phases.Run(context.pool, count * w.stride);
}

void RmsNorm(const Context& context, const float* x, int64_t num_x, int64_t n, const float* scale, float eps,
             float* out) {
  const auto norm = [&](int64_t m) { context.kernels.rms_norm(x + m * n, n, scale, eps, out + m * n); };
  if (num_x <= kFew) {
    for (int64_t m = 0; m < num_x; ++m) norm(m);
    return;
  }
  Phases phases;
  phases.Add(num_x, norm);
  phases.Run(context.pool, num_x * n * int64_t{sizeof(float)});
}

void Linear(const Context& context, const float* x, int64_t num_x, const std::vector<Matrix>& weights,
            const std::vector<float*>& outs) {
  for (int64_t m = 0; m < num_x; m += kManyVectors) {
    std::vector<float*> some;
    for (size_t i = 0; i < outs.size(); ++i) some.push_back(outs[i] + m * weights[i].rows);
    LinearBlock(context, x + m * weights[0].cols, std::min(kManyVectors, num_x - m), weights, some);
  }
}

void DenseFfn(const Context& context, const float* x, int64_t num_x, const Ffn& ffn, const FfnSpec& spec, float* y) {
  const int64_t width = ffn.gate.cols;
  if (num_x <= kFew || IsLowBit(ffn.down_t.type)) {
    for (int64_t m = 0; m < num_x; m += kFewLowBit) {
      DenseFfnFew(context, x + m * width, std::min(kFewLowBit, num_x - m), ffn, spec, y + m * width);
    }
    return;
  }
  for (int64_t m = 0; m < num_x; m += kManyVectors) {
    DenseFfnBlock(context, x + m * width, std::min(kManyVectors, num_x - m), ffn, spec, y + m * width);
  }
}

void SparseFfn(const Context& context, const float* x, int64_t num_x, const Ffn& ffn, const Predictor& predictor,
               const FfnSpec& spec, const Route& route, float* y, int32_t* counts) {
  const int64_t width = ffn.gate.cols;
  for (int64_t m = 0; m < num_x; m += kFew) {
    const int64_t some = std::min(kFew, num_x - m);
    const Route of_some{route.factors + m * route.groups, route.groups};
    SparseFfnFew(context, x + m * width, some, ffn, predictor, spec, of_some, y + m * width, counts + m * 2);
  }
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
