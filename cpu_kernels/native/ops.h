// The operations of a decode step and of a prefill, on checked arguments. Vectors are float32, one row a token. A token's
// result has the same bits for any number of tokens and of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "matrix.h"
#include "parallel.h"

namespace jsparse {

struct Context {
  const Kernels& kernels;
  const Pool& pool;
};

// What is applied to gate values: kRelu keeps those above their neuron's threshold, kRelu2 squares what it keeps, kSilu
// is x / (1 + exp(-x)).
enum class Activation : int { kRelu, kRelu2, kSilu };
inline constexpr const char* kActivations[] = {"relu", "relu2", "silu"};
// What is applied to up values; kNone where an FFN has none.
enum class UpActivation : int { kNone, kLinear, kRelu };
inline constexpr const char* kUpActivations[] = {"none", "linear", "relu"};

struct FfnSpec {
  Activation activation;
  UpActivation up;
  bool parallel;  // gate and up of all predicted neurons; otherwise up of those that survive the gate
};

struct Ffn {
  Matrix gate, up, down_t;  // up has no rows where the specification says kNone
  const float* threshold;   // one of every neuron
};

struct Predictor {
  Matrix a, b;
  const float* bias;
};

// out (count, w.cols) = rows of w; an index outside gives zeros.
void TakeRows(const Context& context, const Matrix& w, const int32_t* indices, int64_t count, float* out);

// out (num_x, n) = every x over its root mean square, times scale (n).
void RmsNorm(const Context& context, const float* x, int64_t num_x, int64_t n, const float* scale, float eps, float* out);

// outs[i] (num_x, weights[i].rows) = x weights[i]^T.
void Linear(const Context& context, const float* x, int64_t num_x, const std::vector<Matrix>& weights,
            const std::vector<float*>& outs);

// y (num_x, D) over all neurons.
void DenseFfn(const Context& context, const float* x, int64_t num_x, const Ffn& ffn, const FfnSpec& spec, float* y);

// What scales the hidden values of every token's neurons, a group of equally many after the other: (num_x, groups). Where it
// is zero the group is neither scored nor read.
struct Route {
  const float* factors;
  int64_t groups;
};

// y (num_x, D) over the predicted neurons, and counts (num_x, 2): predicted, and truly active among them.
void SparseFfn(const Context& context, const float* x, int64_t num_x, const Ffn& ffn, const Predictor& predictor,
               const FfnSpec& spec, const Route& route, float* y, int32_t* counts);

// Tokens of every sequence over its KV cache, a ring of `slots` slots of which slot s holds the newest position p with
// p % slots == s.
struct Attention {
  int64_t batch, tokens, num_heads, num_kv_heads, head_dim, slots;
  Type cache_type;
  int64_t window;  // positions a token sees, itself included; at most `slots` are there
  float scale;
};

struct AttentionArrays {
  const float* q;  // (batch, tokens, num_heads, head_dim)
  const float* k;  // (batch, tokens, num_kv_heads, head_dim), and v
  const float* v;
  const int32_t* start;  // (batch), the first token's position
  const int32_t* count;  // (batch), how many of the tokens exist
  void* keys;            // (batch, slots, num_kv_heads, head_dim), and values
  void* values;
  uint16_t* key_scale;  // of kI8x32: (batch, slots, num_kv_heads, groups of 32 of head_dim) bfloat16, and those of values
  uint16_t* value_scale;
  float* out;  // as q
};

// Writes keys and values at the tokens' positions, and the attention over what each of them sees; zeros for tokens that
// do not exist. A token's result has the same bits whatever stands beside it.
void Attend(const Context& context, const Attention& shape, const AttentionArrays& arrays);

// Reads all bytes; the result depends on every one. For measuring memory bandwidth.
uint64_t ReadAll(const Context& context, const void* data, int64_t bytes);

}  // namespace jsparse
