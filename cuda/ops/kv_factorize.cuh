// SPDX-License-Identifier: Apache-2.0
// What the kernels of kv_factorize share: which tiles of the Gram matrix there are, over how many blocks the tokens are
// shared out, and what becomes of rows of u.
#pragma once

#include "core/arena.h"
#include "core/tensor.h"
#include "cuda/core/int8_rows.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/segments.cuh"
#include "cuda/core/vec.cuh"

namespace fastpost::cuda {

struct Keys {
  const void* data;
  int64_t batch_stride, row_stride, tokens;
  const int32_t* length;  // may be null
  int d;

  __device__ int64_t rows(int64_t b) const { return length ? clamped(length[b], 0, tokens) : tokens; }
  template <class T>
  __device__ const T* at(int64_t b) const {
    return static_cast<const T*>(data) + b * batch_stride;
  }
};

// ---- the Gram matrix ----

// Tiles of m rows and n = m or 2m columns that have a place on or above the diagonal, column of tiles by column of tiles.
struct Triangle {
  int m, n, down, across;

  __host__ __device__ constexpr Triangle(int d, int m, int n)
      : m(m), n(n), down((d + m - 1) / m), across((d + n - 1) / n) {}
  __host__ __device__ constexpr int before(int column) const { return n / m * (column * (column + 1) / 2); }
  __host__ __device__ constexpr int count() const { return before(across - 1) + down; }
  __host__ __device__ constexpr int index(int row, int column) const { return before(column) + row; }

  struct Tile {
    int row, column;
  };
  __host__ __device__ constexpr Tile at(int index) const {
    int column = 0;
    while (before(column + 1) <= index && column + 1 < across) ++column;
    return {index - before(column), column};
  }
};

struct GramWork {
  Keys keys;
  int splits;
  int64_t split_tokens;  // tokens of a block, a multiple of 64
  float* partial;        // [B, splits, tiles, m, n]
};

// By shapes alone, and not by how many sequences there are, or a sequence's bits would depend on its neighbours: about
// `blocks` for one sequence, each with 512 tokens at least.
struct Splits {
  int count;
  int64_t tokens;

  constexpr Splits(int64_t all, int tiles, int blocks) : count(1), tokens(64) {
    int64_t n = blocks / tiles;
    if (n > (all + 511) / 512) n = (all + 511) / 512;
    if (n < 1) n = 1;
    tokens = ((all + n - 1) / n + 63) / 64 * 64;
    if (tokens < 64) tokens = 64;
    count = all == 0 ? 1 : static_cast<int>((all + tokens - 1) / tokens);
  }
};

// Where a kernel's block is.
struct GramPlace {
  int64_t b, begin, end;  // tokens
  Triangle::Tile tile;
  float* partial;

  __device__ GramPlace(const GramWork& w, const Triangle& t, int64_t index) {
    const int count = t.count();
    const int64_t split = index / count % w.splits;
    tile = t.at(static_cast<int>(index % count));
    b = index / count / w.splits;
    partial = w.partial + index * t.m * t.n;
    const int64_t rows = w.keys.rows(b);
    begin = split * w.split_tokens < rows ? split * w.split_tokens : rows;
    end = begin + w.split_tokens < rows ? begin + w.split_tokens : rows;
  }
};

// A way to do it: tiles, and how many blocks keep a GPU busy with few waves (H100, 132 multiprocessors).
struct GramPlan {
  int m, n, blocks;

  Triangle triangle(int64_t d) const { return {static_cast<int>(d), m, n}; }
  Splits splits(int64_t tokens, int64_t d) const { return {tokens, triangle(d).count(), blocks}; }
  int64_t bytes(int64_t batch, int64_t tokens, int64_t d) const {
    return batch * splits(tokens, d).count * triangle(d).count() * m * n * static_cast<int64_t>(sizeof(float));
  }
};
constexpr GramPlan kPlainPlan = {64, 64, 4 * 132}, kPlanSm80 = {128, 128, 2 * 132}, kPlanSm90 = {128, 256, 132};

// cuda/ops/kv_factorize_sm80.cu and _sm90.cu: bfloat16 and float16, rows of 16-byte pieces.
void gram_sm80(const Stream& stream, const GramWork& work, int64_t batch, DType dtype);
void gram_sm90(const Stream& stream, const GramWork& work, int64_t batch, DType dtype);

// ---- u = keys · directions ----

struct ProjectWork {
  Keys keys;
  int rank, columns;  // columns: of `parts`, the rank rounded up to 16 bytes
  const void* parts;  // [B, 2, D, columns]: directions as the sum of two 16-bit numbers each, times 1 / column_scale
  const float* column_scale;
  const float* directions;
  int64_t direction_strides[3];
  void* u;
  int64_t u_strides[3];
  bool wide;     // u is float32
  float* scale;  // null: u is a float dtype
  int64_t scale_strides[2];
};

void project_sm80(const Stream& stream, const ProjectWork& work, int64_t batch, DType dtype);

// Tokens of a block: [first, first + kM) of sequence b. With int8 rows of which a tile has not all columns, the block goes over
// the columns twice: for each row's largest value, then to write. kWhole: it is known that a tile has them all.
template <int kM_, int kN_, bool kWhole>
struct ProjectPlace {
  static constexpr int kM = kM_, kN = kN_;
  int b, first;
  int rows, chunks, passes;  // rows that are there; chunks of columns

