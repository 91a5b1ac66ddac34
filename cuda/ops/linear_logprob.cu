// SPDX-License-Identifier: Apache-2.0
#include "cuda/core/launch.h"
#include "cuda/ops.h"
#include "cuda/ops/linear_logprob.cuh"
#include "cuda/ops/token_logprob.cuh"

namespace fastpost::cuda {
namespace {

// stats [5, n]: one column per row of logits, which lives across tiles.
constexpr int kZTarget = 4;
struct Stats {
  float* base;
  int64_t n;
  __device__ float& at(int row, int64_t i) const { return base[row * n + i]; }
  __device__ RowStats load(int64_t i) const { return {at(0, i), at(1, i), at(2, i), at(3, i)}; }
  __device__ void store(int64_t i, const RowStats& s) const {
    at(0, i) = s.max;
    at(1, i) = s.at_max;
    at(2, i) = s.rest;
    at(3, i) = s.weighted;
  }
  __device__ float& z_target(int64_t i) const { return at(kZTarget, i); }
};

template <class T, bool kSoftcap, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads)
    tile_kernel(const T* logits, int64_t row_stride, int64_t v, const T* bias, const int64_t* targets,
                int64_t vocab_start, LogitTransform t, Stats stats) {
  const int64_t i = blockIdx.x;
  const T* row = logits + i * row_stride;
  const RowStats tile = row_stats<T, kSoftcap, kEntropy>(row, bias, v, t);
  if (threadIdx.x != 0) return;
  stats.store(i, merged(stats.load(i), tile));
  const int64_t target = targets[i] - vocab_start;
  if (target >= 0 && target < v) stats.z_target(i) = transform<kSoftcap>(raw_logit(row, bias, target), t);
}

constexpr int kFinishThreads = 256;

__global__ void finish_kernel(Stats stats, float* logprob, float* lse, float* entropy) {
  const int64_t i = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (i >= stats.n) return;
  const RowResult result = finished(stats.load(i), stats.z_target(i));
  logprob[i] = result.logprob;
  lse[i] = result.lse;
  if (entropy) entropy[i] = result.entropy;
}

template <class T, bool kSoftcap, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads)
    tile_backward_kernel(const T* logits, int64_t row_stride, int64_t v, const T* bias, const int64_t* targets,
                         int64_t vocab_start, LogitTransform t, const float* logprob, const float* lse,
                         const float* entropy, const float* grad_logprob, const float* grad_entropy, T* grad_logits,
                         int64_t grad_row_stride) {
  const int64_t i = blockIdx.x;
  const float g = grad_logprob[i];
  float h = 0.0f, row_entropy = 0.0f;
  if constexpr (kEntropy) {
    h = grad_entropy[i];
    if (h != 0.0f) row_entropy = entropy[i];
  }
  T* out = grad_logits + i * grad_row_stride;
  if (g == 0.0f && h == 0.0f) return fill_row(out, v, 0.0f);
  int64_t target = targets[i] - vocab_start;
  if (target >= v) target = -1;
  row_gradient<T, kSoftcap, kEntropy>(logits + i * row_stride, bias, v, t, target, logprob[i], lse[i], row_entropy, g,
                                      h, out);
}

// ---- from partial statistics and exponentials (linear_logprob.cuh) ----

constexpr int kFoldSlices = 8, kFoldThreads = kWarp * kFoldSlices;

