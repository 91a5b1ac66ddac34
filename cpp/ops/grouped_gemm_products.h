// SPDX-License-Identifier: Apache-2.0
// The products of grouped_gemm on a CPU; arguments are checked (grouped_gemm.cpp).
//
// Every product is that of linear_logprob_fused_simd.h: rows of words times a panel of lanes.
//
// W with stride 1 along K: rows of W, as they lie in memory, times panels whose lanes are an expert's rows of x; an
// activation happens while a block of results is in cache. W with stride 1 along N (transposed, the input gradient): rows
// of x times panels of W whose lanes are neighbouring outputs. Weight gradient: both packed with steps along the rows.
// An expert with few rows reads W straight into registers.
//
// Work is cut into (expert, block) units that are shared out by their cost, so that uneven experts keep all threads busy;
// every sum runs in an order that depends on the shape and the expert's own rows alone.
#pragma once

#include "core/tensor.h"
#include "ops/grouped_gemm_simd.h"

namespace fastpost {

struct Groups {
  const int32_t* offset;
  int64_t experts;
  int64_t first(int64_t e) const { return offset[e]; }
  int64_t rows(int64_t e) const { return offset[e + 1] - offset[e]; }
};

// Workspace for any of them, for a weight [e, n, k] and r grouped rows.
int64_t product_bytes(DType dtype, int64_t r, int64_t e, int64_t n, int64_t k, int64_t threads);

// out = activation(x · Wᵀ + bias?) and pre?, for a W with stride 1 along K.
void multiply_forward(const GroupedRows& x, const Tensor& weight, const Groups& groups, const Tensor& bias,
                      Activation activation, const Tensor& workspace, const Tensor& pre, const Tensor& out);

// out = x · Wᵀ + bias?, for a W with stride 1 along N.
void multiply_transposed(const GroupedRows& x, const Tensor& weight, const Groups& groups, const Tensor& bias,
                         const Tensor& workspace, const Tensor& out);

// grouped_gemm_activation_backward.
void multiply_activation_backward(const GroupedRows& grad, const Tensor& weight, const Groups& groups,
                                  const Tensor& pre, Activation activation, const Tensor& gate, const Tensor& workspace,
                                  const Tensor& grad_pre, const Tensor& activated, const Tensor& grad_gate);

// grouped_gemm_weight_gradient.
void multiply_outer(const GroupedRows& grad, const GroupedRows& x, int64_t r, const Groups& groups,
                    const Tensor& workspace, const Tensor& grad_weight, const Tensor& grad_bias);

}  // namespace fastpost
