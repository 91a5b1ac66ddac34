// SPDX-License-Identifier: Apache-2.0
// x · Wᵀ for compute capability 9.0 and enough rows to be bound by arithmetic. W is the left factor of WGMMA and comes from
// registers: its codes go from global memory to them, become scale·(code - zero) there, rounded once, and never touch
// shared memory. x comes by TMA, one warp group loads it, two multiply: 128 rows of W by 64, 128 or 256 of x. Where there
// are few tiles, two blocks share one, half of the columns each, and one adds the other's sums to its own.
//
// H200, 8192 x 8192, groups of 128, µs beside torch.mm in bfloat16: 512 rows 98 (90), 1024 rows 193 (175), 4096 rows 815
// (691). Without sharing tiles: 64 rows 48 (39), 128 rows 50 (38), 256 rows 65 (51); with it part of their tests ran
// and they are not yet timed. Tried and no faster: clusters that load x once and send it to all (98), other depths of the ring.
#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "cuda/core/tensor_map.cuh"
#include "cuda/ops/int4_gemm.cuh"

namespace fastpost::cuda {
namespace {

namespace gmma = cute::SM90::GMMA;
using Full = cutlass::arch::ClusterTransactionBarrier;
using Empty = cutlass::arch::ClusterBarrier;

constexpr int kTileRows = 128;  // of W
constexpr int kGroup = 128, kConsumers = 2 * kGroup, kThreads = kGroup + kConsumers;
// Of a thread, once the warp groups have parted. A block has 168 for each of its threads, and a warp group that asks for more
// than the others have given back waits for ever.
constexpr int kLoadRegisters = 40, kMultiplyRegisters = 232;
static_assert(kGroup * kLoadRegisters + kConsumers * kMultiplyRegisters <= 168 * kThreads);
static_assert(kGroup * 48 <= kConsumers * 24);  // what the backward's loaders keep for themselves
constexpr int kStageColumns = 64;               // 128 bytes of a row of x: what one swizzled row of shared memory holds
constexpr int kOutRow = kTileRows + 8;          // elements; the padding puts rows in other banks
constexpr int kPair = 2;  // blocks of codes that are copied together: whole lines of 128 bytes of a row
constexpr int kRing = 4;  // blocks of codes that a thread has room for
constexpr int kRingBytes = kRing * kTileRows * int4::kBlockBytes;
constexpr int kMostShared = 216 << 10;

__host__ __device__ constexpr int stage_bytes(int tile) { return tile * kStageColumns * 2; }
__host__ __device__ constexpr int stages(int tile) {
  const int room = (kMostShared - kRingBytes) / stage_bytes(tile);
  return room < 8 ? room : 8;
}

// Beside a stage of grad lie what its rows of W are: 6 KB.
__host__ __device__ constexpr int backward_stages(int tile) {
  const int room = kMostShared / (stage_bytes(tile) + (6 << 10));
  return room < 8 ? room : 8;
}

// What is written: [rows, columns], bias? [columns] added.
struct Output {
  int64_t rows, columns;
  void* data;
  int64_t stride;
  const void* bias;
};

struct TilesWork {
  Int4Matrix w;
  int64_t blocks;  // of 128 columns of W
  Output out;
  int tiles;  // across out
};

template <class T, int kTile>
struct Atom;
template <>
struct Atom<bfloat16, 64> : gmma::MMA_64x64x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K> {};
template <>
struct Atom<bfloat16, 128> : gmma::MMA_64x128x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K> {};
template <>
struct Atom<bfloat16, 256> : gmma::MMA_64x256x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K> {};
template <>
struct Atom<float16, 64> : gmma::MMA_64x64x16_F32F16F16_RS<gmma::Major::K, gmma::Major::K> {};
template <>
struct Atom<float16, 128> : gmma::MMA_64x128x16_F32F16F16_RS<gmma::Major::K, gmma::Major::K> {};
template <>
struct Atom<float16, 256> : gmma::MMA_64x256x16_F32F16F16_RS<gmma::Major::K, gmma::Major::K> {};

template <class T, int kTile, size_t... I>
__device__ __forceinline__ void multiply(const uint32_t* a, uint64_t b, float (&d)[kTile / 2],
                                         std::index_sequence<I...>) {
  Atom<T, kTile>::fma(a[0], a[1], a[2], a[3], b, d[I]..., gmma::ScaleOut::One);
}

// sums += a · b over 32 columns, in two instructions; on return the products that were started before these are done.
template <class T, int kTile>
__device__ __forceinline__ void multiply_step(const uint32_t (&a)[8], uint64_t b, float (&sums)[kTile / 2]) {
  constexpr auto kAll = std::make_index_sequence<kTile / 2>{};
  CUTE_UNROLL
  for (int k = 0; k < kTile / 2; ++k) cute::warpgroup_fence_operand(sums[k]);
  cute::warpgroup_arrive();
  multiply<T, kTile>(a, b, sums, kAll);
  multiply<T, kTile>(a + 4, b + 2, sums, kAll);
  cute::warpgroup_commit_batch();
  cute::warpgroup_wait<1>();
  CUTE_UNROLL
  for (int k = 0; k < kTile / 2; ++k) cute::warpgroup_fence_operand(sums[k]);
}

// A tile of x in shared memory for WGMMA: rows of 128 bytes, swizzled over 8 rows (PTX ISA, matrix descriptor).
__device__ __forceinline__ uint64_t x_descriptor(const void* shared) {
  const uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32,
                     kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kEightRows | kUnused | (address & 0x3ffff) >> 4;
}

// Four 8x8 matrices of 16-bit values, each transposed on the way to shared memory: lane l passes where row l % 8 of matrix
// l / 8 begins there.
__device__ __forceinline__ void store_transposed(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(row))),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

template <class T>
__device__ __forceinline__ uint32_t two(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}

// Adds the other part's sums, if there are two, and writes the tile, transposed through shared memory, so that rows of out are
// written in whole lines. column(half): where the 8 columns of a thread's rows g, or g + 8, begin in the tile's 128.
template <class T, int kTile, int kParts, class Column>
__device__ __forceinline__ void finish(float (&sums)[kTile / 2], char* shared, int part, int thread, const Output& out,
                                       int first_row, int64_t first_column, Column column) {
  if constexpr (kParts > 1) {
    float* theirs = reinterpret_cast<float*>(shared) + thread;  // [sum][thread]
    consumers_sync();
    if (part == 1) {
      CUTE_UNROLL
      for (int k = 0; k < kTile / 2; ++k) theirs[k * kConsumers] = sums[k];
    }
    cute::cluster_sync();
    if (part == 0) {
      const uint32_t address = cute::set_block_rank(static_cast<uint32_t>(__cvta_generic_to_shared(theirs)), 1);
      CUTE_UNROLL
      for (int k = 0; k < kTile / 2; ++k) {
        float value;
        asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address + k * kConsumers * 4));
        sums[k] += value;
      }
    }
    cute::cluster_sync();  // nobody leaves while others read
    if (part == 1) return;
  }
  const int lane = thread % 32;
  float bias[2] = {0, 0};
  if (out.bias) {
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t at = first_column + column(half) + lane / 4;
      if (at < out.columns) bias[half] = to_float(static_cast<const T*>(out.bias)[at]);
    }
  }
  consumers_sync();
  T* tile = reinterpret_cast<T*>(shared);
  CUTE_UNROLL
  for (int j = 0; j < kTile / 8; j += 2) {
    const float* at = sums + 4 * j;
    T* to = tile + (8 * (j + lane / 16) + lane % 8) * kOutRow + column(lane / 8 % 2);
    store_transposed(to, two<T>(at[0] + bias[0], at[1] + bias[0]), two<T>(at[2] + bias[1], at[3] + bias[1]),
                     two<T>(at[4] + bias[0], at[5] + bias[0]), two<T>(at[6] + bias[1], at[7] + bias[1]));
  }
  consumers_sync();
  for (int i = thread; i < kTile * (kTileRows / 8); i += kConsumers) {
    const int row = i / (kTileRows / 8), at = i % (kTileRows / 8) * 8;
    if (first_row + row >= out.rows) break;
    T* to = static_cast<T*>(out.data) + (first_row + row) * out.stride + first_column + at;
    const auto eight = *reinterpret_cast<const Packed<T, 8>*>(tile + row * kOutRow + at);
    if (first_column + at + 8 <= out.columns && is_aligned<T, 8>(to)) {
      *reinterpret_cast<Packed<T, 8>*>(to) = eight;
    } else {
      CUTE_UNROLL
      for (int c = 0; c < 8; ++c) {
        if (first_column + at + c < out.columns) to[c] = eight.v[c];
      }
    }
  }
}

