// SPDX-License-Identifier: Apache-2.0
// Three launches. Blocks score tiles of chunks: logits of every query head, and each tile's share of its softmax; reading the
// landmarks is what takes time. Blocks make one sortable number of each chunk. A block for each row and key head chooses by
// its digits, the highest first, and then keeps the books of slots.
//
// A chunk's score is compared as its logarithm, logit - (log Σ exp - that of the group's first head): no probability
// vanishes, and what all chunks of a group have in common does not cost digits.
//
// No GPU has run it yet; tests run it on the host. nvcc 13.0, sm_80 and sm_90a: scores 64 to 128 registers, choosing 48; no
// spills.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <string>

#include "core/arena.h"
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/segments.cuh"
#include "cuda/core/vec.cuh"
#include "cuda/ops.h"

namespace fastpost::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTile = 512;        // chunks of a block that scores
constexpr int kKeyTile = 1024;    // and of one that makes keys
constexpr int kRows = 4;          // chunks that a lane has under way
constexpr int kFewChunks = 4096;  // that 256 threads choose from; more take 1024
constexpr int kBins = 2048;
constexpr int kMostSize = 256;          // of a row
constexpr int kMostShared = 150 << 10;  // of a block that selects, beside its bins

struct Space {
  int64_t tiles;
  float* logits;   // [B, H, C]; -inf: no candidate
  float* shares;   // [B, H, tiles, 2]: the tile's largest logit, and its sum of exponentials from there
  uint32_t* keys;  // [B, G, C]; 0: no candidate
  int64_t bytes;

  Space(char* base, int64_t rows, int64_t heads, int64_t key_heads, int64_t chunks) : tiles(blocks_for(chunks, kTile)) {
    Arena a{base};
    logits = a.take<float>(rows * heads * chunks);
    shares = a.take<float>(rows * heads * tiles * 2);
    keys = a.take<uint32_t>(rows * key_heads * chunks);
    bytes = a.used;
  }
};

struct Selecting {
  const void* query;
  DType query_dtype;
  int64_t query_row, query_head;
  const void* landmark;
  int64_t landmark_stride[3];
  const float* scale;  // may be null, as source and kept
  int64_t scale_stride[3];
  const int32_t *source, *count, *kept;
  int64_t kept_stride[2];
  int64_t prompts, tiles;
  int heads, key_heads, group, chunks, d, kept_size, wanted;
  float scaling;
  float *logits, *shares;
  uint32_t* keys;
};

__device__ inline float query_at(const Selecting& w, int64_t at) {
  switch (w.query_dtype) {
    case DType::BFloat16: return to_float(static_cast<const bfloat16*>(w.query)[at]);
    case DType::Float16: return to_float(static_cast<const float16*>(w.query)[at]);
    default: return static_cast<const float*>(w.query)[at];
  }
}
__device__ inline int candidates_of(const Selecting& w, int64_t b) {
  return static_cast<int>(clamped(w.count[b], 0, w.chunks));
}

// N elements as words: bytes would take a register each.
template <class T, int N>
struct Words {
  static constexpr int kPer = 4 / sizeof(T), kCount = N / kPer;
  uint32_t word[kCount];

  // Of a row, those below `size`; zeros beyond.
  __device__ void load(const T* row, int size) {
    if (size >= N && is_aligned<T, N>(row)) {
      const Packed<uint32_t, kCount> all = *reinterpret_cast<const Packed<uint32_t, kCount>*>(row);
      FP_UNROLL
      for (int i = 0; i < kCount; ++i) word[i] = all.v[i];
      return;
    }
    FP_UNROLL
    for (int i = 0; i < kCount; ++i) {
      word[i] = 0;
      FP_UNROLL
      for (int k = 0; k < kPer; ++k) {
        uint32_t bits = 0;
        if (i * kPer + k < size) memcpy(&bits, row + i * kPer + k, sizeof(T));
        word[i] |= bits << (k * 8 * sizeof(T)) % 32;
      }
    }
  }
  __device__ float at(int k) const {
    const uint32_t bits = word[k / kPer] >> (k % kPer * 8 * sizeof(T)) % 32;
    T value;
    memcpy(&value, &bits, sizeof(T));
    return to_float(value);
  }
};

