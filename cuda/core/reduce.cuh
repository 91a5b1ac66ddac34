// SPDX-License-Identifier: Apache-2.0
// Reductions over a warp and over a block. The order of combinations is fixed, so results have the same bits every run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/core/launch.h"

namespace fastpost::cuda {

constexpr int kWarp = 32;

// A plain value as words: what shuffles move, and what shared memory can hold when T has default member values.
template <class T>
struct Raw {
  static constexpr int kWords = sizeof(T) / 4;
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[kWords];

  __device__ void set(const T& value) { memcpy(words, &value, sizeof(T)); }
  __device__ T get() const {
    T value;
    memcpy(&value, words, sizeof(T));
    return value;
  }
};

// The value of the lane whose index differs in the bits of `mask`.
template <class T>
__device__ T shuffle_xor(const T& value, int mask) {
  Raw<T> raw;
  raw.set(value);
  for (uint32_t& word : raw.words) word = __shfl_xor_sync(0xffffffffu, word, mask);
  return raw.get();
}

// combine(a, b) must equal combine(b, a) to the bit; every lane then gets the same result.
template <class T, class F>
__device__ T warp_reduce(T value, F combine) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  return value;
}

// The same over a block of kThreads. Every thread of the block must call it, and every thread gets the result.
template <int kThreads, class T, class F>
__device__ T block_reduce(T value, F combine) {
  static_assert(kThreads % kWarp == 0);
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Raw<T> partial[kWarps];
  value = warp_reduce(value, combine);
  __syncthreads();  // partial may still be read from an earlier call
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp].set(value);
  __syncthreads();
  value = partial[0].get();
  for (int w = 1; w < kWarps; ++w) value = combine(value, partial[w].get());
  return value;
}

// Sums of kValues values over groups of L lanes. Each lane ends with its share of them, from `first` on: a step sends half of
// what is left to the lane across and adds what comes from there.
template <int L, int kValues>
struct ScatteredSums {
  static constexpr int kLeft = L < kValues ? kValues / L : 1;
  static constexpr int kCopies = L > kValues ? L / kValues : 1;  // lanes that end with the same

  static __device__ int first(int lane) {
    int index = 0, half = kValues / 2;
    FP_UNROLL
    for (int mask = L / 2; mask > 0 && half > 0; mask /= 2, half /= 2) index += lane & mask ? half : 0;
    return index;
  }
  template <int kMask, int kCount>
  static __device__ void step(float (&v)[kValues], int lane) {
    if constexpr (kMask > 0) {
      if constexpr (kCount > 1) {
        FP_UNROLL
        for (int k = 0; k < kCount / 2; ++k) {
          const bool upper = lane & kMask;
          const float kept = upper ? v[k + kCount / 2] : v[k], sent = upper ? v[k] : v[k + kCount / 2];
          v[k] = kept + shuffle_xor(sent, kMask);
        }
        step<kMask / 2, kCount / 2>(v, lane);
      } else {
        v[0] += shuffle_xor(v[0], kMask);
        step<kMask / 2, 1>(v, lane);
      }
    }
  }
};

}  // namespace fastpost::cuda
