// The inner loops, one table of them per instruction set. Each runs on the calling thread alone.
//
// A vector that meets a matrix's rows is first *arranged* for the matrix's type: padded with zeros to whole groups of
// lanes x parts elements, and where shifts widen the packed elements permuted so that none crosses lanes. What is
// accumulated from rows (the down projection) comes out in the same arrangement.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace jsparse {

struct Kernels {
  const char* name;

  // Floats that an arranged vector of n elements takes.
  int64_t (*arranged_size)(Type type, int64_t n);
  void (*arrange)(Type type, const float* x, int64_t n, float scale, float* arranged);
  void (*restore)(Type type, const float* arranged, int64_t n, float* x);

  // A row of w in float32, scaled, in w's arrangement.
  void (*widen)(const Matrix& w, int64_t row, float* arranged);

  // x = the sum of `count` arranged vectors, one every `stride` floats; the first is overwritten.
  void (*combine)(Type type, float* arranged, int64_t count, int64_t stride, int64_t n, float* x);

  // out[m * ldo + i] = row rows[i] of w . x_m, for num_x vectors arranged one every ldx floats.
  void (*dots)(const Matrix& w, Rows rows, const float* x, int64_t ldx, int64_t num_x, float* out, int64_t ldo);
  // sum += coefficients[i] * row rows[i] of w, `sum` in w's arrangement.
  void (*accumulate)(const Matrix& w, Rows rows, const float* coefficients, float* sum);
  // sums[m] += sum over i of p[m * ldp + i] * row rows[i] of w, one every lds floats in w's arrangement; `rows` is no list, w whole.
  void (*weighted)(const Matrix& w, Rows rows, const float* p, int64_t ldp, int64_t num_x, float* sums, int64_t lds);

  // The products of a low-bit matrix (kI8 or kI4) with features of 16 bits, in integer arithmetic. `Quantize` arranges
  // and rounds x and returns the value of one step; score i is out[i] = step * (row . features).
  int64_t (*features_size)(Type type, int64_t n);
  float (*quantize)(Type type, const float* x, int64_t n, int16_t* features);
  void (*scores)(const Matrix& w, Rows rows, const int16_t* features, float step, float* out);

  // sums[m] += sum over i of h[m * ldh + i] * row rows[i] of w without its scale, for many vectors: the column_block
  // columns from `column` on, in w's arrangement, one vector every lds floats; `panel` is a scratch of panel_size floats.
  void (*add_columns)(const Matrix& w, Rows rows, int64_t column, const float* h, int64_t ldh, int64_t num_x,
                      float* panel, float* sums, int64_t lds);
  int64_t panel_size;
  int64_t column_block;

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
