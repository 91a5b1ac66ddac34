// SPDX-License-Identifier: Apache-2.0
// Rows of tokens [T, H] and of slots [T, K, H], and their sums: what moe_dispatch and moe_combine share.
#pragma once

#include "core/tensor.h"
#include "cuda/core/launch.h"
#include "cuda/core/vec.cuh"

namespace fastpost::cuda {

constexpr int kRowThreads = 128;  // a row of 2048 bfloat16 is 256 vectors

// Row i: of token i when k = 1, otherwise of slot i = t·k + its number.
template <class T>
struct Rows {
  T* data;
  int64_t token_stride, slot_stride, k;

  __device__ T* operator[](int64_t i) const { return data + i / k * token_stride + i % k * slot_stride; }
};

// x [T, H] or [T, K, H] as rows of slots: in the first, a token's slots are all its row.
template <class T>
Rows<T> slot_rows(const Tensor& x, int64_t k) {
  return {x.ptr<T>(), x.stride(0), x.ndim == 3 ? x.stride(1) : 0, k};
}
// As it lies: rows of tokens or of slots.
template <class T>
Rows<T> own_rows(const Tensor& x) {
  return x.ndim == 3 ? slot_rows<T>(x, x.size(1)) : slot_rows<T>(x, 1);
}

template <int kThreads, class T>
__device__ void clear_row(T* row, int64_t h, int thread) {
  for_each_vector<kThreads>(row, h, thread, [&](int64_t j, auto count) {
    Packed<T, decltype(count)::value> zero = {};
    *reinterpret_cast<Packed<T, decltype(count)::value>*>(row + j) = zero;
  });
}

// out[i] = Σ_n gate[i·count + n]·y[place[i·count + n]] in float32 and in the order of n; gate may be null: 1.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    sum_kernel(const T* y, int64_t stride, int64_t rows, int64_t h, const int32_t* place, int64_t count,
               const float* gate, Rows<T> out) {
  const int64_t i = blockIdx.x;
  T* to = out[i];
  for_each_vector<kRowThreads>(to, h, [&](int64_t j, auto width) {
    constexpr int N = decltype(width)::value;
    Floats<N> sum = {};
    for (int64_t n = i * count; n < (i + 1) * count; ++n) {
      const int64_t r = place[n];
      if (r < 0 || r >= rows) continue;
      const float g = gate ? gate[n] : 1.0f;
      const Floats<N> x = load<N>(y + r * stride + j);
      for (int v = 0; v < N; ++v) sum.v[v] += g * x.v[v];
    }
    store(to + j, sum);
  });
}

// Sums over a token's slots into out [T, H], or each slot by itself into [T, K, H].
template <class T>
void launch_sum(const Stream& stream, const Tensor& y, const Tensor& place, const Tensor& gate, const Tensor& out) {
  const int64_t slots = place.numel(), count = out.ndim == 3 ? 1 : place.size(1);
  launch(sum_kernel<T>, out.ndim == 3 ? slots : place.size(0), kRowThreads, 0, stream, y.ptr<T>(), y.stride(0), slots,
         y.size(1), place.ptr<int32_t>(), count, gate.ptr<float>(), own_rows<T>(out));
}

}  // namespace fastpost::cuda
