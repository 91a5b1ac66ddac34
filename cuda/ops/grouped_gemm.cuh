// SPDX-License-Identifier: Apache-2.0
// What the kernels of grouped_gemm share: which tile a block works on, and what becomes of a tile's sums. Plain CUDA C++, so
// that tests/cuda_on_host runs it without a GPU.
//
// The host knows shapes, not offsets: a grid is made for the most tiles that there can be, each block reads the offsets and
// walks over the tiles that there are. Nothing waits for the host, so a call can be part of a CUDA graph.
#pragma once

#include <cmath>

#include "cuda/core/launch.h"
#include "cuda/core/mma.cuh"
#include "cuda/core/reduce.cuh"
#include "cuda/core/segments.cuh"
#include "cuda/core/vec.cuh"
#include "cuda/core/wide_tile.cuh"
#include "cuda/ops.h"

namespace fastpost::cuda {

// ---- which tile ----

constexpr int kRowGroup = 16;  // row tiles that pass over the columns together

struct GroupedTile {
  int expert;              // or the number of experts: rows that nobody here works on, which become zero
  int first_row, end_row;  // those that exist
  int column_tile;
};

// Rows are cut into tiles expert by expert. Both arrays are [experts + 2], for a last expert has the rows beyond
// offset[experts].
struct GroupedTiles {
  const int *offset, *start;  // first row, first row tile
  int experts, tile_rows, column_tiles;

  __host__ __device__ constexpr int count() const { return start[experts + 1] * column_tiles; }

  // Neighbours in time share a row tile's x or a column tile's weights, about as many of one as of the other, so that the
  // L2 cache has what a wave of blocks reads.
  __host__ __device__ constexpr GroupedTile at(int index) const {
    const int row_tile = index / column_tiles;
    int low = 0, high = experts;  // the first expert that ends beyond row_tile
    while (low < high) {
      const int middle = (low + high) / 2;
      if (start[middle + 1] <= row_tile) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const int tiles = start[low + 1] - start[low], within = index - start[low] * column_tiles;
    const int group = within / (kRowGroup * column_tiles) * kRowGroup, inside = within - group * column_tiles;
    const int height = tiles - group < kRowGroup ? tiles - group : kRowGroup;
    const int first = offset[low] + (group + inside % height) * tile_rows;
    const int end = first + tile_rows < offset[low + 1] ? first + tile_rows : offset[low + 1];
    return {low, first, end, inside / height};
  }
};

__host__ __device__ constexpr int tiles_bytes(int experts) { return (2 * (experts + 2) * 4 + 15) / 16 * 16; }

// Row tiles, whatever the offsets are: each expert with rows can have one that is not full.
constexpr int64_t most_row_tiles(int64_t rows, int64_t experts, int tile_rows) {
  return rows / tile_rows + (rows < experts + 1 ? rows : experts + 1);
}

// Called by all threads of a block; `shared` has room for tiles_bytes. Offsets that make no sense lead to wrong results, not
// outside of tensors.
__device__ inline GroupedTiles make_tiles(const int32_t* offset, int experts, int rows, int tile_rows, int column_tiles,
                                          void* shared) {
  int* const offsets = static_cast<int*>(shared);
  int* const start = offsets + experts + 2;
  const int thread = static_cast<int>(threadIdx.x);
  for (int e = thread; e <= experts + 1; e += static_cast<int>(blockDim.x)) {
    offsets[e] = e <= experts ? static_cast<int>(clamped(offset[e], 0, rows)) : rows;
  }
  __syncthreads();
  if (thread < kWarp) {
    const int share = (experts + kWarp) / kWarp, begin = thread * share;
    const int end = begin + share < experts + 1 ? begin + share : experts + 1;
    const auto tiles = [&](int e) {
      const int count = offsets[e + 1] - offsets[e];
      return count > 0 ? (count + tile_rows - 1) / tile_rows : 0;
    };
    int sum = 0, before = 0;
    for (int e = begin; e < end; ++e) sum += tiles(e);
    int all = sum;
    for (int mask = 1; mask < kWarp; mask *= 2) {  // sums of ever larger neighbourhoods
      const int other = shuffle_xor(all, mask);
      if (thread & mask) before += other;
      all += other;
    }
    for (int e = begin; e < end; ++e) {
      start[e] = before;
      before += tiles(e);
    }
    if (thread == 0) start[experts + 1] = all;
  }
  __syncthreads();
  return {offsets, start, experts, tile_rows, column_tiles};
}

// ---- what is computed ----

// Division by a number that the host knows: a product and a shift. Exact for what is not negative.
struct Divisor {
  uint32_t multiplier;
  int shift;

