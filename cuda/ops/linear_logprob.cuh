// SPDX-License-Identifier: Apache-2.0
// One tile of logits while it is still in the registers of the threads that multiplied it: what linear_logprob_sm90.cu
// calls at the end of each tile. Plain CUDA C++, so that tests/cuda_on_host runs it without a GPU.
#pragma once

#include "cuda/core/launch.h"
#include "cuda/ops.h"
#include "cuda/ops/token_logprob.cuh"

namespace fastpost::cuda {

// ---- where the logits of a tile are ----
// 256 threads (two warpgroups, one above the other) share a tile of 128 rows and 256 columns as wgmma.m64n256k16 leaves
// it (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16", matrix D): a warp has 16 rows, four neighbouring
// threads (a quad) two of these, 8 apart, and one thread two neighbours out of every 8 columns.
constexpr int kTileRows = 128, kTileThreads = 256;
constexpr int kQuad = 4, kThreadColumns = kTileColumns / kQuad, kAccumulators = 2 * kThreadColumns;

__host__ __device__ constexpr int tile_row(int thread, int half) {
  return thread / 32 * 16 + thread % 32 / kQuad + 8 * half;
}
__host__ __device__ constexpr int tile_column(int thread, int j) { return j / 2 * 8 + thread % kQuad * 2 + j % 2; }
// Which of its accumulators a thread keeps (tile_row(half), tile_column(j)) in.
__host__ __device__ constexpr int accumulator(int half, int j) { return j / 2 * 4 + half * 2 + j % 2; }
// The j of a column, for the thread of the quad that has it.
__host__ __device__ constexpr int thread_column(int column) { return column / 8 * 2 + column % 2; }
__host__ __device__ constexpr int quad_lane_of(int column) { return column % 8 / 2; }

// Exponentials are kept as float16, which rounds them eight times finer than bfloat16, and scaled so that only what is
// below 2^-29 of the tile's largest loses bits, and below 2^-40 is lost.
constexpr float kExponentialScale = 32768.0f;

// Partial statistics lie as [planes, tiles, n]: max, at_max, rest, and weighted when the entropy is wanted.
__host__ __device__ constexpr int partial_planes(bool with_entropy) { return with_entropy ? 4 : 3; }

// What a tile is turned into. n rows, v columns in all; pointers may be null as "?" says in cpp/ops.h.
struct TileWork {
  int64_t n, v;
  const bfloat16* bias;
  const int64_t* target;
  int64_t vocab_start;
  LogitTransform transform;
  bool with_entropy;
  float16* exponentials;  // [n, v], rows exponentials_stride apart
  int64_t exponentials_stride;
  float* partials;
  float* z_target;  // [n]
};

// cuda/ops/linear_logprob_sm90.cu, where it is built: every tile of hidden · weightᵀ, and finish_tile on each.
void multiply_tiles_sm90(const Stream& stream, const Tensor& hidden, const Tensor& weight, const TileWork& work);

// ---- a tile's logits, a thread's share of them ----

// Good to about |x|/2 units in the last place of e^x, which is what e^x adds to a sum that has a 1 in it.
__device__ inline float fast_exp(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
#else
  return expf(x);
#endif
}

// combine over the four threads of a quad, in all of them.
template <class T, class F>
__device__ T quad_reduce(T value, F combine) {
  value = combine(value, shuffle_xor(value, 1));
  return combine(value, shuffle_xor(value, 2));
}

// The accumulators become z; columns beyond the vocabulary become -inf.
__device__ __forceinline__ void transform_tile(const TileWork& work, int64_t first_column, int thread,
                                               float (&z)[kAccumulators]) {
  const int columns = static_cast<int>(work.v - first_column < kTileColumns ? work.v - first_column : kTileColumns);
  if (work.bias) {
    FP_UNROLL
    for (int j = 0; j < kThreadColumns; ++j) {
      const int column = tile_column(thread, j);
      const float b = column < columns ? to_float(work.bias[first_column + column]) : 0.0f;
      z[accumulator(0, j)] += b;
      z[accumulator(1, j)] += b;
    }
  }
  if (work.transform.softcap != 0.0f) {
    FP_UNROLL
    for (int a = 0; a < kAccumulators; ++a) z[a] = transform<true>(z[a], work.transform);
  } else {
    FP_UNROLL
    for (int a = 0; a < kAccumulators; ++a) z[a] = transform<false>(z[a], work.transform);
  }
  if (columns < kTileColumns) {
    FP_UNROLL
    for (int j = 0; j < kThreadColumns; ++j) {
      if (tile_column(thread, j) < columns) continue;
      z[accumulator(0, j)] = -INFINITY;
      z[accumulator(1, j)] = -INFINITY;
    }
  }
}

// The statistics of one row of the tile, in all four threads of its quad. z becomes e^(z - max).
template <bool kEntropy>
__device__ __forceinline__ RowStats tile_row_stats(int half, float (&z)[kAccumulators]) {
  RowStats s;
  FP_UNROLL
  for (int j = 0; j < kThreadColumns; ++j) s.max = max_or_nan(s.max, z[accumulator(half, j)]);
  s.max = quad_reduce(s.max, max_or_nan);
  const float max = s.max == -INFINITY ? 0.0f : s.max;  // where there is nothing, e^(-inf - 0) adds nothing
  FP_UNROLL
  for (int j = 0; j < kThreadColumns; ++j) {
    const float d = z[accumulator(half, j)] - max, e = fast_exp(d);
    const bool at_max = d == 0.0f;
    s.at_max += at_max ? 1.0f : 0.0f;
    s.rest += at_max ? 0.0f : e;
    if constexpr (kEntropy) s.weighted += e * max_or_nan(kExpUnderflow, d);
    z[accumulator(half, j)] = e;
  }
  return quad_reduce(s, [](const RowStats& a, const RowStats& b) {
    return RowStats{a.max, a.at_max + b.at_max, a.rest + b.rest, a.weighted + b.weighted};
  });
}

// words[i] of thread q of a quad becomes words[q] of thread i.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[kQuad], int lane) {
  FP_UNROLL
  for (int mask = 1; mask < kQuad; mask *= 2) {
    FP_UNROLL
    for (int i = 0; i < kQuad; ++i) {
      if (i & mask) continue;
      uint32_t &low = words[i], &high = words[i | mask];
      const bool gives_low = lane & mask;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, gives_low ? low : high, mask);
      (gives_low ? low : high) = got;
    }
  }
}

