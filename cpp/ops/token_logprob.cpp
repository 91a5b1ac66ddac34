// SPDX-License-Identifier: Apache-2.0
#include "core/check.h"
#include "core/parallel.h"
#include "cuda/ops.h"
#include "ops.h"
#include "ops/token_logprob_simd.h"

namespace fastpost {
namespace {

constexpr int64_t kGrain = 1;  // a row is tens of microseconds: every row is worth a thread

}  // namespace

void token_logprob(Tensor logits, Tensor target, float temperature, float softcap, int64_t ignore_index, Tensor logprob,
                   Tensor lse, Tensor entropy) {
  constexpr const char* op = "token_logprob";
  expect(op, "logits", logits, kFloats, {kAny, kAny}, Layout::ContiguousRows);
  const int64_t n = logits.size(0), v = logits.size(1);
  expect(op, "target", target, {DType::Int64}, {n}, Layout::Contiguous, &logits);
  expect(op, "logprob", logprob, {DType::Float32}, {n}, Layout::Contiguous, &logits);
  expect(op, "lse", lse, {DType::Float32}, {n}, Layout::Contiguous, &logits);
  expect_optional(op, "entropy", entropy, {DType::Float32}, {n}, Layout::Contiguous, &logits);
  expect_transform(op, temperature, softcap);
  if (logits.device == Device::CUDA) {
    return cuda::token_logprob(logits, target, temperature, softcap, ignore_index, logprob, lse, entropy);
  }
  expect_targets(op, target, v, ignore_index);
  const LogitTransform transform{1.0f / temperature, softcap};
  const LogprobRowKernels& kernels = logprob_row_kernels();
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = target.ptr<int64_t>()[i];
      RowResult row{0, 0, 0};
      if (t != ignore_index) {
        RowStats s;
        kernels.accumulate(logits.dtype, logits.row(i), nullptr, v, transform, entropy.defined(), &s);
        row = finish_row(s, kernels.transform(logits.dtype, logits.row(i), nullptr, t, transform));
      }
      logprob.ptr<float>()[i] = row.logprob;
      lse.ptr<float>()[i] = row.lse;
      if (entropy.defined()) entropy.ptr<float>()[i] = row.entropy;
    }
  });
}

void token_logprob_backward(Tensor logits, Tensor target, float temperature, float softcap, int64_t ignore_index,
                            Tensor logprob, Tensor lse, Tensor entropy, Tensor grad_logprob, Tensor grad_entropy,
                            Tensor grad_logits) {
  constexpr const char* op = "token_logprob_backward";
  expect(op, "logits", logits, kFloats, {kAny, kAny}, Layout::ContiguousRows);
  const int64_t n = logits.size(0), v = logits.size(1);
  expect(op, "target", target, {DType::Int64}, {n}, Layout::Contiguous, &logits);
  expect(op, "logprob", logprob, {DType::Float32}, {n}, Layout::Contiguous, &logits);
  expect(op, "lse", lse, {DType::Float32}, {n}, Layout::Contiguous, &logits);
  expect(op, "grad_logprob", grad_logprob, {DType::Float32}, {n}, Layout::Contiguous, &logits);
  expect_optional(op, "grad_entropy", grad_entropy, {DType::Float32}, {n}, Layout::Contiguous, &logits);
  if (grad_entropy.defined()) expect(op, "entropy", entropy, {DType::Float32}, {n}, Layout::Contiguous, &logits);
  expect(op, "grad_logits", grad_logits, {logits.dtype}, {n, v}, Layout::ContiguousRows, &logits);
  expect_transform(op, temperature, softcap);
  if (logits.device == Device::CUDA) {
    return cuda::token_logprob_backward(logits, target, temperature, softcap, ignore_index, logprob, lse, entropy,
                                        grad_logprob, grad_entropy, grad_logits);
  }
  expect_targets(op, target, v, ignore_index);
  const LogitTransform transform{1.0f / temperature, softcap};
  const LogprobRowKernels& kernels = logprob_row_kernels();
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = target.ptr<int64_t>()[i];
      const float g = grad_logprob.ptr<float>()[i];
      const float h = grad_entropy.defined() ? grad_entropy.ptr<float>()[i] : 0.0f;
      char* out = grad_logits.row(i);
      if (t == ignore_index || (g == 0 && h == 0)) {
        std::memset(out, 0, v * itemsize(logits.dtype));
      } else {
        kernels.gradient(logits.dtype, logits.row(i), nullptr, v, transform, t, logprob.ptr<float>()[i],
                         lse.ptr<float>()[i], h != 0 ? entropy.ptr<float>()[i] : 0.0f, g, h, out);
      }
    }
  });
}

}  // namespace fastpost
