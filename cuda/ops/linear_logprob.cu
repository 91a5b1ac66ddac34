// SPDX-License-Identifier: Apache-2.0
#include "cuda/core/launch.h"
#include "cuda/ops.h"
#include "cuda/ops/token_logprob.cuh"

namespace fastpost::cuda {
namespace {

// stats [5, n]: one column per row of logits, which lives across tiles.
struct Stats {
  float* base;
  int64_t n;
  __device__ float& at(int row, int64_t i) const { return base[row * n + i]; }
  __device__ RowStats load(int64_t i) const { return {at(0, i), at(1, i), at(2, i), at(3, i)}; }
  __device__ void store(int64_t i, const RowStats& s) const {
    at(0, i) = s.max;
    at(1, i) = s.at_max;
    at(2, i) = s.rest;
    at(3, i) = s.weighted;
  }
  __device__ float& z_target(int64_t i) const { return at(4, i); }
};

template <class T, bool kSoftcap, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads)
    tile_kernel(const T* logits, int64_t row_stride, int64_t v, const T* bias, const int64_t* targets,
                int64_t vocab_start, LogitTransform t, Stats stats) {
  const int64_t i = blockIdx.x;
  const T* row = logits + i * row_stride;
  const RowStats tile = row_stats<T, kSoftcap, kEntropy>(row, bias, v, t);
  if (threadIdx.x != 0) return;
  stats.store(i, merged(stats.load(i), tile));
  const int64_t target = targets[i] - vocab_start;
  if (target >= 0 && target < v) stats.z_target(i) = transform<kSoftcap>(raw_logit(row, bias, target), t);
}

constexpr int kFinishThreads = 256;

__global__ void finish_kernel(Stats stats, float* logprob, float* lse, float* entropy) {
  const int64_t i = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (i >= stats.n) return;
  const RowResult result = finished(stats.load(i), stats.z_target(i));
  logprob[i] = result.logprob;
  lse[i] = result.lse;
  if (entropy) entropy[i] = result.entropy;
}

template <class T, bool kSoftcap, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads)
    tile_backward_kernel(const T* logits, int64_t row_stride, int64_t v, const T* bias, const int64_t* targets,
                         int64_t vocab_start, LogitTransform t, const float* logprob, const float* lse,
                         const float* entropy, const float* grad_logprob, const float* grad_entropy, T* grad_logits,
                         int64_t grad_row_stride) {
  const int64_t i = blockIdx.x;
  const float g = grad_logprob[i];
  float h = 0.0f, row_entropy = 0.0f;
  if constexpr (kEntropy) {
    h = grad_entropy[i];
    if (h != 0.0f) row_entropy = entropy[i];
  }
  T* out = grad_logits + i * grad_row_stride;
  if (g == 0.0f && h == 0.0f) return fill_row(out, v, 0.0f);
  int64_t target = targets[i] - vocab_start;
  if (target >= v) target = -1;
  row_gradient<T, kSoftcap, kEntropy>(logits + i * row_stride, bias, v, t, target, logprob[i], lse[i], row_entropy, g,
                                      h, out);
}

}  // namespace

void linear_logprob_tile(Tensor logits, Tensor bias, Tensor target, int64_t vocab_start, float temperature,
                         float softcap, bool with_entropy, Tensor stats) {
  const Stream stream("linear_logprob", logits);
  const LogitTransform t{1.0f / temperature, softcap};
  const int64_t n = logits.size(0);
  visit_float(logits.dtype, [&]<class T>(T) {
    with_flag(softcap != 0, [&](auto capped) {
      with_flag(with_entropy, [&](auto entropy) {
        launch(tile_kernel<T, decltype(capped)::value, decltype(entropy)::value>, n, kRowThreads, 0, stream,
               logits.ptr<T>(), logits.stride(0), logits.size(1), bias.ptr<T>(), target.ptr<int64_t>(), vocab_start, t,
               Stats{stats.ptr<float>(), n});
      });
    });
  });
}

void linear_logprob_finish(Tensor stats, Tensor logprob, Tensor lse, Tensor entropy) {
  const Stream stream("linear_logprob", stats);
  const int64_t n = stats.size(1);
  launch(finish_kernel, blocks_for(n, kFinishThreads), kFinishThreads, 0, stream, Stats{stats.ptr<float>(), n},
         logprob.ptr<float>(), lse.ptr<float>(), entropy.ptr<float>());
}

void linear_logprob_tile_backward(Tensor logits, Tensor bias, Tensor target, int64_t vocab_start, float temperature,
                                  float softcap, Tensor logprob, Tensor lse, Tensor entropy, Tensor grad_logprob,
                                  Tensor grad_entropy, Tensor grad_logits) {
  const Stream stream("linear_logprob_backward", logits);
  const LogitTransform t{1.0f / temperature, softcap};
  visit_float(logits.dtype, [&]<class T>(T) {
    with_flag(softcap != 0, [&](auto capped) {
      with_flag(grad_entropy.defined(), [&](auto with_entropy) {
        launch(tile_backward_kernel<T, decltype(capped)::value, decltype(with_entropy)::value>, logits.size(0),
               kRowThreads, 0, stream, logits.ptr<T>(), logits.stride(0), logits.size(1), bias.ptr<T>(),
               target.ptr<int64_t>(), vocab_start, t, logprob.ptr<float>(), lse.ptr<float>(), entropy.ptr<float>(),
               grad_logprob.ptr<float>(), grad_entropy.ptr<float>(), grad_logits.ptr<T>(), grad_logits.stride(0));
      });
    });
  });
}

}  // namespace fastpost::cuda
