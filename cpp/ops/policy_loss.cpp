// SPDX-License-Identifier: Apache-2.0
// Policy-gradient losses of cpp/policy_objectives.h on token log-probs of packed sequences, value and derivative in one
// call. Arithmetic is double whatever the dtype: it is a few numbers per token.
#include <algorithm>
#include <cmath>
#include <string>

#include "core/check.h"
#include "core/parallel.h"
#include "cuda/ops.h"
#include "ops.h"
#include "policy_objectives.h"

namespace fastpost {
namespace {

constexpr int64_t kGrain = 4;  // sequences a thread should get at least
constexpr int64_t kSums = sizeof(PolicySums) / sizeof(double);
constexpr std::initializer_list<DType> kReals = {DType::Float32, DType::Float64};

PolicyObjective make_objective(const char* op, int64_t kind, int64_t level, const std::vector<double>& params) {
  if (kind < 0 || kind >= static_cast<int64_t>(PolicyKind::count) || level < 0 ||
      level >= static_cast<int64_t>(RatioLevel::count) || params.size() != 5) {
    fail(op, "objective", "what GRPO's core() returns",
         "kind " + std::to_string(kind) + ", level " + std::to_string(level));
  }
  return {static_cast<PolicyKind>(kind),
          static_cast<RatioLevel>(level),
          params[0],
          params[1],
          params[2],
          params[3],
          params[4]};
}

template <class T>
struct Inputs {
  const T *logprob, *advantage, *old, *reference;  // the last two may be null
  const int64_t* target;
  int64_t ignore_index;
  bool advantage_per_token;

  bool scored(int64_t t) const { return target[t] != ignore_index; }
  double log_ratio(int64_t t) const { return static_cast<double>(logprob[t]) - (old ? old[t] : logprob[t]); }
};

// One sequence: what it contributes, and derivative of each of its tokens.
template <class T>
PolicySums sequence_loss(const PolicyObjective& o, const Inputs<T>& in, int64_t i, int64_t begin, int64_t end,
                         T* derivative) {
  PolicySums sums{};
  double log_ratio = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (!in.scored(t)) continue;
    log_ratio += in.log_ratio(t);
    ++sums.length;
  }
  const double weight = token_weight(o, sums.length), share = ratio_share(o, sums.length);
  const bool per_token = o.level == RatioLevel::token;
  const double shared_ratio = std::exp(log_ratio * share);
  for (int64_t t = begin; t < end; ++t) {
    derivative[t] = 0;
    if (!in.scored(t)) continue;
    const double ratio = per_token ? std::exp(in.log_ratio(t)) : shared_ratio;
    PolicyToken token = policy_token(o, in.logprob[t], ratio, in.advantage[in.advantage_per_token ? t : i]);
    if (in.reference) add_kl(o, in.logprob[t], in.reference[t], token);
    sums.add(token, ratio);
    derivative[t] = static_cast<T>(weight * (token.direct + (per_token ? token.through_ratio : 0)));
  }
  if (!per_token) {
    const double slope = weight * share * sums.slope;
    for (int64_t t = begin; t < end; ++t) {
      if (in.scored(t)) derivative[t] = static_cast<T>(derivative[t] + slope);
    }
  }
  return finish_sequence(o, sums, shared_ratio);
}

template <class F>
void visit_real(DType t, F&& f) {
  t == DType::Float64 ? f(double{}) : f(float{});
}

}  // namespace

