// The sparse FFN by hand in CUDA C, for `benchmarks.cuda_ffn`: what the Pallas kernels are held against. The same steps,
// one token, float16 weights, sequential FATReLU (gate > threshold), and a predictor of float16 or 4-bit rows. A warp
// reads a whole row, 16 bytes per thread at a time, and the rows of a block of neurons are shared out over eight warps.

#include <cuda_fp16.h>

constexpr int kNeurons = 32;  // per block
constexpr int kWarps = 8;
constexpr int kGroups = 4;  // lists of survivors that a block of `down` adds up
constexpr int kColumns = 8;  // of the output, per thread of `down`
constexpr unsigned kAll = 0xffffffffu;

__device__ float warp_sum(float value) {
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

__device__ float dot8(uint4 bits, const float* x) {
  const __half2* pairs = reinterpret_cast<const __half2*>(&bits);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(pairs[i]);
    sum += pair.x * x[2 * i] + pair.y * x[2 * i + 1];
  }
  return sum;
}

// A row of float16 times a vector, by a warp; the width is a multiple of 8.
__device__ float row_dot(const __half* row, const float* x, int width) {
  const int lane = threadIdx.x % 32;
  float sum = 0;
#pragma unroll 4
  for (int column = lane * 8; column < width; column += 256) {
    sum += dot8(__ldg(reinterpret_cast<const uint4*>(row + column)), x + column);
  }
  return warp_sum(sum);
}

// The same for two 4-bit numbers a byte, the even column in the low nibble; the rank is a multiple of 32.
__device__ float row_dot_int4(const unsigned char* row, const float* z, int rank) {
  const int lane = threadIdx.x % 32;
  float sum = 0;
  for (int column = lane * 32; column < rank; column += 1024) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(row + column / 2));
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sum += (static_cast<int>(words[word] >> (4 * i) & 15) - 8) * z[column + 8 * word + i];
      }
    }
  }
  return warp_sum(sum);
}

template <bool kInt4>
__device__ void predict_gate_up(const float* x, const float* z, const void* b, const float* scale, const float* bias,
                                const __half* gate, const __half* up, float threshold, int* survivors, float* hidden,
                                int* counts, int neurons, int width, int rank) {
  __shared__ float scores[kNeurons], values[kNeurons];
  __shared__ int predicted[kNeurons], num_predicted;
  extern __shared__ float staged[];  // x
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * kNeurons;
  for (int i = threadIdx.x; i < width; i += blockDim.x) staged[i] = x[i];
  for (int i = warp; i < kNeurons; i += kWarps) {
    const int neuron = first + i;
    float score = -1;
    if (neuron < neurons) {
      score = kInt4 ? row_dot_int4(static_cast<const unsigned char*>(b) + size_t(neuron) * rank / 2, z, rank) * scale[neuron]
                    : row_dot(static_cast<const __half*>(b) + size_t(neuron) * rank, z, rank);
      score += bias[neuron];
    }
    if (lane == 0) scores[i] = score;
  }
  __syncthreads();
  if (warp == 0) {
    const bool active = scores[lane] > 0;
    const unsigned ballot = __ballot_sync(kAll, active);
    if (active) predicted[__popc(ballot & ((1u << lane) - 1))] = first + lane;
    if (lane == 0) num_predicted = __popc(ballot);
  }
  __syncthreads();
  for (int i = warp; i < num_predicted; i += kWarps) {
    const size_t start = size_t(predicted[i]) * width;
    float value = row_dot(gate + start, staged, width);
    value = value > threshold ? value * row_dot(up + start, staged, width) : 0;
    if (lane == 0) values[i] = value;
  }
  __syncthreads();
  if (warp == 0) {
    const float value = lane < num_predicted ? values[lane] : 0;
    const unsigned ballot = __ballot_sync(kAll, value != 0);
    const int place = first + __popc(ballot & ((1u << lane) - 1));
    if (value != 0) survivors[place] = predicted[lane], hidden[place] = value;
    if (lane == 0) counts[blockIdx.x] = __popc(ballot);
  }
}

extern "C" __global__ void __launch_bounds__(32 * kWarps)
    predict_gate_up_float16(const float* x, const float* z, const __half* b, const float* bias, const __half* gate,
                            const __half* up, float threshold, int* survivors, float* hidden, int* counts, int neurons,
                            int width, int rank) {
  predict_gate_up<false>(x, z, b, nullptr, bias, gate, up, threshold, survivors, hidden, counts, neurons, width, rank);
}

extern "C" __global__ void __launch_bounds__(32 * kWarps)
    predict_gate_up_int4(const float* x, const float* z, const unsigned char* b, const float* scale, const float* bias,
                         const __half* gate, const __half* up, float threshold, int* survivors, float* hidden,
                         int* counts, int neurons, int width, int rank) {
  predict_gate_up<true>(x, z, b, scale, bias, gate, up, threshold, survivors, hidden, counts, neurons, width, rank);
}

// Partial sums (gridDim.x, width) over the survivors of kGroups lists; gridDim.y covers the columns.
extern "C" __global__ void down(const int* survivors, const float* hidden, const int* counts, const __half* down_t,
                                float* partial, int blocks, int width) {
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * kColumns;
  if (column >= width) return;
  float sums[kColumns] = {};
  for (int group = 0; group < kGroups; ++group) {
    const int list = blockIdx.x * kGroups + group;
    if (list >= blocks) break;
    const int count = counts[list];
#pragma unroll 4
    for (int i = list * kNeurons; i < list * kNeurons + count; ++i) {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(down_t + size_t(survivors[i]) * width + column));
      const __half2* pairs = reinterpret_cast<const __half2*>(&bits);
#pragma unroll
      for (int k = 0; k < kColumns / 2; ++k) {
        const float2 pair = __half22float2(pairs[k]);
        sums[2 * k] += hidden[i] * pair.x;
        sums[2 * k + 1] += hidden[i] * pair.y;
      }
    }
  }
  for (int k = 0; k < kColumns; ++k) partial[size_t(blockIdx.x) * width + column + k] = sums[k];
}

extern "C" __global__ void add_up(const float* partial, float* y, int programs, int width) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= width) return;
  float sum = 0;
  for (int i = 0; i < programs; ++i) sum += partial[size_t(i) * width + column];
  y[column] = sum;
}

// z = a x for float16 rows; a warp per row.
extern "C" __global__ void features_float16(const float* x, const __half* a, float* z, int rank, int width) {
  const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (row >= rank) return;
  const float sum = row_dot(a + size_t(row) * width, x, width);
  if (threadIdx.x % 32 == 0) z[row] = sum;
}

// The same for 4-bit rows.
extern "C" __global__ void features_int4(const float* x, const unsigned char* a, const float* scale, float* z, int rank,
                                         int width) {
  const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (row >= rank) return;
  const float sum = row_dot_int4(a + size_t(row) * width / 2, x, width) * scale[row];
  if (threadIdx.x % 32 == 0) z[row] = sum;
}