// Writes one row of the tile: a quad trades values so that each thread has 8 neighbours to write at once.
__device__ __forceinline__ void store_tile_row(float16* row, int columns, int half, int lane,
                                               const float (&z)[kAccumulators]) {
  constexpr int kGroups = kThreadColumns / 2;  // of 8 columns, of which a thread has 2
  FP_UNROLL
  for (int g = 0; g < kGroups; g += kQuad) {
    uint32_t words[kQuad];
    FP_UNROLL
    for (int i = 0; i < kQuad; ++i) {
      const int j = 2 * (g + i);
      words[i] = from_float<float16>(kExponentialScale * z[accumulator(half, j)]).bits |
                 uint32_t{from_float<float16>(kExponentialScale * z[accumulator(half, j + 1)]).bits} << 16;
    }
    transpose_quad(words, lane);
    const int column = 8 * (g + lane);
    if (!row || column >= columns) continue;
    Packed<float16, 8> eight;
    memcpy(&eight, words, sizeof eight);
    if (column + 8 <= columns && is_aligned<float16, 8>(row + column)) {
      *reinterpret_cast<Packed<float16, 8>*>(row + column) = eight;
    } else {
      FP_UNROLL
      for (int k = 0; k < 8; ++k) {
        if (column + k < columns) row[column + k] = eight.v[k];
      }
    }
  }
}

// All that happens to a tile, by the 256 threads that hold it. Ends in memory that no other tile writes, so that results
// have the same bits every run, and what a row gets does not depend on how many rows there are.
__device__ __forceinline__ void finish_tile(const TileWork& work, int64_t row_tile, int64_t column_tile, int thread,
                                            float (&z)[kAccumulators]) {
  const int64_t first_column = column_tile * kTileColumns, tiles = blocks_for(work.v, kTileColumns);
  if (column_tile >= tiles) return;  // clusters round the grid up
  const int lane = thread % kQuad;
  transform_tile(work, first_column, thread, z);
  FP_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = row_tile * kTileRows + tile_row(thread, half);
    const bool exists = row < work.n;
    const int64_t target = exists ? work.target[row] - work.vocab_start : -1;
    const int64_t column = target < work.v ? target - first_column : -1;
    if (column >= 0 && column < kTileColumns && quad_lane_of(static_cast<int>(column)) == lane) {
      const int wanted = thread_column(static_cast<int>(column));
      float found = 0.0f;
      FP_UNROLL
      for (int j = 0; j < kThreadColumns; ++j) found = j == wanted ? z[accumulator(half, j)] : found;
      work.z_target[row] = found;
    }
    const RowStats s = work.with_entropy ? tile_row_stats<true>(half, z) : tile_row_stats<false>(half, z);
    if (exists && lane < partial_planes(work.with_entropy)) {
      const float planes[kQuad] = {s.max, s.at_max, s.rest, s.weighted};
      float plane = planes[0];
      FP_UNROLL
      for (int k = 1; k < kQuad; ++k) plane = lane == k ? planes[k] : plane;
      work.partials[(lane * tiles + column_tile) * work.n + row] = plane;
    }
    if (work.exponentials) {
      const int64_t columns = work.v - first_column;
      store_tile_row(exists ? work.exponentials + row * work.exponentials_stride + first_column : nullptr,
                     static_cast<int>(columns < kTileColumns ? columns : kTileColumns), half, lane, z);
    }
  }
}

}  // namespace fastpost::cuda
