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

// What has been seen of a row. Logits at the maximum count 1 each and are kept apart from the sum over the others: when
// one logit towers above the rest (p -> 1), log p = -log1p(rest) would drown in 1 + rest.
struct RowStats {
  float max = -__builtin_inff();
  float at_max = 0;    // how many logits equal max
  float rest = 0;      // Σ e^(z - max) over the others
  float weighted = 0;  // Σ e^(z - max)·(z - max), for the entropy
};

// lse = max + log_sum. The log-prob of a target is (z - max) - log_sum, which keeps bits that z - lse would lose; it
// cannot be above 0. NaN stays NaN.
struct RowResult {
  float logprob, lse, entropy;
};
inline RowResult finish_row(const RowStats& s, float z_target) {
  const float log_sum = __builtin_logf(s.at_max) + __builtin_log1pf(s.rest / s.at_max);
  const float logprob = (z_target - s.max) - log_sum;
  return {logprob > 0 ? 0 : logprob, s.max + log_sum, log_sum - s.weighted / (s.at_max + s.rest)};
}

struct LogprobRowKernels {
  // Folds v more logits into *stats. bias may be null.
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

FP_DECLARE_SIMD(LogprobRowKernels, logprob_row_kernels)

}  // namespace fastpost
