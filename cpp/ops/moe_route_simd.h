// SPDX-License-Identifier: Apache-2.0
// A block of tokens of the router, forward and backward: everything but the plan. Rows of logits are as short as 8, so a
// register holds one expert's logit of 16 tokens instead of one token's row.
#pragma once

#include "core/dtype.h"
#include "core/isa.h"

namespace fastpost {

constexpr int64_t kRouteLanes = 16;  // tokens that go side by side

struct RouteOptions {
  DType dtype;  // of the logits; double: everything in double
  int64_t experts, top_k;
  bool sigmoid, normalize;
  double scale;
};

struct RouteRows {
  const char* logits;  // row 0
  int64_t stride, tokens;

  const char* row(DType dtype, int64_t i) const { return logits + i * stride * itemsize(dtype); }
};

// Bytes that one thread needs for a tile of tokens.
constexpr int64_t route_scratch(int64_t experts, int64_t top_k) {
  return kRouteLanes * static_cast<int64_t>(sizeof(double)) * (5 * experts + 4 * top_k);
}

struct RouteForward {
  const float* correction;  // [experts], may be null
  int64_t* expert;          // [tokens, top_k]
  void* gate;               // [tokens, top_k] float, or double
  int32_t* count;           // [experts]: += slots
  double* probability;      // [experts]: sum over the tokens
  double* z;                // sum over the tokens of logsumexp²
};

struct RouteBackward {
  const int64_t* expert;
  const void* grad_gate;      // float or double, may be null
  const double* coefficient;  // [experts]: d loss / d probability of one token
  double z;                   // d loss / d logsumexp² of one token
  void* grad_logits;          // rows apart by `stride`
  int64_t stride;
};

struct RouteKernels {
  // Index of a row whose logits have NaN, +inf or nothing but -inf; -1: none. Such rows get numbers within bounds.
  int64_t (*forward)(const RouteOptions& options, const RouteRows& rows, const RouteForward& out, void* scratch);
  void (*backward)(const RouteOptions& options, const RouteRows& rows, const RouteBackward& out, void* scratch);
};

FP_DECLARE_SIMD(RouteKernels, route_kernels)

}  // namespace fastpost
