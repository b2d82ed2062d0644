#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops.h"

namespace jsparse {

namespace {

constexpr int64_t kKeyBlock = 64;     // positions whose keys and values have a softmax of their own; a thread takes one
constexpr int64_t kQueryTokens = 16;  // that a pass over the keys takes at most
constexpr int64_t kFew = 8;           // tokens that are taken in by the calling thread alone
constexpr int64_t kSlotsAtOnce = 4;   // for one head after another; or more, of at most so many bytes:
constexpr int64_t kBlockBytes = 1 << 16;

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

// The attention of some tokens, at most kQueryTokens of each sequence, which follow one another.
//
// Keys are taken in blocks of kKeyBlock positions, from multiples of kKeyBlock on, wherever the ring has them: a block has
// a softmax of its own, and a token's are weighed in their order. So a token's result depends on what it sees alone.
class AttendTile {
 public:
  // `first` is the index of the tile's first token in x, `size` its tokens.
  AttendTile(const Context& context, const Attention& shape, const AttentionArrays& arrays, int64_t first, int64_t size)
      : context_(context), kernels_(context.kernels), shape_(shape), arrays_(arrays), first_(first), size_(size),
        keys_{arrays.keys, arrays.key_scale}, values_{arrays.values, arrays.value_scale} {
    group_ = shape.num_heads / shape.num_kv_heads;
    window_ = std::min(shape.window, shape.slots);
    head_bytes_ = RowBytes(shape.cache_type, shape.head_dim);
    slot_bytes_ = shape.num_kv_heads * head_bytes_;
    head_scales_ = shape.cache_type == Type::kI8x32 ? NumGroups(shape.head_dim) : 0;
    slot_scales_ = shape.num_kv_heads * head_scales_;
    query_ = kernels_.operand_size(shape.cache_type, shape.head_dim);
    vector_ = kernels_.sum_size(shape.cache_type, shape.head_dim);
    partial_ = vector_ + 2;
    for (int64_t b = 0; b < shape.batch; ++b) {
      if (Tokens(b)) blocks_ = std::max(blocks_, LastBlock(b, Tokens(b) - 1) - FirstBlock(b, 0) + 1);
    }
  }

  void Run() {
    const int64_t num_queries = shape_.batch * size_ * shape_.num_heads;
    Arena& arena = Arena::OfCall();
    arena.Begin();
    queries_ = arena.Take<float>(num_queries * query_);
    partials_ = arena.Take<float>(num_queries * blocks_ * partial_);
    Phases phases;
    const auto take = [this](int64_t i) { TakeToken(i / size_, i % size_); };
    if (shape_.batch * size_ > kFew) {
      phases.Add(shape_.batch * size_, take);
    } else {
      for (int64_t i = 0; i < shape_.batch * size_; ++i) take(i);
    }
    phases.Add(shape_.batch * blocks_, [this](int64_t i) { OneBlock(i / blocks_, i % blocks_); });
    phases.Add(num_queries, [this](int64_t i) {
      const int64_t of_token = i % (size_ * shape_.num_heads);
      Combine(i / (size_ * shape_.num_heads), of_token / shape_.num_heads, of_token % shape_.num_heads);
    });
    int64_t read = 0;
    for (int64_t b = 0; b < shape_.batch; ++b) read += Tokens(b) ? 2 * (Position(b, Tokens(b)) - Oldest(b, 0)) : 0;
    phases.Run(context_.pool, read * slot_bytes_ * ((size_ + kFew - 1) / kFew));
  }

 private:
  // Tokens of the sequence in this tile; the position of one; the oldest position it sees; the blocks of these.
  int64_t Tokens(int64_t b) const { return std::clamp<int64_t>(arrays_.count[b] - first_, 0, size_); }
  int64_t Position(int64_t b, int64_t t) const { return int64_t{arrays_.start[b]} + first_ + t; }
  int64_t Oldest(int64_t b, int64_t t) const { return std::max<int64_t>(0, Position(b, t) - window_ + 1); }
  int64_t FirstBlock(int64_t b, int64_t t) const { return Oldest(b, t) / kKeyBlock; }
  int64_t LastBlock(int64_t b, int64_t t) const { return Position(b, t) / kKeyBlock; }

