// SPDX-License-Identifier: Apache-2.0
// Up to three launches: new keys and values go to their pages; blocks attend (bfloat16 and float16 with matrix instructions
// in paged_attention_sm80.cu, everything else here by plain products); splits of a row's positions are put together.
//
// Few rows to a sequence (decoding): a block for each token, key head and split of the positions. Splits are so many
// positions whatever a sequence's length, so they depend on shapes alone, and a row's bits on its own length. Many rows: a
// block for each tile of rows; it goes through all positions that these see.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/arena.h"
#include "cuda/ops.h"
#include "cuda/ops/paged_attention.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kLeastSplit = 128, kMostSplits = 64;
constexpr int kFewRows = 4;  // to a sequence on average: more make tiles

// Positions of a split.
int64_t split_size(int64_t positions) {
  int64_t size = kLeastSplit;
  while (size * kMostSplits < positions) size *= 2;
  return size;
}

struct Space {
  bool tiled;
  int64_t split, splits;
  float *partial, *stats;
  int64_t bytes;

  Space(char* base, int64_t rows, int64_t heads, int64_t d, int64_t sequences, int64_t positions)
      : tiled(rows > kFewRows * sequences),
        split(tiled ? positions : split_size(positions)),
        splits(tiled ? 1 : std::max<int64_t>(1, (positions + split - 1) / split)) {
    Arena a{base};
    const int64_t parts = splits > 1 ? rows * heads * splits : 0;
    partial = a.take<float>(parts * d);
    stats = a.take<float>(parts * 2);
    bytes = a.used;
  }
};

// ---- new keys and values ----

struct NewRows {
  const void *keys, *values;
  int64_t key_row, key_head, value_row, value_head;
};

template <class T>
__device__ void copy_row(const T* from, T* to, int d, int lane) {
  constexpr int N = kVector<T>;
  for (int j = lane * N; j < d; j += kWarp * N) {
    if (j + N <= d) {
      copy<N>(from + j, to + j);
    } else {
      for (int k = j; k < d; ++k) to[k] = from[k];
    }
  }
}

// A warp for each token and key head.
template <class T>
__global__ void __launch_bounds__(kThreads) append_kernel(Attention w, NewRows in) {
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  const int64_t t = index / w.key_heads;
  const int g = static_cast<int>(index % w.key_heads), lane = static_cast<int>(threadIdx.x % kWarp);
  if (t >= w.rows) return;
  const TokenPlace place = place_of_token(w, t);
  const int x = place.sees - 1;
  if (place.sequence < 0 || x < 0 || x >= w.positions) return;
  const int64_t key = offset_of(w.keys, pool_place(w.keys, place.sequence, g), x, w.page);
  const int64_t value = offset_of(w.values, pool_place(w.values, place.sequence, g), x, w.page);
  // The pools are inputs of everything else, hence const there.
  if (key >= 0) {
    copy_row(static_cast<const T*>(in.keys) + t * in.key_row + g * in.key_head,
             const_cast<T*>(static_cast<const T*>(w.keys.data)) + key, w.d, lane);
  }
  if (value >= 0) {
    copy_row(static_cast<const T*>(in.values) + t * in.value_row + g * in.value_head,
             const_cast<T*>(static_cast<const T*>(w.values.data)) + value, w.d, lane);
  }
}

// ---- attention by plain products: float32, and rows that no 16-byte copy can take ----

constexpr int kRows = 16, kKeys = kWarp;  // of a tile; a warp has rows warp, warp + 4, ..., a lane one key of each step
constexpr int kRowsOfWarp = kRows / kWarps;

size_t plain_bytes(int d) { return sizeof(float) * (kRows * d + kKeys * (d + 1) + kKeys * d + kRows * kKeys); }

