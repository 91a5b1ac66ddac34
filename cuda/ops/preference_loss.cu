// SPDX-License-Identifier: Apache-2.0
// The work is a few numbers per token and per sequence: what counts is few launches, no atomics and no host round trip.
// Sums and objectives are double, as on the CPU.
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/segments.cuh"
#include "cuda/ops.h"
#include "objectives.h"

namespace fastpost::cuda {
namespace {

constexpr int kThreads = 256;

struct Totals {
  double value, count;
};
__device__ inline Totals block_sum(Totals mine) {
  return block_reduce<kThreads>(
      mine, [](const Totals& a, const Totals& b) { return Totals{a.value + b.value, a.count + b.count}; });
}

// What the mean loss divides by: pairs, sequences or scored tokens.
struct Denominator {
  int64_t groups;
  bool scored_tokens;
  __device__ double operator()(double tokens) const {
    const double count = scored_tokens ? tokens : static_cast<double>(groups);
    return count > 1.0 ? count : 1.0;
  }
};

Denominator denominator(Kind kind, int64_t sequences) {
  return {needs(kind).pairs ? sequences / 2 : sequences, kind == Kind::sft};
}

// One block per sequence.
__global__ void __launch_bounds__(kThreads)
    segment_sum_kernel(const float* logprob, const int64_t* target, int64_t tokens, const int32_t* cu_seqlens,
                       int64_t ignore_index, float* logprob_sum, int32_t* length) {
  const int64_t i = blockIdx.x;
  const auto [begin, end] = segment(cu_seqlens, i, tokens);
  Totals mine = {0.0, 0.0};
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
    if (target[t] == ignore_index) continue;
    mine.value += static_cast<double>(logprob[t]);
    mine.count += 1.0;
  }
  const Totals sum = block_sum(mine);
  if (threadIdx.x == 0) {
    logprob_sum[i] = static_cast<float>(sum.value);
    length[i] = static_cast<int32_t>(sum.count);
  }
}

struct Inputs {  // per sequence; null where the objective does not need it
  const float *logprob_sum, *reference, *previous, *reward;
  const int32_t* length;
  __device__ Sequence<double> operator[](int64_t i) const {
    Sequence<double> q{logprob_sum[i], static_cast<double>(length[i])};
    if (reference) q.reference = reference[i];
    if (previous) q.previous = previous[i];
    if (reward) q.reward = reward[i];
    return q;
  }
};

// One block for all sequences: there are seldom more than a few hundred, and the mean then needs no second pass.
__global__ void __launch_bounds__(kThreads)
    objective_kernel(Inputs in, Objective objective, int per_group, Denominator denominator, const float* kl,
                     float* loss, float* losses, float* rewards, float* derivative) {
  const double kl_value = kl ? static_cast<double>(*kl) : 0.0;
  Totals mine = {0.0, 0.0};
  for (int64_t g = threadIdx.x; g < denominator.groups; g += kThreads) {
    const int64_t i = g * per_group, j = i + per_group - 1;  // j = i where there are no pairs
    const Sequence<double> chosen = in[i], rejected = in[j];
    const PairLoss<double> f = evaluate<double>(objective, chosen, rejected, kl_value);
    losses[g] = static_cast<float>(f.value);
    derivative[i] = static_cast<float>(f.chosen);
    rewards[i] = static_cast<float>(implicit_reward(objective, chosen));
    mine.value += f.value;
    mine.count += chosen.length;
    if (per_group == 2) {
      derivative[j] = static_cast<float>(f.rejected);
      rewards[j] = static_cast<float>(implicit_reward(objective, rejected));
      mine.count += rejected.length;
    }
  }
  const Totals sum = block_sum(mine);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum.value / denominator(sum.count));
}

// One thread per token, so that every element of grad_logprob is written whatever cu_seqlens holds.
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const int64_t* target, int64_t tokens, const int32_t* cu_seqlens, int64_t sequences,
                    int64_t ignore_index, int per_group, Denominator denominator, const int32_t* length,
                    const float* derivative, const float* grad_loss, const float* grad_losses,
                    const float* grad_logprob_sum, float* grad_logprob) {
  double per_mean = 0.0;
  if (grad_loss) {
    Totals lengths = {0.0, 0.0};
    if (denominator.scored_tokens) {
      for (int64_t i = threadIdx.x; i < sequences; i += kThreads) lengths.count += length[i];
      lengths = block_sum(lengths);
    }
    per_mean = *grad_loss / denominator(lengths.count);
  }
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= tokens) return;
  const int64_t i = segment_of(cu_seqlens, sequences, t);
  double grad = 0.0;
  if (target[t] != ignore_index && i >= 0) {
    double upstream = per_mean;
    if (grad_losses) upstream += grad_losses[i / per_group];
    grad = upstream * derivative[i];
    if (grad_logprob_sum) grad += grad_logprob_sum[i];
  }
  grad_logprob[t] = static_cast<float>(grad);
}

int per_group(Kind kind) { return needs(kind).pairs ? 2 : 1; }

}  // namespace

void preference_loss(Tensor logprob, Tensor target, Tensor cu_seqlens, int64_t ignore_index, const Objective& objective,
                     Tensor reference, Tensor previous, Tensor reward, Tensor kl, Tensor loss, Tensor losses,
                     Tensor logprob_sum, Tensor length, Tensor rewards, Tensor derivative) {
  const Stream stream("preference_loss", logprob);
  const int64_t sequences = length.size(0);
  launch(segment_sum_kernel, sequences, kThreads, 0, stream, logprob.ptr<float>(), target.ptr<int64_t>(),
         target.size(0), cu_seqlens.ptr<int32_t>(), ignore_index, logprob_sum.ptr<float>(), length.ptr<int32_t>());
  const Needs need = needs(objective.kind);
  const Inputs inputs{logprob_sum.ptr<float>(), need.reference ? reference.ptr<float>() : nullptr,
                      need.previous ? previous.ptr<float>() : nullptr, need.reward ? reward.ptr<float>() : nullptr,
                      length.ptr<int32_t>()};
  launch(objective_kernel, 1, kThreads, 0, stream, inputs, objective, per_group(objective.kind),
         denominator(objective.kind, sequences), kl.ptr<float>(), loss.ptr<float>(), losses.ptr<float>(),
         rewards.ptr<float>(), derivative.ptr<float>());
}

void preference_loss_backward(Tensor target, Tensor cu_seqlens, int64_t ignore_index, Kind kind, Tensor length,
                              Tensor derivative, Tensor grad_loss, Tensor grad_losses, Tensor grad_logprob_sum,
                              Tensor grad_logprob) {
  const Stream stream("preference_loss_backward", derivative);
  const int64_t tokens = target.size(0), sequences = derivative.size(0);
  launch(backward_kernel, blocks_for(tokens, kThreads), kThreads, 0, stream, target.ptr<int64_t>(), tokens,
         cu_seqlens.ptr<int32_t>(), sequences, ignore_index, per_group(kind), denominator(kind, sequences),
         length.ptr<int32_t>(), derivative.ptr<float>(), grad_loss.ptr<float>(), grad_losses.ptr<float>(),
         grad_logprob_sum.ptr<float>(), grad_logprob.ptr<float>());
}

}  // namespace fastpost::cuda
