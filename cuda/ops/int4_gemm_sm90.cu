// SPDX-License-Identifier: Apache-2.0
// x · Wᵀ for compute capability 9.0 and enough rows to be bound by arithmetic. W is the left factor of WGMMA and comes from
// registers: its codes go from global memory to them, become scale·(code - zero) there, rounded once, and never touch
// shared memory. x comes by TMA, one warp group loads it, two multiply: 128 rows of W by 64, 128 or 256 of x. Where there
// are few tiles, two blocks share one, half of the columns each, and one adds the other's sums to its own.
#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "cuda/ops/int4_gemm.cuh"

namespace fastpost::cuda {
namespace {

namespace gmma = cute::SM90::GMMA;
using Full = cutlass::arch::ClusterTransactionBarrier;
using Empty = cutlass::arch::ClusterBarrier;

constexpr int kTileRows = 128;  // of W
constexpr int kGroup = 128, kConsumers = 2 * kGroup, kThreads = kGroup + kConsumers;
constexpr int kStageColumns = 64;       // 128 bytes of a row of x: what one swizzled row of shared memory holds
constexpr int kOutRow = kTileRows + 8;  // elements; the padding puts rows in other banks
constexpr int kPair = 2;                // blocks of codes that are copied together: whole lines of 128 bytes of a row
constexpr int kRing = 4;                // blocks of codes that a thread has room for
constexpr int kRingBytes = kRing * kTileRows * int4::kBlockBytes;
constexpr int kMostShared = 216 << 10;

__host__ __device__ constexpr int stage_bytes(int tile) { return tile * kStageColumns * 2; }
__host__ __device__ constexpr int stages(int tile) {
  const int room = (kMostShared - kRingBytes) / stage_bytes(tile);
  return room < 8 ? room : 8;
}

struct TilesWork {
  Int4Matrix w;
  int64_t m, blocks;  // rows of x; blocks of 128 columns
  const void* bias;   // or null
  void* out;
  int64_t out_stride;
  int row_tiles;  // of 128 rows of W
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
  const int64_t first_row = int64_t{kTileRows} * (tile_index % work.row_tiles);
  const int first_x = tile_index / work.row_tiles * kTile;
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
    cutlass::arch::warpgroup_reg_dealloc<40>();
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
  cutlass::arch::warpgroup_reg_alloc<232>();
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
  constexpr auto kAll = std::make_index_sequence<kAccumulators>{};
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
        CUTE_UNROLL
        for (int k = 0; k < kAccumulators; ++k) cute::warpgroup_fence_operand(sums[k]);
        cute::warpgroup_arrive();
        multiply<T, kTile>(mine, x, sums, kAll);
        multiply<T, kTile>(mine + 4, x + 2, sums, kAll);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<1>();  // the products before these are done
        CUTE_UNROLL
        for (int k = 0; k < kAccumulators; ++k) cute::warpgroup_fence_operand(sums[k]);
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

  if constexpr (kParts > 1) {
    constexpr int kOf = kConsumers;  // [sum][thread]
    float* theirs = reinterpret_cast<float*>(shared) + thread - kGroup;
    consumers_sync();
    if (part == 1) {
      CUTE_UNROLL
      for (int k = 0; k < kAccumulators; ++k) theirs[k * kOf] = sums[k];
    }
    cute::cluster_sync();
    if (part == 0) {
      const uint32_t address = cute::set_block_rank(static_cast<uint32_t>(__cvta_generic_to_shared(theirs)), 1);
      CUTE_UNROLL
      for (int k = 0; k < kAccumulators; ++k) {
        float value;
        asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address + k * kOf * 4));
        sums[k] += value;
      }
    }
    cute::cluster_sync();  // nobody leaves while others read
    if (part == 1) return;
  }

