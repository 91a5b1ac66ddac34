// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ops/grouped_gemm_sm90.cu, which needs the hardware's matrix instruction: the same tiles, the same threads
// with the same sums, here by plain dot products, handed to the same finish_warp.
#include "cuda/ops/grouped_gemm.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kThreads = 2 * kWideM;

template <class T>
void product_kernel(GroupedWork w) {
  FP_DYNAMIC_SHARED(char, shared);
  clear_grad_gate(w);
  float* all_staged = reinterpret_cast<float*>(shared);
  const GroupedTiles tiles = make_tiles(w.offset, w.experts, w.rows, kWideM, w.column_tiles(kWideN),
                                        all_staged + kThreads / 32 * kStagedFloats);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int index = static_cast<int>(blockIdx.x); index < tiles.count(); index += static_cast<int>(gridDim.x)) {
    const GroupedTile tile = tiles.at(index);
    const int first_row = tile.first_row + 16 * warp;
    float sums[kWideSums] = {};
    for (int half = 0; half < 2 && tile.expert < w.experts; ++half) {
      const int row = first_row + lane / 4 + 8 * half;
      if (row >= tile.end_row) continue;
      const T* x = static_cast<const T*>(w.x.data) + w.x.row(row) * w.x.stride;
      for (int j = 0; j < kWideN / 4; ++j) {
        const int column = j / 2 * 8 + lane % 4 * 2 + j % 2, n = w.weight_row(tile.column_tile, column, kWideN);
        if (n < 0) continue;  // what the copy engine reads there is never written
        const T* weight = static_cast<const T*>(w.weight) + tile.expert * w.expert_stride + n * w.row_stride;
        float sum = 0.0f;
        for (int k = 0; k < w.k; ++k) sum += to_float(x[k]) * to_float(weight[k * w.column_stride]);
        sums[wide_sum(half, column)] = sum;
      }
    }
    finish_warp<T>(w, tile, first_row, sums, all_staged + warp * kStagedFloats, lane);
  }
}

template <class T>
void gradient_kernel(GradientWork w, int down, int across) {
  FP_DYNAMIC_SHARED(float, all_staged);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int index = static_cast<int>(blockIdx.x); index < w.experts * down * across;
       index += static_cast<int>(gridDim.x)) {
    const GradientTile tile = gradient_tile(index, down, across);
    const Segment rows = segment(w.offset, tile.expert, w.rows);
    const int first_n = tile.row_tile * kWideM + 16 * warp, first_k = tile.column_tile * kWideN;
    float sums[kWideSums] = {};
    for (int half = 0; half < 2; ++half) {
      const int n = first_n + lane / 4 + 8 * half;
      for (int j = 0; j < kWideN / 4 && n < w.n; ++j) {
        const int column = j / 2 * 8 + lane % 4 * 2 + j % 2, k = first_k + column;
        if (k >= w.k) continue;
        float sum = 0.0f;
        for (int row = static_cast<int>(rows.begin); row < rows.end; ++row) {
          sum += to_float(static_cast<const T*>(w.grad.data)[w.grad.row(row) * w.grad.stride + n]) *
                 to_float(static_cast<const T*>(w.x.data)[w.x.row(row) * w.x.stride + k]);
        }
        sums[wide_sum(half, column)] = sum;
      }
    }
    finish_gradient<T>(w, tile.expert, first_n, first_k, sums, all_staged + warp * kStagedFloats, lane);
  }
}

// Each chunk of 16 bytes of 128 rows of 128 bytes is copied once, to where the copy engine's swizzle has it: bits 4 to 6 of an
// address are crossed with bits 7 to 9.
constexpr bool gathers_all() {
  bool seen[128 * 8] = {};
  for (int thread = 0; thread < 128; ++thread) {
    const GatherShare share = gather_share(thread);
    for (int i = 0; i < 128 / kGatherStep; ++i) {
      const int plain = (share.row + i * kGatherStep) * 128 + share.column * 2;
      const int to = share.offset + i * kGatherBytes;
      if (to != (plain ^ (plain >> 7 & 7) << 4) || seen[to / 16]) return false;
      seen[to / 16] = true;
    }
  }
  return true;  // 1024 chunks, none of them twice: all
}
static_assert(gathers_all());

}  // namespace

void multiply_grouped_sm90(const Stream& stream, const GroupedWork& work, GroupedType type, int processors) {
  const int64_t tiles = most_row_tiles(work.rows, work.experts, kWideM) * work.column_tiles(kWideN);
  const int shared = kThreads / 32 * kStagedFloats * 4 + tiles_bytes(work.experts);
  const auto go = [&]<class T>(T) {
    launch(product_kernel<T>, tiles < processors ? tiles : processors, kThreads, shared, stream, work);
  };
  type.dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

void multiply_gradient_sm90(const Stream& stream, const GradientWork& work, DType dtype, int processors) {
  const int64_t down = blocks_for(work.n, kWideM), across = blocks_for(work.k, kWideN);
  const int64_t tiles = work.experts * down * across;
  const auto go = [&]<class T>(T) {
    launch(gradient_kernel<T>, tiles < processors ? tiles : processors, kThreads, kThreads / 32 * kStagedFloats * 4,
           stream, work, down, across);
  };
  dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace fastpost::cuda
