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

}  // namespace

void multiply_grouped_sm90(const Stream& stream, const GroupedWork& work, GroupedType type, int processors) {
  const int64_t tiles = most_row_tiles(work.rows, work.experts, kWideM) * work.column_tiles(kWideN);
  const int shared = kThreads / 32 * kStagedFloats * 4 + tiles_bytes(work.experts);
  const auto go = [&]<class T>(T) {
    launch(product_kernel<T>, tiles < processors ? tiles : processors, kThreads, shared, stream, work);
  };
  type.dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace fastpost::cuda