  // The tile, transposed through shared memory, so that rows of out are written in whole lines.
  float bias[2] = {0, 0};
  if (work.bias) {
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) bias[half] = to_float(static_cast<const T*>(work.bias)[row[half]]);
  }
  consumers_sync();
  T* tile = reinterpret_cast<T*>(shared);
  CUTE_UNROLL
  for (int j = 0; j < kTile / 8; j += 2) {
    const float* at = sums + 4 * j;
    T* to = tile + (8 * (j + lane / 16) + lane % 8) * kOutRow + 16 * warp + lane / 8 % 2 * 8;
    store_transposed(to, two<T>(at[0] + bias[0], at[1] + bias[0]), two<T>(at[2] + bias[1], at[3] + bias[1]),
                     two<T>(at[4] + bias[0], at[5] + bias[0]), two<T>(at[6] + bias[1], at[7] + bias[1]));
  }
  consumers_sync();
  for (int i = thread - kGroup; i < kTile * (kTileRows / 8); i += kConsumers) {
    const int m = i / (kTileRows / 8), column = i % (kTileRows / 8) * 8;
    if (first_x + m >= work.m) break;
    const int64_t n = first_row + column;
    T* to = static_cast<T*>(work.out) + (first_x + m) * work.out_stride + n;
    const auto eight = *reinterpret_cast<const Packed<T, 8>*>(tile + m * kOutRow + column);
    if (n + 8 <= w.n && is_aligned<T, 8>(to)) {
      *reinterpret_cast<Packed<T, 8>*>(to) = eight;
    } else {
      CUTE_UNROLL
      for (int c = 0; c < 8; ++c) {
        if (n + c < w.n) to[c] = eight.v[c];
      }
    }
  }
}

// x [m, k] as the copy engine sees it; what lies outside reads as zero.
CUtensorMap describe(const Stream& stream, const Tensor& x, int tile) {
  static const auto encode = [&] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    stream.check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(x.size(1)), static_cast<cuuint64_t>(x.size(0))};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(x.stride(0)) * 2};
  const cuuint32_t box[2] = {kStageColumns, static_cast<cuuint32_t>(tile)}, one[2] = {1, 1};
  const auto type = x.dtype == DType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult status =
      encode ? encode(&map, type, 2, x.data, sizes, strides, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
                      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
             : CUDA_ERROR_NOT_FOUND;
  stream.check(status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue);
  return map;
}

template <class T, int kTile, int kParts>
void launch_parts(const Stream& stream, const Tensor& x, TilesWork& work) {
  const CUtensorMap map = describe(stream, x, kTile);
  constexpr int kStaged = stages(kTile) * stage_bytes(kTile) + kRingBytes, kOut = kTile * kOutRow * 2;
  constexpr int kShared = (kStaged > kOut ? kStaged : kOut) + 1024;
  static_assert(kStaged >= kTile / 2 * kConsumers * 4);  // the other part's sums
  with_group_step(work.w, [&](auto step) {
    auto* kernel = tiles_kernel<T, kTile, kParts, decltype(step)::value>;
    stream.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    launch(kernel, kParts * work.row_tiles * blocks_for(work.m, kTile), kThreads, kShared, stream, Cluster{kParts}, map,
           work);
  });
}

template <class T, int kTile>
void launch_tiles(const Stream& stream, const Tensor& x, TilesWork& work, int processors) {
  work.row_tiles = static_cast<int>(blocks_for(work.w.n, kTileRows));
  const bool few = 2 * work.row_tiles * blocks_for(work.m, kTile) <= processors && work.blocks > 1;
  few ? launch_parts<T, kTile, 2>(stream, x, work) : launch_parts<T, kTile, 1>(stream, x, work);
}

}  // namespace

void multiply_tiles_sm90(const Stream& stream, const Tensor& x, const Int4Matrix& w, const Tensor& bias,
                         const Tensor& out) {
  TilesWork work = {};
  work.w = w;
  work.m = x.size(0);
  work.blocks = blocks_for(w.k, int4::kBlock);
  work.bias = bias.defined() ? bias.data : nullptr;
  work.out = out.data;
  work.out_stride = out.stride(0);
  int processors = 0;
  stream.check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.device_index));
  const auto go = [&]<class T>(T) {
    if (work.m <= 64) return launch_tiles<T, 64>(stream, x, work, processors);
    if (work.m <= 128) return launch_tiles<T, 128>(stream, x, work, processors);
    launch_tiles<T, 256>(stream, x, work, processors);
  };
  x.dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace fastpost::cuda