// L lanes to a landmark, N elements to a lane; kHeads query heads of a group at a time.
template <class T, int L, int kHeads>
__global__ void __launch_bounds__(kThreads, 2) score_kernel(Selecting w) {
  constexpr int N = sizeof(T) == 1 ? 16 : 8, kGroups = kWarp / L, kValues = kRows * kHeads;
  using Sum = ScatteredSums<L, kValues>;
  __shared__ float logits[kHeads][kTile];
  __shared__ uint8_t closed[kTile];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int parts = (w.group + kHeads - 1) / kHeads;
  int64_t index = blockIdx.x;
  const int part = static_cast<int>(index % parts);
  index /= parts;
  const int64_t tile = index % w.tiles;
  index /= w.tiles;
  const int g = static_cast<int>(index % w.key_heads);
  const int64_t b = index / w.key_heads;
  const int head = g * w.group + part * kHeads;  // the first
  const int heads = w.group - part * kHeads < kHeads ? w.group - part * kHeads : kHeads;
  const int first = static_cast<int>(tile) * kTile, left = candidates_of(w, b) - first;
  const int here = left < 0 ? 0 : left < kTile ? left : kTile;
  float* shares = w.shares + ((b * w.heads + head) * w.tiles + tile) * 2;
  if (here == 0) {
    if (thread < 2 * heads) shares[thread / 2 * w.tiles * 2 + thread % 2] = thread % 2 ? 0.0f : -INFINITY;
    return;
  }
  for (int i = thread; i < here; i += kThreads) closed[i] = 0;

  const int member = lane % L, begin = member * N;
  float q[kHeads][N];
  FP_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    FP_UNROLL
    for (int k = 0; k < N; ++k) {
      const bool exists = h < heads && begin + k < w.d;
      q[h][k] = exists ? query_at(w, b * w.query_row + (head + h) * w.query_head + begin + k) * w.scaling : 0.0f;
    }
  }
  __syncthreads();
  for (int i = thread; i < w.kept_size; i += kThreads) {
    const int64_t at = int64_t{w.kept[b * w.kept_stride[0] + g * w.kept_stride[1] + i]} - first;
    if (at >= 0 && at < here) closed[at] = 1;
  }
  __syncthreads();

  const int64_t prompt = clamped(w.source ? w.source[b] : b, 0, w.prompts - 1);
  const T* landmark = static_cast<const T*>(w.landmark) + prompt * w.landmark_stride[0] + g * w.landmark_stride[1];
  const float* scale = w.scale + prompt * w.scale_stride[0] + g * w.scale_stride[1];
  const int mine = Sum::first(lane);
  for (int base = warp * kRows * kGroups; base < here; base += kWarps * kRows * kGroups) {
    Words<T, N> raw[kRows];
    FP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int c = base + r * kGroups + lane / L;
      raw[r].load(landmark + (first + c) * w.landmark_stride[2] + begin, c < here ? w.d - begin : 0);
    }
    float sums[kValues];
    FP_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float x[N];
      FP_UNROLL
      for (int k = 0; k < N; ++k) x[k] = raw[r].at(k);
      FP_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        float dot = 0.0f;
        FP_UNROLL
        for (int k = 0; k < N; ++k) dot += q[h][k] * x[k];
        sums[r * kHeads + h] = dot;
      }
    }
    Sum::template step<L / 2, kValues>(sums, lane);
    if (member % Sum::kCopies != 0) continue;
    FP_UNROLL
    for (int k = 0; k < Sum::kLeft; ++k) {
      const int value = mine + k, c = base + value / kHeads * kGroups + lane / L;
      if (c >= here) continue;
      float z = sums[k];
      if constexpr (sizeof(T) == 1) z *= scale[(first + c) * w.scale_stride[2]];
      // Bounded, NaN too, so that only what is no candidate is -inf.
      logits[value % kHeads][c] = closed[c] ? -INFINITY : fminf(fmaxf(z, -FLT_MAX), FLT_MAX);
    }
  }
  __syncthreads();
  for (int h = warp; h < heads; h += kWarps) {
    float max = -INFINITY, sum = 0.0f;
    float* out = w.logits + (b * w.heads + head + h) * w.chunks + first;
    for (int i = lane; i < here; i += kWarp) {
      max = fmaxf(max, logits[h][i]);
      out[i] = logits[h][i];
    }
    max = warp_reduce(max, [](float x, float y) { return fmaxf(x, y); });
    for (int i = lane; max > -INFINITY && i < here; i += kWarp) sum += expf(logits[h][i] - max);
    sum = warp_reduce(sum, [](float x, float y) { return x + y; });
    if (lane < 2) shares[h * w.tiles * 2 + lane] = lane ? sum : max;
  }
}

