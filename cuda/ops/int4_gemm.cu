// SPDX-License-Identifier: Apache-2.0
#include "cuda/ops.h"
#include "cuda/ops/int4_gemm.cuh"

namespace fastpost::cuda {
namespace {

// ---- dequantise: four neighbouring threads write 64 bytes of a row side by side ----

constexpr int kDequantizeThreads = 256, kQuadThreads = 4;

// Each quad takes one block of one row: thread j writes columns 32i + 8j to + 8 for i = 0 to 3.
template <class T>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(Int4Matrix w, int64_t blocks, T* out, int64_t out_stride) {
  const int64_t quad = (static_cast<int64_t>(blockIdx.x) * kDequantizeThreads + threadIdx.x) / kQuadThreads;
  const int64_t row = quad / blocks, block = quad % blocks;
  if (row >= w.n) return;
  const int j = threadIdx.x % kQuadThreads;
  const auto* words = reinterpret_cast<const uint32_t*>(w.codes + row * w.codes_stride + block * int4::kBlockBytes);
  Packed<uint32_t, 4> chunks[4];
  FP_UNROLL
  for (int t = 0; t < 4; ++t) chunks[t] = reinterpret_cast<const Packed<uint32_t, 4>*>(words)[t];
  FP_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t column = block * int4::kBlock + 32 * i + 8 * j;
    if (column >= w.k) break;
    const int group = static_cast<int>((4 * block + i) / w.group_units);
    const float scale = int4_scale(w, row, group);
    const int zero = int4_zero(w, row, group);
    Floats<8> values;
    FP_UNROLL
    for (int t = 0; t < 4; ++t) {
      FP_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int code = chunks[t].v[i] >> (16 * h + 4 * j) & 15;
        values.v[2 * t + h] = w.table ? int4::weight(code, scale, w.table) : int4::weight(code, scale, zero);
      }
    }
    T* to = out + row * out_stride + column;
    if (column + 8 <= w.k) {
      constexpr int kStep = kVector<T> < 8 ? kVector<T> : 8;
      FP_UNROLL
      for (int at = 0; at < 8; at += kStep) {
        Floats<kStep> part;
        FP_UNROLL
        for (int c = 0; c < kStep; ++c) part.v[c] = values.v[at + c];
        store(to + at, part);
      }
    } else {
      FP_UNROLL
      for (int c = 0; c < 8; ++c) {
        if (column + c < w.k) to[c] = from_float<T>(values.v[c]);
      }
    }
  }
}

}  // namespace

void int4_gemm_dequantize(Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size, Tensor out) {
  const Stream stream("int4_gemm_dequantize", codes);
  const Int4Matrix w = int4_matrix(codes, scales, zeros, table, group_size, out.size(1));
  const int64_t blocks = blocks_for(w.k, int4::kBlock);
  const int64_t grid = blocks_for(w.n * blocks * kQuadThreads, kDequantizeThreads);
  visit_float(out.dtype, [&]<class T>(T) {
    launch(dequantize_kernel<T>, grid, kDequantizeThreads, 0, stream, w, blocks, out.ptr<T>(), out.stride(0));
  });
}

namespace {

bool is_hopper(const Stream& stream, int device) {
  int major = 0;
  stream.check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return kBuiltForSm90 && major == 9;
}

// Beyond these rows the time to make W in 16 bits, slab by slab, is small beside that of the product.
constexpr int64_t kTilesMost = 1024;

}  // namespace

bool int4_gemm_fits(Tensor x, Tensor codes, Tensor scales, Tensor table) {
  // Rows of x are copied 16 bytes at a time; float32 has no tensor cores that keep its bits.
  const bool copies = (x.dtype == DType::BFloat16 || x.dtype == DType::Float16) && x.size(1) % 8 == 0 &&
                      x.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(codes.data) % 16 == 0 && codes.stride(0) % 16 == 0;
  if (!copies || x.size(0) <= kRowsMost) return copies;
  return x.size(0) <= kTilesMost && !table.defined() && scales.dtype == x.dtype &&
         is_hopper(Stream("int4_gemm", x), x.device_index);
}

int64_t int4_gemm_bytes(Tensor, Tensor) { return 0; }

void int4_gemm(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size, Tensor bias,
               Tensor, Tensor out) {
  const Stream stream("int4_gemm", x);
  const Int4Matrix w = int4_matrix(codes, scales, zeros, table, group_size, x.size(1));
  if (x.size(0) <= kRowsMost) return multiply_rows(stream, x, w, bias, out);
  if constexpr (kBuiltForSm90) multiply_tiles_sm90(stream, x, w, bias, out);  // else int4_gemm_fits says no
}

}  // namespace fastpost::cuda
