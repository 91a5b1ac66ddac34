// SPDX-License-Identifier: Apache-2.0
// Policy-gradient losses once: value and derivative of one token. Header only and free of torch and Python, as
// objectives.h, so CPU and CUDA kernels share it.
//
// python/fastpost/objectives/policy.py has the same in plain torch with conventions, defaults and sources: its
// POLICY_KINDS are FP_POLICY_KINDS, its LEVELS are FP_RATIO_LEVELS. A test holds both equal.
#pragma once

#include "objectives.h"

namespace fastpost {

#define FP_POLICY_KINDS(X) X(grpo) X(dr_grpo) X(dapo) X(bnpo) X(cispo)
#define FP_RATIO_LEVELS(X) X(token) X(sequence) X(trajectory)

#define FP_ENUMERATOR(name) name,
enum class PolicyKind : int { FP_POLICY_KINDS(FP_ENUMERATOR) count };
enum class RatioLevel : int { FP_RATIO_LEVELS(FP_ENUMERATOR) count };
#undef FP_ENUMERATOR

struct PolicyObjective {
  PolicyKind kind = PolicyKind::grpo;
  RatioLevel level = RatioLevel::token;
  double epsilon_low = 0, epsilon_high = 0;
  double delta = 0;  // 0: none
  double beta = 0;
  double max_completion_length = 1;
};

// Whether the loss divides by the number of scored tokens, else by that of sequences.
FP_HOST_DEVICE constexpr bool per_token_mean(PolicyKind kind) {
  return kind == PolicyKind::dapo || kind == PolicyKind::bnpo || kind == PolicyKind::cispo;
}

// What a token counts within its sequence of `length` scored tokens.
FP_HOST_DEVICE inline double token_weight(const PolicyObjective& o, double length) {
  if (o.kind == PolicyKind::grpo) return 1 / (length > 1 ? length : 1.0);
  return o.kind == PolicyKind::dr_grpo ? 1 / o.max_completion_length : 1.0;
}

// d log(ratio) / d logprob of a token, for the ratio of its sequence: exp of the mean or of the sum of log-ratios.
FP_HOST_DEVICE inline double ratio_share(const PolicyObjective& o, double length) {
  return o.level == RatioLevel::sequence ? 1 / (length > 1 ? length : 1.0) : 1.0;
}

struct PolicyToken {
  double value;          // loss, KL penalty included
  double through_ratio;  // d value / d log(ratio)
  double direct;         // d value / d logprob with the ratio held
  double kl;             // k3 estimate of KL(policy || reference)
  int clipped;  // -1 below, 1 above: the token has left the trust region on the side that its advantage pulls to
};

FP_HOST_DEVICE inline PolicyToken policy_token(const PolicyObjective& o, double logprob, double ratio,
                                               double advantage) {
  if (advantage == 0) {  // nothing, even where the ratio is infinite; but NaN stays NaN
    const double zero = ratio == ratio ? 0.0 : ratio;
    return {zero, zero, 0, 0, 0};
  }
  if (o.kind == PolicyKind::cispo) {
    const bool high = ratio > o.epsilon_high;
    const double weighted = (high ? o.epsilon_high : ratio) * advantage;
    return {-weighted * logprob, 0, -weighted, 0, high && advantage > 0};
  }
  const double low = 1 - o.epsilon_low, high = 1 + o.epsilon_high;
  const bool capped = o.delta > 0 && ratio > o.delta, outside = ratio < low || ratio > high;
  const double capped_ratio = capped ? o.delta : ratio;
  const double free = capped_ratio * advantage;
  const double clipped = (ratio < low ? low : ratio > high ? high : ratio) * advantage;
  const bool pick_free = free <= clipped;
  const bool constant = pick_free ? capped : outside;
  const int side = advantage < 0 ? -(capped_ratio < low) : capped_ratio > high;
  return {pick_free ? -free : -clipped, constant ? 0 : -ratio * advantage, 0, 0, side};
}

// Adds the penalty beta·k3, k3 = e^d - 1 - d with d = reference - logprob; the same digits for small d as for large.
FP_HOST_DEVICE inline void add_kl(const PolicyObjective& o, double logprob, double reference, PolicyToken& token) {
  const double d = reference - logprob, slope = std::expm1(d);
  token.kl = slope - d;
  if (o.beta == 0) return;
  token.value += o.beta * token.kl;
  token.direct -= o.beta * slope;
}

// Sums over the scored tokens of a sequence, then over sequences. low, high: how many are clipped; ratio: of ratios.
struct PolicySums {
  double value, kl, low, high, ratio, length;
  double slope;  // of through_ratio

  FP_HOST_DEVICE void add(const PolicyToken& token, double token_ratio) {
    value += token.value;
    kl += token.kl;
    low += token.clipped < 0;
    high += token.clipped > 0;
    ratio += token_ratio;
    slope += token.through_ratio;
  }
  FP_HOST_DEVICE PolicySums operator+(const PolicySums& x) const {
    return {value + x.value, kl + x.kl,         low + x.low,    high + x.high,
            ratio + x.ratio, length + x.length, slope + x.slope};
  }
};

// What a sequence contributes to losses and metrics: where it has one ratio, it counts once in low, high and ratio.
FP_HOST_DEVICE inline PolicySums finish_sequence(const PolicyObjective& o, PolicySums sums, double shared_ratio) {
  sums.value *= token_weight(o, sums.length);
  if (o.level != RatioLevel::token) {
    const double tokens = sums.length > 1 ? sums.length : 1.0;
    sums.low /= tokens;
    sums.high /= tokens;
    sums.ratio = shared_ratio;
  }
  return sums;
}

struct PolicyTotals {
  double loss, count;
  double metrics[4];  // mean KL, shares clipped below and above, mean ratio
};

// From the sums over all sequences. num_items < 0: none was given.
FP_HOST_DEVICE inline PolicyTotals finish_batch(const PolicyObjective& o, const PolicySums& sums, double sequences,
                                                double num_items) {
  const double own = per_token_mean(o.kind) ? sums.length : sequences;
  const double given = num_items >= 0 ? num_items : own;
  const double count = given > 1 ? given : 1.0;
  const double tokens = sums.length > 1 ? sums.length : 1.0;
  const double some = sequences > 1 ? sequences : 1.0, units = o.level == RatioLevel::token ? tokens : some;
  return {sums.value / count, count, {sums.kl / tokens, sums.low / units, sums.high / units, sums.ratio / units}};
}

}  // namespace fastpost