template <class T, int kTile, int kParts, int kGroupStep>
__global__ void __launch_bounds__(kThreads, 1)
    tiles_kernel(const __grid_constant__ CUtensorMap x_map, const TilesWork work) {
  constexpr int kStages = stages(kTile), kBytes = stage_bytes(kTile), kAccumulators = kTile / 2;
  extern __shared__ char unaligned[];
  char* shared = unaligned + (1024 - __cvta_generic_to_shared(unaligned) % 1024) % 1024;
  __shared__ __align__(8) Full::ValueType full[kStages];
  __shared__ __align__(8) Empty::ValueType empty[kStages];

  const int thread = static_cast<int>(threadIdx.x);
  const int part = static_cast<int>(blockIdx.x) % kParts, tile_index = static_cast<int>(blockIdx.x) / kParts;
  const int64_t first_row = int64_t{kTileRows} * (tile_index % work.tiles);
  const int first_x = tile_index / work.tiles * kTile;
  const int per_part = static_cast<int>((work.blocks + kParts - 1) / kParts), first_block = part * per_part;
  const int end_block = first_block + per_part < work.blocks ? first_block + per_part : static_cast<int>(work.blocks);
  const int steps = 2 * (end_block - first_block);
  if (thread == 0) {
    for (int s = 0; s < kStages; ++s) {
      Full::init(&full[s], 1);
      Empty::init(&empty[s], kConsumers / 32);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  if (thread < kGroup) {  // loads x
    cutlass::arch::warpgroup_reg_dealloc<kLoadRegisters>();
    if (thread == 0) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % kStages, turn = step / kStages;
        Empty::wait(&empty[stage], (turn & 1) ^ 1);
        Full::arrive_and_expect_tx(&full[stage], kBytes);
        cute::SM90_TMA_LOAD_2D::copy(&x_map, &full[stage], static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST),
                                     shared + stage * kBytes, (2 * first_block + step) * kStageColumns, first_x);
      }
    }
    if constexpr (kParts > 1) {  // as the others do below
      cute::cluster_sync();
      cute::cluster_sync();
    }
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<kMultiplyRegisters>();
  const Int4Matrix& w = work.w;
  const int warp = (thread - kGroup) / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  int64_t row[2];
  const uint8_t* codes[2];
  CUTE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t at = first_row + 16 * warp + g + 8 * half;
    row[half] = at < w.n ? at : w.n - 1;
    codes[half] = w.codes + row[half] * w.codes_stride + 16 * t;
  }
  uint32_t scale[2], offset[2];
  const int first_group = int4_group(w, 4 * first_block);
  int left = (first_group + 1) * w.group_units - 4 * first_block;
  Int4Groups groups(w, row, first_group < w.groups ? first_group : w.groups - 1);
  const auto begin_group = [&] {
    groups.next([&](int half, uint32_t bits, float zero) {
      scale[half] = bits * 0x00010001u;
      offset[half] = pair_of<T>(-Pair<T>::kMagicValue - zero);
    });
  };
  using Chunk = Packed<uint32_t, 4>;
  Chunk* ring = reinterpret_cast<Chunk*>(shared + kStages * kBytes) + thread - kGroup;  // [slot][half][thread]
  int fetched = first_block, free_slot = 0;
  const auto fetch = [&] {
    CUTE_UNROLL
    for (int d = 0; d < kPair; ++d, ++fetched) {
      if (fetched >= end_block) break;
      CUTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        copy_async(ring + ((free_slot + d) * 2 + half) * kConsumers,
                   codes[half] + static_cast<int64_t>(fetched) * int4::kBlockBytes, true);
      }
    }
    free_slot = free_slot + kPair == kRing ? 0 : free_slot + kPair;
    copies_commit();
  };
  CUTE_UNROLL
  for (int d = 0; d < kRing; d += kPair) fetch();
  begin_group();

  float sums[kAccumulators];
  CUTE_UNROLL
  for (int i = 0; i < kAccumulators; ++i) sums[i] = 0;
  constexpr uint32_t kMinusZero = 0x80008000u;

  uint32_t a[2][8];  // of two steps of 16 columns; while one is multiplied, the other is made
  const uint64_t first_x_tile = x_descriptor(shared);
  int stage = 0, phase = 0, slot = 0;
  for (int block = first_block; block < end_block; block += kPair) {
    copies_wait<kRing / kPair - 1>();
    CUTE_UNROLL
    for (int d = 0; d < kPair; ++d) {
      if (block + d >= end_block) break;
      const Chunk packed[2] = {ring[(slot + d) * 2 * kConsumers], ring[((slot + d) * 2 + 1) * kConsumers]};
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        uint32_t (&mine)[8] = a[i % 2];
        CUTE_UNROLL
        for (int half = 0; half < 2; ++half) {
          uint32_t pairs[4];
          int4_differences<T>(packed[half].v[i], offset[half], pairs);
          CUTE_UNROLL
          for (int j = 0; j < 4; ++j) mine[2 * j + half] = fma_pair<T>(pairs[j], scale[half], kMinusZero);
        }
        if ((i + 1) % kGroupStep == 0 && (left -= kGroupStep) == 0) {  // the same for all threads
          begin_group();
          left = w.group_units;
        }
        if (i % 2 == 0) Full::wait(&full[stage], phase);
        const uint64_t x = first_x_tile + stage * (kBytes / 16) + i % 2 * 4;  // 32 columns: 64 bytes, in units of 16
        multiply_step<T, kTile>(mine, x, sums);
        if (i % 2 == 0) {
          const int before = stage == 0 ? kStages - 1 : stage - 1;
          if (block + d + i > first_block && lane == 0) Empty::arrive(&empty[before]);
        } else if (++stage == kStages) {
          stage = 0;
          phase ^= 1;
        }
      }
    }
    slot = slot + kPair == kRing ? 0 : slot + kPair;
    fetch();
  }
  cute::warpgroup_wait<0>();
  CUTE_UNROLL
  for (int k = 0; k < kAccumulators; ++k) cute::warpgroup_fence_operand(sums[k]);

  finish<T, kTile, kParts>(sums, shared, part, thread - kGroup, work.out, first_x, first_row,
                           [&](int half) { return 16 * warp + 8 * half; });
}

