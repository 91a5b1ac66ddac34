// SPDX-License-Identifier: Apache-2.0
// Rows of float32, bfloat16 or float16 read and written 128 bits at a time, as float32 values.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#ifndef __CUDACC__
#include "core/simd.h"  // tests/cuda_on_host: conversions in plain C++
#endif

namespace fastpost::cuda {

#ifdef __CUDACC__
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float to_float(float16 x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
}

// Rounds to nearest even. NaN stays NaN; float16 overflows to infinity.
template <class T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    T out;
    if constexpr (std::is_same_v<T, bfloat16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    }
    return out;
  }
}
#else
using FP_ISA::from_float;
using FP_ISA::to_float;
#endif

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of one 128-bit access

template <class T, int N>
struct alignas(sizeof(T) * N) Packed {
  T v[N];
};

template <int N>
struct Floats {
  float v[N];
};

template <class T, int N>
__device__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Packed<T, N>) == 0;
}

// N consecutive elements, in one access when p is aligned for it.
template <int N, class T>
__device__ Floats<N> load(const T* p) {
  Packed<T, N> raw;
  if (is_aligned<T, N>(p)) {
    raw = *reinterpret_cast<const Packed<T, N>*>(p);
  } else {
    for (int k = 0; k < N; ++k) raw.v[k] = p[k];
  }
  Floats<N> x;
  for (int k = 0; k < N; ++k) x.v[k] = to_float(raw.v[k]);
  return x;
}

template <int N, class T>
__device__ void store(T* p, const Floats<N>& x) {
  Packed<T, N> raw;
  for (int k = 0; k < N; ++k) raw.v[k] = from_float<T>(x.v[k]);
  if (is_aligned<T, N>(p)) {
    *reinterpret_cast<Packed<T, N>*>(p) = raw;
  } else {
    for (int k = 0; k < N; ++k) p[k] = raw.v[k];
  }
}

// N consecutive elements as they are, in one access where both sides are aligned for it.
template <int N, class T>
__device__ void copy(const T* from, T* to) {
  Packed<T, N> raw;
  if (is_aligned<T, N>(from)) {
    raw = *reinterpret_cast<const Packed<T, N>*>(from);
  } else {
    for (int k = 0; k < N; ++k) raw.v[k] = from[k];
  }
  if (is_aligned<T, N>(to)) {
    *reinterpret_cast<Packed<T, N>*>(to) = raw;
  } else {
    for (int k = 0; k < N; ++k) to[k] = raw.v[k];
  }
}

// Shares the elements of a row among kThreads threads, of which this is number `thread`: calls f(j, count) with elements
// j to j + count.value, where count is kVector<T> with `row + j` aligned, or 1 in the few elements before and after those.
template <int kThreads, class T, class F>
__device__ void for_each_vector(const T* row, int64_t size, int thread, F f) {
  constexpr int N = kVector<T>;
  static_assert(N <= kThreads);
  const int past_boundary = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % N);
  const int64_t wanted = (N - past_boundary) % N, head = wanted < size ? wanted : size;
  const int64_t tail = head + (size - head) / N * N;
  if (thread < head) f(int64_t{thread}, std::integral_constant<int, 1>{});
  for (int64_t j = head + int64_t{N} * thread; j < tail; j += N * kThreads) f(j, std::integral_constant<int, N>{});
  if (tail + thread < size) f(tail + thread, std::integral_constant<int, 1>{});
}
// The same among the threads of a block.
template <int kThreads, class T, class F>
__device__ void for_each_vector(const T* row, int64_t size, F f) {
  for_each_vector<kThreads>(row, size, static_cast<int>(threadIdx.x), f);
}

}  // namespace fastpost::cuda