// kColumns: of a lane.
template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads) plain_kernel(Attention w) {
  FP_DYNAMIC_SHARED(float, queries);         // [kRows, d]
  float* keys = queries + kRows * w.d;       // [kKeys, d + 1]
  float* values = keys + kKeys * (w.d + 1);  // [kKeys, d]
  float* weights = values + kKeys * w.d;     // [kRows, kKeys]
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp, d = w.d;
  const AttentionTile tile = attention_tile<kRows>(w);
  if (tile.count == 0) return;
  const PoolPlace key_place = pool_place(w.keys, tile.sequence, tile.head);
  const PoolPlace value_place = pool_place(w.values, tile.sequence, tile.head);

  for (int i = thread; i < tile.count * d; i += kThreads) {
    const int row = tile.first + i / d;
    queries[i] = to_float(static_cast<const T*>(w.query)[(tile.token + row / w.group) * w.query_row +
                                                         (tile.head * w.group + row % w.group) * w.query_head + i % d]);
  }
  float max[kRowsOfWarp], sum[kRowsOfWarp], out[kRowsOfWarp][kColumns] = {};
  int sees[kRowsOfWarp];
  FP_UNROLL
  for (int r = 0; r < kRowsOfWarp; ++r) {
    max[r] = -INFINITY;
    sum[r] = 0.0f;
    sees[r] = tile.sees + (tile.first + warp + r * kWarps) / w.group;
  }
  for (int begin = tile.begin; begin < tile.end; begin += kKeys) {
    __syncthreads();                // the last step's keys and values have been read
    const int mine = begin + lane;  // the position whose logits are this lane's
    const bool there = mine < tile.end && offset_of(w.keys, key_place, mine, w.page) >= 0 &&
                       offset_of(w.values, value_place, mine, w.page) >= 0;
    for (int j = warp; j < kKeys; j += kWarps) {  // a warp reads a key at a time
      const int x = begin + j;
      const int64_t key = x < tile.end ? offset_of(w.keys, key_place, x, w.page) : -1;
      const int64_t value = key >= 0 ? offset_of(w.values, value_place, x, w.page) : -1;
      for (int c = lane; c < d; c += kWarp) {
        keys[j * (d + 1) + c] = key >= 0 ? to_float(static_cast<const T*>(w.keys.data)[key + c]) : 0.0f;
        values[j * d + c] = value >= 0 ? to_float(static_cast<const T*>(w.values.data)[value + c]) : 0.0f;
      }
    }
    __syncthreads();
    FP_UNROLL
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const int row = warp + r * kWarps;
      if (row >= tile.count) continue;
      float dot = 0.0f;
      for (int c = 0; c < d; ++c) dot += queries[row * d + c] * keys[lane * (d + 1) + c];
      const bool seen = there && mine < sees[r] && (w.window == 0 || mine >= sees[r] - w.window);
      const float logit = seen ? logit_of(w, dot) : -INFINITY;
      const float most = fmaxf(max[r], warp_reduce(logit, [](float a, float b) { return fmaxf(a, b); }));
      const float shift = most == -INFINITY ? 0.0f : most, keep = exp2f(max[r] - shift);
      const float weight = exp2f(logit - shift);
      weights[row * kKeys + lane] = weight;
      sum[r] = sum[r] * keep + warp_reduce(weight, [](float a, float b) { return a + b; });
      max[r] = most;
      FP_UNROLL
      for (int c = 0; c < kColumns; ++c) out[r][c] *= keep;
    }
    __syncwarp();
    for (int j = 0; j < kKeys; ++j) {
      float value[kColumns];
      FP_UNROLL
      for (int c = 0; c < kColumns; ++c) value[c] = lane + c * kWarp < d ? values[j * d + lane + c * kWarp] : 0.0f;
      FP_UNROLL
      for (int r = 0; r < kRowsOfWarp; ++r) {
        const int row = warp + r * kWarps;
        if (row >= tile.count) continue;
        FP_UNROLL
        for (int c = 0; c < kColumns; ++c) out[r][c] += weights[row * kKeys + j] * value[c];
      }
    }
  }
  FP_UNROLL
  for (int r = 0; r < kRowsOfWarp; ++r) {
    const int packed = tile.first + warp + r * kWarps;
    if (warp + r * kWarps >= tile.count) continue;
    const int64_t row = (tile.token + packed / w.group) * w.heads + tile.head * w.group + packed % w.group;
    if (w.splits > 1) {
      if (tile.begin >= tile.end) continue;  // the merge will not look here
      const int64_t at = row * w.splits + tile.split;
      if (lane < 2) w.partial_stats[2 * at + lane] = lane ? sum[r] : max[r];
      FP_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        if (lane + c * kWarp < d) w.partial[at * d + lane + c * kWarp] = out[r][c];
      }
      continue;
    }
    const Ending end = ending_of(w, row, max[r], sum[r], lane == 0);
    FP_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if (lane + c * kWarp < d) end_columns<T, 1>(w, row, lane + c * kWarp, end, {{out[r][c]}});
    }
  }
}

// ---- splits together ----

// A warp for 32 columns of each row.
template <class T>
__global__ void __launch_bounds__(kThreads) merge_kernel(Attention w) {
  const int lane = static_cast<int>(threadIdx.x % kWarp), pieces = (w.d + kWarp - 1) / kWarp;
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp, row = index / pieces;
  if (row >= w.rows * w.heads) return;
  const int column = static_cast<int>(index % pieces) * kWarp + lane;
  const TokenPlace place = place_of_token(w, row / w.heads);
  const Range seen = positions_of(w, place.sees, place.sees);
  const int first = seen.begin / w.split, last = (seen.end + w.split - 1) / w.split;
  const float* stats = w.partial_stats + row * w.splits * 2;
  float max = -INFINITY, sum = 0.0f, out = 0.0f;
  for (int s = first + lane; s < last; s += kWarp) max = fmaxf(max, stats[2 * s]);
  max = warp_reduce(max, [](float a, float b) { return fmaxf(a, b); });
  const float shift = max == -INFINITY ? 0.0f : max;
  for (int s = first + lane; s < last; s += kWarp) sum += stats[2 * s + 1] * exp2f(stats[2 * s] - shift);
  sum = warp_reduce(sum, [](float a, float b) { return a + b; });
  const Ending end = ending_of(w, row, max, sum, column == 0);
  if (column >= w.d) return;
  const float* partial = w.partial + row * w.splits * w.d + column;
  for (int s = first; s < last; ++s) out += exp2f(stats[2 * s] - shift) * partial[int64_t{s} * w.d];
  end_columns<T, 1>(w, row, column, end, {{out}});
}

