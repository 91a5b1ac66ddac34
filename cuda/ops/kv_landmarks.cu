// SPDX-License-Identifier: Apache-2.0
// A warp for each chunk. Chunks of eight keys are read once, all eight rows at a time, and stay in registers; others are read
// twice, the second time from the cache. Reading the keys is what takes time.
//
// No GPU has run it yet; tests run it on the host.
#include "core/dtype.h"
#include "cuda/core/int8_rows.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/segments.cuh"
#include "cuda/core/vec.cuh"
#include "cuda/ops.h"

namespace fastpost::cuda {
namespace {

constexpr int kWarps = 8, kMembers = 8;

template <class T>
struct Grid3 {  // the first three dimensions of a tensor
  T* data;
  int64_t strides[3];

  __device__ T* at(int64_t b, int64_t g, int64_t i) const {
    return data + b * strides[0] + g * strides[1] + i * strides[2];
  }
};
template <class T>
Grid3<T> grid3(const Tensor& t) {
  if (!t.defined()) return {};
  return {t.ptr<T>(), {t.stride(0), t.stride(1), t.stride(2)}};
}

struct Landmarks {
  int64_t heads, tokens, count, total;  // of chunks: count in a row, total in all
  int d, chunk;
  bool wide;  // without scale: landmarks are float32
  const int32_t* length;
  Grid3<void> landmark;
  Grid3<float> scale, similarity;
};

struct Place {
  int64_t b, g, c;
  bool whole;

  __device__ Place(const Landmarks& w, int64_t index) : b(index / w.count / w.heads), g(index / w.count % w.heads) {
    c = index % w.count;
    const int64_t length = w.length ? clamped(w.length[b], 0, w.tokens) : w.tokens;
    whole = (c + 1) * w.chunk <= length;
  }
};

template <class To, int N, class F>
__device__ void store_values(To* to, F value) {
  Packed<To, N> packed;
  FP_UNROLL
  for (int n = 0; n < N; ++n) packed.v[n] = value(n);
  if (is_aligned<To, N>(to)) {
    *reinterpret_cast<Packed<To, N>*>(to) = packed;
  } else {
    FP_UNROLL
    for (int n = 0; n < N; ++n) to[n] = packed.v[n];
  }
}

// N elements of a landmark from `column` on.
template <class T, int N>
__device__ void store_mean(const Landmarks& w, const Place& p, int column, const float (&mean)[N], const Int8Row& row) {
  const int64_t first =
      p.b * w.landmark.strides[0] + p.g * w.landmark.strides[1] + p.c * w.landmark.strides[2] + column;
  if (w.scale.data) {
    store_values<int8_t, N>(static_cast<int8_t*>(w.landmark.data) + first, [&](int n) { return row(mean[n]); });
  } else if (w.wide) {
    store_values<float, N>(static_cast<float*>(w.landmark.data) + first, [&](int n) { return mean[n]; });
  } else {
    store_values<T, N>(static_cast<T*>(w.landmark.data) + first, [&](int n) { return from_float<T>(mean[n]); });
  }
}

__device__ inline void store_scalars(const Landmarks& w, const Place& p, float scale, float similarity) {
  if (w.scale.data) *w.scale.at(p.b, p.g, p.c) = scale;
  *w.similarity.at(p.b, p.g, p.c) = similarity;
}

__device__ inline float add(float a, float b) { return a + b; }
__device__ inline float min_or_nan(float a, float b) { return a < b || a != a ? a : b; }
__device__ inline float cosine(float dot, float square, float mean_square) {
  return dot / (fmaxf(sqrtf(square), 1e-20f) * fmaxf(sqrtf(mean_square), 1e-20f));
}

// Eight rows of up to 32·N elements, N at a time.
template <class T, int N>
__global__ void __launch_bounds__(kWarps* kWarp) eight_kernel(Landmarks w, Grid3<const T> keys, int64_t row_stride) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, column = lane * N;
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (index >= w.total) return;
  const Place place(w, index);
  const bool here = column < w.d;
  float mean[N] = {};
  if (!place.whole) {
    if (here) store_mean<T, N>(w, place, column, mean, Int8Row(0.0f));
    if (lane == 0) store_scalars(w, place, 0.0f, 1.0f);
    return;
  }
  const T* first = keys.at(place.b, place.g, 0) + place.c * kMembers * row_stride + (here ? column : 0);
  Packed<T, N> rows[kMembers];
  FP_UNROLL
  for (int m = 0; m < kMembers; ++m) rows[m] = *reinterpret_cast<const Packed<T, N>*>(first + m * row_stride);
  float sums[2 * kMembers] = {}, mean_square = 0.0f, max = 0.0f;  // dots with the mean, then squares
  if (here) {
    FP_UNROLL
    for (int n = 0; n < N; ++n) {
      FP_UNROLL
      for (int m = 0; m < kMembers; ++m) mean[n] += to_float(rows[m].v[n]);
      mean[n] *= 1.0f / kMembers;
      mean_square += mean[n] * mean[n];
      max = max_or_nan(max, fabsf(mean[n]));
      FP_UNROLL
      for (int m = 0; m < kMembers; ++m) {
        const float x = to_float(rows[m].v[n]);
        sums[m] += x * mean[n];
        sums[kMembers + m] += x * x;
      }
    }
  }
  // A lane ends with that of value lane / 2, in sums[0].
  ScatteredSums<kWarp, 2 * kMembers>::template step<kWarp / 2, 2 * kMembers>(sums, lane);
  mean_square = warp_reduce(mean_square, add);
  const float square = shuffle_xor(sums[0], kWarp / 2);  // of the member whose dot a lane of the first half has
  const float similarity = warp_reduce(lane < kWarp / 2 ? cosine(sums[0], square, mean_square) : INFINITY, min_or_nan);
  const Int8Row row(w.scale.data ? warp_reduce(max, max_or_nan) : 0.0f);
  if (here) store_mean<T, N>(w, place, column, mean, row);
  if (lane == 0) store_scalars(w, place, row.scale, similarity);
}

// Any chunk, any size, any alignment; the mean lies in shared memory, d floats for each warp.
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp) any_kernel(Landmarks w, Grid3<const T> keys, int64_t row_stride) {
  FP_DYNAMIC_SHARED(float, means);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t index = int64_t{blockIdx.x} * (blockDim.x / kWarp) + warp;
  if (index >= w.total) return;
  const Place place(w, index);
  const T* first = keys.at(place.b, place.g, 0) + place.c * w.chunk * row_stride;
  float *mean = means + int64_t{warp} * w.d, mean_square = 0.0f, max = 0.0f;
  for (int j = lane; j < w.d; j += kWarp) {
    float sum = 0.0f;
    for (int m = 0; place.whole && m < w.chunk; ++m) sum += to_float(first[m * row_stride + j]);
    sum /= static_cast<float>(w.chunk);
    mean[j] = sum;  // only this lane reads it
    mean_square += sum * sum;
    max = max_or_nan(max, fabsf(sum));
  }
  mean_square = warp_reduce(mean_square, add);
  float similarity = place.whole ? INFINITY : 1.0f;
  for (int m = 0; place.whole && m < w.chunk; ++m) {
    float dot = 0.0f, square = 0.0f;
    for (int j = lane; j < w.d; j += kWarp) {
      const float x = to_float(first[m * row_stride + j]);
      dot += x * mean[j];
      square += x * x;
    }
    dot = warp_reduce(dot, add);
    square = warp_reduce(square, add);
    similarity = min_or_nan(similarity, cosine(dot, square, mean_square));
  }
  const Int8Row row(w.scale.data ? warp_reduce(max, max_or_nan) : 0.0f);
  for (int j = lane; j < w.d; j += kWarp) {
    const float one[1] = {mean[j]};
    store_mean<T, 1>(w, place, j, one, row);
  }
  if (lane == 0) store_scalars(w, place, row.scale, similarity);
}

