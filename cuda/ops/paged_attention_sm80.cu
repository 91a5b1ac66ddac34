// SPDX-License-Identifier: Apache-2.0
// paged_attention by mma.m16n8k16, for bfloat16 and float16 on compute capability 8.0 and later. Keys and values come page by
// page with cp.async, two steps of them under way; logits stay in registers, where they are the second product's factor.
//
// A tile of many rows: 64 packed rows, 16 to a warp, and steps of 64 keys that all warps use. One token: 16 packed rows that
// every warp has, and steps of 16 keys of its own; a warp waits for nobody until all four put their sums together.
//
// No GPU has run it yet; tests run it on the host. nvcc 13.0, sm_80 and sm_90a, heads of 64, 128 and 256: tiles 189 to 254
// registers and 35, 67 and 98 KB of shared memory; one token 114 to 215 registers and 37, 71 and 139 KB; no spills.
#include "cuda/ops/paged_attention.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kThreads = 128, kWarps = 4, kStages = 2, kPlaces = 3;

// kD: the size of a head, rounded up; what is beyond d counts as zeros.
template <int kD_, bool kTiled_>
struct Shape {
  static constexpr bool kTiled = kTiled_;
  static constexpr int kD = kD_, kRows = kTiled ? 64 : 16, kKeys = !kTiled ? 16 : kD > 128 ? 32 : 64;
  static constexpr int kTeams = kTiled ? 1 : kWarps, kTeam = kThreads / kTeams;  // threads that share their steps
  static constexpr int kChunks = kD / 8;                                         // of 16 bytes in a row
  static constexpr int kHalfBytes = kKeys * kD * 2, kStageBytes = 2 * kHalfBytes, kRingBytes = kStages * kStageBytes;
  static constexpr int kPlaceBytes = kPlaces * 2 * kKeys * 8;
  // Otherwise queries are read from shared memory again in every step: registers hold the sums of wide heads, or make place
  // for one more block. Those that stay in registers may come to where the ring will be.
  static constexpr bool kQueriesStay = kTiled && kD <= 128;
  static constexpr int kQueryBytes = kRows * kD * 2;
  static constexpr int kBytes = kTeams * (kRingBytes + kPlaceBytes) + (kQueriesStay ? 0 : kQueryBytes);
  static constexpr int kBlocks = kD > 128 ? 1 : kTiled ? 2 : 3;  // on a multiprocessor
  static_assert((kTiled ? kRows : 16) * kD * 4 <= kRingBytes);   // sums go there at the end
};

// What swizzled gives for a lane that reads chunks `even` + first: from a start, with what depends on the lane in `flip` alone. Written
// so that it takes four registers, not one for every chunk.
template <int kChunks>
struct LaneChunks {
  int start, flip;
  __device__ __forceinline__ LaneChunks(int row, int first) : start(row * kChunks * 16), flip((first ^ row % 8) * 16) {}
  __device__ __forceinline__ int at(int more_rows, int even) const {  // more_rows: a multiple of 8
    return start + more_rows * kChunks * 16 + even / 8 * 128 + ((even % 8 * 16) ^ flip);
  }
};
// Where four floats of a row of sums lie: rows begin eight columns apart, so that they are in different banks.
template <int kD>
__device__ __forceinline__ int turned(int row, int column) {
  return row * kD + ((column + 8 * row) & (kD - 1));
}