Pool pool_of(Tensor pool, Tensor table, Tensor row) {
  return {pool.data,
          pool.size(0),
          pool.size(2),
          {pool.stride(0), pool.stride(1), pool.stride(2), pool.stride(3)},
          table.ptr<int32_t>(),
          table.stride(0),
          table.size(1) > 1 ? table.stride(1) : 0,
          row.ptr<int32_t>()};
}

template <class T>
void attend_plain(const Stream& stream, const Attention& w) {
  const int64_t blocks =
      w.tiled ? most_tiles<kRows>(w) * w.key_heads : w.rows * w.key_heads * blocks_for(w.group, kRows) * w.splits;
  const auto go = [&]<int kColumns>() {
    auto* kernel = plain_kernel<T, kColumns>;
    const size_t bytes = plain_bytes(w.d);
    allow_shared(stream, kernel, static_cast<int>(bytes));
    launch(kernel, blocks, kThreads, bytes, stream, w);
  };
  w.d <= 64 ? go.template operator()<2>() : w.d <= 128 ? go.template operator()<4>() : go.template operator()<8>();
}

}  // namespace

void paged_attention(Tensor query, Tensor keys, Tensor values, Tensor key_table, Tensor value_table, Tensor length,
                     Tensor cu_seqlens, Tensor key_row, Tensor value_row, Tensor new_keys, Tensor new_values,
                     Tensor begun_out, Tensor begun_lse, double scaling, double softcap, int64_t window,
                     Tensor workspace, Tensor out, Tensor lse) {
  const Stream stream("paged_attention", query);
  const int64_t rows = query.size(0), heads = query.size(1), d = query.size(2), sequences = key_table.size(0);
  const int64_t page = keys.size(3), positions = std::min<int64_t>(key_table.size(2) * page, INT32_MAX);
  if (rows == 0 || sequences == 0) return;
  if (d > kMostHeadSize) {
    throw std::invalid_argument("[paged_attention] query: expected rows of at most " + std::to_string(kMostHeadSize) +
                                " on a GPU, got " + std::to_string(d) + ". Move the tensors to the CPU.");
  }
  const Space space(workspace.ptr<char>(), rows, heads, d, sequences, positions);
  Attention w = {};
  w.query = query.data;
  w.query_row = query.stride(0);
  w.query_head = query.stride(1);
  w.keys = pool_of(keys, key_table, key_row);
  w.values = pool_of(values, value_table.defined() ? value_table : key_table, value_row);
  w.length = length.ptr<int32_t>();
  w.cu_seqlens = cu_seqlens.ptr<int32_t>();
  w.rows = rows;
  w.sequences = sequences;
  w.heads = static_cast<int>(heads);
  w.key_heads = static_cast<int>(keys.size(1));
  w.group = w.heads / w.key_heads;
  w.d = static_cast<int>(d);
  w.page = static_cast<int>(page);
  w.positions = static_cast<int>(positions);
  w.window = static_cast<int>(std::min<int64_t>(window, INT32_MAX));
  w.scale = static_cast<float>(softcap > 0 ? scaling / softcap : scaling * double{kLog2E});
  w.cap = static_cast<float>(softcap > 0 ? softcap * double{kLog2E} : 0.0);
  w.begun_out = begun_out.ptr<float>();
  w.begun_lse = begun_lse.ptr<float>();
  w.out = out.data;
  w.float_out = out.dtype == DType::Float32;
  w.lse = lse.ptr<float>();
  w.tiled = space.tiled;
  w.splits = static_cast<int>(space.splits);
  w.split = static_cast<int>(space.split);
  w.partial = space.partial;
  w.partial_stats = space.stats;
  visit_float(query.dtype, [&]<class T>(T) {
    if (new_keys.defined()) {
      const NewRows in{new_keys.data,      new_values.data,      new_keys.stride(0),
                       new_keys.stride(1), new_values.stride(0), new_values.stride(1)};
      launch(append_kernel<T>, blocks_for(rows * w.key_heads, kWarps), kThreads, 0, stream, w, in);
    }
    if (query.dtype != DType::Float32 && attend_fits_sm80(w)) {
      attend_sm80(stream, w, query.dtype);
    } else {
      attend_plain<T>(stream, w);
    }
    if (w.splits > 1) {
      launch(merge_kernel<T>, blocks_for(rows * heads * blocks_for(d, kWarp), kWarps), kThreads, 0, stream, w);
    }
  });
}

int64_t paged_attention_bytes(Tensor query, Tensor keys, Tensor key_table) {
  if (query.ndim != 3 || keys.ndim != 5 || key_table.ndim != 3) return 0;
  const int64_t positions = std::min<int64_t>(key_table.size(2) * keys.size(3), INT32_MAX);
  return Space(nullptr, query.size(0), query.size(1), query.size(2), key_table.size(0), positions).bytes;
}

}  // namespace fastpost::cuda