void policy_loss(Tensor logprob, Tensor target, Tensor cu_seqlens, int64_t ignore_index, int64_t kind, int64_t level,
                 const std::vector<double>& params, Tensor advantage, Tensor old, Tensor reference, Tensor num_items,
                 Tensor loss, Tensor losses, Tensor length, Tensor derivative, Tensor count, Tensor metrics,
                 Tensor sums) {
  constexpr const char* op = "policy_loss";
  const PolicyObjective objective = make_objective(op, kind, level, params);
  expect(op, "logprob", logprob, kReals, {kAny});
  const int64_t tokens = logprob.size(0);
  const DType real = logprob.dtype;
  expect(op, "target", target, {DType::Int64}, {tokens}, Layout::Contiguous, &logprob);
  expect(op, "cu_seqlens", cu_seqlens, {DType::Int32}, {kAny}, Layout::Contiguous, &logprob);
  const int64_t s = cu_seqlens.size(0) - 1;
  if (s < 0) fail(op, "cu_seqlens", "at least one element", "none");
  expect(op, "advantage", advantage, {real}, {kAny}, Layout::Contiguous, &logprob);
  if (advantage.size(0) != s && advantage.size(0) != tokens) {
    fail(op, "advantage", "one per sequence [" + std::to_string(s) + "] or per token [" + std::to_string(tokens) + "]",
         describe(advantage));
  }
  expect_optional(op, "old_logprob", old, {real}, {tokens}, Layout::Contiguous, &logprob);
  expect_optional(op, "reference_logprob", reference, {real}, {tokens}, Layout::Contiguous, &logprob);
  if (objective.beta != 0 && !reference.defined()) {
    fail(op, "reference_logprob", describe(logprob), "None", "beta is not 0, and its KL penalty needs it.");
  }
  expect_optional(op, "num_items", num_items, {real}, {}, Layout::Contiguous, &logprob);
  expect(op, "loss", loss, {real}, {}, Layout::Contiguous, &logprob);
  expect(op, "losses", losses, {real}, {s}, Layout::Contiguous, &logprob);
  expect(op, "length", length, {DType::Int32}, {s}, Layout::Contiguous, &logprob);
  expect(op, "derivative", derivative, {real}, {tokens}, Layout::Contiguous, &logprob);
  expect(op, "count", count, {real}, {}, Layout::Contiguous, &logprob);
  expect(op, "metrics", metrics, {real}, {4}, Layout::Contiguous, &logprob);
  expect(op, "sums", sums, {DType::Float64}, {s, kSums}, Layout::Contiguous, &logprob);
  if (logprob.device == Device::CUDA) {
    expect(op, "logprob", logprob, {DType::Float32}, {tokens});
    return cuda::policy_loss(logprob, target, cu_seqlens, ignore_index, objective, advantage, old, reference, num_items,
                             loss, losses, length, derivative, count, metrics, sums);
  }
  expect_segments(op, cu_seqlens, tokens);

  visit_real(real, [&]<class T>(T) {
    const Inputs<T> in{logprob.ptr<T>(),      advantage.ptr<T>(), old.ptr<T>(),          reference.ptr<T>(),
                       target.ptr<int64_t>(), ignore_index,       advantage.size(0) != s};
    const int32_t* cu = cu_seqlens.ptr<int32_t>();
    parallel_for(s, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const PolicySums of_sequence = sequence_loss(objective, in, i, cu[i], cu[i + 1], derivative.ptr<T>());
        sums.ptr<PolicySums>()[i] = of_sequence;
        losses.ptr<T>()[i] = static_cast<T>(of_sequence.value);
        length.ptr<int32_t>()[i] = static_cast<int32_t>(of_sequence.length);
      }
    });
    PolicySums all{};  // in the order of sequences, whatever the threads
    for (int64_t i = 0; i < s; ++i) all = all + sums.ptr<PolicySums>()[i];
    const double given = num_items.defined() ? static_cast<double>(*num_items.ptr<T>()) : -1;
    const PolicyTotals totals = finish_batch(objective, all, static_cast<double>(s), given);
    *loss.ptr<T>() = static_cast<T>(totals.loss);
    *count.ptr<T>() = static_cast<T>(totals.count);
    for (int m = 0; m < 4; ++m) metrics.ptr<T>()[m] = static_cast<T>(totals.metrics[m]);
  });
}

void policy_loss_backward(Tensor cu_seqlens, Tensor derivative, Tensor count, Tensor grad_loss, Tensor grad_losses,
                          Tensor grad_logprob) {
  constexpr const char* op = "policy_loss_backward";
  const DType real = derivative.dtype;
  expect(op, "derivative", derivative, kReals, {kAny});
  const int64_t tokens = derivative.size(0);
  expect(op, "cu_seqlens", cu_seqlens, {DType::Int32}, {kAny}, Layout::Contiguous, &derivative);
  const int64_t s = cu_seqlens.size(0) - 1;
  expect(op, "count", count, {real}, {}, Layout::Contiguous, &derivative);
  expect_optional(op, "grad_loss", grad_loss, {real}, {}, Layout::Contiguous, &derivative);
  expect_optional(op, "grad_losses", grad_losses, {real}, {s}, Layout::Contiguous, &derivative);
  expect(op, "grad_logprob", grad_logprob, {real}, {tokens}, Layout::Contiguous, &derivative);
  if (derivative.device == Device::CUDA) {
    return cuda::policy_loss_backward(cu_seqlens, derivative, count, grad_loss, grad_losses, grad_logprob);
  }
  expect_segments(op, cu_seqlens, tokens);

  visit_real(real, [&]<class T>(T) {
    const double of_mean = grad_loss.defined() ? *grad_loss.ptr<T>() / static_cast<double>(*count.ptr<T>()) : 0;
    const int32_t* cu = cu_seqlens.ptr<int32_t>();
    parallel_for(s, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double upstream = of_mean + (grad_losses.defined() ? grad_losses.ptr<T>()[i] : T(0));
        for (int64_t t = cu[i]; t < cu[i + 1]; ++t) {
          grad_logprob.ptr<T>()[t] = static_cast<T>(upstream * derivative.ptr<T>()[t]);
        }
      }
    });
  });
}

}  // namespace fastpost