  __host__ __device__ constexpr uint32_t divide(int32_t x) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(x)) * multiplier >> shift);
  }
};
constexpr Divisor divisor(int64_t by) {
  int bits = 0;
  while (int64_t{1} << bits < by) ++bits;
  return {static_cast<uint32_t>((uint64_t{1} << (31 + bits)) / static_cast<uint64_t>(by) + 1), 31 + bits};
}
constexpr bool divides_exactly(int32_t by) {
  const Divisor d = divisor(by);
  for (int64_t x = by; x < INT32_MAX; x += x / 8 + by) {
    const auto multiple = static_cast<int32_t>(x / by * by);
    if (d.divide(multiple) * static_cast<uint32_t>(by) != static_cast<uint32_t>(multiple)) return false;
    if (d.divide(multiple - 1) != static_cast<uint32_t>(multiple / by - 1)) return false;
  }
  return d.divide(0) == 0 && d.divide(INT32_MAX) == static_cast<uint32_t>(INT32_MAX / by);
}
static_assert([] {
  for (int32_t by = 1; by <= 130; ++by) {
    if (!divides_exactly(by)) return false;
  }
  return divides_exactly(INT32_MAX) && divides_exactly(1 << 30) && divides_exactly((1 << 30) + 1);
}());

// A matrix whose rows are gathered: row r is data[order[r] / top_k], or data[r] without an order.
struct Gathered {
  const void* data;
  int64_t stride;
  int rows;  // that exist
  const int32_t* order;
  Divisor top_k;

  __device__ int row(int r) const { return order ? bounded(order[r]) : r; }
  __device__ int bounded(int slot) const {  // of order's values nobody has seen any
    const uint32_t at = top_k.divide(slot), last = static_cast<uint32_t>(rows) - 1;
    return static_cast<int>(at < last ? at : last);
  }
};

enum class Finish : int {
  kPlain,    // out = sums + bias
  kGated,    // out = act(first half) · second half
  kBackward  // of that, for the sums' gradient
};

struct GroupedWork {
  Gathered x;
  const void* weight;  // [E, N, K]
  int64_t expert_stride, row_stride, column_stride;
  const int32_t* offset;
  int experts, rows, k;
  int width;  // columns of the result: N, or its half where columns pair up
  Finish finish;
  int activation;
  const void* bias;  // or null
  int64_t bias_stride;
  void *pre, *out, *activated;  // out: grad_pre in the backward; pre, activated: or null
  int64_t pre_stride, out_stride, activated_stride;
  const float* gate;  // or null
  float *partial, *grad_gate;
  int slots;

  // A tile of kTileN columns of W is two halves, and what is paired are columns of the halves: each thread that has one has
  // the other.
  __host__ __device__ constexpr int tile_width(int tile_n) const {
    return finish == Finish::kGated ? tile_n / 2 : tile_n;
  }
  __host__ __device__ constexpr int second_half(int tile_n) const {  // begins so far behind the first
    return finish == Finish::kGated ? width : tile_n / 2;
  }
  __host__ __device__ constexpr int column_tiles(int tile_n) const {
    return (width + tile_width(tile_n) - 1) / tile_width(tile_n);
  }
  // The row of W of column c of a tile, or -1.
  __host__ __device__ constexpr int weight_row(int column_tile, int c, int tile_n) const {
    const bool second = finish == Finish::kGated && c >= tile_n / 2;
    const int j = column_tile * tile_width(tile_n) + (second ? c - tile_n / 2 : c);
    return j < width ? second ? width + j : j : -1;
  }
};

