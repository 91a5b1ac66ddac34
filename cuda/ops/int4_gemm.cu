// SPDX-License-Identifier: Apache-2.0
#include "cuda/ops.h"
#include "cuda/ops/int4_gemm.cuh"

namespace fastpost::cuda {
namespace {

// ---- dequantise: a warp writes 256 neighbouring columns of a row at a time, whole lines of memory ----
// H200, 8192 x 8192 to bfloat16: 100 µs (1.7 TB/s) when four threads wrote 64 bytes side by side, with the L2 cache at 92 %
// of what it can do; whole lines are meant to halve that and are not yet timed.

constexpr int kDequantizeThreads = 256, kWarpBlocks = 8;  // blocks of a row that a warp takes, two at a time

// Lane 16b + 4i + j of a warp writes columns 32i + 8j to + 8 of block b of two.
template <class T, bool kTable>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_kernel(Int4Matrix w, int blocks, int warps_across, T* out, int64_t out_stride) {
  const int lane = static_cast<int>(threadIdx.x) % 32, i = lane / 4 % 4, j = lane % 4;
  const unsigned warp = blockIdx.x * (kDequantizeThreads / 32) + threadIdx.x / 32;
  const int64_t row = warp / static_cast<unsigned>(warps_across);
  const int first = static_cast<int>(warp % static_cast<unsigned>(warps_across)) * kWarpBlocks + lane / 16;
  if (row >= w.n) return;
  const uint8_t* codes = w.codes + row * w.codes_stride + 4 * i;
  const bool aligned = is_aligned<T, kVector<T>>(out + row * out_stride);
  FP_UNROLL
  for (int b = 0; b < kWarpBlocks; b += 2) {
    const int block = first + b;
    const int64_t column = int64_t{int4::kBlock} * block + 32 * i + 8 * j;
    if (block >= blocks || column >= w.k) break;
    uint32_t words[4];
    FP_UNROLL
    for (int t = 0; t < 4; ++t) {
      words[t] = *reinterpret_cast<const uint32_t*>(codes + int64_t{int4::kBlockBytes} * block + 16 * t);
    }
    const int group = int4_group(w, 4 * block + i);
    const float scale = int4_scale(w, int4_scale_bits(w, row, group));
    const int zero = static_cast<int>(int4_zero(w, row, group));
    Floats<8> values;
    FP_UNROLL
    for (int t = 0; t < 4; ++t) {
      const uint32_t shifted = words[t] >> 4 * j;
      const int low = shifted & 15, high = shifted >> 16 & 15;
      values.v[2 * t] = kTable ? int4::weight(low, scale, w.table) : int4::weight(low, scale, zero);
      values.v[2 * t + 1] = kTable ? int4::weight(high, scale, w.table) : int4::weight(high, scale, zero);
    }
    T* to = out + row * out_stride + column;
    if (aligned && column + 8 <= w.k) {
      FP_UNROLL
      for (int at = 0; at < 8; at += kVector<T>) {
        Packed<T, kVector<T>> part;
        FP_UNROLL
        for (int c = 0; c < kVector<T>; ++c) part.v[c] = from_float<T>(values.v[at + c]);
        *reinterpret_cast<Packed<T, kVector<T>>*>(to + at) = part;
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
  const int64_t blocks = blocks_for(w.k, int4::kBlock), across = blocks_for(blocks, kWarpBlocks);
  const int64_t grid = blocks_for(across * w.n, kDequantizeThreads / 32);
  visit_float(out.dtype, [&]<class T>(T) {
    with_flag(w.table != nullptr, [&](auto table) {
      launch(dequantize_kernel<T, decltype(table)::value>, grid, kDequantizeThreads, 0, stream, w, blocks, across,
             out.ptr<T>(), out.stride(0));
    });
  });
}

namespace {

// Where W in 16 bits is soon made beside so many products, the framework's GEMM is the faster one.
constexpr int64_t kTilesMost = 2048;
// Up to here reading W takes longer than multiplying by it, and a thread's own codes are enough to keep memory busy.
constexpr int64_t kReadingMost = 16;

// Rows of x are copied 16 bytes at a time; float32 has no tensor cores that keep its bits.
bool can_copy(const Tensor& x, const Tensor& codes) {
  return (x.dtype == DType::BFloat16 || x.dtype == DType::Float16) && x.size(1) % 8 == 0 && x.stride(0) % 8 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && reinterpret_cast<uintptr_t>(codes.data) % 16 == 0 &&
         codes.stride(0) % 16 == 0;
}

bool can_tile(const Tensor& x, const Tensor& scales, const Tensor& table) {
  if (!kBuiltForSm90 || x.size(0) > kTilesMost || table.defined() || scales.dtype != x.dtype) return false;
  const Stream stream("int4_gemm", x);
  int major = 0;
  stream.check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.device_index));
  return major == 9;
}

}  // namespace

bool int4_gemm_fits(Tensor x, Tensor codes, Tensor scales, Tensor table, bool backward) {
  return can_copy(x, codes) && ((!backward && x.size(0) <= kRowsMost) || can_tile(x, scales, table));
}

void int4_gemm(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size, Tensor bias,
               Tensor out) {
  const Stream stream("int4_gemm", x);
  const Int4Matrix w = int4_matrix(codes, scales, zeros, table, group_size, x.size(1));
  if (x.size(0) <= kReadingMost || !can_tile(x, scales, table)) return multiply_rows(stream, x, w, bias, out);
  if constexpr (kBuiltForSm90) multiply_tiles_sm90(stream, x, w, bias, out);
}

void int4_gemm_backward(Tensor grad, Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size,
                        Tensor grad_x) {
  const Stream stream("int4_gemm", grad);
  const Int4Matrix w = int4_matrix(codes, scales, zeros, table, group_size, grad_x.size(1));
  if (grad.size(0) == 0 || grad_x.size(1) == 0) return;
  if constexpr (kBuiltForSm90) multiply_tiles_backward_sm90(stream, grad, w, grad_x);  // else int4_gemm_fits says no
}

}  // namespace fastpost::cuda
