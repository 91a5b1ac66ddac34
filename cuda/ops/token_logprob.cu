// SPDX-License-Identifier: Apache-2.0
#include "cuda/core/launch.h"
#include "cuda/ops.h"
#include "cuda/ops/token_logprob.cuh"

namespace fastpost::cuda {
namespace {

template <class T, bool kSoftcap, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads)
    forward_kernel(const T* logits, int64_t row_stride, int64_t v, const int64_t* targets, LogitTransform t,
                   int64_t ignore_index, float* logprob, float* lse, float* entropy) {
  const int64_t i = blockIdx.x, target = targets[i];
  RowResult result = {0.0f, 0.0f, 0.0f};
  if (target != ignore_index) {
    result = {NAN, NAN, NAN};
    if (target >= 0 && target < v) {
      const T* row = logits + i * row_stride;
      const RowStats stats = row_stats<T, kSoftcap, kEntropy>(row, nullptr, v, t);
      result = finished(stats, transform<kSoftcap>(to_float(row[target]), t));
    }
  }
  if (threadIdx.x == 0) {
    logprob[i] = result.logprob;
    lse[i] = result.lse;
    if constexpr (kEntropy) entropy[i] = result.entropy;
  }
}

template <class T, bool kSoftcap, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads)
    backward_kernel(const T* logits, int64_t row_stride, int64_t v, const int64_t* targets, LogitTransform t,
                    int64_t ignore_index, const float* logprob, const float* lse, const float* entropy,
                    const float* grad_logprob, const float* grad_entropy, T* grad_logits, int64_t grad_row_stride) {
  const int64_t i = blockIdx.x, target = targets[i];
  const float g = grad_logprob[i];
  float h = 0.0f, row_entropy = 0.0f;
  if constexpr (kEntropy) {
    h = grad_entropy[i];
    if (h != 0.0f) row_entropy = entropy[i];
  }
  T* out = grad_logits + i * grad_row_stride;
  if (target == ignore_index || (g == 0.0f && h == 0.0f)) {
    fill_row(out, v, 0.0f);
  } else if (target < 0 || target >= v) {
    fill_row(out, v, NAN);
  } else {
    row_gradient<T, kSoftcap, kEntropy>(logits + i * row_stride, nullptr, v, t, target, logprob[i], lse[i], row_entropy,
                                        g, h, out);
  }
}

}  // namespace

void token_logprob(Tensor logits, Tensor target, float temperature, float softcap, int64_t ignore_index, Tensor logprob,
                   Tensor lse, Tensor entropy) {
  const Stream stream("token_logprob", logits);
  const LogitTransform t{1.0f / temperature, softcap};
  visit_float(logits.dtype, [&]<class T>(T) {
    with_flag(softcap != 0, [&](auto capped) {
      with_flag(entropy.defined(), [&](auto with_entropy) {
        launch(forward_kernel<T, decltype(capped)::value, decltype(with_entropy)::value>, logits.size(0), kRowThreads,
               0, stream, logits.ptr<T>(), logits.stride(0), logits.size(1), target.ptr<int64_t>(), t, ignore_index,
               logprob.ptr<float>(), lse.ptr<float>(), entropy.ptr<float>());
      });
    });
  });
}

void token_logprob_backward(Tensor logits, Tensor target, float temperature, float softcap, int64_t ignore_index,
                            Tensor logprob, Tensor lse, Tensor entropy, Tensor grad_logprob, Tensor grad_entropy,
                            Tensor grad_logits) {
  const Stream stream("token_logprob_backward", logits);
  const LogitTransform t{1.0f / temperature, softcap};
  visit_float(logits.dtype, [&]<class T>(T) {
    with_flag(softcap != 0, [&](auto capped) {
      with_flag(grad_entropy.defined(), [&](auto with_entropy) {
        launch(backward_kernel<T, decltype(capped)::value, decltype(with_entropy)::value>, logits.size(0), kRowThreads,
               0, stream, logits.ptr<T>(), logits.stride(0), logits.size(1), target.ptr<int64_t>(), t, ignore_index,
               logprob.ptr<float>(), lse.ptr<float>(), entropy.ptr<float>(), grad_logprob.ptr<float>(),
               grad_entropy.ptr<float>(), grad_logits.ptr<T>(), grad_logits.stride(0));
      });
    });
  });
}

}  // namespace fastpost::cuda