  // Queries of a key head stand together, token by token: of that head, token and head among its group.
  int64_t Query(int64_t kv, int64_t t, int64_t g) const { return (kv * size_ + t) * group_ + g; }
  float* QueryAt(int64_t b, int64_t query) const {
    return queries_ + (b * size_ * shape_.num_heads + query) * query_;
  }
  // Of a block and query: largest score, sum of exponentials, weighted sum of values.
  float* PartialAt(int64_t b, int64_t block, int64_t query) const {
    return partials_ + ((b * blocks_ + block) * size_ * shape_.num_heads + query) * partial_;
  }

  // Writes a token's key and value at its position, and makes operands of its queries.
  void TakeToken(int64_t b, int64_t t) const {
    if (t >= Tokens(b)) return;
    const int64_t row = shape_.num_kv_heads * shape_.head_dim, token = b * shape_.tokens + first_ + t;
    const int64_t slot = b * shape_.slots + Position(b, t) % shape_.slots;
    Write(arrays_.k + token * row, keys_, slot);
    Write(arrays_.v + token * row, values_, slot);
    for (int64_t h = 0; h < shape_.num_heads; ++h) {
      const float* q = arrays_.q + (token * shape_.num_heads + h) * shape_.head_dim;
      kernels_.operand(shape_.cache_type, q, shape_.head_dim, shape_.scale,
                       QueryAt(b, Query(h / group_, t, h % group_)));
    }
  }

  // Keys or values, and their scales.
  struct Side {
    void* data;
    uint16_t* scales;
  };

  // Writes the keys or values of all heads to a slot.
  void Write(const float* from, const Side& side, int64_t slot) const {
    uint8_t* to = static_cast<uint8_t*>(side.data) + slot * slot_bytes_;
    if (shape_.cache_type != Type::kI8x32) return StoreAs(shape_.cache_type, from, shape_.num_kv_heads * shape_.head_dim, to);
    for (int64_t head = 0; head < shape_.num_kv_heads; ++head) {
      kernels_.quantize_groups(from + head * shape_.head_dim, shape_.head_dim,
                               reinterpret_cast<int8_t*>(to) + head * head_bytes_,
                               side.scales + slot * slot_scales_ + head * head_scales_);
    }
  }

  // The positions of a block that a token sees: `count` from `begin` on, which is counted from the first of `seen`.
  struct Range {
    int64_t begin, count;
  };

  void OneBlock(int64_t b, int64_t index) const {
    const int64_t tokens = Tokens(b);
    if (!tokens) return;
    const int64_t block = FirstBlock(b, 0) + index;
    const int64_t first = std::max(Oldest(b, 0), block * kKeyBlock);
    const int64_t count = std::min(Position(b, tokens - 1), (block + 1) * kKeyBlock - 1) - first + 1;
    if (count <= 0) return;
    Range ranges[kQueryTokens];
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t begin = std::clamp<int64_t>(Oldest(b, t) - first, 0, count);
      ranges[t] = {begin, std::clamp<int64_t>(Position(b, t) + 1 - first, begin, count) - begin};
    }
    Arena& own = Arena::OfChunk();
    own.Begin();
    float* scores = own.Take<float>(size_ * shape_.num_heads * count);
    ForRows(b, first, count, keys_, values_.data, [&](const Matrix& side, Rows rows, int64_t i, int64_t kv) {
      const int64_t query = Query(kv, 0, 0);
      kernels_.dots(side, rows, QueryAt(b, query), query_, tokens * group_, scores + query * count + i, count);
    });
    for (int64_t kv = 0; kv < shape_.num_kv_heads; ++kv) {
      for (int64_t i = 0; i < tokens * group_; ++i) {
        const Range& range = ranges[i / group_];
        const int64_t query = Query(kv, 0, 0) + i;
        float* result = PartialAt(b, index, query);
        result[1] = kernels_.exponentiate(scores + query * count + range.begin, range.count, result);
        std::memset(result + 2, 0, vector_ * sizeof(float));
      }
    }
    ForRows(b, first, count, values_, nullptr, [&](const Matrix& side, Rows rows, int64_t i, int64_t kv) {
      const auto add = [&](int64_t t, int64_t some, int64_t begin, int64_t end) {
        const int64_t query = Query(kv, t, 0);
        kernels_.weighted(side, {nullptr, rows.first + begin - i, end - begin}, scores + query * count + begin, count,
                          some * group_, PartialAt(b, index, query) + 2, partial_);
      };
      const auto sees_all = [&](const Range& r) { return r.begin <= i && i + rows.count <= r.begin + r.count; };
      if (std::all_of(ranges, ranges + tokens, sees_all)) return add(0, tokens, i, i + rows.count);
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t begin = std::max(i, ranges[t].begin);
        const int64_t end = std::min(i + rows.count, ranges[t].begin + ranges[t].count);
        if (begin < end) add(t, 1, begin, end);
      }
    });
  }

