// SPDX-License-Identifier: Apache-2.0
// grouped_gemm for compute capability 9.0: tiles of 128 rows and 256 columns of W, two warp groups multiply (WGMMA, 64 rows
// each), one loads. W comes by TMA: one description covers all experts' matrices, in either layout, and a tile's two halves are
// copies of their own, so that columns which an activation pairs up meet in one thread's registers. x comes by TMA where it
// lies in grouped order (rows of the next expert come along and are not written), else row by row by cp.async. Blocks stay
// and walk over tiles; the loading group is already in the next tile while the others finish one.
//
// No GPU has run it yet. Tests run these very kernels on the host, where barriers, the copy engine and WGMMA have stand-ins.
// nvcc 13.0: 168 registers for each thread (88 and 208 once the groups have parted), 213 KB of shared memory and 8 bytes for each
// expert, no spills. What is expected to limit the product: a step of 64 loads 48 KB in 1024 cycles of matrix instructions, 48
// bytes a cycle where the L2 cache gives a multiprocessor about 40, so some 80 % of the peak until blocks of a cluster share
// what they load; and between tiles the matrix units wait while results are written.
#include "cuda/core/tensor_map.cuh"
#include "cuda/core/wgmma.cuh"
#include "cuda/ops/grouped_gemm.cuh"

namespace fastpost::cuda {
namespace {

static_assert(kFixedBytes + tiles_bytes(kMostExpertsSm90) + 2 * kStages * 8 <= 227 << 10);
constexpr int kLag = 2;  // steps of gathered rows that a thread has under way
static_assert(kLag < kStages);

// The place whose copies a thread that gathers has to declare done: kLag steps behind where it starts new ones. What cp.async
// wrote is made visible to the matrix instructions by the thread that wrote it, once it is there.
class Behind {
 public:
  __device__ explicit Behind(Full::ValueType* full) : full_(full) {}
  __device__ void started() {
    copies_commit();
    if (++under_way_ <= kLag) return;
    copies_wait<kLag>();
    arrive();
  }
  __device__ void finish() {
    copies_wait<0>();
    while (under_way_ > 0) arrive();
  }

 private:
  __device__ void arrive() {
    cutlass::arch::fence_view_async_shared();
    Full::arrive(&full_[at_.stage]);
    at_.advance();
    --under_way_;
  }
  Full::ValueType* full_;
  Place at_;
  int under_way_ = 0;
};

// ---- the product ----

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

// The same with rows of x from anywhere.
template <class T, bool kTransposed>
__device__ __forceinline__ void gather_tiles(const GroupedWork& w, const GroupedTiles& tiles,
                                             const CUtensorMap& weight_map, char* ring, Barriers barriers, int thread) {
  constexpr int kGatherRows = kWideM / kGatherStep;
  const GatherShare share = gather_share(thread);
  Place at;
  Behind behind(barriers.full);
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
      behind.started();
    }
  }
  behind.finish();
}

template <class T, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                   const __grid_constant__ GroupedWork w) {
  FP_DYNAMIC_SHARED(char, unaligned);
  char *ring = aligned_ring(unaligned), *staged = ring + kStages * kStageBytes;
  __shared__ Full::ValueType full[kStages];
  __shared__ Empty::ValueType empty[kStages];
  const Barriers barriers = {full, empty};
  init(barriers, w.x.order ? 1 + kGroup : 1);  // the copy engine's, and those who gather
  clear_grad_gate(w);
  const GroupedTiles tiles =
      make_tiles(w.offset, w.experts, w.rows, kWideM, w.column_tiles(kWideN), staged + kStagedBytes);

  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kGroup) {
    cutlass::arch::warpgroup_reg_dealloc<kLoadRegisters>();
    if (w.x.order) {
      gather_tiles<T, kTransposed>(w, tiles, weight_map, ring, barriers, thread);
    } else if (thread == 0) {
      load_tiles<kTransposed>(w, tiles, x_map, weight_map, ring, barriers);
    }
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<kMultiplyRegisters>();
  constexpr Lies kWeight = kTransposed ? kInColumns : kInRows;
  const int consumer = (thread - kGroup) / kGroup, warp = (thread - kGroup) / 32;
  const uint64_t first_a = descriptor<kInRows>(ring + consumer * (kABytes / 2));
  const uint64_t first_b = descriptor<kWeight>(ring + kABytes);
  Place at;
  float sums[kWideSums];
  for (int index = static_cast<int>(blockIdx.x); index < tiles.count(); index += static_cast<int>(gridDim.x)) {
    const GroupedTile tile = tiles.at(index);
    multiply_tile<T, kInRows, kWeight>(steps_of(w, tile), first_a, first_b, barriers, at, sums);
    finish_warp<T>(w, tile, tile.first_row + 16 * warp, sums, reinterpret_cast<float*>(staged) + warp * kStagedFloats,
                   thread % 32);
  }
}

// ---- the weights' gradient ----
// 128 of the gradient's rows (columns of grad) by 256 of its columns (of x); what is summed over are rows of both, which is how
// they lie. Both are gathered, for rows of the next expert must not come along.

