// SPDX-License-Identifier: Apache-2.0
// The kernels behind int4_gemm on a CPU.
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

struct Int4Kernels {
  // Row `row` of W -> k elements of `dtype`.
  void (*dequantize)(const Int4Rows& w, int64_t row, DType dtype, void* out);
  // Σ x[k]·w[k]
  float (*dot)(DType dtype, const void* x, const float* w, int64_t k);
  // out[k] += a·w[k]
  void (*add)(float a, const float* w, int64_t k, float* out);
  void (*convert)(const float* src, DType dtype, void* out, int64_t n);
};

FP_DECLARE_SIMD(Int4Kernels, int4_kernels)

}  // namespace fastpost