  // Visits `count` positions from `first` on, a few slots of all heads at a time: body(head's matrix, rows, positions
  // before them, key head). The cache is read front to back, and during the last of them the `next` begins.
  template <class Body>
  void ForRows(int64_t b, int64_t first, int64_t count, const Side& cache, const void* next, Body body) const {
    const int64_t at_once = std::max(kSlotsAtOnce, kBlockBytes / slot_bytes_);
    const int64_t to_next = reinterpret_cast<intptr_t>(next) - reinterpret_cast<intptr_t>(cache.data);
    for (int64_t i = 0, some; i < count; i += some) {
      const int64_t slot = (first + i) % shape_.slots;
      some = std::min({at_once, count - i, shape_.slots - slot});
      const int64_t ahead = i + some < count ? at_once * slot_bytes_ : next ? to_next - i * slot_bytes_ : 0;
      for (int64_t kv = 0; kv < shape_.num_kv_heads; ++kv) {
        const uint8_t* data = static_cast<const uint8_t*>(cache.data) + b * shape_.slots * slot_bytes_ + kv * head_bytes_;
        Matrix side{shape_.cache_type, data, nullptr, shape_.slots, shape_.head_dim, slot_bytes_, ahead};
        side.group_scale = cache.scales + b * shape_.slots * slot_scales_ + kv * head_scales_;
        side.group_stride = slot_scales_;
        body(side, Rows{nullptr, slot, some}, i, kv);
      }
    }
  }

  void Combine(int64_t b, int64_t t, int64_t h) const {
    float* out = arrays_.out + ((b * shape_.tokens + first_ + t) * shape_.num_heads + h) * shape_.head_dim;
    if (t >= Tokens(b)) {
      std::memset(out, 0, shape_.head_dim * sizeof(float));
      return;
    }
    const int64_t count = LastBlock(b, t) - FirstBlock(b, t) + 1, stride = size_ * shape_.num_heads * partial_;
    const float* partials = PartialAt(b, FirstBlock(b, t) - FirstBlock(b, 0), Query(h / group_, t, h % group_));
    Arena& own = Arena::OfChunk();
    own.Begin();
    float* factors = own.Take<float>(count);
    float* sum = own.Take<float>(vector_);
    for (int64_t s = 0; s < count; ++s) factors[s] = partials[s * stride];
    float largest, total = 0;
    kernels_.exponentiate(factors, count, &largest);
    for (int64_t s = 0; s < count; ++s) total += factors[s] * partials[s * stride + 1];
    for (int64_t s = 0; s < count; ++s) factors[s] /= total;
    std::memset(sum, 0, vector_ * sizeof(float));
    const Matrix values{Type::kF32, partials + 2, nullptr, count, vector_, stride * int64_t{sizeof(float)}, 0};
    kernels_.accumulate(values, {nullptr, 0, count}, factors, 0, 1, sum, 0, nullptr);
    kernels_.restore(shape_.cache_type, sum, shape_.head_dim, out);
  }

  const Context& context_;
  const Kernels& kernels_;
  const Attention& shape_;
  const AttentionArrays& arrays_;
  const int64_t first_, size_;
  const Side keys_, values_;
  int64_t group_, window_, head_bytes_, slot_bytes_, head_scales_, slot_scales_, query_, vector_, partial_, blocks_ = 0;
  float* queries_;
  float* partials_;
};

}  // namespace

void Attend(const Context& context, const Attention& shape, const AttentionArrays& arrays) {
  // As many tokens at a time as leave in the ring what the first of them sees.
  const int64_t most = std::min(kQueryTokens, std::max<int64_t>(1, shape.slots - shape.window + 1));
  for (int64_t first = 0; first < shape.tokens; first += most) {
    AttendTile(context, shape, arrays, first, std::min(most, shape.tokens - first)).Run();
  }
}

}  // namespace jsparse
