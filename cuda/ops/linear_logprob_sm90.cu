// SPDX-License-Identifier: Apache-2.0
// hidden · weightᵀ for compute capability 9.0, a tile at a time, and no logit in memory: CUTLASS's main loop (TMA loads
// by one warpgroup, WGMMA by two), then finish_tile (linear_logprob.cuh) where CUTLASS would store the product.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

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
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

// linear_logprob.cuh says which thread has which logit in which accumulator; CUTLASS must mean the same.
constexpr bool layouts_agree() {
  constexpr auto layout = typename MainLoop::TiledMma{}.get_layoutC_TV();  // (thread, accumulator) -> row + 128 column
  auto agree = [&](int thread, int half, int j) {
    return layout(thread, accumulator(half, j)) == tile_row(thread, half) + kTileRows * tile_column(thread, j);
  };
  for (int thread = 0; thread < kTileThreads; ++thread) {
    for (int half = 0; half < 2; ++half) {
      if (!agree(thread, half, thread % kThreadColumns)) return false;
    }
  }
  for (int j = 0; j < kThreadColumns; ++j) {
    if (!agree(0, 0, j) || !agree(kTileThreads - 1, 1, j)) return false;
  }
  return true;
}
static_assert(size(typename MainLoop::TiledMma{}) == kTileThreads && layouts_agree());

}  // namespace

void multiply_tiles_sm90(const Stream& stream, const Tensor& hidden, const Tensor& weight, const TileWork& work) {
  cutlass::KernelHardwareInfo hardware;
  hardware.device_id = hidden.device_index;
  stream.check(cudaDeviceGetAttribute(&hardware.sm_count, cudaDevAttrMultiProcessorCount, hidden.device_index));
  const int n = static_cast<int>(work.n), v = static_cast<int>(work.v), d = static_cast<int>(hidden.size(1));
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {n, v, d, 1},
      {hidden.ptr<Element>(), {hidden.stride(0), _1{}, _0{}}, weight.ptr<Element>(), {weight.stride(0), _1{}, _0{}}},
      work,
      hardware,
      {}};
  // A wave of tiles is then about as high as wide, and what it loads fits the L2 cache.
  arguments.scheduler.max_swizzle_size = 8;
  Gemm gemm;
  // The workspace of this scheduler and epilogue is empty. A driver that cannot describe the tensors fails here.
  if (gemm.initialize(arguments, nullptr, stream.get()) != cutlass::Status::kSuccess ||
      gemm.run(stream.get()) != cutlass::Status::kSuccess) {
    const cudaError_t error = cudaGetLastError();
    stream.check(error == cudaSuccess ? cudaErrorUnknown : error);
  }
}

}  // namespace fastpost::cuda