// Larger is better; never 0.
__device__ inline uint32_t key_of(float x) {
  x += 0.0f;  // -0 becomes 0
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__global__ void __launch_bounds__(kThreads) key_kernel(Selecting w) {
  FP_DYNAMIC_SHARED(double, lse);  // [group]
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t tiles = blocks_for(w.chunks, kKeyTile), row = blockIdx.x / tiles, b = row / w.key_heads;
  const int first = static_cast<int>(blockIdx.x % tiles) * kKeyTile;
  const int candidates = candidates_of(w, b);
  const int64_t head = row * w.group;  // of all rows' heads
  for (int h = warp; h < w.group; h += kWarps) {
    const float* shares = w.shares + (head + h) * w.tiles * 2;
    float max = -INFINITY;
    double sum = 0.0;
    for (int64_t i = lane; i < w.tiles; i += kWarp) max = fmaxf(max, shares[2 * i]);
    max = warp_reduce(max, [](float x, float y) { return fmaxf(x, y); });
    for (int64_t i = lane; max > -INFINITY && i < w.tiles; i += kWarp) {
      sum += static_cast<double>(shares[2 * i + 1]) * expf(shares[2 * i] - max);
    }
    sum = warp_reduce(sum, [](double x, double y) { return x + y; });
    if (lane == 0) lse[h] = max + log(sum);
  }
  __syncthreads();
  for (int c = first + thread; c < first + kKeyTile && c < w.chunks; c += kThreads) {
    uint32_t key = 0;
    if (c < candidates && w.logits[head * w.chunks + c] > -INFINITY) {
      float best = -FLT_MAX;
      for (int h = 0; h < w.group; ++h) {
        best = fmaxf(best, w.logits[(head + h) * w.chunks + c] - static_cast<float>(lse[h] - lse[0]));
      }
      key = key_of(best);
    }
    w.keys[row * w.chunks + c] = key;
  }
}

// ---- choosing ----

__device__ inline int warp_sum(int x) {
  return warp_reduce(x, [](int a, int b) { return a + b; });
}
// Of the lanes below this one.
__device__ inline int warp_before(int x, int lane) {
  int before = 0, total = x;
  for (int mask = 1; mask < kWarp; mask *= 2) {
    const int other = shuffle_xor(total, mask);
    before += lane & mask ? other : 0;
    total += other;
  }
  return before;
}
__device__ inline int votes_below(uint32_t votes, int lane) { return __popc(votes & ((1u << lane) - 1)); }

// What the books say is never outside of them; checked all the same, as what follows from memory that others write.
__device__ inline bool in_bounds(int i, int size) { return static_cast<uint32_t>(i) < static_cast<uint32_t>(size); }

// Over the warps of a block, from one number of each.
template <int kWarps>
__device__ int sum_of_warps(const int* counts, int lane) {
  return warp_sum(lane < kWarps ? counts[lane] : 0);
}
__device__ inline int sum_of_warps_below(const int* counts, int warp, int lane) {
  return warp_sum(lane < warp ? counts[lane] : 0);
}

struct Span {
  int begin, end;
};
// A warp's part of n items, in whole steps of a warp, so that items, warps and lanes are in the same order.
template <int kThreads>
__device__ Span span_of(int n, int warp) {
  const int per_warp = (n + kThreads - 1) / kThreads * kWarp;
  const int64_t begin = int64_t{per_warp} * warp, end = begin + per_warp;
  return {static_cast<int>(begin < n ? begin : n), static_cast<int>(end < n ? end : n)};
}

// Calls use(i, whether is(i), how many below i are) for each i < n. Every thread must call it; `counts` is in use until the
// next barrier.
template <int kThreads, class Is, class Use>
__device__ void ranked(int n, int* counts, Is is, Use use) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const Span span = span_of<kThreads>(n, warp);
  int count = 0;
  for (int i = span.begin; i < span.end; i += kWarp) {
    count += __popc(__ballot_sync(0xffffffffu, i + lane < span.end && is(i + lane)));
  }
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  int before = sum_of_warps_below(counts, warp, lane);
  for (int i = span.begin; i < span.end; i += kWarp) {
    const bool exists = i + lane < span.end, mine = exists && is(i + lane);
    const uint32_t votes = __ballot_sync(0xffffffffu, mine);
    if (exists) use(i + lane, mine, before + votes_below(votes, lane));
    before += __popc(votes);
  }
}

