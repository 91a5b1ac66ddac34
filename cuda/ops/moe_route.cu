// SPDX-License-Identifier: Apache-2.0
// Three launches, no atomics: blocks of tokens choose, count and add up; one block scans over blocks and experts and
// makes the losses; blocks put their slots in place. A block's slots lie in shared memory as 16-bit ids, and a thread
// that owns an expert walks along them, so the order within an expert is that of the slots whatever the timing.
#include <algorithm>

#include "core/arena.h"
#include "cuda/ops.h"
#include "cuda/ops/moe_route.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kThreads = kRouteThreads;
constexpr int kScanThreads = 1024;
constexpr int kMostSlots = 4096;  // of a block: 8 KiB of ids
constexpr int kScanParts = 32;    // more would only be more to add up

// By shapes alone: 64 tokens fill a block, more where there would be thousands of blocks for the scan to go through.
int tokens_per_block(int64_t tokens, int64_t top_k) {
  int n = 64;
  while (n * 2 * top_k <= kMostSlots && blocks_for(tokens, n) > 512) n *= 2;
  return n;
}

struct Space {
  int64_t blocks;
  int32_t* count;  // [blocks, experts + 1], then the first row of each
  float *probability, *z;
  int64_t bytes;

  Space(char* base, int64_t tokens, int64_t top_k, int64_t experts)
      : blocks(blocks_for(tokens, tokens_per_block(tokens, top_k))) {
    Arena a{base};
    count = a.take<int32_t>(blocks * (experts + 1));
    probability = a.take<float>(blocks * experts);
    z = a.take<float>(blocks);
    bytes = a.used;
  }
};

// Which slots of a block a thread looks at, and for which bin. Every thread of the block must call it.
struct Walk {
  int bin, part, parts, begin, end;

  __device__ Walk(int slots, int bins, int first) {
    const int thread = static_cast<int>(threadIdx.x), width = bins < kThreads ? bins : kThreads;
    parts = kThreads / width;
    part = thread / width;
    bin = part < parts ? first + thread % width : bins;
    begin = part * slots / parts;
    end = part < parts ? (part + 1) * slots / parts : begin;
  }
  __device__ int count(const uint16_t* ids) const {
    int n = 0;
    for (int s = begin; s < end; ++s) n += ids[s] == bin;
    return n;
  }
};

// Slots of each of `bins` experts (the last: nobody) in this block, into shared memory: partial[part * width + bin].
__device__ inline void count_slots(const uint16_t* ids, int slots, int bins, int32_t* count) {
  __shared__ int32_t partial[kThreads];
  for (int first = 0; first < bins; first += kThreads) {
    const Walk walk(slots, bins, first);
    const int n = walk.count(ids);
    if (walk.parts == 1) {
      if (walk.bin < bins) count[walk.bin] = n;
      continue;
    }
    partial[threadIdx.x] = n;
    __syncthreads();
    if (walk.part == 0) {
      int sum = 0;
      for (int p = 0; p < walk.parts; ++p) sum += partial[p * bins + walk.bin];
      count[walk.bin] = sum;
    }
  }
}

struct Routing {
  int64_t tokens, stride;  // of logits
  int experts, top_k, per_block;
  Scoring scoring;
  const float* correction;  // may be null
};

