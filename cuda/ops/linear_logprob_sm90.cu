// SPDX-License-Identifier: Apache-2.0
// hidden · weightᵀ for compute capability 9.0, a tile at a time, and no logit in memory: CUTLASS's main loop (TMA loads
// by one warpgroup, WGMMA by two), then finish_tile (linear_logprob.cuh) where CUTLASS would store the product.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

//
// Only the few headers that this kernel needs: cutlass/gemm/kernel/gemm_universal.hpp and the like bring every other one
// along and double the time to compile.
#include <cutlass/device_kernel.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>
#include <cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp>
#include <cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp>

#include "cuda/ops/linear_logprob.cuh"

namespace fastpost::cuda {
namespace {

using namespace cute;

using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;        // hidden [n, D]
using ColumnMajor = cutlass::layout::ColumnMajor;  // weight [v, D] is the second factor [D, v] column by column
using TileShape = Shape<Int<kTileRows>, Int<kTileColumns>, _64>;
using ClusterShape = Shape<_2, _1, _1>;  // two row tiles that load the weight's tile once
constexpr int kAlignment = 16 / sizeof(Element);

using MainLoop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element, ColumnMajor,
    kAlignment, float, TileShape, ClusterShape, cutlass::gemm::collective::StageCountAuto,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;

// What CUTLASS calls an epilogue, as small as its kernel allows.
struct FinishTile {
  using DispatchPolicy = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using ThreadEpilogueOp = void;
  using ElementC = void;
  using ElementD = float;
  using StrideC = Stride<int64_t, _1, _0>;
  using StrideD = StrideC;
  struct SharedStorage {};
  using Arguments = TileWork;
  using Params = TileWork;

  template <class Shape>
  static Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }

  CUTLASS_HOST_DEVICE explicit FinishTile(const Params& params) : work(params) {}

  template <class Shape, class Tile, class Coord, class Engine, class Layout, class Mma, class Residue>
  CUTLASS_DEVICE void operator()(Shape, Tile, Coord coord, const cute::Tensor<Engine, Layout>& accumulators, Mma,
                                 Residue, int thread, char*) const {
    static_assert(size(Layout{}) == kAccumulators && cosize(Layout{}) == kAccumulators);
    float z[kAccumulators];
    CUTE_UNROLL
    for (int i = 0; i < kAccumulators; ++i) z[i] = accumulators(i);
    finish_tile(work, get<0>(coord), get<1>(coord), thread, z);
  }

  const Params& work;
};

using Kernel = cutlass::gemm::kernel::GemmUniversal<
    Shape<int, int, int, int>, MainLoop,
    cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<FinishTile>,
    cutlass::gemm::PersistentScheduler>;

// linear_logprob.cuh says which thread has which logit in which accumulator; CUTLASS must mean the same. Both place a
// logit by a sum over the bits of the two numbers, so that agreement in each bit is agreement.
constexpr bool agree(int thread, int a) {
  constexpr auto layout = typename MainLoop::TiledMma{}.get_layoutC_TV();  // (thread, accumulator) -> row + 128 column
  const int half = a / 2 % 2, j = a / 4 * 2 + a % 2;
  return accumulator(half, j) == a && layout(thread, a) == tile_row(thread, half) + kTileRows * tile_column(thread, j);
}
constexpr bool layouts_agree() {
  for (int bit = 1; bit < kTileThreads; bit *= 2) {
    if (!agree(bit, 0)) return false;
  }
  for (int bit = 1; bit < kAccumulators; bit *= 2) {
    if (!agree(0, bit)) return false;
  }
  return agree(0, 0) && agree(kTileThreads - 1, kAccumulators - 1);
}
static_assert(size(typename MainLoop::TiledMma{}) == kTileThreads && layouts_agree());

}  // namespace

void multiply_tiles_sm90(const Stream& stream, const Tensor& hidden, const Tensor& weight, const TileWork& work) {
  cutlass::KernelHardwareInfo hardware;
  hardware.device_id = hidden.device_index;
  stream.check(cudaDeviceGetAttribute(&hardware.sm_count, cudaDevAttrMultiProcessorCount, hidden.device_index));
  const int n = static_cast<int>(work.n), v = static_cast<int>(work.v), d = static_cast<int>(hidden.size(1));
  typename Kernel::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {n, v, d, 1},
      {hidden.ptr<Element>(), {hidden.stride(0), _1{}, _0{}}, weight.ptr<Element>(), {weight.stride(0), _1{}, _0{}}},
      work,
      hardware,
      {}};
  // A wave of tiles is then about as high as wide, and what it loads fits the L2 cache.
  arguments.scheduler.max_swizzle_size = 8;
  const auto parameters = Kernel::to_underlying_arguments(arguments, nullptr);  // which needs no workspace
  auto* kernel = cutlass::device_kernel<Kernel>;
  constexpr int kShared = Kernel::SharedStorageSize;
  stream.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {size<0>(ClusterShape{}), size<1>(ClusterShape{}), size<2>(ClusterShape{})};
  cudaLaunchConfig_t config = {};
  config.gridDim = Kernel::get_grid_shape(parameters);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = kShared;
  config.stream = stream.get();
  config.attrs = &cluster;
  config.numAttrs = 1;
  stream.check(cudaLaunchKernelEx(&config, kernel, parameters));
}

}  // namespace fastpost::cuda