// Where `chunk` lies in an ascending list, or -1.
__device__ inline int find(const int32_t* list, int size, int chunk) {
  int low = 0, high = size;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list[middle] < chunk) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < size && list[low] == chunk ? low : -1;
}

// The `wanted` largest keys are those above `above`, and the first `equal` of those that are equal to it. Bins and counts are
// free again.
struct Cut {
  uint32_t above;
  int equal;
};

template <int kThreads>
__device__ Cut cut_of(const uint32_t* keys, int n, int wanted, int* bins, int* counts, int* found) {
  constexpr int kOwn = kBins / kThreads;  // bins of a thread
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  uint32_t prefix = 0, fixed = 0;  // digits that are known
  int left = wanted;
  for (int shift = 21; shift > -11; shift -= 11) {  // 11, 11 and 10 bits
    const int down = shift < 0 ? 0 : shift;
    for (int i = thread; i < kBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    for (int i = thread; i < n; i += kThreads) {
      const uint32_t key = keys[i];
      if (key != 0 && (key & fixed) == prefix) atomicAdd(&bins[(key & ~fixed) >> down], 1);
    }
    __syncthreads();
    const int top = kBins - 1 - kOwn * thread;  // bins are shared out from the top
    int own = 0;
    for (int k = 0; k < kOwn; ++k) own += bins[top - k];
    const int of_warp = warp_sum(own);
    if (lane == 0) counts[warp] = of_warp;
    __syncthreads();
    if (shift == 21 && sum_of_warps<kThreads / kWarp>(counts, lane) <= wanted) {  // all
      __syncthreads();                                                            // counts have been read
      return {0, 0};
    }
    int before = sum_of_warps_below(counts, warp, lane) + warp_before(own, lane);
    if (before < left && before + own >= left) {
      int digit = top;
      while (digit > top - kOwn + 1 && before + bins[digit] < left) before += bins[digit--];
      found[0] = digit;
      found[1] = left - before;
      found[2] = bins[digit];
    }
    __syncthreads();
    prefix |= static_cast<uint32_t>(found[0]) << down;
    left = found[1];
    fixed = ~0u << down;
    if (found[2] == left) return {prefix - 1, 0};  // the whole bin: the rest of its digits do not matter
  }
  return {prefix, left};
}

struct Outputs {
  int32_t *resident, *chunks, *slots;
  uint8_t* fresh;
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    select_kernel(Selecting w, Outputs out, bool shared_keys, bool shared_lists) {
  FP_DYNAMIC_SHARED(uint32_t, shared);  // keys and lists, where they have room
  constexpr int kWarps = kThreads / kWarp;
  __shared__ int bins[kBins], counts[2][kWarps], found[3];
  static_assert(kWarps <= kWarp && kBins % kThreads == 0);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t row = blockIdx.x;
  const int n = candidates_of(w, row / w.key_heads), wanted = w.wanted;
  int32_t *resident = out.resident + row * wanted, *chunks = out.chunks + row * wanted,
          *slots = out.slots + row * wanted;
  uint8_t* fresh = out.fresh + row * wanted;

  uint32_t* keys = w.keys + row * w.chunks;
  if (shared_keys) {
    for (int i = thread; i < n; i += kThreads) shared[i] = keys[i];
    keys = shared;
    __syncthreads();
  }
  uint32_t* lists = shared + (shared_keys ? w.chunks : 0);
  int32_t* chosen = shared_lists ? reinterpret_cast<int32_t*>(lists) : chunks;
  int32_t* slot_of = shared_lists ? chosen + wanted : slots;
  int32_t* free_slots = reinterpret_cast<int32_t*>(keys);  // whose own time is over then

  const Cut cut = cut_of<kThreads>(keys, n, wanted, bins, counts[0], found);
  const Span span = span_of<kThreads>(n, warp);
  int above = 0, equal = 0;
  for (int i = span.begin; i < span.end; i += kWarp) {
    const uint32_t key = i + lane < span.end ? keys[i + lane] : 0;
    above += __popc(__ballot_sync(0xffffffffu, key > cut.above));
    equal += __popc(__ballot_sync(0xffffffffu, cut.equal > 0 && key == cut.above));
  }
  if (lane == 0) {
    counts[0][warp] = above;
    counts[1][warp] = equal;
  }
  __syncthreads();
  const int ties_there = sum_of_warps<kWarps>(counts[1], lane);
  const int size = sum_of_warps<kWarps>(counts[0], lane) + (ties_there < cut.equal ? ties_there : cut.equal);
  above = sum_of_warps_below(counts[0], warp, lane);
  equal = sum_of_warps_below(counts[1], warp, lane);
  for (int i = span.begin; i < span.end; i += kWarp) {
    const uint32_t key = i + lane < span.end ? keys[i + lane] : 0;
    const bool is_above = key > cut.above, is_equal = cut.equal > 0 && key == cut.above;
    const uint32_t votes = __ballot_sync(0xffffffffu, is_above), ties = __ballot_sync(0xffffffffu, is_equal);
    const int ties_before = equal + votes_below(ties, lane);
    const int at = above + votes_below(votes, lane) + (ties_before < cut.equal ? ties_before : cut.equal);
    if (in_bounds(at, wanted) && (is_above || (is_equal && ties_before < cut.equal))) {
      chosen[at] = i + lane;
      slot_of[at] = -1;
    }
    above += __popc(votes);
    equal += __popc(ties);
  }
  __syncthreads();

  // What stays keeps its slot; of a chunk that should lie in two, the last.
  for (int s = thread; s < wanted; s += kThreads) {
    const int at = find(chosen, size, resident[s]);
    if (at >= 0) atomicMax(&slot_of[at], s);
  }
  __syncthreads();
  ranked<kThreads>(
      wanted, counts[0],
      [&](int s) {
        const int at = find(chosen, size, resident[s]);
        return at < 0 || slot_of[at] != s;
      },
      [&](int s, bool is_free, int before) {
        if (!is_free) return;
        resident[s] = -1;
        if (before < size) free_slots[before] = s;
      });
  ranked<kThreads>(  // its barrier is behind what the one above has written, too
      size, counts[1], [&](int k) { return slot_of[k] < 0; },
      [&](int k, bool is_fresh, int before) {
        const int chunk = chosen[k], slot = is_fresh ? free_slots[before] : slot_of[k];
        chunks[k] = chunk;
        slots[k] = slot;
        fresh[k] = is_fresh;
        if (is_fresh && in_bounds(slot, wanted)) resident[slot] = chunk;
      });
  for (int k = size + thread; k < wanted; k += kThreads) {
    chunks[k] = slots[k] = -1;
    fresh[k] = 0;
  }
}

template <class T>
void score(const Stream& stream, const Selecting& w, int64_t rows) {
  constexpr int N = sizeof(T) == 1 ? 16 : 8;
  const auto go = [&]<int L>() {
    with_flag(w.group > 1, [&](auto many) {
      constexpr int kHeads = decltype(many)::value ? 4 : 1;
      launch(score_kernel<T, L, kHeads>, rows * w.key_heads * w.tiles * blocks_for(w.group, kHeads), kThreads, 0,
             stream, w);
    });
  };
  w.d <= 64    ? go.template operator()<64 / N>()
  : w.d <= 128 ? go.template operator()<128 / N>()
               : go.template operator()<256 / N>();
}

}  // namespace

void kv_select(Tensor query, Tensor landmark, Tensor scale, Tensor source, Tensor count, Tensor kept, double scaling,
               Tensor workspace, Tensor resident, Tensor chunks, Tensor slots, Tensor fresh) {
  const Stream stream("kv_select", query);
  const int64_t rows = query.size(0), heads = query.size(1), key_heads = landmark.size(1), c = landmark.size(2);
  const int64_t wanted = resident.size(2);
  if (wanted == 0) return;
  if (query.size(2) > kMostSize) {
    throw std::invalid_argument("[kv_select] query: expected rows of at most " + std::to_string(kMostSize) +
                                " on a GPU, got " + std::to_string(query.size(2)) + ". Move the tensors to the CPU.");
  }
  const Space space(workspace.ptr<char>(), rows, heads, key_heads, c);
  Selecting w = {};
  w.query = query.data;
  w.query_dtype = query.dtype;
  w.query_row = query.stride(0);
  w.query_head = query.stride(1);
  w.landmark = landmark.data;
  for (int i = 0; i < 3; ++i) w.landmark_stride[i] = landmark.stride(i);
  if (scale.defined()) {
    w.scale = scale.ptr<float>();
    for (int i = 0; i < 3; ++i) w.scale_stride[i] = scale.stride(i);
  }
  w.source = source.ptr<int32_t>();
  w.count = count.ptr<int32_t>();
  w.kept = kept.ptr<int32_t>();
  w.prompts = landmark.size(0);
  w.tiles = space.tiles;
  w.heads = static_cast<int>(heads);
  w.key_heads = static_cast<int>(key_heads);
  w.group = w.heads / w.key_heads;
  w.chunks = static_cast<int>(c);
  w.d = static_cast<int>(query.size(2));
  if (kept.defined()) {
    w.kept_size = static_cast<int>(kept.size(2));
    for (int i = 0; i < 2; ++i) w.kept_stride[i] = kept.stride(i);
  }
  w.wanted = static_cast<int>(wanted);
  w.scaling = static_cast<float>(scaling);
  w.logits = space.logits;
  w.shares = space.shares;
  w.keys = space.keys;
  if (scale.defined()) {
    score<int8_t>(stream, w, rows);
  } else {
    visit_float(landmark.dtype, [&]<class T>(T) { score<T>(stream, w, rows); });
  }
  launch(key_kernel, rows * key_heads * blocks_for(c, kKeyTile), kThreads, sizeof(double) * w.group, stream, w);
  const int64_t key_bytes = c * 4, list_bytes = wanted * 8;
  const bool shared_keys = key_bytes <= kMostShared;
  const int64_t used = shared_keys ? key_bytes : 0;
  const bool shared_lists = used + list_bytes <= kMostShared;
  const int64_t bytes = used + (shared_lists ? list_bytes : 0);
  with_flag(c > kFewChunks, [&](auto many) {
    constexpr int kThreads = decltype(many)::value ? 1024 : 256;
    auto* kernel = select_kernel<kThreads>;
    allow_shared(stream, kernel, static_cast<int>(bytes));
    launch(kernel, rows * key_heads, kThreads, static_cast<size_t>(bytes), stream, w,
           Outputs{resident.ptr<int32_t>(), chunks.ptr<int32_t>(), slots.ptr<int32_t>(), fresh.ptr<uint8_t>()},
           shared_keys, shared_lists);
  });
}

int64_t kv_select_bytes(Tensor query, Tensor landmark) {
  if (query.ndim != 3 || landmark.ndim != 4) return 0;
  return Space(nullptr, query.size(0), query.size(1), landmark.size(1), landmark.size(2)).bytes;
}

}  // namespace fastpost::cuda
