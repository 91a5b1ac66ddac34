// SPDX-License-Identifier: Apache-2.0
// The row kernels behind token_logprob and linear_logprob: one row of logits, or a vocabulary slice of it, at a time.
//
// A logit a becomes z = softcap(a + bias) / temperature before the softmax. softcap(x) = c·tanh(x / c), off when c = 0.
#pragma once

#include "core/dtype.h"
#include "core/isa.h"

namespace fastpost {

struct LogitTransform {
  float inverse_temperature = 1;
  float softcap = 0;
};

// What has been seen of a row: m = max z, Σ e^(z-m) and, for the entropy, Σ e^(z-m)·(z-m).
struct RowStats {
  float max;
  float sum;
  float weighted;
};

struct LogprobRowKernels {
  // Folds v more logits into *stats. Start from {-inf, 0, 0}. bias may be null.
  void (*accumulate)(DType dtype, const void* logits, const void* bias, int64_t v, const LogitTransform& t,
                     bool with_entropy, RowStats* stats);
  // z of one logit.
  float (*transform)(DType dtype, const void* logits, const void* bias, int64_t index, const LogitTransform& t);
  // out[j] = d(g·logp + h·entropy)/d logits[j] for v logits; target is the index of the target logit, or -1 when it
  // lies outside this slice. logprob (of the target), lse and entropy (ignored when h = 0) are the row's. out may be
  // the logits themselves.
  void (*gradient)(DType dtype, const void* logits, const void* bias, int64_t v, const LogitTransform& t,
                   int64_t target, float logprob, float lse, float entropy, float g, float h, void* out);
};

// Rounding can put a log-prob of nearly 1 just above 0; NaN stays.
inline float clamp_logprob(float x) { return x > 0 ? 0 : x; }

FP_DECLARE_SIMD(LogprobRowKernels, logprob_row_kernels)

}  // namespace fastpost
