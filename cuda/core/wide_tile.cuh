// SPDX-License-Identifier: Apache-2.0
// Tiles of 128 x 256 that two warp groups multiply by WGMMA (compute capability 9.0): how factors lie in shared memory and where a
// warp has its sums. Plain CUDA C++; the instructions are in wgmma.cuh.
#pragma once

#include "cuda/core/launch.h"
#include "cuda/core/vec.cuh"

namespace fastpost::cuda {

constexpr int kPiece = 8;  // neighbouring columns of a row that are read or written together

__device__ inline void read_piece(const float* from, float (&to)[kPiece]) {
  FP_UNROLL
  for (int at = 0; at < kPiece; at += 4) {
    const auto four = *reinterpret_cast<const Packed<float, 4>*>(from + at);
    FP_UNROLL
    for (int c = 0; c < 4; ++c) to[at + c] = four.v[c];
  }
}

// A warp of a consumer has 16 rows and all 256 columns; lane 4g + t has rows g and g + 8 of it, and columns 8j + 2t, 8j + 2t + 1
// of each j (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16", matrix D).
constexpr int kWideM = 128, kWideN = 256, kWideSums = kWideN / 2;
constexpr int kStagedColumns = 16,
              kStagedStride = 2 * kStagedColumns + 8;  // floats; the padding puts rows in other banks
constexpr int kStagedFloats = 16 * kStagedStride;      // of a warp

__host__ __device__ constexpr int wide_sum(int half, int column) {
  return column / 8 * 4 + half * 2 + column % 2;  // of the thread that has it
}

// Rows for WGMMA, gathered: rows of 128 bytes, in each of which the 16-byte chunks are swapped as the row's number says (the
// copy engine's swizzle of 128 bytes). Each of 128 threads copies one chunk of every kGatherStep-th row.
constexpr int kGatherStep = 16, kGatherBytes = kGatherStep * 128;
struct GatherShare {
  int row, column, offset;  // the first row, column in a row (elements), byte in shared memory
};
__host__ __device__ constexpr GatherShare gather_share(int thread) {
  const int row = thread / 8, chunk = thread % 8;
  return {row, chunk * 8, row * 128 + (chunk ^ row % 8) * 16};
}

// A factor in shared memory lies in rows of 128 bytes, swizzled. Either they are rows of the product with what is summed over in
// them, 64 of it; or 64 rows of the product are in each, and the next 64 a box of 64 rows of 128 bytes further.
constexpr int kBoxBytes = 64 * 128;
// What a matrix descriptor (PTX ISA) says of that, without the address.
__host__ __device__ constexpr uint64_t wide_descriptor(bool in_columns) {
  const uint64_t swizzle_of_128 = uint64_t{1} << 62, next_eight = uint64_t{8 * 128 >> 4} << 32;
  const uint64_t next_box = in_columns ? kBoxBytes >> 4 : 1;  // 1: where it has no meaning
  return swizzle_of_128 | next_eight | next_box << 16;
}
// From 16 of what is summed over to the next, as descriptors count bytes.
__host__ __device__ constexpr int wide_step(bool in_columns) { return (in_columns ? 16 * 128 : 16 * 2) >> 4; }

// Hands out a warp's sums, 16 columns of either half at a time, through its own corner of shared memory: use(column, from)
// with two lanes to a row, `from` at a lane's eight columns of the first half; those of the second are kStagedColumns on.
template <class F>
__device__ __forceinline__ void for_each_part(const float (&sums)[kWideSums], float* staged, int lane, F&& use) {
  const int g = lane / 4, t = lane % 4, piece = lane % 2 * kPiece;
#ifdef __CUDACC__
#pragma unroll 1  // what is done with a piece can be long, and picking sums by a loop's index costs little
#endif
  for (int part = 0; part < kWideN / 2 / kStagedColumns; ++part) {
    FP_UNROLL
    for (int p = 0; p < kWideN / 2 / kStagedColumns; ++p) {
      if (p != part) continue;
      FP_UNROLL
      for (int i = 0; i < 8; ++i) {  // half of the columns, of the rows, block of 8
        const int second = i / 4, half = i / 2 % 2, block = i % 2;
        const int at = wide_sum(half, second * (kWideN / 2) + p * kStagedColumns + block * 8);
        const Packed<float, 2> pair = {{sums[at], sums[at + 1]}};
        *reinterpret_cast<Packed<float, 2>*>(staged + (g + 8 * half) * kStagedStride + second * kStagedColumns +
                                             8 * block + 2 * t) = pair;
      }
    }
    __syncwarp();
    use(part * kStagedColumns + piece, staged + lane / 2 * kStagedStride + piece);
    __syncwarp();
  }
}

}  // namespace fastpost::cuda
