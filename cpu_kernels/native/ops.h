// The operations of a decode step and of a prefill, on checked arguments. Vectors are float32, one row a token.
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

// outs[i] (num_x, weights[i].rows) = x weights[i]^T.
void Linear(const Context& context, const float* x, int64_t num_x, const std::vector<Matrix>& weights,
            const std::vector<float*>& outs);

// y (num_x, D) over all neurons.
void DenseFfn(const Context& context, const float* x, int64_t num_x, const Ffn& ffn, const FfnSpec& spec, float* y);

// y (num_x, D) over the predicted neurons, and counts (num_x, 2): predicted, and truly active among them.
void SparseFfn(const Context& context, const float* x, int64_t num_x, const Ffn& ffn, const Predictor& predictor,
               const FfnSpec& spec, float* y, int32_t* counts);

// One token of every sequence over its KV cache, a ring of `slots` slots of which slot s holds the newest position p
// with p % slots == s.
struct Attention {
  int64_t batch, num_heads, num_kv_heads, head_dim, slots;
  Type cache_type;
  int64_t window;  // positions a token sees, itself included
  float scale;
};

// Writes k and v (batch, num_kv_heads, head_dim) at their positions, then out (batch, num_heads, head_dim) = attention
// of q over what is visible.
void Attend(const Context& context, const Attention& shape, const float* q, const float* k, const float* v,
            const int32_t* position, void* keys, void* values, float* out);

// Reads all bytes; the result depends on every one. For measuring memory bandwidth.
uint64_t ReadAll(const Context& context, const void* data, int64_t bytes);

}  // namespace jsparse
