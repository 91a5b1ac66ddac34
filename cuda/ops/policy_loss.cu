// SPDX-License-Identifier: Apache-2.0
// A few numbers per token: few launches, no atomics, no host round trip. Sums and losses are double, as on the CPU.
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/segments.cuh"
#include "cuda/ops.h"

namespace fastpost::cuda {
namespace {

constexpr int kThreads = 256;

__device__ inline PolicySums block_sum(PolicySums mine) {
  return block_reduce<kThreads>(mine, [](const PolicySums& a, const PolicySums& b) { return a + b; });
}

struct Inputs {
  const float *logprob, *advantage, *old, *reference;  // the last two may be null
  const int64_t* target;
  int64_t tokens, ignore_index;
  bool advantage_per_token;

  __device__ bool scored(int64_t t) const { return target[t] != ignore_index; }
  __device__ double log_ratio(int64_t t) const { return static_cast<double>(logprob[t]) - (old ? old[t] : logprob[t]); }
};

// One block per sequence.
__global__ void __launch_bounds__(kThreads)
    sequence_kernel(Inputs in, PolicyObjective objective, const int32_t* cu_seqlens, float* losses, int32_t* length,
                    float* derivative, PolicySums* sums) {
  const int64_t i = blockIdx.x;
  const Segment tokens = segment(cu_seqlens, i, in.tokens);
  PolicySums mine = {};
  for (int64_t t = tokens.begin + threadIdx.x; t < tokens.end; t += kThreads) {
    if (!in.scored(t)) continue;
    mine.ratio += in.log_ratio(t);
    mine.length += 1;
  }
  const PolicySums first = block_sum(mine);
  const double weight = token_weight(objective, first.length), share = ratio_share(objective, first.length);
  const bool per_token = objective.level == RatioLevel::token;
  const double shared_ratio = exp(first.ratio * share);

  mine = {};
  for (int64_t t = tokens.begin + threadIdx.x; t < tokens.end; t += kThreads) {
    derivative[t] = 0;
    if (!in.scored(t)) continue;
    const double ratio = per_token ? exp(in.log_ratio(t)) : shared_ratio;
    PolicyToken token = policy_token(objective, in.logprob[t], ratio, in.advantage[in.advantage_per_token ? t : i]);
    if (in.reference) add_kl(objective, in.logprob[t], in.reference[t], token);
    mine.add(token, ratio);
    mine.length += 1;
    derivative[t] = static_cast<float>(weight * (token.direct + (per_token ? token.through_ratio : 0.0)));
  }
  const PolicySums all = block_sum(mine);
  if (!per_token) {  // each thread on its own tokens again
    const double slope = weight * share * all.slope;
    for (int64_t t = tokens.begin + threadIdx.x; t < tokens.end; t += kThreads) {
      if (in.scored(t)) derivative[t] = static_cast<float>(derivative[t] + slope);
    }
  }
  if (threadIdx.x == 0) {
    sums[i] = finish_sequence(objective, all, shared_ratio);
    losses[i] = static_cast<float>(sums[i].value);
    length[i] = static_cast<int32_t>(all.length);
  }
}

// One block for all sequences.
__global__ void __launch_bounds__(kThreads)
    batch_kernel(PolicyObjective objective, const PolicySums* sums, int64_t sequences, const float* num_items,
                 float* loss, float* count, float* metrics) {
  PolicySums mine = {};
  for (int64_t i = threadIdx.x; i < sequences; i += kThreads) mine = mine + sums[i];
  const PolicySums all = block_sum(mine);
  if (threadIdx.x != 0) return;
  const double given = num_items ? static_cast<double>(*num_items) : -1.0;
  const PolicyTotals totals = finish_batch(objective, all, static_cast<double>(sequences), given);
  *loss = static_cast<float>(totals.loss);
  *count = static_cast<float>(totals.count);
  for (int m = 0; m < 4; ++m) metrics[m] = static_cast<float>(totals.metrics[m]);
}

// One thread per token, so that every element of grad_logprob is written whatever cu_seqlens holds.
__global__ void __launch_bounds__(kThreads)
    backward_kernel(int64_t tokens, const int32_t* cu_seqlens, int64_t sequences, const float* derivative,
                    const float* count, const float* grad_loss, const float* grad_losses, float* grad_logprob) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= tokens) return;
  const int64_t i = segment_of(cu_seqlens, sequences, t);
  if (i < 0) {
    grad_logprob[t] = 0;
    return;
  }
  double upstream = grad_loss ? *grad_loss / static_cast<double>(*count) : 0.0;
  if (grad_losses) upstream += grad_losses[i];
  grad_logprob[t] = static_cast<float>(upstream * derivative[t]);
}

}  // namespace

void policy_loss(Tensor logprob, Tensor target, Tensor cu_seqlens, int64_t ignore_index,
                 const PolicyObjective& objective, Tensor advantage, Tensor old, Tensor reference, Tensor num_items,
                 Tensor loss, Tensor losses, Tensor length, Tensor derivative, Tensor count, Tensor metrics,
                 Tensor sums) {
  const Stream stream("policy_loss", logprob);
  const int64_t tokens = logprob.size(0), sequences = length.size(0);
  const Inputs inputs{logprob.ptr<float>(),   advantage.ptr<float>(),        old.ptr<float>(),
                      reference.ptr<float>(), target.ptr<int64_t>(),         tokens,
                      ignore_index,           advantage.size(0) != sequences};
  launch(sequence_kernel, sequences, kThreads, 0, stream, inputs, objective, cu_seqlens.ptr<int32_t>(),
         losses.ptr<float>(), length.ptr<int32_t>(), derivative.ptr<float>(), sums.ptr<PolicySums>());
  launch(batch_kernel, 1, kThreads, 0, stream, objective, sums.ptr<PolicySums>(), sequences, num_items.ptr<float>(),
         loss.ptr<float>(), count.ptr<float>(), metrics.ptr<float>());
}

void policy_loss_backward(Tensor cu_seqlens, Tensor derivative, Tensor count, Tensor grad_loss, Tensor grad_losses,
                          Tensor grad_logprob) {
  const Stream stream("policy_loss_backward", derivative);
  const int64_t tokens = derivative.size(0);
  launch(backward_kernel, blocks_for(tokens, kThreads), kThreads, 0, stream, tokens, cu_seqlens.ptr<int32_t>(),
         cu_seqlens.size(0) - 1, derivative.ptr<float>(), count.ptr<float>(), grad_loss.ptr<float>(),
         grad_losses.ptr<float>(), grad_logprob.ptr<float>());
}

}  // namespace fastpost::cuda
