// SPDX-License-Identifier: Apache-2.0
// The Gram matrix of kv_factorize for compute capability 9.0: tiles of 128 x 256 on and above the diagonal, by WGMMA. Tokens are what
// is summed over, so both factors lie in columns, as keys do; boxes of 64 tokens and 64 columns come by TMA. Where a tile's rows
// are among its columns, the rows' boxes are the columns'. The last step of a sequence shorter than the tensor is copied
// row by row, for what lies beyond must count as zero whatever it is.
//
// No GPU has run it yet; tests run it on the host. nvcc 13.0: 168 registers (88 and 208 once the groups have parted), 213 KB of
// shared memory, no spills. The L2 cache is expected to limit it, as in grouped_gemm_sm90.cu.
#include "cuda/core/mma.cuh"
#include "cuda/core/wgmma.cuh"
#include "cuda/ops/kv_factorize.cuh"

namespace fastpost::cuda {
namespace {

static_assert(kPlanSm90.m == kWideM && kPlanSm90.n == kWideN);
constexpr int kBoxesOfA = kWideM / kSwizzledRow, kBoxesOfB = kWideN / kSwizzledRow;

// The box of B at which A begins, or -1 where A has boxes of its own.
__host__ __device__ constexpr int shared_box(Triangle::Tile tile) {
  return tile.row / 2 == tile.column ? tile.row % 2 * kBoxesOfA : -1;
}

// 64 tokens, [first, end) of which are there, of `kBoxes` boxes of columns.
template <class T, int kBoxes>
__device__ __forceinline__ void copy_boxes(const GramWork& w, const GramPlace& place, int64_t first, int column,
                                           char* to, const GatherShare& share) {
  CUTE_UNROLL
  for (int i = 0; i < kK / kGatherStep; ++i) {
    const int64_t token = first + share.row + i * kGatherStep;
    const bool row_exists = token < place.end;
    const T* row = w.keys.at<T>(place.b) + (row_exists ? token * w.keys.row_stride : 0);
    CUTE_UNROLL
    for (int box = 0; box < kBoxes; ++box) {
      const int at = column + box * kSwizzledRow + share.column;
      const bool exists = row_exists && at < w.keys.d;
      copy_async(to + share.offset + i * kGatherBytes + box * kBoxBytes, row + (exists ? at : 0), exists);
    }
  }
}

template <int kBoxes>
__device__ __forceinline__ void load_boxes(const CUtensorMap& map, Full::ValueType* full, char* to, int column,
                                           const GramPlace& place, int64_t first) {
  CUTE_UNROLL
  for (int box = 0; box < kBoxes; ++box) {
    cute::SM90_TMA_LOAD_3D::copy(&map, full, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                 to + box * kBoxBytes, column + box * kSwizzledRow, static_cast<int>(first),
                                 static_cast<int>(place.b));
  }
}

template <class T>
__device__ __forceinline__ void load_steps(const GramWork& w, const GramPlace& place, const CUtensorMap& map,
                                           char* ring, Barriers barriers, int thread) {
  const bool own_a = shared_box(place.tile) < 0, speaks = thread % 32 == 0;
  const int column_a = place.tile.row * kWideM, column_b = place.tile.column * kWideN;
  const bool ragged = place.end % kK != 0 && place.end < w.keys.tokens;
  const GatherShare share = gather_share(thread);
  Place at;
  for (int64_t first = place.begin; first < place.end; first += kK, at.advance()) {
    char *a = ring + at.stage * kStageBytes, *b = a + kABytes;
    Full::ValueType* full = &barriers.full[at.stage];
    Empty::wait(&barriers.empty[at.stage], at.phase ^ 1);
    if (ragged && first + kK > place.end) {
      if (own_a) copy_boxes<T, kBoxesOfA>(w, place, first, column_a, a, share);
      copy_boxes<T, kBoxesOfB>(w, place, first, column_b, b, share);
      copies_commit();
      copies_wait<0>();
      cutlass::arch::fence_view_async_shared();  // who wrote it shows it to the matrix instructions
      __syncwarp();
      if (speaks) Full::arrive(full);
    } else if (thread == 0) {
      Full::arrive_and_expect_tx(full, own_a ? kStageBytes : kBBytes);
      if (own_a) load_boxes<kBoxesOfA>(map, full, a, column_a, place, first);
      load_boxes<kBoxesOfB>(map, full, b, column_b, place, first);
    } else if (speaks) {
      Full::arrive(full);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    gram_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ GramWork w) {
  FP_DYNAMIC_SHARED(char, unaligned);
  char *ring = aligned_ring(unaligned), *staged = ring + kStages * kStageBytes;
  __shared__ Full::ValueType full[kStages];
  __shared__ Empty::ValueType empty[kStages];
  const Barriers barriers = {full, empty};
  init(barriers, kGroup / 32);
  __syncthreads();
  const GramPlace place(w, Triangle(w.keys.d, kWideM, kWideN), blockIdx.x);

  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kGroup) {
    cutlass::arch::warpgroup_reg_dealloc<kLoadRegisters>();
    load_steps<T>(w, place, map, ring, barriers, thread);
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<kMultiplyRegisters>();
  const int consumer = (thread - kGroup) / kGroup, warp = (thread - kGroup) / 32;
  const int box = shared_box(place.tile);
  const uint64_t first_a =
      descriptor<kInColumns>(ring + (box < 0 ? 0 : kABytes + box * kBoxBytes) + consumer * kBoxBytes);
  const uint64_t first_b = descriptor<kInColumns>(ring + kABytes);
  const int steps = static_cast<int>((place.end - place.begin + kK - 1) / kK);
  Place at;
  float sums[kWideSums];
  multiply_tile<T, kInColumns, kInColumns>(steps, first_a, first_b, barriers, at, sums);
  float* to = place.partial + (16 * warp + thread % 32 / 2) * kWideN;
  for_each_part(sums, reinterpret_cast<float*>(staged) + warp * kStagedFloats, thread % 32,
                [&](int column, const float* from) {
                  CUTE_UNROLL
                  for (int half = 0; half < 2; ++half) {
                    CUTE_UNROLL
                    for (int i = 0; i < kPiece; i += 4) {
                      copy<4>(from + half * kStagedColumns + i, to + column + half * (kWideN / 2) + i);
                    }
                  }
                });
}

}  // namespace

void gram_sm90(const Stream& stream, const GramWork& work, int64_t batch, DType dtype) {
  const Keys& keys = work.keys;
  // Of a dimension of one, the stride has no meaning, but the driver looks at it.
  const auto step = [](int64_t size, int64_t stride) { return size > 1 ? stride : kSwizzledRow; };
  const CUtensorMap map =
      tensor_map<3>(stream, dtype, keys.data, {keys.d, keys.tokens, batch},
                    {step(keys.tokens, keys.row_stride), step(batch, keys.batch_stride)}, {kSwizzledRow, kK, 1});
  const int64_t blocks = batch * work.splits * Triangle(keys.d, kWideM, kWideN).count();
  const auto go = [&]<class T>(T) {
    auto* kernel = gram_kernel<T>;
    allow_shared(stream, kernel, kFixedBytes);
    launch(kernel, blocks, kThreads, kFixedBytes, stream, map, work);
  };
  dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace fastpost::cuda