// A block folds the tiles of 32 rows into stats: each warp every eighth tile, then one warp the eight sums, in an order
// that depends on nothing but the number of tiles.
__global__ void __launch_bounds__(kFoldThreads)
    fold_kernel(const float* partials, int64_t tiles, bool with_entropy, Stats stats) {
  __shared__ Raw<RowStats> sums[kFoldSlices][kWarp];
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t i = int64_t{blockIdx.x} * kWarp + lane, plane = tiles * stats.n;
  RowStats s;
  if (i < stats.n) {
    for (int64_t tile = slice; tile < tiles; tile += kFoldSlices) {
      const float* p = partials + tile * stats.n + i;
      s = merged(s, {p[0], p[plane], p[2 * plane], with_entropy ? p[3 * plane] : 0.0f});
    }
  }
  sums[slice][lane].set(s);
  __syncthreads();
  if (slice != 0 || i >= stats.n) return;
  s = stats.load(i);
  for (int k = 0; k < kFoldSlices; ++k) s = merged(s, sums[k][lane].get());
  stats.store(i, s);
}

// row_gradient, where e^(z - max of its tile) is known instead of the logit. A warp has one tile at a time and a thread
// 8 columns of it, the target's among them perhaps, so that it may write over what it has read.
template <bool kSoftcap, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads)
    exponentials_backward_kernel(const float16* exponentials, int64_t row_stride, int64_t v, const float* tile_max,
                                 int64_t tile_stride, const int64_t* targets, int64_t vocab_start, LogitTransform t,
                                 const float* logprob, const float* lse, const float* entropy,
                                 const float* grad_logprob, const float* grad_entropy, bfloat16* grad_logits,
                                 int64_t grad_row_stride) {
  constexpr int N = kTileColumns / kWarp;
  const int64_t i = blockIdx.x, target = targets[i] - vocab_start;
  const float g = grad_logprob[i];
  float h = 0.0f, row_entropy = 0.0f;
  if constexpr (kEntropy) {
    h = grad_entropy[i];
    if (h != 0.0f) row_entropy = entropy[i];
  }
  const float16* row = exponentials + i * row_stride;
  bfloat16* out = grad_logits + i * grad_row_stride;
  if (g == 0.0f && h == 0.0f) return fill_row(out, v, 0.0f);
  const float row_lse = lse[i], row_logprob = logprob[i];
  const float to_unit = kSoftcap ? 1.0f / (t.inverse_temperature * t.softcap) : 0.0f;  // z to tanh
  auto slope = [&](float z) {
    const float unit = z * to_unit;
    return kSoftcap ? t.inverse_temperature * (1.0f - unit * unit) : t.inverse_temperature;
  };
  float at_target = -g * expm1f(row_logprob);  // as in row_gradient, for the sake of 1 - p
  if constexpr (kEntropy) at_target -= h * expf(row_logprob) * (max_or_nan(kExpUnderflow, row_logprob) + row_entropy);
  at_target *= slope(row_logprob + row_lse);
  const int lane = threadIdx.x % kWarp;
  for (int64_t tile = threadIdx.x / kWarp; tile * kTileColumns < v; tile += kRowThreads / kWarp) {
    const int64_t begin = tile * kTileColumns + N * lane, left = v - begin;
    if (left <= 0) continue;
    const float max = tile_max[tile * tile_stride + i];
    const float scale = expf(max - row_lse) / kExponentialScale;
    Floats<N> x;
    if (left >= N) {
      x = load<N>(row + begin);
    } else {
      FP_UNROLL
      for (int k = 0; k < N; ++k) x.v[k] = k < left ? to_float(row[begin + k]) : 0.0f;
    }
    FP_UNROLL
    for (int k = 0; k < N; ++k) {
      float z = 0.0f, coefficient = -g;
      if constexpr (kSoftcap || kEntropy) z = max + max_or_nan(kExpUnderflow, logf(x.v[k] / kExponentialScale));
      if constexpr (kEntropy) coefficient -= h * (max_or_nan(kExpUnderflow, z - row_lse) + row_entropy);
      x.v[k] *= scale * coefficient * slope(z);
      if (begin + k == target) x.v[k] = at_target;
    }
    if (left >= N) {
      store(out + begin, x);
    } else {
      FP_UNROLL
      for (int k = 0; k < N; ++k) {
        if (k < left) out[begin + k] = from_float<bfloat16>(x.v[k]);
      }
    }
  }
}