template <class T, int G, int N>
// At least one block: without saying so, ptxas would rather spill than have fewer of them.
__global__ void __launch_bounds__(kThreads, 1) route_kernel(const T* logits, Routing in, int64_t* expert, float* gate,
                                                            int32_t* count, float* probability, float* z) {
  FP_DYNAMIC_SHARED(float, sums);  // [groups, G·N], then ids
  constexpr int kGroups = kThreads / G;
  uint16_t* ids = reinterpret_cast<uint16_t*>(sums + kGroups * G * N);
  const int lane = static_cast<int>(threadIdx.x) % G, group = static_cast<int>(threadIdx.x) / G, k = in.top_k;
  const int64_t first = int64_t{blockIdx.x} * in.per_block;
  const int64_t left = in.tokens - first;
  const int tokens = left < in.per_block ? static_cast<int>(left) : in.per_block;
  const bool sigmoid = in.scoring.sigmoid;
  float* sum = sums + group * N * G + lane;  // its own places: of a lane's experts, over the group's tokens
  float z_sum = 0.0f;
  FP_UNROLL
  for (int n = 0; n < N; ++n) sum[n * G] = 0.0f;
  for (int base = 0; base < tokens; base += kGroups) {
    const int i = base + group;
    const bool present = i < tokens;  // the others go along for the shuffles
    const T* row = logits + (first + (present ? i : 0)) * in.stride;
    const TokenScores<G, N> scores(row, in.experts, lane, sigmoid);
    if (present) {
      FP_UNROLL
      for (int n = 0; n < N; ++n) sum[n * G] += scores.relative_score[n] * scores.inverse_sum;
      z_sum += lane == 0 ? scores.lse * scores.lse : 0.0f;
    }

    const float factor = sigmoid ? expf(scores.shift) : scores.inverse_sum;
    uint32_t taken = 0;
    float chosen_max = -INFINITY;
    for (int c = 0; c < k; ++c) {
      uint64_t best = 0;
      FP_UNROLL
      for (int n = 0; n < N; ++n) {
        const int j = n * G + lane;
        if (j >= in.experts || (taken >> n & 1u)) continue;
        float ranked = scores.z[n];
        if (in.correction && ranked != -INFINITY) ranked = scores.relative_score[n] * factor + in.correction[j];
        const uint64_t candidate = (static_cast<uint64_t>(rank_of(ranked)) << 32) | (0xffffffffu - j);
        if (candidate > best) best = candidate;
      }
      best = group_reduce<G>(best, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
      const int id = static_cast<int>(0xffffffffu - static_cast<uint32_t>(best));
      if (id % G == lane) taken |= 1u << (id / G);
      chosen_max = fmaxf(chosen_max, to_float(row[id]));
      if (present && lane == 0) {
        ids[i * k + c] = static_cast<uint16_t>(id);
        expert[(first + i) * k + c] = id;
      }
    }
    __syncwarp();                        // ids are there for the other lanes
    const uint16_t* mine = ids + i * k;  // of those present
    float shift = sigmoid ? 0.0f : scores.max, over = sigmoid ? 1.0f : scores.softmax_inverse;
    if (in.scoring.normalize) {
      shift = shift_of(sigmoid, chosen_max);
      float total = 0.0f;
      for (int c = lane; present && c < k; c += G) total += relative(sigmoid, to_float(row[mine[c]]), shift);
      over = inverse(group_sum<G>(total));
    }
    if (scores.lse != scores.lse) over = NAN;
    for (int c = lane; present && c < k; c += G) {
      gate[(first + i) * k + c] = in.scoring.scale * relative(sigmoid, to_float(row[mine[c]]), shift) * over;
    }
  }

  z_sum =
      block_reduce<kThreads>(z_sum, [](float a, float b) { return a + b; });  // its barriers serve sums and ids, too
  if (threadIdx.x == 0) z[blockIdx.x] = z_sum;
  for (int j = static_cast<int>(threadIdx.x); j < in.experts; j += kThreads) {
    float total = 0.0f;
    for (int g = 0; g < kGroups; ++g) total += sums[g * G * N + j];
    probability[int64_t{blockIdx.x} * in.experts + j] = total;
  }
  count_slots(ids, tokens * k, in.experts + 1, count + int64_t{blockIdx.x} * (in.experts + 1));
}

// The slots of this block as 16-bit ids; what is out of range is nobody's. Ends with a barrier.
template <class Id>
__device__ int read_ids(const Id* expert, int64_t slots, int per_block, int experts, uint16_t* ids) {
  const int64_t first = int64_t{blockIdx.x} * per_block, left = slots - first;
  const int here = left < per_block ? static_cast<int>(left) : per_block;
  for (int s = static_cast<int>(threadIdx.x); s < here; s += kThreads) {
    const Id id = expert[first + s];
    ids[s] = static_cast<uint16_t>(id >= 0 && id < experts ? id : experts);
  }
  __syncthreads();
  return here;
}

template <class Id>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const Id* expert, int64_t slots, int per_block, int experts, int32_t* count) {
  FP_DYNAMIC_SHARED(uint16_t, ids);
  const int here = read_ids(expert, slots, per_block, experts, ids);
  count_slots(ids, here, experts + 1, count + int64_t{blockIdx.x} * (experts + 1));
}