  __device__ ProjectPlace(const ProjectWork& w, int blocks_of_sequence) {
    b = static_cast<int>(blockIdx.x) / blocks_of_sequence;
    first = static_cast<int>(blockIdx.x) % blocks_of_sequence * kM;
    const int64_t left = w.keys.rows(b) - first;
    rows = left < 0 ? 0 : left < kM ? static_cast<int>(left) : kM;
    chunks = kWhole ? 1 : (w.rank + kN - 1) / kN;
    passes = w.scale && chunks > 1 ? 2 : 1;
  }
};

// Four columns of a row of u, those below the rank.
template <class To, class F>
__device__ __forceinline__ void store_four(To* to, int count, F value) {
  if (count >= 4 && is_aligned<To, 4>(to)) {
    Packed<To, 4> packed;
    FP_UNROLL
    for (int i = 0; i < 4; ++i) packed.v[i] = value(i);
    *reinterpret_cast<Packed<To, 4>*>(to) = packed;
  } else {
    FP_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = value(i);
    }
  }
}

// A chunk of columns whose sums lie in shared memory, [kM][kStride], zeros where there is no row or no column. 16 lanes have a
// row, the same ones for all chunks. row_max [kM] is shared memory, too.
template <class T, int kStride, int kThreads, class Place>
__device__ __forceinline__ void finish_rows(const ProjectWork& w, const Place& p, int chunk, int pass,
                                            const float* staged, float* row_max) {
  constexpr int kM = Place::kM, kN = Place::kN;
  constexpr int kLanes = 16, kPieces = (kN + 4 * kLanes - 1) / (4 * kLanes);  // of four columns, of a lane
  const int lane = static_cast<int>(threadIdx.x) % kLanes, group = static_cast<int>(threadIdx.x) / kLanes;
  const bool first = chunk == 0 && pass == 0, last = pass == p.passes - 1;
  for (int row = group; row < kM; row += kThreads / kLanes) {
    float v[kPieces][4];
    FP_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const int column = 4 * (lane + kLanes * i);
      FP_UNROLL
      for (int k = 0; k < 4; ++k) v[i][k] = 0.0f;
      if (column < kN) {
        const auto four = *reinterpret_cast<const Packed<float, 4>*>(staged + row * kStride + column);
        FP_UNROLL
        for (int k = 0; k < 4; ++k) v[i][k] = four.v[k];
      }
    }
    float max = 0.0f;
    if (w.scale) {  // the same for all threads
      if (pass == 0) {
        FP_UNROLL
        for (int i = 0; i < kPieces; ++i) {
          FP_UNROLL
          for (int k = 0; k < 4; ++k) max = max_or_nan(max, fabsf(v[i][k]));
        }
        FP_UNROLL
        for (int mask = kLanes / 2; mask > 0; mask /= 2) max = max_or_nan(max, shuffle_xor(max, mask));
        if (p.chunks > 1 && lane == 0) row_max[row] = first ? max : max_or_nan(row_max[row], max);
      } else {
        max = row_max[row];
      }
    }
    const int64_t token = int64_t{p.first} + row;
    if (!last || token >= w.keys.tokens) continue;
    const Int8Row quantize(max);
    if (w.scale && chunk == 0 && lane == 0)
      w.scale[p.b * w.scale_strides[0] + token * w.scale_strides[1]] = quantize.scale;
    FP_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const int in_chunk = 4 * (lane + kLanes * i), column = chunk * kN + in_chunk, count = w.rank - column;
      if (in_chunk >= kN || count <= 0) continue;
      const int64_t at = p.b * w.u_strides[0] + token * w.u_strides[1] + column;
      if (w.scale) {
        store_four(static_cast<int8_t*>(w.u) + at, count, [&](int k) { return quantize(v[i][k]); });
      } else if (w.wide) {
        store_four(static_cast<float*>(w.u) + at, count, [&](int k) { return v[i][k]; });
      } else {
        store_four(static_cast<T*>(w.u) + at, count, [&](int k) { return from_float<T>(v[i][k]); });
      }
    }
  }
}

// What has no row in a whole block: zeros without a product.
template <class T, int kThreads, class Place>
__device__ inline void clear_rows(const ProjectWork& w, const Place& p) {
  constexpr int kM = Place::kM;
  const int64_t left = w.keys.tokens - p.first;
  const int rows = left < kM ? static_cast<int>(left) : kM;
  for (int i = static_cast<int>(threadIdx.x); i < rows * w.rank; i += kThreads) {
    const int64_t at = p.b * w.u_strides[0] + (p.first + i / w.rank) * w.u_strides[1] + i % w.rank;
    if (w.scale) {
      static_cast<int8_t*>(w.u)[at] = 0;
    } else if (w.wide) {
      static_cast<float*>(w.u)[at] = 0.0f;
    } else {
      static_cast<T*>(w.u)[at] = T{};
    }
  }
  if (!w.scale) return;
  for (int i = static_cast<int>(threadIdx.x); i < rows; i += kThreads) {
    w.scale[p.b * w.scale_strides[0] + (p.first + i) * w.scale_strides[1]] = 0.0f;
  }
}

}  // namespace fastpost::cuda
