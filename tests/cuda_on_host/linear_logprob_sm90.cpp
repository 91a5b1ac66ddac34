// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ops/linear_logprob_sm90.cu, which needs the hardware's matrix instruction: the same threads get the
// same logits in the same accumulators, here by plain dot products, and hand them to the same finish_tile.
#include "cuda/ops/linear_logprob.cuh"

namespace fastpost::cuda {
namespace {

// The 256 threads hold each place of the tile once, and the one that holds a column can tell.
constexpr bool covers_the_tile() {
  bool seen[kTileRows][kTileColumns] = {};
  for (int thread = 0; thread < kTileThreads; ++thread) {
    for (int half = 0; half < 2; ++half) {
      for (int j = 0; j < kThreadColumns; ++j) {
        const int row = tile_row(thread, half), column = tile_column(thread, j);
        if (seen[row][column] || thread_column(column) != j || quad_lane_of(column) != thread % kQuad) return false;
        seen[row][column] = true;
      }
    }
  }
  bool used[kAccumulators] = {};
  for (int a = 0; a < kAccumulators; ++a) {
    bool& once = used[accumulator(a % 2, a / 2)];
    if (once) return false;
    once = true;
  }
  return true;  // 2^15 places, none of them twice: all
}
static_assert(kTileThreads * kAccumulators == kTileRows * kTileColumns && covers_the_tile());

void tiles_kernel(const bfloat16* hidden, int64_t hidden_stride, const bfloat16* weight, int64_t weight_stride,
                  int64_t d, int64_t column_tiles, TileWork work) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row_tile = blockIdx.x / column_tiles, column_tile = blockIdx.x % column_tiles;
  float z[kAccumulators];
  for (int half = 0; half < 2; ++half) {
    const int64_t row = row_tile * kTileRows + tile_row(thread, half);
    for (int j = 0; j < kThreadColumns; ++j) {
      const int64_t column = column_tile * kTileColumns + tile_column(thread, j);
      float sum = 0.0f;  // also beyond the edges: the copy engine fills with zeros
      for (int64_t k = 0; row < work.n && column < work.v && k < d; ++k) {
        sum += to_float(hidden[row * hidden_stride + k]) * to_float(weight[column * weight_stride + k]);
      }
      z[accumulator(half, j)] = sum;
    }
  }
  finish_tile(work, row_tile, column_tile, thread, z);
}

}  // namespace

void multiply_tiles_sm90(const Stream& stream, const Tensor& hidden, const Tensor& weight, const TileWork& work) {
  // As a cluster of two tiles may, the grid goes beyond the edges.
  const int64_t row_tiles = blocks_for(work.n, 2 * kTileRows) * 2, column_tiles = blocks_for(work.v, kTileColumns) + 1;
  launch(tiles_kernel, row_tiles * column_tiles, kTileThreads, 0, stream, hidden.ptr<bfloat16>(), hidden.stride(0),
         weight.ptr<bfloat16>(), weight.stride(0), hidden.size(1), column_tiles, work);
}

}  // namespace fastpost::cuda
