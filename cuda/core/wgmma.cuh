// SPDX-License-Identifier: Apache-2.0
// The main loop of tiles of 128 x 256 by WGMMA (compute capability 9.0): a ring of steps of 64 in shared memory, one warp group that
// fills it, two that multiply. Only for files named *_sm90.cu.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "cuda/core/tensor_map.cuh"
#include "cuda/core/wide_tile.cuh"

namespace fastpost::cuda {

namespace gmma = cute::SM90::GMMA;
using Full = cutlass::arch::ClusterTransactionBarrier;
using Empty = cutlass::arch::ClusterBarrier;

constexpr int kGroup = 128, kConsumers = 2 * kGroup, kThreads = kGroup + kConsumers;
// Of a thread, once the warp groups have parted: a block has 168 for each of its threads, and a warp group that asks for more
// than the others have given back waits for ever.
constexpr int kLoadRegisters = 88, kMultiplyRegisters = 208;
static_assert(kGroup * kLoadRegisters + kConsumers * kMultiplyRegisters <= 168 * kThreads);

constexpr int kStages = 4, kK = kSwizzledRow;
static_assert(kBoxBytes == kK * kSwizzledRow * 2);
constexpr int kABytes = kWideM * kK * 2, kBBytes = kWideN * kK * 2, kStageBytes = kABytes + kBBytes;
constexpr int kStagedBytes = kConsumers / 32 * kStagedFloats * 4;
constexpr int kFixedBytes = 1024 + kStages * kStageBytes + kStagedBytes;  // tiles have to begin at multiples of 1024
// How a factor lies: rows of the product with its columns (what is summed over) in them, or the other way round.
using Lies = gmma::Major;
constexpr Lies kInRows = Lies::K, kInColumns = Lies::MN;

template <class T, Lies kA, Lies kB>
struct Atom;
template <Lies kA, Lies kB>
struct Atom<bfloat16, kA, kB> : gmma::MMA_64x256x16_F32BF16BF16_SS<kA, kB> {};
template <Lies kA, Lies kB>
struct Atom<float16, kA, kB> : gmma::MMA_64x256x16_F32F16F16_SS<kA, kB> {};

template <class T, Lies kA, Lies kB, size_t... I>
__device__ __forceinline__ void multiply(uint64_t a, uint64_t b, float (&d)[kWideSums], gmma::ScaleOut scale,
                                         std::index_sequence<I...>) {
  Atom<T, kA, kB>::fma(a, b, d[I]..., scale);
}

template <Lies kLies>
__device__ __forceinline__ uint64_t descriptor(const void* shared) {
  const uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  return wide_descriptor(kLies == kInColumns) | (address & 0x3ffff) >> 4;
}

// sums (+)= a · b over 64 columns; on return the products that were started before these are done.
template <class T, Lies kA, Lies kB>
__device__ __forceinline__ void multiply_step(uint64_t a, uint64_t b, float (&sums)[kWideSums], bool first) {
  constexpr auto kAll = std::make_index_sequence<kWideSums>{};
  constexpr int kNextA = wide_step(kA == kInColumns), kNextB = wide_step(kB == kInColumns);
  CUTE_UNROLL
  for (int i = 0; i < kWideSums; ++i) cute::warpgroup_fence_operand(sums[i]);
  cute::warpgroup_arrive();
  CUTE_UNROLL
  for (int k = 0; k < kK / 16; ++k) {
    const auto scale = first && k == 0 ? gmma::ScaleOut::Zero : gmma::ScaleOut::One;
    multiply<T, kA, kB>(a + k * kNextA, b + k * kNextB, sums, scale, kAll);
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_wait<1>();
  CUTE_UNROLL
  for (int i = 0; i < kWideSums; ++i) cute::warpgroup_fence_operand(sums[i]);
}

// A place in the ring.
struct Place {
  int stage = 0, phase = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

struct Barriers {
  Full::ValueType* full;
  Empty::ValueType* empty;
};

// What a warp of a multiplying group does in a tile.
template <class T, Lies kA, Lies kB>
__device__ __forceinline__ void multiply_tile(int steps, uint64_t first_a, uint64_t first_b, Barriers barriers,
                                              Place& at, float (&sums)[kWideSums]) {
  const bool speaks = threadIdx.x % 32 == 0;
  if (steps == 0) {
    CUTE_UNROLL
    for (int i = 0; i < kWideSums; ++i) sums[i] = 0;
  }
  int last = 0;  // the stage whose products may still be under way
  for (int step = 0; step < steps; ++step, at.advance()) {
    Full::wait(&barriers.full[at.stage], at.phase);
    const uint64_t stage = static_cast<uint64_t>(at.stage) * (kStageBytes >> 4);
    multiply_step<T, kA, kB>(first_a + stage, first_b + stage, sums, step == 0);
    if (step > 0 && speaks) Empty::arrive(&barriers.empty[last]);
    last = at.stage;
  }
  cute::warpgroup_wait<0>();
  CUTE_UNROLL
  for (int i = 0; i < kWideSums; ++i) cute::warpgroup_fence_operand(sums[i]);
  if (steps > 0 && speaks) Empty::arrive(&barriers.empty[last]);
}

__device__ __forceinline__ void init(Barriers barriers, int arrivals) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      Full::init(&barriers.full[s], arrivals);
      Empty::init(&barriers.empty[s], kConsumers / 32);
    }
    cutlass::arch::fence_barrier_init();
  }
}

__device__ __forceinline__ char* aligned_ring(char* unaligned) {
  return unaligned + (1024 - __cvta_generic_to_shared(unaligned) % 1024) % 1024;
}

}  // namespace fastpost::cuda
