// SPDX-License-Identifier: Apache-2.0
// One token's logits by a group of G lanes, N to a lane: lane l has experts l, l + G, ... For scores see the CPU's side,
// cpp/ops/moe_route_simd.cpp: relative(z) sums to something that neither overflows nor vanishes.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/vec.cuh"

namespace fastpost::cuda {

constexpr int kRouteThreads = 256;

struct Scoring {
  bool sigmoid, normalize;
  float scale;
};

template <int G, class T, class F>
__device__ T group_reduce(T value, F combine) {
  for (int mask = G / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  return value;
}
template <int G>
__device__ float group_sum(float value) {
  return group_reduce<G>(value, [](float a, float b) { return a + b; });
}
template <int G>
__device__ float group_max(float value) {
  return group_reduce<G>(value, [](float a, float b) { return fmaxf(a, b); });
}

// From the largest of the logits, which is bounded for rows that have none but -inf: all are then relative 0.
__device__ inline float shift_of(bool sigmoid, float max) { return fmaxf(sigmoid ? fminf(max, 0.0f) : max, -3e38f); }
__device__ inline float relative(bool sigmoid, float z, float shift) {
  return sigmoid ? expf(fminf(z, 0.0f) - shift) / (1.0f + expf(-fabsf(z))) : expf(z - shift);
}
__device__ inline float inverse(float x) { return x == 0.0f ? 0.0f : 1.0f / x; }

template <int G, int N>
struct TokenScores {
  float z[N], relative_score[N];
  float max, softmax_inverse, lse, shift, inverse_sum;  // lse is NaN for a row with NaN, +inf or nothing but -inf

  template <class T>
  __device__ TokenScores(const T* row, int experts, int lane, bool sigmoid) {
    max = -INFINITY;
    FP_UNROLL
    for (int n = 0; n < N; ++n) {
      const int j = n * G + lane;
      z[n] = j < experts ? to_float(row[j]) : -INFINITY;
      max = fmaxf(max, z[n]);
    }
    max = group_max<G>(max);
    float sum = 0.0f;
    FP_UNROLL
    for (int n = 0; n < N; ++n) {
      relative_score[n] = n * G + lane < experts ? expf(z[n] - max) : 0.0f;
      sum += relative_score[n];
    }
    sum = group_sum<G>(sum);
    lse = max + logf(sum);
    softmax_inverse = 1.0f / sum;
    shift = max;
    inverse_sum = softmax_inverse;
    if (sigmoid) {
      shift = fminf(max, 0.0f);
      sum = 0.0f;
      FP_UNROLL
      for (int n = 0; n < N; ++n) {
        relative_score[n] = n * G + lane < experts ? relative(true, z[n], shift) : 0.0f;
        sum += relative_score[n];
      }
      inverse_sum = 1.0f / group_sum<G>(sum);
    }
  }
};

// Ranks as integers: larger is better, 0 is nothing at all, a NaN is worse than -inf.
__device__ inline uint32_t rank_of(float x) {
  if (x != x) return 1;
  x += 0.0f;  // -0 becomes 0
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Calls f(G, N) as constants, G lanes with N logits each for so many experts.
template <class F>
void with_group(int64_t experts, F&& f) {
  const auto call = [&]<int G, int N>() { f(std::integral_constant<int, G>{}, std::integral_constant<int, N>{}); };
  if (experts <= 8) return call.template operator()<8, 1>();
  if (experts <= 32) return call.template operator()<8, 4>();
  if (experts <= 128) return call.template operator()<32, 4>();
  if (experts <= 512) return call.template operator()<32, 16>();
  call.template operator()<32, 32>();
}

}  // namespace fastpost::cuda
