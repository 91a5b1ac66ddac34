// SPDX-License-Identifier: Apache-2.0
// What the kernels of kv_reconstruct share: which chunks a block has, where they go, and the rotation.
#pragma once

#include "core/tensor.h"
#include "cuda/core/launch.h"
#include "cuda/core/segments.cuh"
#include "cuda/core/vec.cuh"

namespace fastpost::cuda {

struct Table {  // cosines or sines [1 or P, S', w]
  const void* data;
  int64_t batch_stride, row_stride;
  bool wide;  // float32; else bfloat16

  template <int N>
  __device__ __forceinline__ Floats<N> at(int64_t p, int64_t token, int column) const {
    const int64_t i = p * batch_stride + token * row_stride + column;
    return wide ? load<N>(static_cast<const float*>(data) + i) : load<N>(static_cast<const bfloat16*>(data) + i);
  }
};

struct ReconstructWork {
  // u [P, S, r] and basis [P, G, r, d].
  const void *u, *basis;
  DType u_type;     // int8 where scale is not null
  bool basis_wide;  // float32; else bfloat16
  int64_t u_strides[2], basis_strides[3];
  bool u_pieces, basis_pieces;  // rows of int8 or bfloat16, and of a basis, are whole pieces of 16 bytes
  const float* scale;
  int64_t scale_strides[2];
  Table cos, sin;
  int width;  // of a table; 0: no rotation
  int rank, d, chunk;
  int64_t heads, picks, prompts, tokens, slot_count;  // tokens: that u and the tables have
  const int32_t *source, *chunks, *slots;             // source and slots may be null
  const uint8_t* fresh;                               // may be null
  void* keys;
  int64_t key_strides[3];
  // Values; null: none.
  const void* values;
  int64_t value_strides[3], value_count;  // chunks that there are
  const float* value_scale;               // null: values are what the pool has
  int64_t value_scale_strides[3];
  void* pool;
  int64_t pool_strides[3];
};

// A chunk to do; slot -1: nothing, or nothing that is there.
struct Pick {
  int chunk, slot;
};

__device__ inline int64_t prompt_of(const ReconstructWork& w, int64_t b) {
  const int64_t p = w.source ? w.source[b] : b;
  return p >= 0 && p < w.prompts ? p : -1;
}

// Pick j of row b and key head g of tensors with `there` chunks.
__device__ inline Pick pick_of(const ReconstructWork& w, int64_t b, int64_t g, int64_t j, int64_t there) {
  const int64_t at = (b * w.heads + g) * w.picks + j;
  const int chunk = w.chunks[at];
  const int64_t slot = w.slots ? w.slots[at] : j;
  const bool wanted = chunk >= 0 && chunk < there && slot >= 0 && slot < w.slot_count && !(w.fresh && w.fresh[at] == 0);
  return {chunk, wanted ? static_cast<int>(slot) : -1};
}

// Blocks that make keys and blocks that copy values, mixed evenly: values come slowly, over the bus, and should neither keep
// the others from starting nor begin after them.
struct Mixed {
  int64_t index;
  bool key;
};
__host__ __device__ constexpr Mixed mixed(int64_t block, int64_t keys, int64_t values) {
  const int64_t before = block * keys / (keys + values), after = (block + 1) * keys / (keys + values);
  return {after > before ? before : block - before, after > before};
}

// One row of keys whose sums lie in `from`: units of N elements, shared among kLanes lanes. The first are pairs of pieces that
// are rotated, then come those that stay.
template <class T, int N>
__device__ __forceinline__ void finish_row(const ReconstructWork& w, const float* from, float scale, int64_t p,
                                           int64_t token, T* to, int lane, int lanes) {
  const int pairs = w.width / N, units = pairs + (w.d - 2 * w.width) / N;
  const auto sums = [&](int column) {
    Floats<N> x;
    FP_UNROLL
    for (int i = 0; i < N; ++i) x.v[i] = from[column + i] * scale;
    return x;
  };
  for (int unit = lane; unit < units; unit += lanes) {
    if (unit >= pairs) {
      const int column = 2 * w.width + (unit - pairs) * N;
      store(to + column, sums(column));
      continue;
    }
    const int column = unit * N;
    const Floats<N> cos = w.cos.at<N>(p, token, column), sin = w.sin.at<N>(p, token, column);
    Floats<N> a = sums(column), b = sums(column + w.width);
    FP_UNROLL
    for (int i = 0; i < N; ++i) {
      const float x = a.v[i];
      a.v[i] = x * cos.v[i] - b.v[i] * sin.v[i];
      b.v[i] = b.v[i] * cos.v[i] + x * sin.v[i];
    }
    store(to + column, a);
    store(to + column + w.width, b);
  }
}

// Copies a chunk of values by a warp: four pieces of 16 bytes of each lane are on their way at a time.
template <class T>
__device__ inline void copy_chunk(const T* from, T* to, int elements, int lane) {
  constexpr int N = kVector<T>, kAhead = 4;
  if (!is_aligned<T, N>(from) || !is_aligned<T, N>(to) || elements % N != 0) {
    for (int i = lane; i < elements; i += 32) to[i] = from[i];
    return;
  }
  using Piece = Packed<T, N>;
  const Piece* source = reinterpret_cast<const Piece*>(from);
  Piece* target = reinterpret_cast<Piece*>(to);
  const int pieces = elements / N;
  for (int first = lane; first < pieces; first += 32 * kAhead) {
    Piece ahead[kAhead];
    FP_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (first + 32 * i < pieces) ahead[i] = source[first + 32 * i];
    }
    FP_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (first + 32 * i < pieces) target[first + 32 * i] = ahead[i];
    }
  }
}