template <class Id>
__global__ void __launch_bounds__(kThreads) place_kernel(const Id* expert, int64_t slots, int per_block, int experts,
                                                         const int32_t* start, int32_t* order, int32_t* place) {
  FP_DYNAMIC_SHARED(uint16_t, ids);
  __shared__ int32_t partial[kThreads];
  const int here = read_ids(expert, slots, per_block, experts, ids), bins = experts + 1;
  const int64_t block = blockIdx.x, first_slot = block * per_block;
  for (int first = 0; first < bins; first += kThreads) {
    const Walk walk(here, bins, first);
    if (walk.parts > 1) {
      partial[threadIdx.x] = walk.count(ids);
      __syncthreads();
    }
    if (walk.bin >= bins) continue;
    int32_t row = start[block * bins + walk.bin];
    for (int p = 0; p < walk.part; ++p) row += partial[p * bins + walk.bin];
    for (int s = walk.begin; s < walk.end; ++s) {
      if (ids[s] != walk.bin) continue;
      order[row] = static_cast<int32_t>(first_slot + s);
      place[first_slot + s] = walk.bin == experts ? -1 : row;
      ++row;
    }
  }
}

struct Means {  // null where there is only a plan
  const float *probability, *z;
  float *probability_out, *losses;
};

// One block. Counts of blocks become where their rows begin.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(int64_t tokens, int64_t top_k, int64_t blocks, int experts,
                                                            int32_t* count, int32_t* offset, Means means) {
  __shared__ int32_t partial[2 * kScanThreads];  // of each part and bin; 1025 bins go round twice
  __shared__ int32_t total[kScanThreads];
  __shared__ double share[kScanThreads];
  const int thread = static_cast<int>(threadIdx.x), bins = experts + 1;
  const int width = bins < kScanThreads ? bins : kScanThreads;
  const int parts = kScanThreads / width < kScanParts ? kScanThreads / width : kScanParts, part = thread / width;
  const int64_t begin = part * blocks / parts, end = (part + 1) * blocks / parts;
  const auto for_each_bin = [&](auto f) {
    for (int first = 0; part < parts && first + thread % width < bins; first += kScanThreads) {
      f(first + thread % width, first / kScanThreads * kScanThreads + thread);
    }
  };
  for_each_bin([&](int bin, int at) {
    int32_t sum = 0;
    for (int64_t b = begin; b < end; ++b) sum += count[b * bins + bin];
    partial[at] = sum;
  });
  __syncthreads();
  int32_t mine = 0;
  if (thread < experts) {
    for (int p = 0; p < parts; ++p) mine += partial[p * width + thread];
  }
  total[thread] = mine;
  __syncthreads();
  for (int distance = 1; distance < experts; distance *= 2) {
    const int32_t before = thread >= distance ? total[thread - distance] : 0;
    __syncthreads();
    total[thread] += before;
    __syncthreads();
  }
  if (thread < experts) offset[thread + 1] = total[thread];
  if (thread == 0) offset[0] = 0;
  for_each_bin([&](int bin, int at) {
    int32_t row = bin == 0 ? 0 : total[bin - 1];
    for (int p = 0; p < part; ++p) row += partial[at - (part - p) * width];
    for (int64_t b = begin; b < end; ++b) {
      const int32_t here = count[b * bins + bin];
      count[b * bins + bin] = row;
      row += here;
    }
  });
  if (!means.probability) return;

  const double all = tokens > 0 ? static_cast<double>(tokens) : 1.0;
  double sum = 0.0, balance = 0.0, z = 0.0;
  if (part < parts && thread % width < experts) {
    for (int64_t b = begin; b < end; ++b) sum += means.probability[b * experts + thread % width];
  }
  share[thread] = sum;
  __syncthreads();
  if (thread < experts) {
    sum = 0.0;
    for (int p = 0; p < parts; ++p) sum += share[p * width + thread];
    means.probability_out[thread] = static_cast<float>(sum / all);
    balance = mine / (all * static_cast<double>(top_k)) * (sum / all);
  }
  for (int64_t b = thread; b < blocks; b += kScanThreads) z += means.z[b];
  const auto add = [](double a, double b) { return a + b; };
  balance = block_reduce<kScanThreads>(balance, add);
  z = block_reduce<kScanThreads>(z, add);
  if (thread == 0) {
    means.losses[0] = static_cast<float>(experts * balance);
    means.losses[1] = static_cast<float>(z / all);
  }
}

struct Gradients {  // any may be null
  const float *gate, *losses, *probability;
};