// Whether N elements at a time, one lane each, make up a row.
bool fits(const Tensor& keys, int n) {
  const int64_t d = keys.size(3), bytes = n * itemsize(keys.dtype);
  bool aligned = reinterpret_cast<uintptr_t>(keys.data) % static_cast<uintptr_t>(bytes) == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && (keys.size(i) <= 1 || keys.stride(i) % n == 0);
  return aligned && d > 0 && d % n == 0 && d <= kWarp * n;
}

}  // namespace

void kv_landmarks(Tensor keys, Tensor length, int64_t chunk, Tensor landmark, Tensor scale, Tensor similarity) {
  const Stream stream("kv_landmarks", keys);
  const int64_t heads = keys.size(1), tokens = keys.size(2), count = tokens / chunk;
  const Landmarks w = {heads,
                       tokens,
                       count,
                       keys.size(0) * heads * count,
                       static_cast<int>(keys.size(3)),
                       static_cast<int>(chunk),
                       landmark.dtype == DType::Float32,
                       length.ptr<const int32_t>(),
                       {landmark.data, {landmark.stride(0), landmark.stride(1), landmark.stride(2)}},
                       grid3<float>(scale),
                       grid3<float>(similarity)};
  visit_float(keys.dtype, [&]<class T>(T) {
    const Grid3<const T> from = {keys.ptr<const T>(), {keys.stride(0), keys.stride(1), 0}};
    const auto eight = [&](auto width) {
      launch(eight_kernel<T, decltype(width)::value>, blocks_for(w.total, kWarps), kWarps * kWarp, 0, stream, w, from,
             keys.stride(2));
    };
    if (chunk == kMembers && fits(keys, 2)) return eight(std::integral_constant<int, 2>{});
    if (chunk == kMembers && fits(keys, 4)) return eight(std::integral_constant<int, 4>{});
    if (chunk == kMembers && fits(keys, 8)) return eight(std::integral_constant<int, 8>{});
    const int warps = w.d <= 1024 ? kWarps : 1;
    const size_t shared = sizeof(float) * static_cast<size_t>(warps) * static_cast<size_t>(w.d);
    auto* kernel = any_kernel<T>;
    if (shared > 48 << 10) allow_shared(stream, kernel, static_cast<int>(shared));
    launch(kernel, blocks_for(w.total, warps), warps * kWarp, shared, stream, w, from, keys.stride(2));
  });
}

}  // namespace fastpost::cuda
