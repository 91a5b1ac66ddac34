// SPDX-License-Identifier: Apache-2.0
// One launch: blocks that multiply, with blocks that copy values among them. Values on the host are read where they lie, over the
// bus, by the warps that store them: what is not fresh costs nothing, and no copy has to be planned.
//
// The kernel here is for float32 and whatever kv_reconstruct_sm80.cu does not do.
#include <stdexcept>
#include <string>

#include "cuda/core/reduce.cuh"
#include "cuda/ops.h"
#include "cuda/ops/kv_reconstruct.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp, kRows = 8, kPicks = 8;  // of a block

template <class T>
__device__ float element(const void* from, int64_t i) {
  return to_float(static_cast<const T*>(from)[i]);
}

// Eight rows at a time: u in shared memory, [8][r], then sums, [8][d]; a thread has columns of all eight.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    reconstruct_kernel(ReconstructWork w, int64_t rows, int64_t key_blocks, int64_t value_blocks) {
  FP_DYNAMIC_SHARED(float, factors);
  float* sums = factors + kRows * w.rank;
  const Mixed block = mixed(blockIdx.x, key_blocks, value_blocks);
  if (!block.key) return copy_values<T, kWarps>(w, block.index, rows);

  const int thread = static_cast<int>(threadIdx.x);
  const int64_t groups = (w.picks + kPicks - 1) / kPicks;
  const int64_t g = block.index / groups % w.heads, b = block.index / groups / w.heads;
  const int64_t p = prompt_of(w, b), first = block.index % groups * kPicks;
  const int64_t end = first + kPicks < w.picks ? first + kPicks : w.picks;
  if (p < 0) return;
  for (int64_t j = first; j < end; ++j) {
    const Pick pick = pick_of(w, b, g, j, w.tokens / w.chunk);
    if (pick.slot < 0) continue;  // the same for all threads
    T* out = static_cast<T*>(w.keys) + b * w.key_strides[0] + g * w.key_strides[1] + pick.slot * w.key_strides[2];
    for (int base = 0; base < w.chunk; base += kRows) {
      const int count = w.chunk - base < kRows ? w.chunk - base : kRows;
      const int64_t token = int64_t{pick.chunk} * w.chunk + base;
      for (int i = thread; i < kRows * w.rank; i += kThreads) {
        const int row = i / w.rank;
        float x = 0.0f;
        if (row < count) {
          const int64_t at = p * w.u_strides[0] + (token + row) * w.u_strides[1] + i % w.rank;
          if (w.scale) {
            x = static_cast<float>(static_cast<const int8_t*>(w.u)[at]);
          } else {
            x = w.u_type == DType::Float32    ? element<float>(w.u, at)
                : w.u_type == DType::BFloat16 ? element<bfloat16>(w.u, at)
                                              : element<float16>(w.u, at);
          }
        }
        factors[i] = x;
      }
      __syncthreads();
      for (int column = thread; column < w.d; column += kThreads) {
        const int64_t head = p * w.basis_strides[0] + g * w.basis_strides[1] + column;
        float sum[kRows] = {};
        for (int k = 0; k < w.rank; ++k) {
          const int64_t at = head + k * w.basis_strides[2];
          const float x = w.basis_wide ? element<float>(w.basis, at) : element<bfloat16>(w.basis, at);
          FP_UNROLL
          for (int row = 0; row < kRows; ++row) sum[row] += factors[row * w.rank + k] * x;
        }
        FP_UNROLL
        for (int row = 0; row < kRows; ++row) sums[row * w.d + column] = sum[row];
      }
      __syncthreads();
      constexpr int kLanes = kThreads / kRows;  // of a row
      const int row = thread / kLanes;
      if (row < count) {
        const float scale = w.scale ? w.scale[p * w.scale_strides[0] + (token + row) * w.scale_strides[1]] : 1.0f;
        finish_row<T, 1>(w, sums + row * w.d, scale, p, token + row, out + int64_t{base + row} * w.d, thread % kLanes,
                         kLanes);
      }
      // The next rows of u do not lie where sums are, and a thread writes sums after a barrier that all have come to.
    }
  }
}

Table table_of(const Tensor& t) {
  if (!t.defined()) return {};
  return {t.data, t.size(0) > 1 ? t.stride(0) : 0, t.stride(1), t.dtype == DType::Float32};
}

