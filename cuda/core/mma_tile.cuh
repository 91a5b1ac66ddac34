// SPDX-License-Identifier: Apache-2.0
// A block's tile of a matrix product by mma.m16n8k16 (compute capability 8.0): a ring of tiles in shared memory that cp.async
// fills and ldmatrix reads, swizzled, and the sums on their way back through shared memory.
#pragma once

#include "cuda/core/launch.h"
#include "cuda/core/mma.cuh"

namespace fastpost::cuda {

// Tiles kM x kN, kK columns of the factors in a step; warps along each of the three.
template <int kM_, int kN_, int kK_, int kWarpsM_, int kWarpsN_, int kWarpsK_, int kStages_>
struct Shape {
  static constexpr int kM = kM_, kN = kN_, kK = kK_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN * kWarpsK;
  static constexpr int kMBlocks = kM / kWarpsM / 16, kNBlocks = kN / kWarpsN / 8;  // of a warp
  static constexpr int kABytes = kM * kK * 2, kStageBytes = kABytes + kN * kK * 2;
  static constexpr int kStride = kN + 8;  // floats of a row of sums; rows begin in other banks
  static constexpr int kSumBytes = kM * kStride * 4;
  static constexpr int kBytes =
      kStages * kStageBytes > kWarpsK* kSumBytes ? kStages * kStageBytes : kWarpsK * kSumBytes;
  static_assert(kNBlocks % 4 == 0);
};

// The first of eight columns that a warp has of a tile of B: half of its blocks lie in the tile's first half.
template <class S>
__host__ __device__ constexpr int block_column(int warp_n, int block) {
  constexpr int kHalf = S::kNBlocks / 2;
  return block / kHalf * (S::kN / 2) + warp_n * kHalf * 8 + block % kHalf * 8;
}

template <class S>
using Sums = float[S::kMBlocks][S::kNBlocks][4];

// sums += a · b for a step. A factor lies as rows of the product with its columns in a row, or as columns with the rows in one.
template <class T, class S, bool kAColumns, bool kBColumns>
__device__ __forceinline__ void multiply_step(const char* a, const char* b, int warp_m, int warp_n, int warp_k,
                                              int lane, Sums<S>& sums) {
  constexpr int kSteps = S::kK / 16 / S::kWarpsK;
  const int row = lane % 8, matrix = lane / 8;
  FP_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const int k = 16 * (warp_k * kSteps + step);
    uint32_t from_a[S::kMBlocks][4];
    FP_UNROLL
    for (int m = 0; m < S::kMBlocks; ++m) {  // matrices: rows 0 to 7, 8 to 15, then 8 columns on
      const int at = 16 * (warp_m * S::kMBlocks + m) + matrix % 2 * 8, column = k + matrix / 2 * 8;
      if constexpr (kAColumns) {
        load_matrices_transposed(a + swizzled<S::kM / 8>(column + row, at / 8), from_a[m]);
      } else {
        load_matrices(a + swizzled<S::kK / 8>(at + row, column / 8), from_a[m]);
      }
    }
    FP_UNROLL
    for (int n = 0; n < S::kNBlocks; n += 2) {  // matrices: columns 0 to 7 and 8 to 15 of k, then of the next block
      const int at = block_column<S>(warp_n, n) + matrix / 2 * 8, column = k + matrix % 2 * 8;
      uint32_t from_b[4];
      if constexpr (kBColumns) {
        load_matrices_transposed(b + swizzled<S::kN / 8>(column + row, at / 8), from_b);
      } else {
        load_matrices(b + swizzled<S::kK / 8>(at + row, column / 8), from_b);
      }
      FP_UNROLL
      for (int m = 0; m < S::kMBlocks; ++m) {
        mma<T>(sums[m][n], from_a[m], from_b[0], from_b[1]);
        mma<T>(sums[m][n + 1], from_a[m], from_b[2], from_b[3]);
      }
    }
  }
}

// The ring: fetch(step, slot) starts the copies of a step, use(slot) multiplies.
template <int kStages, class Fetch, class Use>
__device__ __forceinline__ void pipeline(int steps, Fetch&& fetch, Use&& use) {
  FP_UNROLL
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) fetch(s, s);
    copies_commit();
  }
  int slot = 0;
  for (int step = 0; step < steps; ++step) {
    copies_wait<kStages - 2>();
    __syncthreads();  // everyone's copies of this step are there, and nobody reads the last one's slot
    const int next = step + kStages - 1;
    if (next < steps) fetch(next, slot == 0 ? kStages - 1 : slot - 1);
    copies_commit();
    use(slot);
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
  copies_wait<0>();
  __syncthreads();
}

// Sums of all warps in shared memory, [kM][kStride].
template <class S>
__device__ __forceinline__ void stage_sums(const Sums<S>& sums, float* staged, int warp_m, int warp_n, int warp_k,
                                           int lane) {
  float* mine = staged + warp_k * (S::kSumBytes / 4);
  FP_UNROLL
  for (int m = 0; m < S::kMBlocks; ++m) {
    FP_UNROLL
    for (int n = 0; n < S::kNBlocks; ++n) {
      const int column = block_column<S>(warp_n, n) + lane % 4 * 2;
      FP_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * (warp_m * S::kMBlocks + m) + lane / 4 + 8 * half;
        const Packed<float, 2> pair = {{sums[m][n][2 * half], sums[m][n][2 * half + 1]}};
        *reinterpret_cast<Packed<float, 2>*>(mine + row * S::kStride + column) = pair;
      }
    }
  }
  __syncthreads();
  if constexpr (S::kWarpsK > 1) {
    for (int i = static_cast<int>(threadIdx.x); i < S::kSumBytes / 4; i += S::kThreads) {
      if (i % S::kStride >= S::kN) continue;
      float sum = staged[i];
      for (int part = 1; part < S::kWarpsK; ++part) sum += staged[part * (S::kSumBytes / 4) + i];
      staged[i] = sum;
    }
    __syncthreads();
  }
}

}  // namespace fastpost::cuda