// ---- the input's gradient: grad · W from the same bytes ----
// Now 128 columns of W are the left factor, transposed, and its rows are summed over, 64 of them in a step. Their codes come
// to shared memory (three warps copy them, and what the scales and zeros are), and each thread picks the nibbles of its
// columns: columns 32i + 8j + g of a block are one nibble in each of the words i of chunk g / 2. Warp j of group h has those
// for i = 2h (rows g of the matrix instruction) and 2h + 1 (rows g + 8).

constexpr int kStepRows = 64,
              kCodesRow = 80;  // bytes between rows of codes: 64 would put a quad's rows in the same banks
constexpr int kLoaders = 3;    // warps

struct Affine {  // of two neighbouring rows: w = scale·(code + offset)
  uint32_t scale, offset;
};

constexpr int kStepBytes = kStepRows * kCodesRow + 4 * (kStepRows / 2) * static_cast<int>(sizeof(Affine));
static_assert(kStepBytes == 6 << 10);

template <class T, int kTile, int kParts, int kGroupStep>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ CUtensorMap grad_map, const TilesWork work) {
  constexpr int kStages = backward_stages(kTile), kBytes = stage_bytes(kTile), kAccumulators = kTile / 2;
  constexpr int kGroups = 4 / kGroupStep;  // of a block
  extern __shared__ char unaligned[];
  char* shared = unaligned + (1024 - __cvta_generic_to_shared(unaligned) % 1024) % 1024;
  __shared__ __align__(8) Full::ValueType full[kStages];
  __shared__ __align__(8) Empty::ValueType empty[kStages];

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int part = static_cast<int>(blockIdx.x) % kParts, tile_index = static_cast<int>(blockIdx.x) / kParts;
  const int block = tile_index % work.tiles, first_x = tile_index / work.tiles * kTile;
  const Int4Matrix& w = work.w;
  const int all_steps = static_cast<int>((w.n + kStepRows - 1) / kStepRows);
  const int per_part = (all_steps + kParts - 1) / kParts, first_step = part * per_part;
  const int steps = (first_step + per_part < all_steps ? first_step + per_part : all_steps) - first_step;
  if (thread == 0) {
    for (int s = 0; s < kStages; ++s) {
      Full::init(&full[s], 1 + 2 * 32);  // the copy engine's, and two of each lane of a loading warp
      Empty::init(&empty[s], kConsumers / 32);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const auto codes_of = [&](int stage) { return shared + kStages * kBytes + stage * kStepBytes; };
  const auto affine_of = [&](int stage) {  // [group][pair of rows]
    return reinterpret_cast<Affine*>(codes_of(stage) + kStepRows * kCodesRow);
  };

  if (thread < kGroup) {
    cutlass::arch::warpgroup_reg_dealloc<kLoadRegisters + 48>();
    if (thread == 0) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % kStages, turn = step / kStages;
        Empty::wait(&empty[stage], (turn & 1) ^ 1);
        Full::arrive_and_expect_tx(&full[stage], kBytes);
        cute::SM90_TMA_LOAD_2D::copy(&grad_map, &full[stage],
                                     static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST),
                                     shared + stage * kBytes, (first_step + step) * kStageColumns, first_x);
      }
    } else if (thread >= 32) {
      for (int step = thread / 32 - 1; step < steps; step += kLoaders) {
        const int stage = step % kStages, turn = step / kStages;
        const int64_t first = int64_t{kStepRows} * (first_step + step);
        uint32_t scale[2][kGroups], zero[2][kGroups];
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int64_t at = first + lane + 32 * r, row = at < w.n ? at : w.n - 1;
          CUTE_UNROLL
          for (int u = 0; u < kGroups; ++u) {
            const int group = int4_group(w, 4 * block + u * kGroupStep);
            const int there = group < w.groups ? group : w.groups - 1;
            scale[r][u] = int4_scale_bits(w, row, there);
            zero[r][u] = int4_zero(w, row, there);
          }
        }
        Empty::wait(&empty[stage], (turn & 1) ^ 1);
        char* codes = codes_of(stage);
#pragma unroll 2
        for (int i = lane; i < kStepRows * 4; i += 32) {
          const int64_t at = first + i / 4, row = at < w.n ? at : w.n - 1;
          copy_async(codes + i / 4 * kCodesRow + i % 4 * 16,
                     w.codes + row * w.codes_stride + int64_t{int4::kBlockBytes} * block + i % 4 * 16, true);
        }
        CUTE_UNROLL
        for (int r = 0; r < 2; ++r) {
          CUTE_UNROLL
          for (int u = 0; u < kGroups; ++u) {
            const int row = lane + 32 * r;
            auto* halves = reinterpret_cast<uint16_t*>(&affine_of(stage)[u * (kStepRows / 2) + row / 2]) + row % 2;
            halves[0] = static_cast<uint16_t>(scale[r][u]);
            halves[2] = from_float<T>(-Pair<T>::kMagicValue - static_cast<float>(zero[r][u])).bits;
          }
        }
        const auto barrier = static_cast<uint32_t>(__cvta_generic_to_shared(&full[stage]));
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
        Full::arrive(&full[stage]);
      }
    }
    if constexpr (kParts > 1) {  // as the others do in finish
      cute::cluster_sync();
      cute::cluster_sync();
    }
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<kMultiplyRegisters - 24>();
  const int warp = (thread - kGroup) / 32, g = lane / 4, t = lane % 4, j = warp % 4, h = warp / 4;
  const int shift = 4 * (4 * (g % 2) + j), picked = g / 2 * 16 + 8 * h;

  float sums[kAccumulators];
  CUTE_UNROLL
  for (int i = 0; i < kAccumulators; ++i) sums[i] = 0;
  constexpr uint32_t kMinusZero = 0x80008000u;
  uint32_t a[2][8];
  const uint64_t first_tile = x_descriptor(shared);
  int stage = 0, phase = 0;
  for (int step = 0; step < steps; ++step) {
    Full::wait(&full[stage], phase);
    const char* codes = codes_of(stage) + picked;
    const Affine* affine = affine_of(stage);
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint32_t (&mine)[8] = a[i];
      CUTE_UNROLL
      for (int q = 0; q < 2; ++q) {
        CUTE_UNROLL
        for (int p = 0; p < 2; ++p) {  // rows 2t and 2t + 1, then 8 on
          const int row = 32 * i + 16 * q + 8 * p + 2 * t;
          const auto even = *reinterpret_cast<const Packed<uint32_t, 2>*>(codes + row * kCodesRow);
          const auto odd = *reinterpret_cast<const Packed<uint32_t, 2>*>(codes + (row + 1) * kCodesRow);
          CUTE_UNROLL
          for (int half = 0; half < 2; ++half) {
            const Affine of = affine[(2 * h + half) / kGroupStep * (kStepRows / 2) + row / 2];
            const uint32_t both = pick_bytes(even.v[half] >> shift, odd.v[half] >> shift, 0x5410u);
            const uint32_t difference =
                fma_pair<T>(and_or(both, 0x000f000fu, Pair<T>::kMagic), Pair<T>::kOne, of.offset);
            mine[4 * q + 2 * p + half] = fma_pair<T>(difference, of.scale, kMinusZero);
          }
        }
      }
      const uint64_t grad = first_tile + stage * (kBytes / 16) + i * 4;
      multiply_step<T, kTile>(mine, grad, sums);
      if (i == 0 && step > 0 && lane == 0) Empty::arrive(&empty[stage == 0 ? kStages - 1 : stage - 1]);
    }
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  cute::warpgroup_wait<0>();
  CUTE_UNROLL
  for (int k = 0; k < kAccumulators; ++k) cute::warpgroup_fence_operand(sums[k]);
  finish<T, kTile, kParts>(sums, shared, part, thread - kGroup, work.out, first_x, int64_t{int4::kBlock} * block,
                           [&](int half) { return 32 * (2 * h + half) + 8 * j; });
}

