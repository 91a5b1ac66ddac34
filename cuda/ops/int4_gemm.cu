// SPDX-License-Identifier: Apache-2.0
#include "cuda/ops.h"
#include "cuda/ops/int4_gemm.cuh"

namespace fastpost::cuda {
namespace {

// ---- dequantise: four neighbouring threads write 64 bytes of a row side by side ----

constexpr int kDequantizeThreads = 256, kQuadThreads = 4;
constexpr int kDequantizeBlocks = 8, kDequantizeRows = kDequantizeThreads / kQuadThreads / kDequantizeBlocks;

// Each quad takes one block of one row: thread j writes columns 32i + 8j to + 8 for i = 0 to 3. A warp has 8 blocks of a
// row, which is 2 KB of it.
template <class T, bool kTable>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(Int4Matrix w, int blocks, int tiles_across, T* out, int64_t out_stride) {
  const int thread = static_cast<int>(threadIdx.x), quad = thread / kQuadThreads, j = thread % kQuadThreads;
  const int tile = static_cast<int>(blockIdx.x);
  const int block = tile % tiles_across * kDequantizeBlocks + quad % kDequantizeBlocks;
  const int64_t row = static_cast<int64_t>(tile / tiles_across) * kDequantizeRows + quad / kDequantizeBlocks;
  if (row >= w.n || block >= blocks) return;
  const uint8_t* codes = w.codes + row * w.codes_stride + static_cast<int64_t>(block) * int4::kBlockBytes;
  Packed<uint32_t, 4> chunks[4];
  FP_UNROLL
  for (int t = 0; t < 4; ++t) chunks[t] = *reinterpret_cast<const Packed<uint32_t, 4>*>(codes + 16 * t);
  uint32_t scale_bits[4], zeros[4];
  FP_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int group = int4_group(w, 4 * block + i);
    const int at = group < w.groups ? group : w.groups - 1;  // what a last block lacks
    scale_bits[i] = int4_scale_bits(w, row, at);
    zeros[i] = int4_zero(w, row, at);
  }
  const int64_t first = int64_t{int4::kBlock} * block + 8 * j;
  T* to = out + row * out_stride + first;
  const bool whole = int64_t{int4::kBlock} * (block + 1) <= w.k && is_aligned<T, kVector<T>>(to);
  FP_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float scale = int4_scale(w, scale_bits[i]);
    Floats<8> values;
    FP_UNROLL
    for (int t = 0; t < 4; ++t) {
      const uint32_t shifted = chunks[t].v[i] >> 4 * j;
      const int low = shifted & 15, high = shifted >> 16 & 15, zero = static_cast<int>(zeros[i]);
      values.v[2 * t] = kTable ? int4::weight(low, scale, w.table) : int4::weight(low, scale, zero);
      values.v[2 * t + 1] = kTable ? int4::weight(high, scale, w.table) : int4::weight(high, scale, zero);
    }
    if (whole) {
      FP_UNROLL
      for (int at = 0; at < 8; at += kVector<T>) {
        Packed<T, kVector<T>> part;
        FP_UNROLL
        for (int c = 0; c < kVector<T>; ++c) part.v[c] = from_float<T>(values.v[at + c]);
        *reinterpret_cast<Packed<T, kVector<T>>*>(to + 32 * i + at) = part;
      }
    } else {
      for (int c = 0; c < 8; ++c) {
        if (first + 32 * i + c < w.k) to[32 * i + c] = from_float<T>(values.v[c]);
      }
    }
  }
}

}  // namespace

void int4_gemm_dequantize(Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size, Tensor out) {
  const Stream stream("int4_gemm_dequantize", codes);
  const Int4Matrix w = int4_matrix(codes, scales, zeros, table, group_size, out.size(1));
  const int64_t blocks = blocks_for(w.k, int4::kBlock), across = blocks_for(blocks, kDequantizeBlocks);
  const int64_t grid = across * blocks_for(w.n, kDequantizeRows);
  visit_float(out.dtype, [&]<class T>(T) {
    with_flag(w.table != nullptr, [&](auto table) {
      launch(dequantize_kernel<T, decltype(table)::value>, grid, kDequantizeThreads, 0, stream, w, blocks, across,
             out.ptr<T>(), out.stride(0));
    });
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