// Whether rows of t are whole pieces of 16 bytes, `elements` in each.
bool has_pieces(const Tensor& t, int64_t elements, int dimensions) {
  bool all = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.size(dimensions) % elements == 0;
  for (int i = 0; i < dimensions; ++i) all = all && (t.size(i) <= 1 || t.stride(i) % elements == 0);
  return all;
}

// Where a GPU finds what may lie in the host's memory. Asking neither waits nor is it recorded in a graph.
const void* reachable(const Stream& stream, const char* name, const Tensor& t) {
  if (!t.defined() || t.device == Device::CUDA || t.numel() == 0) return t.data;
  cudaPointerAttributes found = {};
  stream.check(cudaPointerGetAttributes(&found, t.data));
  if (!found.devicePointer) {
    throw std::invalid_argument("[kv_reconstruct] " + std::string(name) +
                                ": expected memory that the GPU can read, got pageable memory of the host. " +
                                "Call .pin_memory() on it.");
  }
  return found.devicePointer;
}

}  // namespace

int64_t kv_reconstruct_bytes(Tensor, Tensor) { return 0; }

void kv_reconstruct(Tensor u, Tensor scale, Tensor basis, Tensor cos, Tensor sin, Tensor source, Tensor chunks,
                    Tensor slots, Tensor fresh, Tensor values, Tensor value_scale, Tensor, Tensor keys,
                    Tensor value_pool) {
  const Stream stream("kv_reconstruct", u);
  ReconstructWork w = {};
  w.u = u.data;
  w.u_type = u.dtype;
  w.basis = basis.data;
  w.basis_wide = basis.dtype == DType::Float32;
  w.cos = table_of(cos);
  w.sin = table_of(sin);
  w.width = cos.defined() ? static_cast<int>(cos.size(2)) : 0;
  w.rank = static_cast<int>(u.size(2));
  w.d = static_cast<int>(keys.size(4));
  w.chunk = static_cast<int>(keys.size(3));
  w.heads = keys.size(1);
  w.picks = chunks.size(2);
  w.prompts = u.size(0);
  w.tokens = cos.defined() && cos.size(1) < u.size(1) ? cos.size(1) : u.size(1);
  w.slot_count = keys.size(2);
  w.source = source.ptr<const int32_t>();
  w.chunks = chunks.ptr<const int32_t>();
  w.slots = slots.ptr<const int32_t>();
  w.fresh = fresh.ptr<const uint8_t>();
  w.keys = keys.data;
  for (int i = 0; i < 2; ++i) w.u_strides[i] = u.stride(i);
  for (int i = 0; i < 3; ++i) w.basis_strides[i] = basis.stride(i), w.key_strides[i] = keys.stride(i);
  if (scale.defined()) {
    w.scale = scale.ptr<const float>();
    for (int i = 0; i < 2; ++i) w.scale_strides[i] = scale.stride(i);
  }
  w.u_pieces = (scale.defined() || u.dtype == DType::BFloat16) && has_pieces(u, scale.defined() ? 16 : 8, 2);
  w.basis_pieces = has_pieces(basis, w.basis_wide ? 4 : 8, 3) && w.d % 8 == 0;
  if (values.defined()) {
    w.values = reachable(stream, "values", values);
    w.value_count = values.size(2);
    w.pool = value_pool.data;
    for (int i = 0; i < 3; ++i) w.value_strides[i] = values.stride(i), w.pool_strides[i] = value_pool.stride(i);
    if (value_scale.defined()) {
      w.value_scale = static_cast<const float*>(reachable(stream, "value_scale", value_scale));
      for (int i = 0; i < 3; ++i) w.value_scale_strides[i] = value_scale.stride(i);
    }
  }
  const int64_t rows = keys.size(0);
  if (fits_sm80(w, keys.dtype)) return reconstruct_sm80(stream, w, rows, keys.dtype);
  visit_float(keys.dtype, [&]<class T>(T) {
    const int64_t key_blocks = rows * w.heads * blocks_for(w.picks, kPicks);
    const int64_t value_blocks = w.values ? blocks_for(rows * w.heads * w.picks, kWarps) : 0;
    const int shared = static_cast<int>(sizeof(float)) * kRows * (w.rank + w.d);
    auto* kernel = reconstruct_kernel<T>;
    if (shared > 48 << 10) allow_shared(stream, kernel, shared);
    launch(kernel, key_blocks + value_blocks, kThreads, static_cast<size_t>(shared), stream, w, rows, key_blocks,
           value_blocks);
  });
}

}  // namespace fastpost::cuda