// ---- rows that count ----

constexpr int kCompactThreads = 1024;

// One block: counts, then gives each row its place. A warp's votes are a bit mask, so a place is a few additions.
__global__ void __launch_bounds__(kCompactThreads)
    rows_kernel(const int64_t* targets, int64_t ignore_index, const float* grad_logprob, const float* grad_entropy,
                int64_t n, int64_t* rows, int64_t* count) {
  __shared__ int votes[kCompactThreads / kWarp];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  auto counts = [&](int64_t i) {
    if (i >= n || targets[i] == ignore_index) return false;
    if (!grad_logprob && !grad_entropy) return true;
    return (grad_logprob && grad_logprob[i] != 0.0f) || (grad_entropy && grad_entropy[i] != 0.0f);
  };
  int mine = 0;
  for (int64_t i = thread; i < n; i += kCompactThreads) mine += counts(i);
  const int64_t total = block_reduce<kCompactThreads>(mine, [](int a, int b) { return a + b; });
  int64_t counted = 0;  // in the rows before these
  for (int64_t begin = 0; begin < n; begin += kCompactThreads) {
    const int64_t i = begin + thread;
    const bool active = counts(i);
    const uint32_t voted = __ballot_sync(0xffffffffu, active);
    if (lane == 0) votes[warp] = __popc(voted);
    __syncthreads();
    int before = __popc(voted & ((1u << lane) - 1)), all = 0;
    for (int w = 0; w < kCompactThreads / kWarp; ++w) {
      if (w == warp) before += all;
      all += votes[w];
    }
    const int64_t place = counted + before;
    if (i < n) rows[active ? place : total + (i - place)] = i;
    counted += all;
    __syncthreads();
  }
  if (thread == 0) *count = total;
}

}  // namespace

void linear_logprob_tile(Tensor logits, Tensor bias, Tensor target, int64_t vocab_start, float temperature,
                         float softcap, bool with_entropy, Tensor stats) {
  const Stream stream("linear_logprob", logits);
  const LogitTransform t{1.0f / temperature, softcap};
  const int64_t n = logits.size(0);
  visit_float(logits.dtype, [&]<class T>(T) {
    with_flag(softcap != 0, [&](auto capped) {
      with_flag(with_entropy, [&](auto entropy) {
        launch(tile_kernel<T, decltype(capped)::value, decltype(entropy)::value>, n, kRowThreads, 0, stream,
               logits.ptr<T>(), logits.stride(0), logits.size(1), bias.ptr<T>(), target.ptr<int64_t>(), vocab_start, t,
               Stats{stats.ptr<float>(), n});
      });
    });
  });
}

void linear_logprob_finish(Tensor stats, Tensor logprob, Tensor lse, Tensor entropy) {
  const Stream stream("linear_logprob", stats);
  const int64_t n = stats.size(1);
  launch(finish_kernel, blocks_for(n, kFinishThreads), kFinishThreads, 0, stream, Stats{stats.ptr<float>(), n},
         logprob.ptr<float>(), lse.ptr<float>(), entropy.ptr<float>());
}

void linear_logprob_tile_backward(Tensor logits, Tensor bias, Tensor target, int64_t vocab_start, float temperature,
                                  float softcap, Tensor logprob, Tensor lse, Tensor entropy, Tensor grad_logprob,
                                  Tensor grad_entropy, Tensor grad_logits) {
  const Stream stream("linear_logprob_backward", logits);
  const LogitTransform t{1.0f / temperature, softcap};
  visit_float(logits.dtype, [&]<class T>(T) {
    with_flag(softcap != 0, [&](auto capped) {
      with_flag(grad_entropy.defined(), [&](auto with_entropy) {
        launch(tile_backward_kernel<T, decltype(capped)::value, decltype(with_entropy)::value>, logits.size(0),
               kRowThreads, 0, stream, logits.ptr<T>(), logits.stride(0), logits.size(1), bias.ptr<T>(),
               target.ptr<int64_t>(), vocab_start, t, logprob.ptr<float>(), lse.ptr<float>(), entropy.ptr<float>(),
               grad_logprob.ptr<float>(), grad_entropy.ptr<float>(), grad_logits.ptr<T>(), grad_logits.stride(0));
      });
    });
  });
}