// A box: 64 rows, 128 bytes of each.
constexpr int kRowsOfStep = kK / kGatherStep;  // that a thread copies from
template <class T, int kBoxes>
__device__ __forceinline__ void gather_boxes(const Gathered& from, const int (&rows)[kRowsOfStep], int first,
                                             int columns, char* to, const GatherShare& share) {
  CUTE_UNROLL
  for (int i = 0; i < kRowsOfStep; ++i) {
    const T* row = static_cast<const T*>(from.data) + (rows[i] >= 0 ? rows[i] * from.stride : 0);
    CUTE_UNROLL
    for (int box = 0; box < kBoxes; ++box) {
      const int column = first + box * kSwizzledRow + share.column;
      const bool exists = column < columns;
      copy_async(to + share.offset + i * kGatherBytes + box * kBoxBytes, row + (exists ? column : 0),
                 exists && rows[i] >= 0);
    }
  }
}

template <class T>
__device__ __forceinline__ void gather_gradient(const GradientWork& w, int down, int across, char* ring,
                                                Barriers barriers, int thread) {
  const GatherShare share = gather_share(thread);
  Place at;
  Behind behind(barriers.full);
  const int count = w.experts * down * across;
  for (int index = static_cast<int>(blockIdx.x); index < count; index += static_cast<int>(gridDim.x)) {
    const GradientTile tile = gradient_tile(index, down, across);
    const Segment rows = segment(w.offset, tile.expert, w.rows);
    const int begin = static_cast<int>(rows.begin), end = static_cast<int>(rows.end);
    // Where the next step's rows are: an order is read a step ahead, for the copies need what it says at once.
    int grad_rows[kRowsOfStep], x_rows[kRowsOfStep];
    const auto look_up = [&](int first) {
      CUTE_UNROLL
      for (int i = 0; i < kRowsOfStep; ++i) {
        const int row = first + share.row + i * kGatherStep;
        grad_rows[i] = row < end ? w.grad.row(row) : -1;
        x_rows[i] = row < end ? w.x.row(row) : -1;
      }
    };
    look_up(begin);
    for (int first = begin; first < end; first += kK, at.advance()) {
      char* a = ring + at.stage * kStageBytes;
      Empty::wait(&barriers.empty[at.stage], at.phase ^ 1);
      gather_boxes<T, kWideM / kSwizzledRow>(w.grad, grad_rows, tile.row_tile * kWideM, w.n, a, share);
      gather_boxes<T, kWideN / kSwizzledRow>(w.x, x_rows, tile.column_tile * kWideN, w.k, a + kABytes, share);
      behind.started();
      look_up(first + kK);
    }
  }
  behind.finish();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    gradient_kernel(const __grid_constant__ GradientWork w, int down, int across) {
  FP_DYNAMIC_SHARED(char, unaligned);
  char *ring = aligned_ring(unaligned), *staged = ring + kStages * kStageBytes;
  __shared__ Full::ValueType full[kStages];
  __shared__ Empty::ValueType empty[kStages];
  const Barriers barriers = {full, empty};
  init(barriers, kGroup);
  __syncthreads();

  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kGroup) {
    cutlass::arch::warpgroup_reg_dealloc<kLoadRegisters>();
    gather_gradient<T>(w, down, across, ring, barriers, thread);
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<kMultiplyRegisters>();
  const int consumer = (thread - kGroup) / kGroup, warp = (thread - kGroup) / 32;
  const uint64_t first_a = descriptor<kInColumns>(ring + consumer * kBoxBytes);
  const uint64_t first_b = descriptor<kInColumns>(ring + kABytes);
  const int count = w.experts * down * across;
  Place at;
  float sums[kWideSums];
  for (int index = static_cast<int>(blockIdx.x); index < count; index += static_cast<int>(gridDim.x)) {
    const GradientTile tile = gradient_tile(index, down, across);
    const Segment rows = segment(w.offset, tile.expert, w.rows);
    const int steps = static_cast<int>(rows.end - rows.begin + kK - 1) / kK;
    multiply_tile<T, kInColumns, kInColumns>(steps, first_a, first_b, barriers, at, sums);
    finish_gradient<T>(w, tile.expert, tile.row_tile * kWideM + 16 * warp, tile.column_tile * kWideN, sums,
                       reinterpret_cast<float*>(staged) + warp * kStagedFloats, thread % 32);
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

void multiply_gradient_sm90(const Stream& stream, const GradientWork& work, DType dtype, int processors) {
  const int64_t down = blocks_for(work.n, kWideM), across = blocks_for(work.k, kWideN);
  const int64_t tiles = work.experts * down * across;
  const auto go = [&]<class T>(T) {
    auto* kernel = gradient_kernel<T>;
    stream.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kFixedBytes));
    launch(kernel, tiles < processors ? tiles : processors, kThreads, kFixedBytes, stream, work, down, across);
  };
  dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace fastpost::cuda