template <class T, int kTile, int kParts, bool kBackward>
void launch_parts(const Stream& stream, const Tensor& x, TilesWork& work) {
  const CUtensorMap map =
      tensor_map<2>(stream, x.dtype, x.data, {x.size(1), x.size(0)}, {x.stride(0)}, {kStageColumns, kTile});
  constexpr int kStaged = kBackward ? backward_stages(kTile) * (stage_bytes(kTile) + kStepBytes)
                                    : stages(kTile) * stage_bytes(kTile) + kRingBytes;
  constexpr int kOut = kTile * kOutRow * 2;
  constexpr int kShared = (kStaged > kOut ? kStaged : kOut) + 1024;
  static_assert(kStaged >= kTile / 2 * kConsumers * 4);  // the other part's sums
  with_group_step(work.w, [&](auto step) {
    constexpr int kStep = decltype(step)::value;
    auto* kernel = kBackward ? backward_kernel<T, kTile, kParts, kStep> : tiles_kernel<T, kTile, kParts, kStep>;
    stream.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    launch(kernel, kParts * work.tiles * blocks_for(work.out.rows, kTile), kThreads, kShared, stream, Cluster{kParts},
           map, work);
  });
}

template <class T, int kTile, bool kBackward>
void launch_tiles(const Stream& stream, const Tensor& x, TilesWork& work, int processors) {
  const bool few = 2 * work.tiles * blocks_for(work.out.rows, kTile) <= processors && work.blocks > 1 && work.w.n > 64;
  few ? launch_parts<T, kTile, 2, kBackward>(stream, x, work) : launch_parts<T, kTile, 1, kBackward>(stream, x, work);
}

