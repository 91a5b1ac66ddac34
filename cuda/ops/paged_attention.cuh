// SPDX-License-Identifier: Apache-2.0
// What the kernels of paged_attention share: which rows and positions a block has, where a position lies, and how a row ends.
//
// The query heads of one key head are rows of the same tile, so each key and value is read once for all of them: packed row
// r of a sequence is token r / group, head r % group of the group. Values of tables and lengths are never trusted.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/core/launch.h"
#include "cuda/core/mma.cuh"
#include "cuda/core/reduce.cuh"
#include "cuda/core/segments.cuh"
#include "cuda/core/vec.cuh"

namespace fastpost::cuda {

constexpr int kMostHeadSize = 256;
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// Keys or values; strides in elements.
struct Pool {
  const void* data;
  int64_t pools, pages, stride[4];
  const int32_t* table;
  int64_t table_row, table_head;
  const int32_t* row;  // may be null
};

struct Attention {
  const void* query;
  int64_t query_row, query_head;
  Pool keys, values;
  const int32_t *length, *cu_seqlens;  // cu_seqlens may be null: one row each
  int64_t rows, sequences;
  int heads, key_heads, group, d, page, positions, window;
  float scale, cap;  // logits in powers of 2: scale·q·k, or cap·tanh(scale·q·k) where cap > 0
  const float *begun_out, *begun_lse;
  void* out;
  bool float_out;
  float* lse;
  bool tiled;  // blocks have tiles of a sequence's rows, otherwise those of one token and a split of its positions
  int splits, split;               // of `split` positions each
  float *partial, *partial_stats;  // [rows, heads, splits, d] and [.., 2]: where there is more than one split
};

// A block's rows [first, first + count) of a sequence and the positions [begin, end) that any of them may look at.
struct AttentionTile {
  int64_t token;  // of packed row 0
  int sequence, head, first, count, split;
  int sees;  // positions that packed row 0 sees
  int begin, end;
};

struct Range {
  int begin, end;
};

// Positions that rows seeing from `least` to `most` look at.
__device__ inline Range positions_of(const Attention& w, int least, int most) {
  const int end = most < 0 ? 0 : most < w.positions ? most : w.positions;
  const int begin = w.window > 0 && least > w.window ? least - w.window : 0;
  return {begin < end ? begin : end, end};
}

__device__ inline int length_of(const Attention& w, int64_t sequence) {
  return static_cast<int>(clamped(w.length[sequence], 0, w.positions));
}

// Positions that the row of token t sees, and its sequence: -1 where it has none.
struct TokenPlace {
  int sequence, sees;
};
__device__ inline TokenPlace place_of_token(const Attention& w, int64_t t) {
  if (!w.cu_seqlens) return {static_cast<int>(t), length_of(w, t)};
  const int64_t b = segment_of(w.cu_seqlens, w.sequences, t);
  if (b < 0) return {-1, 0};
  const Segment s = segment(w.cu_seqlens, b, w.rows);
  return {static_cast<int>(b), static_cast<int>(length_of(w, b) - (s.end - 1 - t))};
}

// Tiles of all sequences lie one after the other, with room for as many as each can have: tile 0 of sequence b is this one.
template <int kRows>
__device__ int64_t first_tile(const Attention& w, int64_t b) {
  return clamped(w.cu_seqlens[b], 0, w.rows) * w.group / kRows + b;
}
template <int kRows>
int64_t most_tiles(const Attention& w) {
  return w.rows * w.group / kRows + w.sequences;
}

template <int kRows>
__device__ AttentionTile attention_tile(const Attention& w) {
  AttentionTile tile = {};
  int64_t index = blockIdx.x;
  int left;
  if (w.tiled) {
    tile.head = static_cast<int>(index % w.key_heads);
    // The last tiles of a prompt see most: they go first.
    const int64_t slot = static_cast<int64_t>(gridDim.x) / w.key_heads - 1 - index / w.key_heads;
    int64_t low = 0, high = w.sequences - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (first_tile<kRows>(w, middle) <= slot) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const Segment s = segment(w.cu_seqlens, low, w.rows);
    const int64_t n = s.end - s.begin, first = (slot - first_tile<kRows>(w, low)) * kRows;
    if (first < 0 || first >= n * w.group) return tile;
    tile.token = s.begin;
    tile.sequence = static_cast<int>(low);
    tile.first = static_cast<int>(first);
    tile.sees = length_of(w, low) - static_cast<int>(n - 1);
    left = static_cast<int>(n * w.group - first);
  } else {
    const int parts = (w.group + kRows - 1) / kRows;
    tile.split = static_cast<int>(index % w.splits);
    index /= w.splits;
    tile.first = static_cast<int>(index % parts) * kRows;
    index /= parts;
    tile.head = static_cast<int>(index % w.key_heads);
    tile.token = index / w.key_heads;
    const TokenPlace place = place_of_token(w, tile.token);
    tile.sequence = place.sequence < 0 ? 0 : place.sequence;
    tile.sees = place.sees;
    left = w.group - tile.first;
  }
  tile.count = left < kRows ? left : kRows;
  const Range all =
      positions_of(w, tile.sees + tile.first / w.group, tile.sees + (tile.first + tile.count - 1) / w.group);
  const int64_t from = int64_t{tile.split} * w.split, to = from + w.split;
  tile.begin = all.begin > from ? all.begin : static_cast<int>(from < all.end ? from : all.end);
  tile.end = all.end < to ? all.end : static_cast<int>(to);
  return tile;
}

// Where sequence b's positions of head g lie.
struct PoolPlace {
  const int32_t* pages;
  int64_t base;  // -1: nowhere
};
__device__ inline PoolPlace pool_place(const Pool& pool, int b, int g) {
  const int64_t row = pool.pools == 1 ? 0 : pool.row ? pool.row[b] : b;
  const bool there = row >= 0 && row < pool.pools;
  return {pool.table + b * pool.table_row + g * pool.table_head,
          there ? row * pool.stride[0] + g * pool.stride[1] : -1};
}
// In elements; -1 where there is no page.
__device__ inline int64_t offset_of(const Pool& pool, const PoolPlace& place, int x, int page) {
  const int slot = x / page, at = place.pages[slot];
  if (place.base < 0 || at < 0 || at >= pool.pages) return -1;
  return place.base + at * pool.stride[2] + (x - slot * page) * pool.stride[3];
}

// A row's sums: of exp2(logit - max), and of that times the values. How they become its output.
struct Ending {
  float share, begun_share;  // of the sums of values, and of what had begun
};
__device__ inline Ending ending_of(const Attention& w, int64_t row, float max, float sum, bool writes) {
  float begun = -INFINITY;
  if (w.begun_lse) begun = w.begun_lse[row] * kLog2E;
  const bool some = sum != 0.0f;  // also of NaN, which must not look like nothing
  float top = fmaxf(some ? max : -INFINITY, begun);
  if (top == -INFINITY) top = 0.0f;
  const float mine = some ? exp2f(max - top) : 0.0f, other = exp2f(begun - top), total = mine * sum + other;
  const bool any = total != 0.0f;
  if (writes && w.lse) w.lse[row] = any ? (top + log2f(total)) * kLn2 : -INFINITY;
  // Nothing had begun: no share, even of NaN, or what is not there would be read.
  return {any ? mine / total : 0.0f, other != 0.0f ? other / total : 0.0f};
}

template <class T, int N>
__device__ void end_columns(const Attention& w, int64_t row, int column, const Ending& end, Floats<N> x) {
  const int64_t at = row * w.d + column;
  FP_UNROLL
  for (int k = 0; k < N; ++k) {
    x.v[k] *= end.share;
    if (end.begun_share != 0.0f) x.v[k] += end.begun_share * w.begun_out[at + k];
  }
  if (w.float_out) {
    store<N>(static_cast<float*>(w.out) + at, x);
  } else {
    store<N>(static_cast<T*>(w.out) + at, x);
  }
}

// Logit in powers of 2.
__device__ inline float logit_of(const Attention& w, float dot) {
  return w.cap > 0.0f ? w.cap * tanhf(dot * w.scale) : dot * w.scale;
}

// Whether the matrix instructions' kernels can read these pools; the plain ones read all.
bool attend_fits_sm80(const Attention& w);
void attend_sm80(const Stream& stream, const Attention& w, DType dtype);

}  // namespace fastpost::cuda
