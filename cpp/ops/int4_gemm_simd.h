// SPDX-License-Identifier: Apache-2.0
// The kernels behind int4_gemm on a CPU. The product of many rows is that of linear_logprob_fused_simd.h, whose words
// and panels these kernels make out of four-bit weights.
#pragma once

#include "core/dtype.h"
#include "core/isa.h"
#include "int4.h"

namespace fastpost {

// W [n, k] as it lies in memory (cpp/int4.h). Distances between rows are in bytes.
struct Int4Rows {
  const uint8_t* codes;
  int64_t codes_row;
  const char* scales;
  int64_t scales_row;
  DType scales_dtype;
  const uint8_t* zeros;  // null: 8
  int64_t zeros_row;
  const float* table;  // null: codes are integers
  int64_t n, k, group_size;
};

constexpr int kFewRows = 8;  // of x, at most, that `few` takes at a time
constexpr int kStep = 48;    // rows of W

// A word is a float32, or two bfloat16 that are neighbours along K (pairs). Blocks of 128 columns are whole: words of
// columns that do not exist are zero in x and finite in W. "Stored order": see int4_decode.h.
struct Int4Kernels {
  // A row of W in stored order.
  void (*decode)(bool pairs, const Int4Rows& w, int64_t row, uint32_t* out);
  // Rows [row, row + count) of W in one block of columns, as panels whose lanes are columns in their own order and whose
  // steps are rows (or pairs of rows), panel_steps of room for each.
  void (*decode_along)(bool pairs, const Int4Rows& w, int64_t row, int64_t count, int64_t block, int64_t panel_steps,
                       uint32_t* out);
  void (*dequantize)(const Int4Rows& w, int64_t row, DType dtype, void* out);

  // A row of x in stored order, or `count` rows as a panel of so many lanes, a multiple of 16.
  void (*pack)(DType dtype, bool pairs, const void* src, int64_t k, uint32_t* out);
  void (*pack_across)(DType dtype, bool pairs, const char* src, int64_t row_bytes, int64_t count, int64_t k,
                      int64_t lanes, uint32_t* out);

  // y [m][kStep] = rows of x, in stored order and x_row words apart, times rows [begin, end) of W; at most kFewRows and
  // kStep of them.
  void (*few)(bool pairs, const Int4Rows& w, int64_t begin, int64_t end, const uint32_t* x, int64_t x_row, int64_t m,
              float* y);

  // n sums and bias? of `dtype` -> dtype.
  void (*finish)(const float* y, int64_t n, DType dtype, const void* bias, void* out);
  // c [n][lanes] -> `used` rows of n.
  void (*finish_across)(const float* c, int64_t lanes, int64_t n, int64_t used, DType dtype, const void* bias,
                        char* out, int64_t out_row);
};

FP_DECLARE_SIMD(Int4Kernels, int4_kernels)

}  // namespace fastpost
