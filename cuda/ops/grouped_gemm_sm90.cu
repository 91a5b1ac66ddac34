// SPDX-License-Identifier: Apache-2.0
// grouped_gemm for compute capability 9.0: tiles of 128 rows and 256 columns of W, two warp groups multiply (WGMMA, 64 rows
// each), one loads. W comes by TMA: one description covers all experts' matrices, in either layout, and a tile's two halves are
// copies of their own, so that columns which an activation pairs up meet in one thread's registers. x comes by TMA where it
// lies in grouped order (rows of the next expert come along and are not written), else row by row by cp.async. Blocks stay
// and walk over tiles; the loading group is already in the next tile while the others finish one.
//
// Compiled for sm_90a; no GPU has run it yet, and only its tiles, its gathering and what follows WGMMA are tested on the host.
// What is expected to limit it: a step of 64 loads 48 KB for 1024 cycles of matrix instructions, 48 bytes a cycle where the L2
// cache gives about 40, so at most some 80 % of the peak until blocks in a cluster share what they load.
#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "cuda/core/tensor_map.cuh"
#include "cuda/ops/grouped_gemm.cuh"

namespace fastpost::cuda {
namespace {

namespace gmma = cute::SM90::GMMA;
using Full = cutlass::arch::ClusterTransactionBarrier;
using Empty = cutlass::arch::ClusterBarrier;

constexpr int kGroup = 128, kConsumers = 2 * kGroup, kThreads = kGroup + kConsumers;
// Of a thread, once the warp groups have parted: a block has 168 for each of its threads, and a warp group that asks for more
// than the others have given back waits for ever.
constexpr int kLoadRegisters = 88, kMultiplyRegisters = 208;
static_assert(kGroup * kLoadRegisters + kConsumers * kMultiplyRegisters <= 168 * kThreads);

constexpr int kStages = 4, kK = kSwizzledRow;
constexpr int kABytes = kWideM * kK * 2, kBBytes = kWideN * kK * 2, kStageBytes = kABytes + kBBytes;
constexpr int kStagedBytes = kConsumers / 32 * kStagedFloats * 4;
constexpr int kFixedBytes = 1024 + kStages * kStageBytes + kStagedBytes;  // tiles have to begin at multiples of 1024
static_assert(kFixedBytes + tiles_bytes(kMostExpertsSm90) + 2 * kStages * 8 <= 227 << 10);
constexpr int kLag = 2;  // steps of gathered rows that a thread has under way
static_assert(kLag < kStages);

template <class T, bool kTransposed>
struct Atom;
template <bool kTransposed>
struct Atom<bfloat16, kTransposed>
    : gmma::MMA_64x256x16_F32BF16BF16_SS<gmma::Major::K, kTransposed ? gmma::Major::MN : gmma::Major::K> {};
template <bool kTransposed>
struct Atom<float16, kTransposed>
    : gmma::MMA_64x256x16_F32F16F16_SS<gmma::Major::K, kTransposed ? gmma::Major::MN : gmma::Major::K> {};

template <class T, bool kTransposed, size_t... I>
__device__ __forceinline__ void multiply(uint64_t a, uint64_t b, float (&d)[kWideSums], gmma::ScaleOut scale,
                                         std::index_sequence<I...>) {
  Atom<T, kTransposed>::fma(a, b, d[I]..., scale);
}

// A tile in shared memory for WGMMA, rows of 128 bytes swizzled over 8 of them (PTX ISA, matrix descriptor). Rows of the
// product with its columns in them: the next 8 are 1024 bytes on. Columns with 64 rows in them: the next 8 columns are 1024
// bytes on, the next 64 rows a whole box.
constexpr int kBoxBytes = kK * kSwizzledRow * 2;
__device__ __forceinline__ uint64_t descriptor(const void* shared, int next_rows) {
  const uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEight = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEight | static_cast<uint64_t>(next_rows >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// sums (+)= a · b over 64 columns; on return the products that were started before these are done.
template <class T, bool kTransposed>
__device__ __forceinline__ void multiply_step(uint64_t a, uint64_t b, float (&sums)[kWideSums], bool first) {
  constexpr auto kAll = std::make_index_sequence<kWideSums>{};
  constexpr int kNextB = (kTransposed ? 2 * 1024 : 32) >> 4;  // 16 columns on
  CUTE_UNROLL
  for (int i = 0; i < kWideSums; ++i) cute::warpgroup_fence_operand(sums[i]);
  cute::warpgroup_arrive();
  CUTE_UNROLL
  for (int k = 0; k < kK / 16; ++k) {
    const auto scale = first && k == 0 ? gmma::ScaleOut::Zero : gmma::ScaleOut::One;
    multiply<T, kTransposed>(a + k * 2, b + k * kNextB, sums, scale, kAll);
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

template <bool kTransposed>
__device__ __forceinline__ void load_weight(const GroupedWork& w, const CUtensorMap& map, const GroupedTile& tile,
                                            int step, char* b, Full::ValueType* full) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  const int first = tile.column_tile * w.tile_width(kWideN), second = first + w.second_half(kWideN);
  CUTE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int n = half ? second : first;
    char* to = b + half * (kBBytes / 2);
    if constexpr (kTransposed) {
      CUTE_UNROLL
      for (int box = 0; box < kWideN / 2 / kSwizzledRow; ++box) {
        cute::SM90_TMA_LOAD_3D::copy(&map, full, kHint, to + box * kBoxBytes, n + box * kSwizzledRow, step * kK,
                                     tile.expert);
      }
    } else {
      cute::SM90_TMA_LOAD_3D::copy(&map, full, kHint, to, step * kK, n, tile.expert);
    }
  }
}

__device__ __forceinline__ int steps_of(const GroupedWork& w, const GroupedTile& tile) {
  return tile.expert == w.experts ? 0 : (w.k + kK - 1) / kK;
}

template <bool kTransposed>
__device__ __forceinline__ void load_tiles(const GroupedWork& w, const GroupedTiles& tiles, const CUtensorMap& x_map,
                                           const CUtensorMap& weight_map, char* ring, Barriers barriers) {
  Place at;
  for (int index = static_cast<int>(blockIdx.x); index < tiles.count(); index += static_cast<int>(gridDim.x)) {
    const GroupedTile tile = tiles.at(index);
    const int steps = steps_of(w, tile);
    for (int step = 0; step < steps; ++step, at.advance()) {
      char* a = ring + at.stage * kStageBytes;
      Full::ValueType* full = &barriers.full[at.stage];
      Empty::wait(&barriers.empty[at.stage], at.phase ^ 1);
      Full::arrive_and_expect_tx(full, kStageBytes);
      cute::SM90_TMA_LOAD_2D::copy(&x_map, full, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), a,
                                   step * kK, tile.first_row);
      load_weight<kTransposed>(w, weight_map, tile, step, a + kABytes, full);
    }
  }
}

// The same with rows of x from anywhere. What cp.async wrote is made visible to the matrix instructions by the thread that
// wrote it, once it is there: kLag steps later.
template <class T, bool kTransposed>
__device__ __forceinline__ void gather_tiles(const GroupedWork& w, const GroupedTiles& tiles,
                                             const CUtensorMap& weight_map, char* ring, Barriers barriers, int thread) {
  const GatherShare share = gather_share(thread);
  Place at;
  int arrived = 0, under_way = 0;  // the stage that comes next, and how many
  const auto arrive = [&] {
    cutlass::arch::fence_view_async_shared();
    Full::arrive(&barriers.full[arrived]);
    arrived = arrived + 1 == kStages ? 0 : arrived + 1;
    --under_way;
  };
  int slots[kGatherRows];  // of the tile that comes next: loaded long before they are needed
  const auto look_up = [&](const GroupedTile& tile) {
    CUTE_UNROLL
    for (int i = 0; i < kGatherRows; ++i) {
      const int row = tile.first_row + share.row + i * kGatherStep;
      slots[i] = row < tile.end_row && tile.expert < w.experts ? w.x.order[row] : 0;
    }
  };
  int index = static_cast<int>(blockIdx.x);
  GroupedTile next = {};
  if (index < tiles.count()) look_up(next = tiles.at(index));
  while (index < tiles.count()) {
    const GroupedTile tile = next;
    int rows[kGatherRows];
    CUTE_UNROLL
    for (int i = 0; i < kGatherRows; ++i) {
      rows[i] = tile.first_row + share.row + i * kGatherStep < tile.end_row ? w.x.bounded(slots[i]) : -1;
    }
    index += static_cast<int>(gridDim.x);
    if (index < tiles.count()) look_up(next = tiles.at(index));
    const int steps = steps_of(w, tile);
    for (int step = 0; step < steps; ++step, at.advance()) {
      char* a = ring + at.stage * kStageBytes;
      Empty::wait(&barriers.empty[at.stage], at.phase ^ 1);
      if (thread == 0) {
        Full::arrive_and_expect_tx(&barriers.full[at.stage], kBBytes);
        load_weight<kTransposed>(w, weight_map, tile, step, a + kABytes, &barriers.full[at.stage]);
      }
      const int column = step * kK + share.column;
      const T* x = static_cast<const T*>(w.x.data) + (column < w.k ? column : 0);
      CUTE_UNROLL
      for (int i = 0; i < kGatherRows; ++i) {
        const bool exists = rows[i] >= 0;
        copy_async(a + share.offset + i * kGatherBytes, x + (exists ? rows[i] * w.x.stride : 0),
                   exists && column < w.k);
      }
      copies_commit();
      if (++under_way > kLag) {
        copies_wait<kLag>();
        arrive();
      }
    }
  }
  copies_wait<0>();
  while (under_way > 0) arrive();
}

template <class T, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                   const __grid_constant__ GroupedWork w) {
  extern __shared__ char unaligned[];
  char* ring = unaligned + (1024 - __cvta_generic_to_shared(unaligned) % 1024) % 1024;
  char* staged = ring + kStages * kStageBytes;
  __shared__ __align__(8) Full::ValueType full[kStages];
  __shared__ __align__(8) Empty::ValueType empty[kStages];

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  if (thread == 0) {
    for (int s = 0; s < kStages; ++s) {
      Full::init(&full[s], w.x.order ? 1 + kGroup : 1);  // the copy engine's, and those who gather
      Empty::init(&empty[s], kConsumers / 32);
    }
    cutlass::arch::fence_barrier_init();
  }
  clear_grad_gate(w);
  const GroupedTiles tiles =
      make_tiles(w.offset, w.experts, w.rows, kWideM, w.column_tiles(kWideN), staged + kStagedBytes);

  if (thread < kGroup) {
    cutlass::arch::warpgroup_reg_dealloc<kLoadRegisters>();
    if (w.x.order) {
      gather_tiles<T, kTransposed>(w, tiles, weight_map, ring, {full, empty}, thread);
    } else if (thread == 0) {
      load_tiles<kTransposed>(w, tiles, x_map, weight_map, ring, {full, empty});
    }
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<kMultiplyRegisters>();
  const int consumer = (thread - kGroup) / kGroup, warp = (thread - kGroup) / 32;
  const uint64_t first_a = descriptor(ring + consumer * (kABytes / 2), 16);  // 16: where it has no meaning
  const uint64_t first_b = descriptor(ring + kABytes, kTransposed ? kBoxBytes : 16);
  float* corner = reinterpret_cast<float*>(staged) + warp * kStagedFloats;
  Place at;
  float sums[kWideSums];
  for (int index = static_cast<int>(blockIdx.x); index < tiles.count(); index += static_cast<int>(gridDim.x)) {
    const GroupedTile tile = tiles.at(index);
    const int steps = steps_of(w, tile);
    if (steps == 0) {
      CUTE_UNROLL
      for (int i = 0; i < kWideSums; ++i) sums[i] = 0;
    }
    int last = 0;  // the stage whose products may still be under way
    for (int step = 0; step < steps; ++step, at.advance()) {
      Full::wait(&full[at.stage], at.phase);
      const uint64_t stage = static_cast<uint64_t>(at.stage) * (kStageBytes >> 4);
      multiply_step<T, kTransposed>(first_a + stage, first_b + stage, sums, step == 0);
      if (step > 0 && lane == 0) Empty::arrive(&empty[last]);
      last = at.stage;
    }
    cute::warpgroup_wait<0>();
    CUTE_UNROLL
    for (int i = 0; i < kWideSums; ++i) cute::warpgroup_fence_operand(sums[i]);
    if (steps > 0 && lane == 0) Empty::arrive(&empty[last]);
    finish_warp<T>(w, tile, tile.first_row + 16 * warp, sums, corner, lane);
  }
}

}  // namespace

void multiply_grouped_sm90(const Stream& stream, const GroupedWork& work, GroupedType type, int processors) {
  const int64_t experts = work.experts, k = work.k, n = work.finish == Finish::kGated ? 2 * work.width : work.width;
  // Of a dimension of one, the stride has no meaning, but the driver looks at it.
  const auto step = [](int64_t size, int64_t stride) { return size > 1 ? stride : kSwizzledRow; };
  const int64_t to_expert = step(experts, work.expert_stride);
  const CUtensorMap weight_map =
      type.transposed ? tensor_map<3>(stream, type.dtype, work.weight, {n, k, experts},
                                      {step(k, work.column_stride), to_expert}, {kSwizzledRow, kK, 1})
                      : tensor_map<3>(stream, type.dtype, work.weight, {k, n, experts},
                                      {step(n, work.row_stride), to_expert}, {kSwizzledRow, kWideN / 2, 1});
  const CUtensorMap x_map = work.x.order ? weight_map  // which nobody then looks at
                                         : tensor_map<2>(stream, type.dtype, work.x.data, {k, work.x.rows},
                                                         {step(work.x.rows, work.x.stride)}, {kSwizzledRow, kWideM});
  const int64_t tiles = most_row_tiles(work.rows, work.experts, kWideM) * work.column_tiles(kWideN);
  const int shared = kFixedBytes + tiles_bytes(work.experts);
  const auto go = [&]<class T>(T) {
    with_flag(type.transposed, [&](auto transposed) {
      auto* kernel = product_kernel<T, decltype(transposed)::value>;
      stream.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
      launch(kernel, tiles < processors ? tiles : processors, kThreads, shared, stream, x_map, weight_map, work);
    });
  };
  type.dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace fastpost::cuda