template <class T>
__device__ inline void widen_chunk(const int8_t* from, const float* scale, T* to, int elements, int d, int lane) {
  constexpr int N = 8, kAhead = 4;
  using Piece = Packed<int8_t, N>;
  if (!is_aligned<int8_t, N>(from) || d % N != 0) {
    for (int i = lane; i < elements; i += 32) to[i] = from_float<T>(static_cast<float>(from[i]) * scale[i / d]);
    return;
  }
  const Piece* source = reinterpret_cast<const Piece*>(from);
  const int pieces = elements / N;
  for (int first = lane; first < pieces; first += 32 * kAhead) {
    Piece ahead[kAhead];
    float by[kAhead];
    FP_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int piece = first + 32 * i;
      if (piece < pieces) ahead[i] = source[piece], by[i] = scale[piece * N / d];
    }
    FP_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int piece = first + 32 * i;
      if (piece >= pieces) break;
      Floats<N> x;
      FP_UNROLL
      for (int k = 0; k < N; ++k) x.v[k] = static_cast<float>(ahead[i].v[k]) * by[i];
      store(to + piece * N, x);
    }
  }
}

// A warp for each pick.
template <class T, int kWarps>
__device__ inline void copy_values(const ReconstructWork& w, int64_t block, int64_t rows) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t index = block * kWarps + threadIdx.x / 32;
  if (index >= rows * w.heads * w.picks) return;
  const int64_t j = index % w.picks, g = index / w.picks % w.heads, b = index / w.picks / w.heads;
  const int64_t p = prompt_of(w, b);
  const Pick pick = pick_of(w, b, g, j, w.value_count);
  if (p < 0 || pick.slot < 0) return;
  const int64_t from = p * w.value_strides[0] + g * w.value_strides[1] + pick.chunk * w.value_strides[2];
  T* to = static_cast<T*>(w.pool) + b * w.pool_strides[0] + g * w.pool_strides[1] + pick.slot * w.pool_strides[2];
  if (w.value_scale) {
    const float* scale = w.value_scale + p * w.value_scale_strides[0] + g * w.value_scale_strides[1] +
                         pick.chunk * w.value_scale_strides[2];
    widen_chunk(static_cast<const int8_t*>(w.values) + from, scale, to, w.chunk * w.d, w.d, lane);
  } else {
    copy_chunk(static_cast<const T*>(w.values) + from, to, w.chunk * w.d, lane);
  }
}

// cuda/ops/kv_reconstruct_sm80.cu: keys of 16 bits, u int8 or bfloat16, d up to 256.
bool fits_sm80(const ReconstructWork& work, DType keys);
void reconstruct_sm80(const Stream& stream, const ReconstructWork& work, int64_t rows, DType keys);

}  // namespace fastpost::cuda