struct GradientWork {
  Gathered grad, x;
  const int32_t* offset;
  int experts, rows, n, k;
  void* out;  // [E, N, K]
  int64_t expert_stride, row_stride, column_stride;
};

// A tile of a gradient that has down x across of them for each expert. An expert's come one after the other, so that the L2
// cache has its rows.
struct GradientTile {
  int expert, row_tile, column_tile;
};
__host__ __device__ constexpr GradientTile gradient_tile(int index, int down, int across) {
  const int within = index % (down * across), group = within / (kRowGroup * across) * kRowGroup;
  const int inside = within - group * across, height = down - group < kRowGroup ? down - group : kRowGroup;
  return {index / (down * across), group + inside % height, inside / height};
}

// ---- activations: cpp/ops.h numbers them ----

struct Activated {
  float value, derivative;
};

__device__ inline float fast_sigmoid(float x) {
#ifdef __CUDA_ARCH__
  float e, s;  // to a few units in the last place of float32
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
  return s;
#else
  return 1.0f / (1.0f + expf(-x));
#endif
}

__device__ inline Activated activate(int activation, float x) {
  if (activation == 1) {  // silu
    const float s = fast_sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  }
  if (activation == 2) {  // gelu
    const float below = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
    return {x * below, below + x * 0.3989422804014327f * expf(-0.5f * x * x)};
  }
  if (activation == 3) {  // gelu by tanh: (1 + tanh(u)) / 2 = sigmoid(2u)
    constexpr float kSlope = 1.5957691216057308f, kCubic = 0.044715f;
    const float s = fast_sigmoid(kSlope * (x + kCubic * x * x * x));
    return {x * s, s + x * s * (1.0f - s) * kSlope * (1.0f + 3.0f * kCubic * x * x)};
  }
  return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};  // NaN stays
}

// ---- what becomes of sums: eight neighbouring columns of a row at a time ----

template <class T>
__device__ inline void load_piece(const T* from, int count, float (&to)[kPiece]) {
  constexpr int N = kVector<T>;
  if (count >= kPiece && is_aligned<T, N>(from)) {
    FP_UNROLL
    for (int at = 0; at < kPiece; at += N) {
      const Packed<T, N> raw = *reinterpret_cast<const Packed<T, N>*>(from + at);
      FP_UNROLL
      for (int c = 0; c < N; ++c) to[at + c] = to_float(raw.v[c]);
    }
  } else {
    FP_UNROLL
    for (int c = 0; c < kPiece; ++c) to[c] = c < count ? to_float(from[c]) : 0.0f;
  }
}

template <class T>
__device__ inline void store_piece(T* to, int count, const float (&from)[kPiece]) {
  constexpr int N = kVector<T>;
  if (count >= kPiece && is_aligned<T, N>(to)) {
    FP_UNROLL
    for (int at = 0; at < kPiece; at += N) {
      Packed<T, N> raw;
      FP_UNROLL
      for (int c = 0; c < N; ++c) raw.v[c] = from_float<T>(from[at + c]);
      *reinterpret_cast<Packed<T, N>*>(to + at) = raw;
    }
  } else {
    FP_UNROLL
    for (int c = 0; c < kPiece; ++c) {
      if (c < count) to[c] = from_float<T>(from[c]);
    }
  }
}

