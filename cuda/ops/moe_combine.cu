// SPDX-License-Identifier: Apache-2.0
// Forward: a block per token (or slot). Backward: a warp per slot, so that a dot product needs shuffles alone; warps of
// one token are neighbours and find its gradient in cache.
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/ops.h"
#include "cuda/ops/moe_rows.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kWarps = 8;

// y, gate, grad_y and grad_gate may be null. Warp i also clears row i of grad_y if nobody has it.
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    backward_kernel(Rows<const T> grad_out, const T* y, int64_t y_stride, int64_t rows, int64_t h, const int32_t* place,
                    const int32_t* present, const float* gate, T* grad_y, int64_t grad_stride, float* grad_gate) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t slot = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (slot >= rows) return;
  const int64_t r = place[slot];
  const bool here = r >= 0 && r < rows;
  float dot = 0.0f;
  if (here) {
    const T* x = grad_out[slot];
    const float g = gate ? gate[slot] : 1.0f;
    for_each_vector<kWarp>(x, h, lane, [&](int64_t j, auto width) {
      constexpr int N = decltype(width)::value;
      Floats<N> a = load<N>(x + j);
      if (grad_gate) {
        const Floats<N> b = load<N>(y + r * y_stride + j);
        for (int v = 0; v < N; ++v) dot += a.v[v] * b.v[v];
      }
      if (grad_y) {
        for (int v = 0; v < N; ++v) a.v[v] *= g;
        store(grad_y + r * grad_stride + j, a);
      }
    });
  }
  dot = warp_reduce(dot, [](float a, float b) { return a + b; });
  if (grad_gate && lane == 0) grad_gate[slot] = dot;
  if (grad_y && slot >= *present) clear_row<kWarp>(grad_y + slot * grad_stride, h, lane);
}

}  // namespace

void moe_combine(Tensor y, Tensor place, Tensor gate, Tensor out) {
  const Stream stream("moe_combine", y);
  visit_float(y.dtype, [&]<class T>(T) { launch_sum<T>(stream, y, place, gate, out); });
}

void moe_combine_backward(Tensor grad_out, Tensor y, Tensor place, Tensor offset, Tensor order, Tensor gate,
                          Tensor grad_y, Tensor grad_gate) {
  const Stream stream("moe_combine_backward", grad_out);
  const int64_t rows = order.size(0);
  visit_float(grad_out.dtype, [&]<class T>(T) {
    launch(backward_kernel<T>, blocks_for(rows, kWarps), kWarps * kWarp, 0, stream,
           slot_rows<const T>(grad_out, place.size(1)), y.ptr<T>(), y.defined() ? y.stride(0) : 0, rows,
           grad_out.size(grad_out.ndim - 1), place.ptr<int32_t>(), offset.ptr<int32_t>() + offset.size(0) - 1,
           gate.ptr<float>(), grad_y.ptr<T>(), grad_y.defined() ? grad_y.stride(0) : 0, grad_gate.ptr<float>());
  });
}

}  // namespace fastpost::cuda
