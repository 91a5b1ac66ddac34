// SPDX-License-Identifier: Apache-2.0
// Weighted sums of rows, and their backward: what moe_combine and moe_dispatch's backward do with each token.
#pragma once

#include "core/dtype.h"
#include "core/isa.h"

namespace fastpost {

struct CombineKernels {
  // out[i] = Σ_k gate[k]·rows[k][i] for n elements, in the order of k; gate (float; double for Float64) may be null: 1.
  void (*sum)(DType dtype, const void* const* rows, const void* gate, int64_t count, int64_t n, void* out);
  // out[i] = gate·x[i], and returns Σ x·y. out or y may be null.
  double (*scale_and_dot)(DType dtype, const void* x, const void* y, double gate, int64_t n, void* out);
};

FP_DECLARE_SIMD(CombineKernels, combine_kernels)

}  // namespace fastpost