template <class T>
__device__ inline void add_bias(const GroupedWork& w, int expert, int column, int count, float (&sums)[kPiece]) {
  float bias[kPiece];
  load_piece(static_cast<const T*>(w.bias) + expert * w.bias_stride + column, count, bias);
  FP_UNROLL
  for (int c = 0; c < kPiece; ++c) sums[c] += bias[c];
}

// The backward of one piece: `sums` are d. Returns Σ d·a.
template <class T>
__device__ inline float finish_backward(const GroupedWork& w, int expert, int row, int column, int count,
                                        const float (&sums)[kPiece]) {
  float first[kPiece] = {}, second[kPiece] = {}, gate = 1.0f, dot = 0.0f;
  if (expert == w.experts) {
    gate = 0.0f;
  } else {
    const T* pre = static_cast<const T*>(w.pre) + row * w.pre_stride + column;
    load_piece(pre, count, first);
    load_piece(pre + w.width, count, second);
    if (w.gate) {
      const int slot = w.x.order ? w.x.order[row] : row;
      gate = slot >= 0 && slot < w.slots ? w.gate[slot] : 0.0f;
    }
  }
  float activated[kPiece];
  FP_UNROLL
  for (int c = 0; c < kPiece; ++c) {
    const Activated a = activate(w.activation, first[c]);
    const float product = a.value * second[c], scaled = gate * sums[c];
    if (c < count) dot += sums[c] * product;
    activated[c] = gate * product;
    first[c] = scaled * second[c] * a.derivative;
    second[c] = scaled * a.value;
  }
  T* out = static_cast<T*>(w.out) + row * w.out_stride + column;
  store_piece(out, count, first);
  store_piece(out + w.width, count, second);
  if (w.activated) store_piece(static_cast<T*>(w.activated) + row * w.activated_stride + column, count, activated);
  return dot;
}

// Columns from `column` on of a row: of `first`, or of both halves where they pair up. Returns the row's share of grad_gate.
template <class T>
__device__ inline float finish_piece(const GroupedWork& w, int expert, int row, int column, float (&first)[kPiece],
                                     float (&second)[kPiece]) {
  const int count = w.width - column;
  if (count <= 0) return 0.0f;
  if (w.finish == Finish::kBackward) return finish_backward<T>(w, expert, row, column, count, first);
  const bool biased = w.bias && expert < w.experts, gated = w.finish == Finish::kGated;
  if (biased) add_bias<T>(w, expert, column, count, first);
  if (gated) {
    if (biased) add_bias<T>(w, expert, column + w.width, count, second);
    if (w.pre) {
      T* pre = static_cast<T*>(w.pre) + row * w.pre_stride + column;
      store_piece(pre, count, first);
      store_piece(pre + w.width, count, second);
    }
    FP_UNROLL
    for (int c = 0; c < kPiece; ++c) first[c] = activate(w.activation, first[c]).value * second[c];
  }
  store_piece(static_cast<T*>(w.out) + row * w.out_stride + column, count, first);
  return 0.0f;
}

// A tile whose sums lie in shared memory, [kM rows][kStride], by all threads of a block.
template <class T, int kM, int kN, int kStride, int kThreads>
__device__ inline void finish_tile(const GroupedWork& w, const GroupedTile& tile, const float* sums) {
  constexpr int kPieces = kN / kPiece;  // of a row, side by side in a warp
  static_assert(kM * kPieces % kThreads == 0 && kWarp % kPieces == 0 && kStride % 4 == 0);
  const bool gated = w.finish == Finish::kGated;
  const int first_column = tile.column_tile * w.tile_width(kN);
  for (int i = static_cast<int>(threadIdx.x); i < kM * kPieces; i += kThreads) {
    const int piece = i % kPieces, row = tile.first_row + i / kPieces;
    float dot = 0.0f;
    if (row < tile.end_row && (!gated || piece < kPieces / 2)) {
      float first[kPiece], second[kPiece] = {};
      const float* from = sums + i / kPieces * kStride + piece * kPiece;
      read_piece(from, first);
      if (gated) read_piece(from + kN / 2, second);
      dot = finish_piece<T>(w, tile.expert, row, first_column + piece * kPiece, first, second);
    }
    if (w.partial) {  // the same for all threads
      for (int mask = 1; mask < kPieces; mask *= 2) dot += shuffle_xor(dot, mask);
      if (piece == 0 && row < tile.end_row) w.partial[int64_t{tile.column_tile} * w.rows + row] = dot;
    }
  }
}

