// SPDX-License-Identifier: Apache-2.0
// One row of logits, or a vocabulary slice of it, by one block: what token_logprob.cu and linear_logprob.cu share.
// The CPU's side of this file, with the same formulas, is cpp/ops/token_logprob_simd.cpp.
#pragma once

#include <cmath>

#include "cuda/core/reduce.cuh"
#include "cuda/core/vec.cuh"
#include "ops/token_logprob_simd.h"  // LogitTransform, RowStats, RowResult

namespace fastpost::cuda {

constexpr int kRowThreads = 256;
constexpr float kExpUnderflow = -104.0f;  // e^x rounds to zero from here on; keeps 0·(-inf) out of the entropy

__device__ inline float max_or_nan(float a, float b) {  // fmaxf would drop a NaN
#ifdef __CUDA_ARCH__
  float max;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(a), "f"(b));
  return max;
#else
  return a > b || a != a ? a : b;
#endif
}

// Rounded by itself (__fmul_rn): fused into a later z - max, the product would no longer cancel to the exact 0 by which
// logits at the maximum are known.
template <bool kSoftcap>
__device__ float transform(float a, const LogitTransform& t) {
  if constexpr (kSoftcap) a = t.softcap * tanhf(a * (1.0f / t.softcap));
  return __fmul_rn(a, t.inverse_temperature);
}

// The same sums relative to another maximum, which is at least as high: what stood at the old one joins the rest.
__device__ inline RowStats rescaled(const RowStats& s, float max) {
  if (s.max == max) return s;
  const float shift = max_or_nan(kExpUnderflow, s.max - max), e = expf(shift), all = s.at_max + s.rest;
  return {max, 0.0f, e * all, e * (s.weighted + shift * all)};
}

__device__ inline RowStats merged(const RowStats& a, const RowStats& b) {
  const float max = max_or_nan(a.max, b.max);
  const RowStats x = rescaled(a, max), y = rescaled(b, max);
  return {max, x.at_max + y.at_max, x.rest + y.rest, x.weighted + y.weighted};
}

// finish_row of the CPU.
__device__ inline RowResult finished(const RowStats& s, float z_target) {
  const float log_sum = logf(s.at_max) + log1pf(s.rest / s.at_max);
  const float logprob = (z_target - s.max) - log_sum;
  return {logprob > 0.0f ? 0.0f : logprob, s.max + log_sum, log_sum - s.weighted / (s.at_max + s.rest)};
}

// The statistics of one row, in every thread of the block. bias may be null.
template <class T, bool kSoftcap, bool kEntropy>
__device__ RowStats row_stats(const T* logits, const T* bias, int64_t size, const LogitTransform& t) {
  RowStats s;
  for_each_vector<kRowThreads>(logits, size, [&](int64_t j, auto count) {
    constexpr int N = decltype(count)::value;
    Floats<N> z = load<N>(logits + j);
    if (bias) {
      const Floats<N> b = load<N>(bias + j);
      for (int k = 0; k < N; ++k) z.v[k] += b.v[k];
    }
    float max = s.max;
    for (int k = 0; k < N; ++k) {
      z.v[k] = transform<kSoftcap>(z.v[k], t);
      max = max_or_nan(max, z.v[k]);
    }
    if (max == -INFINITY) return;  // so far this thread has seen nothing else: nothing to add
    s = rescaled(s, max);
    for (int k = 0; k < N; ++k) {
      const float d = z.v[k] - max, e = expf(d);
      const bool at_max = d == 0.0f;
      s.at_max += at_max ? 1.0f : 0.0f;
      s.rest += at_max ? 0.0f : e;
      if constexpr (kEntropy) s.weighted += e * max_or_nan(kExpUnderflow, d);
    }
  });
  return block_reduce<kRowThreads>(s, [](const RowStats& a, const RowStats& b) { return merged(a, b); });
}

template <class T>
__device__ float raw_logit(const T* logits, const T* bias, int64_t j) {
  return to_float(logits[j]) + (bias ? to_float(bias[j]) : 0.0f);
}

template <class T>
__device__ void fill_row(T* out, int64_t size, float value) {
  for_each_vector<kRowThreads>(out, size, [&](int64_t j, auto count) {
    Floats<decltype(count)::value> x;
    for (float& element : x.v) element = value;
    store(out + j, x);
  });
}

// d(g·logp + h·H)/dz = g·(1[target] - p) - h·p·(log p + H), times dz/dlogit.
// target: index of the target's logit in this slice, or -1. logprob (of the target), lse and entropy are the forward's.
// out may be the logits themselves.
template <class T, bool kSoftcap, bool kEntropy>
__device__ void row_gradient(const T* logits, const T* bias, int64_t size, const LogitTransform& t, int64_t target,
                             float logprob, float lse, float entropy, float g, float h, T* out) {
  // The target's column on its own: there 1 - p cancels when p is near 1, and -expm1(log p) does not.
  const bool owns_target = threadIdx.x == 0 && target >= 0;
  float at_target = 0.0f;
  if (owns_target) {
    at_target = -g * expm1f(logprob);
    if constexpr (kEntropy) at_target -= h * expf(logprob) * (max_or_nan(kExpUnderflow, logprob) + entropy);
    at_target *= t.inverse_temperature;
    if constexpr (kSoftcap) {
      const float unit = tanhf(raw_logit(logits, bias, target) * (1.0f / t.softcap));
      at_target *= 1.0f - unit * unit;
    }
  }
  if constexpr (kSoftcap) __syncthreads();  // that logit is read before another thread writes over it
  for_each_vector<kRowThreads>(logits, size, [&](int64_t j, auto count) {
    constexpr int N = decltype(count)::value;
    Floats<N> x = load<N>(logits + j);
    if (bias) {
      const Floats<N> b = load<N>(bias + j);
      for (int k = 0; k < N; ++k) x.v[k] += b.v[k];
    }
    for (int k = 0; k < N; ++k) {
      float z = x.v[k], slope = t.inverse_temperature;
      if constexpr (kSoftcap) {
        const float unit = tanhf(z * (1.0f / t.softcap));
        z = t.softcap * unit;
        slope *= 1.0f - unit * unit;
      }
      const float logp = z * t.inverse_temperature - lse;
      float coefficient = -g;
      if constexpr (kEntropy) coefficient -= h * (max_or_nan(kExpUnderflow, logp) + entropy);
      x.v[k] = expf(logp) * coefficient * slope;
    }
    store(out + j, x);
  });
  __syncthreads();  // or the plain derivative could land on top of the target's
  if (owns_target) out[target] = from_float<T>(at_target);
}

}  // namespace fastpost::cuda