template <bool kBackward>
void multiply(const Stream& stream, const Tensor& x, const Int4Matrix& w, const Tensor& bias, const Tensor& out) {
  TilesWork work = {};
  work.w = w;
  work.blocks = blocks_for(w.k, int4::kBlock);
  work.out = {out.size(0), out.size(1), out.data, out.stride(0), bias.defined() ? bias.data : nullptr};
  work.tiles = static_cast<int>(blocks_for(out.size(1), kTileRows));
  int processors = 0;
  stream.check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.device_index));
  const auto go = [&]<class T>(T) {
    if (work.out.rows <= 64) return launch_tiles<T, 64, kBackward>(stream, x, work, processors);
    if (work.out.rows <= 128) return launch_tiles<T, 128, kBackward>(stream, x, work, processors);
    launch_tiles<T, 256, kBackward>(stream, x, work, processors);
  };
  x.dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace

void multiply_tiles_sm90(const Stream& stream, const Tensor& x, const Int4Matrix& w, const Tensor& bias,
                         const Tensor& out) {
  multiply<false>(stream, x, w, bias, out);
}

void multiply_tiles_backward_sm90(const Stream& stream, const Tensor& grad, const Int4Matrix& w, const Tensor& grad_x) {
  multiply<true>(stream, grad, w, Tensor{}, grad_x);
}

}  // namespace fastpost::cuda