template <class T, int G, int N>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const T* logits, Routing in, const int64_t* expert, const int32_t* offset, Gradients grad, T* out,
                    int64_t out_stride) {
  constexpr int kGroups = kThreads / G;
  const int lane = static_cast<int>(threadIdx.x) % G, group = static_cast<int>(threadIdx.x) / G, k = in.top_k;
  const int64_t first = int64_t{blockIdx.x} * in.per_block, left = in.tokens - first;
  const int tokens = left < in.per_block ? static_cast<int>(left) : in.per_block;
  const bool sigmoid = in.scoring.sigmoid, normalize = in.scoring.normalize;
  const float each = 1.0f / static_cast<float>(in.tokens);
  const float twice_z = grad.losses ? 2.0f * grad.losses[1] * each : 0.0f;
  float coefficient[N];  // d loss / d probability of one token
  FP_UNROLL
  for (int n = 0; n < N; ++n) {
    const int j = n * G + lane;
    float c = 0.0f;
    if (j < in.experts) {
      if (grad.probability) c = grad.probability[j];
      if (grad.losses) {
        const float rows = static_cast<float>(offset[j + 1] - offset[j]);
        c += grad.losses[0] * static_cast<float>(in.experts) * (rows * each / static_cast<float>(k));
      }
    }
    coefficient[n] = c * each;
  }
  for (int base = 0; base < tokens; base += kGroups) {
    const int i = base + group;
    const bool present = i < tokens;
    const int64_t t = first + (present ? i : 0);
    const T* row = logits + t * in.stride;
    TokenScores<G, N> scores(row, in.experts, lane, sigmoid);
    float direct[N] = {};  // what gates send to their own expert: to its probability, or otherwise to its log score
    const bool to_probability = !sigmoid && !normalize;
    if (grad.gate) {
      const auto id_of = [&](int c) {
        const int64_t id = expert[t * k + c];
        return id >= 0 && id < in.experts ? static_cast<int>(id) : 0;
      };
      const auto incoming = [&](int c) { return in.scoring.scale * grad.gate[t * k + c]; };
      float shift = 0.0f, over = 1.0f, mean = 0.0f;
      if (normalize) {
        float max = -INFINITY, total = 0.0f;
        for (int c = lane; c < k; c += G) max = fmaxf(max, to_float(row[id_of(c)]));
        shift = shift_of(sigmoid, group_max<G>(max));
        for (int c = lane; c < k; c += G) {
          const float q = relative(sigmoid, to_float(row[id_of(c)]), shift);
          total += q;
          mean += q * incoming(c);
        }
        over = inverse(group_sum<G>(total));
        mean = group_sum<G>(mean) * over;
      }
      for (int c = 0; c < k; ++c) {
        const int id = id_of(c);
        float sent = incoming(c);
        if (!to_probability) sent = relative(sigmoid, to_float(row[id]), shift) * over * (sent - mean);
        FP_UNROLL
        for (int n = 0; n < N; ++n) direct[n] += n * G + lane == id ? sent : 0.0f;
      }
    }
    float dot = 0.0f;
    FP_UNROLL
    for (int n = 0; n < N; ++n) {
      scores.relative_score[n] *= scores.inverse_sum;  // a probability now
      dot += scores.relative_score[n] * (coefficient[n] + (to_probability ? direct[n] : 0.0f));
    }
    dot = group_sum<G>(dot);
    if (!present) continue;
    const float of_z = twice_z * scores.lse;
    FP_UNROLL
    for (int n = 0; n < N; ++n) {
      const int j = n * G + lane;
      if (j >= in.experts) continue;
      // Before the dot product is taken off, so that where a probability is 1 exactly nothing is left.
      const float through = coefficient[n] + (to_probability ? direct[n] : 0.0f) - dot;
      float d;
      if (sigmoid) {  // 1 - σ(z) without what 1 - σ would lose
        const float x = scores.z[n], rest = expf(-fmaxf(x, 0.0f)) / (1.0f + expf(-fabsf(x)));
        d = (scores.relative_score[n] * through + direct[n]) * rest +
            expf(x - scores.max) * scores.softmax_inverse * of_z;
      } else {
        d = scores.relative_score[n] * (through + of_z) + (to_probability ? 0.0f : direct[n]);
      }
      out[t * out_stride + j] = from_float<T>(d);
    }
  }
}

size_t ids_bytes(int64_t slots) { return static_cast<size_t>((slots * 2 + 15) / 16 * 16); }

}  // namespace