template <class S>
__device__ __forceinline__ void sync_team() {
  if constexpr (S::kTiled) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// 16 rows of a warp: lane 4g + t has rows g and g + 8, columns 2t and 2t + 1 of each eight.
template <int kD>
struct Sums {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // sum: of this lane's columns
  float out[kD / 8][4] = {};
};

template <class T, class S>
__device__ __forceinline__ void load_queries(const char* queries, int first_row, int step, int lane, uint32_t (&q)[4]) {
  load_matrices(queries + LaneChunks<S::kChunks>(first_row + lane % 16, lane / 16).at(0, 2 * step), q);
}

template <class T, class S>
__device__ __forceinline__ void attend_step(const Attention& w, const char* keys, const char* values,
                                            const char* queries, int first_row,
                                            const uint32_t (&resident)[S::kQueriesStay ? S::kD / 16 : 1][4], int x,
                                            uint64_t there, bool all_seen, const int (&sees)[2], int lane,
                                            Sums<S::kD>& sums) {
  constexpr int kBlocks = S::kKeys / 8, kSteps = S::kD / 16;
  const int row = lane % 8, matrix = lane / 8;
  const LaneChunks<S::kChunks> of_keys(matrix / 2 * 8 + row, matrix % 2), of_values(matrix % 2 * 8 + row, matrix / 2);
  float logit[kBlocks][4] = {};
  const auto add = [&](int step, const uint32_t (&q)[4]) {
    FP_UNROLL
    for (int n = 0; n < kBlocks; n += 2) {  // matrices: keys 0 to 7, columns 0 to 7 and 8 to 15; then of the next keys
      uint32_t k[4];
      load_matrices(keys + of_keys.at(8 * n, 2 * step), k);
      mma<T>(logit[n], q, k[0], k[1]);
      mma<T>(logit[n + 1], q, k[2], k[3]);
    }
  };
  if constexpr (S::kQueriesStay) {
    FP_UNROLL
    for (int step = 0; step < kSteps; ++step) add(step, resident[step]);
  } else {
    const auto load_and_add = [&](int step) {
      uint32_t q[4];
      load_queries<T, S>(queries, first_row, step, lane, q);
      add(step, q);
    };
    if constexpr (kSteps <= 8) {
      FP_UNROLL
      for (int step = 0; step < kSteps; ++step) load_and_add(step);
    } else {  // unrolled, it would take more registers than there are
#ifdef __CUDACC__
#pragma unroll 1
#endif
      for (int step = 0; step < kSteps; ++step) load_and_add(step);
    }
  }
  float most[2] = {sums.max[0], sums.max[1]};
  FP_UNROLL
  for (int n = 0; n < kBlocks; ++n) {
    FP_UNROLL
    for (int i = 0; i < 4; ++i) {
      float z = logit_of(w, logit[n][i]);
      if (!all_seen) {
        const int j = 8 * n + lane % 4 * 2 + i % 2;
        const int before = sees[i / 2] - (x + j);  // 1: the row's own position
        const bool seen = (there >> j & 1) && before > 0 && (w.window == 0 || before <= w.window);
        z = seen ? z : -INFINITY;
      }
      logit[n][i] = z;
      most[i / 2] = fmaxf(most[i / 2], z);
    }
  }
  float shift[2];
  FP_UNROLL
  for (int h = 0; h < 2; ++h) {
    most[h] = quad_max(most[h]);
    shift[h] = most[h] == -INFINITY ? 0.0f : most[h];
    const float keep = exp2f(sums.max[h] - shift[h]);
    sums.max[h] = most[h];
    sums.sum[h] *= keep;
    FP_UNROLL
    for (int n = 0; n < S::kD / 8; ++n) {
      sums.out[n][2 * h] *= keep;
      sums.out[n][2 * h + 1] *= keep;
    }
  }
  FP_UNROLL
  for (int k = 0; k < kBlocks / 2; ++k) {
    uint32_t weight[4];
    FP_UNROLL
    for (int i = 0; i < 4; ++i) {  // rows g, g + 8, then eight keys on
      const int n = 2 * k + i / 2, h = i % 2;
      const float low = exp2f(logit[n][2 * h] - shift[h]), high = exp2f(logit[n][2 * h + 1] - shift[h]);
      sums.sum[h] += low + high;
      weight[i] = pair_of<T>(low, high);
    }
    FP_UNROLL
    for (int n = 0; n < S::kD / 8; n += 2) {  // matrices: columns 0 to 7 of keys 0 to 7 and 8 to 15; then eight on
      uint32_t v[4];
      load_matrices_transposed(values + of_values.at(16 * k, n), v);
      mma<T>(sums.out[n], weight, v[0], v[1]);
      mma<T>(sums.out[n + 1], weight, v[2], v[3]);
    }
  }
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads, S::kBlocks) attend_kernel(Attention w) {
  constexpr int kD = S::kD, kKeys = S::kKeys, kChunks = S::kChunks;
  FP_DYNAMIC_SHARED(char, shared);
  __shared__ float stats[kWarps][16][2];  // max and sum of each row of a warp
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const AttentionTile tile = attention_tile<S::kRows>(w);
  if (tile.count == 0 || (w.splits > 1 && tile.begin >= tile.end)) return;  // the merge will not look here
  const int team = thread / S::kTeam, member = thread % S::kTeam;
  char* ring = shared + team * S::kRingBytes;
  int64_t* places = reinterpret_cast<int64_t*>(shared + S::kTeams * S::kRingBytes + team * S::kPlaceBytes);
  char* queries = S::kQueriesStay ? shared : shared + S::kTeams * (S::kRingBytes + S::kPlaceBytes);

  const PoolPlace key_place = pool_place(w.keys, tile.sequence, tile.head);
  const PoolPlace value_place = pool_place(w.values, tile.sequence, tile.head);
  const int all = (tile.end - tile.begin + kKeys - 1) / kKeys;
  const int steps = (all - team + S::kTeams - 1) / S::kTeams;  // of this team
  const auto position = [&](int step) { return tile.begin + (step * S::kTeams + team) * kKeys; };
  // Where a step's keys and values lie, found out by one thread each.
  const auto look_up = [&](int step) {
    if (member >= 2 * kKeys) return;
    const int x = position(step) + member % kKeys;
    int64_t at = -1;
    if (step < steps && x < tile.end) {
      at = member < kKeys ? offset_of(w.keys, key_place, x, w.page) : offset_of(w.values, value_place, x, w.page);
    }
    places[step % kPlaces * 2 * kKeys + member] = at;
  };
  const auto fetch = [&](int step) {
    if (step < steps) {
      char* to = ring + step % kStages * S::kStageBytes;
      const int64_t* from = places + step % kPlaces * 2 * kKeys;
      const int chunk = member % kChunks;
      FP_UNROLL
      for (int half = 0; half < 2; ++half) {
        const T* data = static_cast<const T*>(half ? w.values.data : w.keys.data);
        for (int row = member / kChunks; row < kKeys; row += S::kTeam / kChunks) {
          const int64_t at = from[half * kKeys + row];
          const bool exists = at >= 0 && chunk * 8 < w.d;  // no page: zeros, for NaN times no weight is NaN
          copy_async(to + half * S::kHalfBytes + swizzled<kChunks>(row, chunk), exists ? data + at + chunk * 8 : data,
                     exists);
        }
      }
    }
    copies_commit();
  };

  look_up(0);
  look_up(1);
  if constexpr (!S::kQueriesStay) {
    sync_team<S>();
    fetch(0);
    fetch(1);
  }
  for (int i = thread; i < S::kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks, packed = tile.first + row;
    T* to = reinterpret_cast<T*>(queries + swizzled<kChunks>(row, chunk));
    if (row < tile.count && chunk * 8 < w.d) {
      copy<8>(static_cast<const T*>(w.query) + (tile.token + packed / w.group) * w.query_row +
                  (tile.head * w.group + packed % w.group) * w.query_head + chunk * 8,
              to);
    } else {
      *reinterpret_cast<Packed<T, 8>*>(to) = {};
    }
  }
  __syncthreads();
  const int first_row = S::kTiled ? 16 * warp : 0;
  uint32_t resident[S::kQueriesStay ? kD / 16 : 1][4];
  if constexpr (S::kQueriesStay) {
    FP_UNROLL
    for (int step = 0; step < kD / 16; ++step) load_queries<T, S>(queries, first_row, step, lane, resident[step]);
  }
  if constexpr (S::kQueriesStay) {
    __syncthreads();  // everyone has its queries
    fetch(0);
    fetch(1);
  }

  int sees[2];  // positions that the lane's rows see
  FP_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + lane / 4 + 8 * h;
    sees[h] = row < tile.count ? tile.sees + (tile.first + row) / w.group : 0;
  }
  // Of all rows of the warp: what the first sees, all see; what the last does not, none does.
  const int last_row = first_row + 15 < tile.count ? first_row + 15 : tile.count - 1;
  const int least = tile.sees + (tile.first + first_row) / w.group;
  const int most = last_row < first_row ? 0 : tile.sees + (tile.first + last_row) / w.group;
  const int most_low = w.window > 0 ? most - w.window : 0;

  Sums<kD> sums;
  for (int step = 0; step < steps; ++step) {
    copies_wait<1>();
    sync_team<S>();
    look_up(step + 2);
    const int x = position(step);
    const int64_t* at = places + step % kPlaces * 2 * kKeys;
    const auto is_there = [&](int j) { return at[j] >= 0 && at[kKeys + j] >= 0; };  // key and value
    uint64_t there = __ballot_sync(0xffffffffu, lane < kKeys && is_there(lane % kKeys));
    if constexpr (kKeys > kWarp) {
      there |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, is_there(kWarp + lane))) << kWarp;
    }
    if (x < most) {
      const bool all_seen = there == ~uint64_t{0} >> (64 - kKeys) && x + kKeys <= least && x >= most_low;
      const char* keys = ring + step % kStages * S::kStageBytes;
      attend_step<T, S>(w, keys, keys + S::kHalfBytes, queries, first_row, resident, x, there, all_seen, sees, lane,
                        sums);
    }
    sync_team<S>();  // the step has been read, and the next but one is known
    fetch(step + 2);
  }
  copies_wait<0>();

  // A warp's sums go to its own part of the ring, or of the rows that all have.
  float* staged = reinterpret_cast<float*>(ring) + (S::kTiled ? 16 * warp * kD : 0);
  FP_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float sum = quad_sum(sums.sum[h]);
    const int row = lane / 4 + 8 * h;
    if (lane % 4 < 2) stats[warp][row][lane % 4] = lane % 4 ? sum : sums.max[h];
    FP_UNROLL
    for (int n = 0; n < kD / 8; ++n) {
      const Packed<float, 2> pair = {{sums.out[n][2 * h], sums.out[n][2 * h + 1]}};
      *reinterpret_cast<Packed<float, 2>*>(staged + turned<kD>(row, 8 * n + lane % 4 * 2)) = pair;
    }
  }
  __syncthreads();
  for (int row = warp; row < tile.count; row += kWarps) {
    constexpr int kParts = S::kTiled ? 1 : kWarps;  // whose sums belong to this row
    const int from = S::kTiled ? row / 16 : 0, packed = tile.first + row;
    float max = -INFINITY, sum = 0.0f, share[kParts];
    FP_UNROLL
    for (int p = 0; p < kParts; ++p) max = fmaxf(max, stats[from + p][row % 16][0]);
    FP_UNROLL
    for (int p = 0; p < kParts; ++p) {
      share[p] = max == -INFINITY ? 0.0f : exp2f(stats[from + p][row % 16][0] - max);
      sum += share[p] * stats[from + p][row % 16][1];
    }
    const int64_t at = (tile.token + packed / w.group) * w.heads + tile.head * w.group + packed % w.group;
    const int64_t part = at * w.splits + tile.split;
    Ending end = {};
    if (w.splits > 1) {
      if (lane < 2) w.partial_stats[2 * part + lane] = lane ? sum : max;
    } else {
      end = ending_of(w, at, max, sum, lane == 0);
    }
    for (int column = 4 * lane; column < w.d; column += 4 * kWarp) {
      Floats<4> x = {};
      FP_UNROLL
      for (int p = 0; p < kParts; ++p) {
        const float* mine =
            reinterpret_cast<const float*>(shared + (S::kTiled ? from * 16 * kD * 4 : p * S::kRingBytes));
        const Floats<4> y = load<4>(mine + turned<kD>(row % 16, column));
        FP_UNROLL
        for (int k = 0; k < 4; ++k) x.v[k] += share[p] * y.v[k];
      }
      if (w.splits > 1) {
        store<4>(w.partial + part * w.d + column, x);
      } else {
        end_columns<T>(w, at, column, end, x);
      }
    }
  }
}

