// SPDX-License-Identifier: Apache-2.0
// The kernels behind grouped_gemm on a CPU, beside the product of linear_logprob_fused_simd.h, whose words and panels
// these make out of rows that are gathered on the way.
#pragma once

#include "core/dtype.h"
#include "core/isa.h"

namespace fastpost {

enum class Activation : int64_t { None, SwiGlu, GeGlu, GeGluTanh, ReGlu };

// Rows of a matrix in grouped order: row i is row order[i] / top_k of memory, or i itself.
struct GroupedRows {
  const char* base;
  int64_t row_bytes;
  const int32_t* order;  // may be null
  int64_t top_k;
  DType dtype;
  const char* row(int64_t i) const { return base + (order ? order[i] / top_k : i) * row_bytes; }
};

struct GroupedKernels {
  // Rows [first, first + count) and columns [begin, end) as words (linear_logprob_fused_simd.h), an even number of
  // columns for pairs except at the edge. `across`: lanes are rows, steps go along columns. `along`: lanes are columns,
  // `lanes` of them a panel and panel_words apart, steps are rows or pairs of rows. `rows`: as they are, row_words apart.
  // What is missing in the lanes of a panel or in a pair is zero.
  void (*pack_across)(bool pairs, const GroupedRows& x, int64_t first, int64_t count, int64_t begin, int64_t end,
                      uint32_t* out);
  void (*pack_along)(bool pairs, const GroupedRows& x, int64_t first, int64_t count, int64_t begin, int64_t end,
                     int64_t lanes, int64_t panel_words, uint32_t* out);
  void (*pack_rows)(bool pairs, const GroupedRows& x, int64_t first, int64_t count, int64_t begin, int64_t end,
                    int64_t row_words, uint32_t* out);

  // y [m][y_row] = m rows of words times `count` rows of W, which lie at w: m <= 8.
  void (*few)(bool pairs, DType dtype, const char* w, int64_t w_row_bytes, int64_t count, int64_t k, const uint32_t* x,
              int64_t x_row, int64_t m, float* y, int64_t y_row);

  // y [m][y_row] += m rows of words times `count` rows of W, of which so many columns from w on: m <= 8. Room for a multiple
  // of 32 columns in y.
  void (*few_along)(bool pairs, DType dtype, const char* w, int64_t w_row_bytes, int64_t count, int64_t columns,
                    const uint32_t* x, int64_t x_row, int64_t m, float* y, int64_t y_row);

  // out [count] rows of so many columns = Σ over few steps of a(step, row) · panels [panel][step][lanes], in dtype;
  // a(step, row) = a[step·a_step + row].
  void (*outer)(bool pairs, DType dtype, const uint32_t* a, int64_t a_step, int64_t count, const uint32_t* panels,
                int64_t steps, int64_t columns, char* out, int64_t out_row);

  // z [rows][z_row] in place. Biases belong to rows or lanes; may be null.
  void (*add_bias)(float* z, int64_t z_row, int64_t rows, int64_t used, const char* bias, DType dtype, bool by_row);
  // first [rows][z_row] = act(first)·second.
  void (*activate)(Activation activation, float* first, const float* second, int64_t z_row, int64_t rows, int64_t used);

  // n columns of one row, everything in `dtype` but grad: a = act(first)·second. out (may be null) = gate·a, grad_first
  // and grad_second (may be null) = gate·grad·(da/dfirst, da/dsecond); returns Σ grad·a. grad may be null: nothing but out.
  float (*activation_backward)(Activation activation, DType dtype, const void* first, const void* second,
                               const float* grad, float gate, int64_t n, void* out, void* grad_first,
                               void* grad_second);

  // sums [n] += rows [first, first + count) of columns [begin, begin + n).
  void (*add_rows)(const GroupedRows& x, int64_t first, int64_t count, int64_t begin, int64_t n, float* sums);
};

FP_DECLARE_SIMD(GroupedKernels, grouped_kernels)

}  // namespace fastpost
