// SPDX-License-Identifier: Apache-2.0
// Sums of token log-probs over packed sequences, then one objective of cpp/objectives.h with its derivative.
// Arithmetic is double whatever the dtype: it is a few numbers per sequence, and sums of thousands of log-probs.
#include <algorithm>
#include <string>

#include "core/check.h"
#include "core/parallel.h"
#include "cuda/ops.h"
#include "objectives.h"
#include "ops.h"

namespace fastpost {
namespace {

constexpr int64_t kGrain = 8;  // sequences a thread should get at least

#define FP_NAME(name) #name,
std::string kind_name(Kind kind) {
  constexpr const char* names[] = {FP_OBJECTIVES(FP_NAME)};
  return names[static_cast<int>(kind)];
}
#undef FP_NAME

constexpr std::initializer_list<DType> kReals = {DType::Float32, DType::Float64};

template <class F>
void visit_real(DType t, F&& f) {
  t == DType::Float64 ? f(double{}) : f(float{});
}

Objective make_objective(const char* op, int64_t kind, const std::vector<double>& params) {
  if (kind < 0 || kind >= static_cast<int64_t>(Kind::count) || params.size() > Objective::kMaxParams) {
    fail(op, "objective", "what an Objective's core() returns", "kind " + std::to_string(kind));
  }
  Objective o{static_cast<Kind>(kind), {}};
  std::copy(params.begin(), params.end(), o.params);
  return o;
}

void expect_scored_tokens(const char* op, const Tensor& length, const Tensor& cu_seqlens, const Objective& o) {
  for (int64_t i = 0; i < length.size(0); ++i) {
    if (length.ptr<int32_t>()[i] > 0) continue;
    const int32_t* cu = cu_seqlens.ptr<int32_t>() + i;
    fail(op, "target", "a scored token in every sequence, because " + kind_name(o.kind) + " divides by their number",
         "none in sequence " + std::to_string(i) + " (tokens " + std::to_string(cu[0]) + " to " +
             std::to_string(cu[1]) + ")",
         "Drop the row.");
  }
}

// What the mean loss divides by.
int64_t count(Kind kind, const Tensor& length) {
  const int64_t s = length.size(0);
  if (needs(kind).pairs) return s / 2;
  if (kind != Kind::sft) return s;
  int64_t tokens = 0;
  for (int64_t i = 0; i < s; ++i) tokens += length.ptr<int32_t>()[i];
  return tokens;
}

template <class T>
void sum_segments(const Tensor& logprob, const Tensor& target, const Tensor& cu_seqlens, int64_t ignore_index,
                  const Tensor& logprob_sum, const Tensor& length) {
  const int32_t* cu = cu_seqlens.ptr<int32_t>();
  parallel_for(length.size(0), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double sum = 0;
      int32_t scored = 0;
      for (int64_t t = cu[i]; t < cu[i + 1]; ++t) {
        if (target.ptr<int64_t>()[t] == ignore_index) continue;
        sum += static_cast<double>(logprob.ptr<T>()[t]);
        ++scored;
      }
      logprob_sum.ptr<T>()[i] = static_cast<T>(sum);
      length.ptr<int32_t>()[i] = scored;
    }
  });
}

}  // namespace

