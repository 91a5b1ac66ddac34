// SPDX-License-Identifier: Apache-2.0
// Copies of rows, 16 bytes at a time where they are aligned; the dtype matters to the backward's sums alone.
#include "cuda/ops.h"
#include "cuda/ops/moe_rows.cuh"

namespace fastpost::cuda {
namespace {

// One block per row. index[r] is the row of `from`; -1 or anything else outside, or r from *present on: a row of zeros.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    gather_kernel(Rows<const T> from, int64_t rows, int64_t h, const int32_t* index, const int32_t* present,
                  Rows<T> out) {
  const int64_t r = blockIdx.x, source = index[r];
  T* to = out[r];
  if (source < 0 || source >= rows || (present && r >= *present)) {
    clear_row<kRowThreads>(to, h, static_cast<int>(threadIdx.x));
    return;
  }
  const T* row = from[source];
  for_each_vector<kRowThreads>(to, h, [&](int64_t j, auto count) { copy<decltype(count)::value>(row + j, to + j); });
}

template <class F>
void visit_size(DType t, F&& f) {
  itemsize(t) == 2 ? f(uint16_t{}) : f(uint32_t{});
}

}  // namespace

void moe_dispatch(Tensor x, Tensor offset, Tensor order, Tensor place, Tensor out) {
  const Stream stream("moe_dispatch", x);
  const int64_t rows = order.size(0), k = place.size(1);
  visit_size(x.dtype, [&]<class T>(T) {
    launch(gather_kernel<T>, rows, kRowThreads, 0, stream, slot_rows<const T>(x, k), rows, out.size(1),
           order.ptr<int32_t>(), offset.ptr<int32_t>() + offset.size(0) - 1, own_rows<T>(out));
  });
}

void moe_dispatch_backward(Tensor grad_out, Tensor place, Tensor grad_x) {
  const Stream stream("moe_dispatch_backward", grad_out);
  if (grad_x.ndim == 2) {
    visit_float(grad_out.dtype, [&]<class T>(T) { launch_sum<T>(stream, grad_out, place, Tensor{}, grad_x); });
    return;
  }
  const int64_t rows = place.numel();
  visit_size(grad_out.dtype, [&]<class T>(T) {
    launch(gather_kernel<T>, rows, kRowThreads, 0, stream, own_rows<const T>(grad_out), rows, grad_out.size(1),
           place.ptr<int32_t>(), nullptr, own_rows<T>(grad_x));
  });
}

}  // namespace fastpost::cuda
