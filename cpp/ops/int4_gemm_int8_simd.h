// SPDX-License-Identifier: Apache-2.0
// int4_gemm with int8 multipliers: codes are unsigned bytes, x is signed ones, what the zeros add is taken off at the end.
#pragma once

#include "ops/int4_gemm_simd.h"

namespace fastpost {

constexpr int kInt8Rows = 32;  // of W, side by side in the lanes of a panel

// x in int8. Digits: one row, each value in 15 bits as 256·high + low, with a scale for each block of 128 columns that is
// a power of two, so that the eight bits of a bfloat16 are kept where it is more than a 64th of the block's largest.
// Plain: any number of rows (W4A8), eight bits with a scale for each 32 columns. A NaN or infinity makes its scale NaN.
struct Int8Rows {
  int8_t* values;  // digits: [block][high, low][nibble % 2][64]; plain: [row][block][128], rows int8_row bytes apart
  float* scale;    // digits: [block]; plain: [row][unit]
  float* sums;     // of the rounded x: [row][block][part of a block that lies in one group]
};

// A cache line more than the data: at distances of a power of two, rows would fight for the same places.
constexpr int64_t int8_row(int64_t blocks) { return blocks * int4::kBlock + 64; }

struct Int8Kernels {
  bool there;  // this CPU has such multipliers
  // False if x holds NaN or infinity.
  bool (*pack_digits)(const Int4Rows& w, DType dtype, const void* x, const Int8Rows& out);
  void (*pack)(const Int4Rows& w, DType dtype, const void* x, int64_t row, const Int8Rows& out);

  // y [kStep] = the row of digits times rows [begin, end) of W.
  void (*multiply_digits)(const Int4Rows& w, int64_t begin, int64_t end, const Int8Rows& x, float* y);
  // kInt8Rows rows of W from `row` on: codes [block][unit][step][2][64], scales and zeros [block][part][kInt8Rows].
  void (*decode)(const Int4Rows& w, int64_t row, uint8_t* codes, float* scales, float* zeros);
  // y [rows][kInt8Rows] = rows of x from `first` on, at most kFewRows, times a decoded panel. On the way it prefetches
  // as many bytes of W from `soon` on, if that is not null.
  void (*multiply)(const Int4Rows& w, const uint8_t* codes, const float* scales, const float* zeros, const Int8Rows& x,
                   int64_t first, int64_t rows, const uint8_t* soon, float* y);
};

FP_DECLARE_SIMD(Int8Kernels, int8_kernels)

}  // namespace fastpost