void preference_loss(Tensor logprob, Tensor target, Tensor cu_seqlens, int64_t ignore_index, int64_t kind,
                     const std::vector<double>& params, Tensor reference, Tensor previous, Tensor reward, Tensor kl,
                     Tensor loss, Tensor losses, Tensor logprob_sum, Tensor length, Tensor rewards, Tensor derivative) {
  constexpr const char* op = "preference_loss";
  const Objective objective = make_objective(op, kind, params);
  const Needs need = needs(objective.kind);
  expect(op, "logprob", logprob, kReals, {kAny});
  const int64_t tokens = logprob.size(0);
  const DType real = logprob.dtype;
  expect(op, "target", target, {DType::Int64}, {tokens}, Layout::Contiguous, &logprob);
  expect(op, "cu_seqlens", cu_seqlens, {DType::Int32}, {kAny}, Layout::Contiguous, &logprob);
  const int64_t s = cu_seqlens.size(0) - 1;
  if (s < 0) fail(op, "cu_seqlens", "at least one element", "none");
  if (need.pairs && s % 2) {
    fail(op, "cu_seqlens", "an even number of sequences (chosen, rejected, chosen, ...)", std::to_string(s),
         "Pass whole pairs.");
  }
  const int64_t groups = need.pairs ? s / 2 : s;
  struct {
    const char* name;
    const Tensor& tensor;
    bool needed;
  } const per_sequence[] = {{"reference_logprob", reference, need.reference},
                            {"previous_logprob", previous, need.previous},
                            {"reward", reward, need.reward}};
  for (const auto& [name, tensor, needed] : per_sequence) {
    if (!needed) continue;
    if (!tensor.defined()) {
      fail(op, name, describe(logprob_sum), "None",
           (kind_name(objective.kind) + " needs it, one per sequence.").c_str());
    }
    expect(op, name, tensor, {real}, {s}, Layout::Contiguous, &logprob);
  }
  expect_optional(op, "kl", kl, {real}, {}, Layout::Contiguous, &logprob);
  expect(op, "loss", loss, {real}, {}, Layout::Contiguous, &logprob);
  expect(op, "losses", losses, {real}, {groups}, Layout::Contiguous, &logprob);
  expect(op, "logprob_sum", logprob_sum, {real}, {s}, Layout::Contiguous, &logprob);
  expect(op, "length", length, {DType::Int32}, {s}, Layout::Contiguous, &logprob);
  expect(op, "rewards", rewards, {real}, {s}, Layout::Contiguous, &logprob);
  expect(op, "derivative", derivative, {real}, {s}, Layout::Contiguous, &logprob);
  if (logprob.device == Device::CUDA) {
    expect(op, "logprob", logprob, {DType::Float32}, {tokens});
    return cuda::preference_loss(logprob, target, cu_seqlens, ignore_index, objective, reference, previous, reward, kl,
                                 loss, losses, logprob_sum, length, rewards, derivative);
  }
  expect_segments(op, cu_seqlens, tokens);

  visit_real(real, [&]<class T>(T) {
    sum_segments<T>(logprob, target, cu_seqlens, ignore_index, logprob_sum, length);
    if (divides_by_length(objective)) expect_scored_tokens(op, length, cu_seqlens, objective);
    auto sequence = [&](int64_t i) {
      Sequence<double> q{logprob_sum.ptr<T>()[i], static_cast<double>(length.ptr<int32_t>()[i])};
      if (need.reference) q.reference = reference.ptr<T>()[i];
      if (need.previous) q.previous = previous.ptr<T>()[i];
      if (need.reward) q.reward = reward.ptr<T>()[i];
      return q;
    };
    const double kl_value = kl.defined() ? static_cast<double>(*kl.ptr<T>()) : 0;
    double total = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t i = need.pairs ? 2 * g : g, j = need.pairs ? i + 1 : i;
      const PairLoss<double> f = evaluate<double>(objective, sequence(i), sequence(j), kl_value);
      total += f.value;
      losses.ptr<T>()[g] = static_cast<T>(f.value);
      derivative.ptr<T>()[i] = static_cast<T>(f.chosen);
      if (need.pairs) derivative.ptr<T>()[j] = static_cast<T>(f.rejected);
    }
    for (int64_t i = 0; i < s; ++i) rewards.ptr<T>()[i] = static_cast<T>(implicit_reward(objective, sequence(i)));
    *loss.ptr<T>() = static_cast<T>(total / static_cast<double>(std::max<int64_t>(count(objective.kind, length), 1)));
  });
}

void preference_loss_backward(Tensor target, Tensor cu_seqlens, int64_t ignore_index, int64_t kind, Tensor length,
                              Tensor derivative, Tensor grad_loss, Tensor grad_losses, Tensor grad_logprob_sum,
                              Tensor grad_logprob) {
  constexpr const char* op = "preference_loss_backward";
  const Kind k = make_objective(op, kind, {}).kind;
  const DType real = derivative.dtype;
  expect(op, "derivative", derivative, kReals, {kAny});
  const int64_t s = derivative.size(0);
  const int64_t per_group = needs(k).pairs ? 2 : 1;
  expect(op, "target", target, {DType::Int64}, {kAny}, Layout::Contiguous, &derivative);
  expect(op, "cu_seqlens", cu_seqlens, {DType::Int32}, {s + 1}, Layout::Contiguous, &derivative);
  expect(op, "length", length, {DType::Int32}, {s}, Layout::Contiguous, &derivative);
  expect_optional(op, "grad_loss", grad_loss, {real}, {}, Layout::Contiguous, &derivative);
  expect_optional(op, "grad_losses", grad_losses, {real}, {s / per_group}, Layout::Contiguous, &derivative);
  expect_optional(op, "grad_logprob_sum", grad_logprob_sum, {real}, {s}, Layout::Contiguous, &derivative);
  expect(op, "grad_logprob", grad_logprob, {real}, {target.size(0)}, Layout::Contiguous, &derivative);
  if (derivative.device == Device::CUDA) {
    return cuda::preference_loss_backward(target, cu_seqlens, ignore_index, k, length, derivative, grad_loss,
                                          grad_losses, grad_logprob_sum, grad_logprob);
  }
  expect_segments(op, cu_seqlens, target.size(0));

  visit_real(real, [&]<class T>(T) {
    const double per_mean =
        grad_loss.defined() ? *grad_loss.ptr<T>() / static_cast<double>(std::max<int64_t>(count(k, length), 1)) : 0;
    const int32_t* cu = cu_seqlens.ptr<int32_t>();
    parallel_for(s, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double upstream = per_mean;
        if (grad_losses.defined()) upstream += grad_losses.ptr<T>()[i / per_group];
        double grad = upstream * derivative.ptr<T>()[i];
        if (grad_logprob_sum.defined()) grad += grad_logprob_sum.ptr<T>()[i];
        for (int64_t t = cu[i]; t < cu[i + 1]; ++t) {
          grad_logprob.ptr<T>()[t] = target.ptr<int64_t>()[t] == ignore_index ? T(0) : static_cast<T>(grad);
        }
      }
    });
  });
}

}  // namespace fastpost
