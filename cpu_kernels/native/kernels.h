// The inner loops, one table of them per instruction set. Each runs on the calling thread alone.
//
// A vector that meets a matrix's rows first becomes an *operand* for the matrix's type. For floats it is *arranged*: padded
// with zeros to whole groups of lanes x parts elements, and where shifts widen the packed elements permuted so that none
// crosses lanes. For low-bit types it is rounded to 16 bits, and products are taken in integers. What is accumulated from
// rows (the down projection) is arranged for their type too.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace jsparse {

constexpr int64_t kSumRows = 256;  // of a low-bit matrix, whose sums in 32 bits cannot overflow

struct Kernels {
  const char* name;

  // Floats that the operand of a vector of n elements takes; and the operand of x times `scale`.
  int64_t (*operand_size)(Type type, int64_t n);
  void (*operand)(Type type, const float* x, int64_t n, float scale, float* operand);
  // out[m * ldo + i] = row rows[i] of w . x_m, for num_x operands, one every ldx floats.
  void (*dots)(const Matrix& w, Rows rows, const float* x, int64_t ldx, int64_t num_x, float* out, int64_t ldo);

  // Floats that a sum of rows takes, arranged; and its elements.
  int64_t (*sum_size)(Type type, int64_t n);
  void (*restore)(Type type, const float* arranged, int64_t n, float* x);
  // x = the sum of `count` arranged vectors, one every `stride` floats; the first is overwritten.
  void (*combine)(Type type, float* arranged, int64_t count, int64_t stride, int64_t n, float* x);
  // A row of w in float32, scaled, arranged.
  void (*widen)(const Matrix& w, int64_t row, float* arranged);

  // sums[m] += coefficients[m * ldc + i] * row rows[i] of w, arranged, one every lds floats. `scratch` is for
  // scratch_size(w, num_x) integers, none of floats. Low-bit rows are added in blocks of kSumRows, whose coefficients are
  // rounded to 16 bits.
  int64_t (*scratch_size)(const Matrix& w, int64_t num_x);
  void (*accumulate)(const Matrix& w, Rows rows, const float* coefficients, int64_t ldc, int64_t num_x, float* sums,
                     int64_t lds, int32_t* scratch);
  // sums[m] += sum over i of p[m * ldp + i] * row rows[i] of w, one every lds floats arranged; `rows` is no list, w of floats or kI8x32.
  void (*weighted)(const Matrix& w, Rows rows, const float* p, int64_t ldp, int64_t num_x, float* sums, int64_t lds);

  // sums[m] += sum over i of h[m * ldh + i] * row rows[i] of w, of floats, for many vectors: the column_block
  // columns from `column` on, in w's arrangement, one vector every lds floats; `panel` is a scratch of panel_size floats.
  void (*add_columns)(const Matrix& w, Rows rows, int64_t column, const float* h, int64_t ldh, int64_t num_x,
                      float* panel, float* sums, int64_t lds);
  int64_t panel_size;
  int64_t column_block;

  // x of n elements as a row of kI8x32 and its scales.
  void (*quantize_groups)(const float* x, int64_t n, int8_t* codes, uint16_t* scales);

  // out = x over its root mean square, times `scale`.
  void (*rms_norm)(const float* x, int64_t n, const float* scale, float eps, float* out);
  // p = exp(p - max p); returns the sum.
  float (*exponentiate)(float* p, int64_t n, float* max);
  // Reads the bytes and returns a value that depends on all of them.
  uint64_t (*read)(const void* data, int64_t bytes);
};

// The best table for the processor this runs on.
const Kernels& BestKernels();
// Every table that this processor can run, best first; ends with a null pointer.
const Kernels* const* RunnableKernels();

}  // namespace jsparse