int64_t linear_logprob_forward_columns(Tensor hidden, Tensor weight) {
  const Stream stream("linear_logprob", hidden);
  int major = 0;
  stream.check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, hidden.device_index));
  auto fits = [](const Tensor& t) {  // what the copy engine can describe
    return t.dtype == DType::BFloat16 && t.size(0) > 0 && t.size(0) <= INT32_MAX && t.size(1) > 0 &&
           t.size(1) <= INT32_MAX && t.size(1) % 8 == 0 && t.stride(1) == 1 && t.stride(0) >= t.size(1) &&
           t.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  };
  return kBuiltForSm90 && major == 9 && fits(hidden) && fits(weight) ? kTileColumns : 0;
}

void linear_logprob_forward(Tensor hidden, Tensor weight, Tensor bias, Tensor target, int64_t vocab_start,
                            float temperature, float softcap, bool with_entropy, Tensor exponentials, Tensor partials,
                            Tensor stats) {
  const Stream stream("linear_logprob", hidden);
  const int64_t n = hidden.size(0), v = weight.size(0);
  const TileWork work{n,
                      v,
                      bias.ptr<bfloat16>(),
                      target.ptr<int64_t>(),
                      vocab_start,
                      {1.0f / temperature, softcap},
                      with_entropy,
                      exponentials.ptr<float16>(),
                      exponentials.defined() ? exponentials.stride(0) : 0,
                      partials.ptr<float>(),
                      stats.ptr<float>() + kZTarget * n};
  if constexpr (kBuiltForSm90) multiply_tiles_sm90(stream, hidden, weight, work);  // else never called
  launch(fold_kernel, blocks_for(n, kWarp), kFoldThreads, 0, stream, partials.ptr<float>(), blocks_for(v, kTileColumns),
         with_entropy, Stats{stats.ptr<float>(), n});
}

void linear_logprob_exponentials_backward(Tensor exponentials, Tensor tile_max, Tensor target, int64_t vocab_start,
                                          float temperature, float softcap, Tensor logprob, Tensor lse, Tensor entropy,
                                          Tensor grad_logprob, Tensor grad_entropy, Tensor grad_logits) {
  const Stream stream("linear_logprob_backward", exponentials);
  const LogitTransform t{1.0f / temperature, softcap};
  with_flag(softcap != 0, [&](auto capped) {
    with_flag(grad_entropy.defined(), [&](auto with_entropy) {
      launch(exponentials_backward_kernel<decltype(capped)::value, decltype(with_entropy)::value>, exponentials.size(0),
             kRowThreads, 0, stream, exponentials.ptr<float16>(), exponentials.stride(0), exponentials.size(1),
             tile_max.ptr<float>(), tile_max.stride(0), target.ptr<int64_t>(), vocab_start, t, logprob.ptr<float>(),
             lse.ptr<float>(), entropy.ptr<float>(), grad_logprob.ptr<float>(), grad_entropy.ptr<float>(),
             grad_logits.ptr<bfloat16>(), grad_logits.stride(0));
    });
  });
}

void linear_logprob_rows(Tensor target, int64_t ignore_index, Tensor grad_logprob, Tensor grad_entropy, Tensor rows,
                         Tensor count) {
  const Stream stream("linear_logprob", target);
  launch(rows_kernel, 1, kCompactThreads, 0, stream, target.ptr<int64_t>(), ignore_index, grad_logprob.ptr<float>(),
         grad_entropy.ptr<float>(), target.size(0), rows.ptr<int64_t>(), count.ptr<int64_t>());
}

}  // namespace fastpost::cuda