template <class T, int kD, bool kTiled>
void launch_attend(const Stream& stream, const Attention& w) {
  using S = Shape<kD, kTiled>;
  auto* kernel = attend_kernel<T, S>;
  allow_shared(stream, kernel, S::kBytes);
  const int64_t blocks =
      kTiled ? most_tiles<S::kRows>(w) * w.key_heads : w.rows * w.key_heads * blocks_for(w.group, S::kRows) * w.splits;
  launch(kernel, blocks, kThreads, S::kBytes, stream, w);
}

}  // namespace

bool attend_fits_sm80(const Attention& w) {
  const auto fits = [](const Pool& pool) {
    bool whole = reinterpret_cast<uintptr_t>(pool.data) % 16 == 0;
    for (const int64_t stride : pool.stride) whole &= stride % 8 == 0;
    return whole;
  };
  return w.d % 8 == 0 && w.d <= kMostHeadSize && fits(w.keys) && fits(w.values);
}

void attend_sm80(const Stream& stream, const Attention& w, DType dtype) {
  const auto go = [&]<class T>(T) {
    with_flag(w.tiled, [&](auto tiled) {
      constexpr bool kTiled = decltype(tiled)::value;
      w.d <= 64    ? launch_attend<T, 64, kTiled>(stream, w)
      : w.d <= 128 ? launch_attend<T, 128, kTiled>(stream, w)
                   : launch_attend<T, 256, kTiled>(stream, w);
    });
  };
  dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace fastpost::cuda