// Slots that nobody has get no gradient from any row; the rows' own come after the kernel, so nothing is lost.
__device__ inline void clear_grad_gate(const GroupedWork& w) {
  if (!w.grad_gate) return;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < w.slots;
       i += static_cast<int>(gridDim.x * blockDim.x)) {
    w.grad_gate[i] = 0.0f;
  }
}

// ---- tiles of WGMMA ----

// Writes the 16 rows of a warp.
template <class T>
__device__ __forceinline__ void finish_warp(const GroupedWork& w, const GroupedTile& tile, int first_row,
                                            const float (&sums)[kWideSums], float* staged, int lane) {
  const bool gated = w.finish == Finish::kGated;
  const int row = first_row + lane / 2, first_column = tile.column_tile * w.tile_width(kWideN);
  float dot = 0.0f;
  for_each_part(sums, staged, lane, [&](int column, const float* from) {
    if (row >= tile.end_row) return;
    for (int half = 0; half < (gated ? 1 : 2); ++half) {
      float first[kPiece], second[kPiece] = {};
      read_piece(from + half * kStagedColumns, first);
      if (gated) read_piece(from + kStagedColumns, second);
      dot += finish_piece<T>(w, tile.expert, row, first_column + column + half * (kWideN / 2), first, second);
    }
  });
  if (w.partial) {
    dot += shuffle_xor(dot, 1);
    if (lane % 2 == 0 && row < tile.end_row) w.partial[int64_t{tile.column_tile} * w.rows + row] = dot;
  }
}

template <class T>
__device__ __forceinline__ void store_gradient(const GradientWork& w, int expert, int n, int k,
                                               const float (&sums)[kPiece]) {
  if (n >= w.n || k >= w.k) return;
  store_piece(static_cast<T*>(w.out) + expert * w.expert_stride + n * w.row_stride + k, w.k - k, sums);
}

template <class T>
__device__ __forceinline__ void finish_gradient(const GradientWork& w, int expert, int n, int first_k,
                                                const float (&sums)[kWideSums], float* staged, int lane) {
  for_each_part(sums, staged, lane, [&](int column, const float* from) {
    FP_UNROLL
    for (int half = 0; half < 2; ++half) {
      float piece[kPiece];
      read_piece(from + half * kStagedColumns, piece);
      store_gradient<T>(w, expert, n + lane / 2, first_k + column + half * (kWideN / 2), piece);
    }
  });
}

// ---- where the code differs by architecture: bfloat16 and float16, 16 bytes at a time ----

struct GroupedType {
  DType dtype;
  bool transposed;  // the weight has stride 1 along N
};

// cuda/ops/grouped_gemm_sm80.cu. few: tiles of 32 rows, for experts that have few, where reading weights takes the time.
// Columns of W in a tile are what partial sums of grad_gate are made for.
int tile_columns_sm80(bool few);
void multiply_grouped_sm80(const Stream& stream, const GroupedWork& work, GroupedType type, bool few, int processors);
void multiply_gradient_sm80(const Stream& stream, const GradientWork& work, DType dtype);

// cuda/ops/grouped_gemm_sm90.cu, up to so many experts.
constexpr int kMostExpertsSm90 = 1024;
void multiply_grouped_sm90(const Stream& stream, const GroupedWork& work, GroupedType type, int processors);
void multiply_gradient_sm90(const Stream& stream, const GradientWork& work, DType dtype, int processors);

}  // namespace fastpost::cuda