int64_t moe_route_bytes(Tensor expert, int64_t experts) {
  if (expert.ndim != 2) return 0;
  return Space(nullptr, expert.size(0), expert.size(1), experts).bytes;
}

void moe_route(Tensor logits, int64_t top_k, bool sigmoid, bool normalize, float scale, Tensor correction,
               Tensor workspace, Tensor expert, Tensor gate, Tensor offset, Tensor order, Tensor place,
               Tensor probability, Tensor losses) {
  const Stream stream("moe_route", logits);
  const int64_t t = logits.size(0), e = logits.size(1);
  const int per_block = tokens_per_block(t, top_k), slots = per_block * static_cast<int>(top_k);
  const Space space(workspace.ptr<char>(), t, top_k, e);
  const Routing in{t,
                   logits.stride(0),
                   static_cast<int>(e),
                   static_cast<int>(top_k),
                   per_block,
                   {sigmoid, normalize, scale},
                   correction.ptr<float>()};
  visit_float(logits.dtype, [&]<class T>(T) {
    with_group(e, [&](auto g, auto n) {
      constexpr int G = decltype(g)::value, N = decltype(n)::value;
      launch(route_kernel<T, G, N>, space.blocks, kThreads, sizeof(float) * kThreads * N + ids_bytes(slots), stream,
             logits.ptr<T>(), in, expert.ptr<int64_t>(), gate.ptr<float>(), space.count, space.probability, space.z);
    });
  });
  const Means means{space.probability, space.z, probability.ptr<float>(), losses.ptr<float>()};
  launch(scan_kernel, 1, kScanThreads, 0, stream, t, top_k, space.blocks, static_cast<int>(e), space.count,
         offset.ptr<int32_t>(), means);
  launch(place_kernel<int64_t>, space.blocks, kThreads, ids_bytes(slots), stream, expert.ptr<int64_t>(), t * top_k,
         slots, static_cast<int>(e), space.count, order.ptr<int32_t>(), place.ptr<int32_t>());
}

void moe_route_backward(Tensor logits, bool sigmoid, bool normalize, float scale, Tensor expert, Tensor offset,
                        Tensor grad_gate, Tensor grad_losses, Tensor grad_probability, Tensor, Tensor grad_logits) {
  const Stream stream("moe_route_backward", logits);
  const int64_t t = logits.size(0), e = logits.size(1), k = expert.size(1);
  const int per_block = tokens_per_block(t, k);
  const Routing in{
      t, logits.stride(0), static_cast<int>(e), static_cast<int>(k), per_block, {sigmoid, normalize, scale}, nullptr};
  const Gradients grad{grad_gate.ptr<float>(), grad_losses.ptr<float>(), grad_probability.ptr<float>()};
  visit_float(logits.dtype, [&]<class T>(T) {
    with_group(e, [&](auto g, auto n) {
      constexpr int G = decltype(g)::value, N = decltype(n)::value;
      launch(backward_kernel<T, G, N>, blocks_for(t, per_block), kThreads, 0, stream, logits.ptr<T>(), in,
             expert.ptr<int64_t>(), offset.ptr<int32_t>(), grad, grad_logits.ptr<T>(), grad_logits.stride(0));
    });
  });
}

void moe_route_plan(Tensor expert, int64_t experts, Tensor workspace, Tensor offset, Tensor order, Tensor place) {
  const Stream stream("moe_route_plan", expert);
  const int64_t t = expert.size(0), k = expert.size(1), e = experts;
  const int slots = tokens_per_block(t, k) * static_cast<int>(k), bins = static_cast<int>(e);
  const Space space(workspace.ptr<char>(), t, k, e);
  const auto run = [&]<class Id>(const Id* ids) {
    launch(count_kernel<Id>, space.blocks, kThreads, ids_bytes(slots), stream, ids, t * k, slots, bins, space.count);
    launch(scan_kernel, 1, kScanThreads, 0, stream, t, k, space.blocks, bins, space.count, offset.ptr<int32_t>(),
           Means{});
    launch(place_kernel<Id>, space.blocks, kThreads, ids_bytes(slots), stream, ids, t * k, slots, bins, space.count,
           order.ptr<int32_t>(), place.ptr<int32_t>());
  };
  expert.dtype == DType::Int64 ? run(expert.ptr<int64_t>()) : run(expert.ptr<int32_t>());
}

}  // namespace fastpost::cuda
