// SPDX-License-Identifier: Apache-2.0
// Gram matrix in two launches: blocks sum their share of the tokens into tiles of their own, then tiles are added up in the
// order of the tokens and mirrored. Projection: directions become pairs of 16-bit numbers, then one launch.
#include <cmath>

#include "cuda/ops.h"
#include "cuda/ops/kv_factorize.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kThreads = 256;

// ---- any dtype, any alignment: tiles of 64 by 64 in float32, without tensor cores ----

constexpr int kTile = 64, kStep = 16;
constexpr int kRow = kTile + 8;  // floats; rows begin in other banks, at multiples of 16 bytes
static_assert(kPlainPlan.m == kTile && kPlainPlan.n == kTile);

struct Factors {
  float a[kStep][kRow], b[kStep][kRow];
};

// sums += aᵀ · b; a thread has 4 x 4 places.
__device__ inline void multiply_step(const Factors& f, float (&sums)[4][4]) {
  const int row = static_cast<int>(threadIdx.x) / 16 * 4, column = static_cast<int>(threadIdx.x) % 16 * 4;
  FP_UNROLL
  for (int k = 0; k < kStep; ++k) {
    FP_UNROLL
    for (int i = 0; i < 4; ++i) {
      FP_UNROLL
      for (int j = 0; j < 4; ++j) sums[i][j] += f.a[k][row + i] * f.b[k][column + j];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) gram_kernel(GramWork w) {
  __shared__ Factors factors;
  const int thread = static_cast<int>(threadIdx.x), column = thread % kTile;
  const GramPlace place(w, Triangle(w.keys.d, kTile, kTile), blockIdx.x);
  const int at_a = place.tile.row * kTile + column, at_b = place.tile.column * kTile + column;
  const T* keys = w.keys.at<T>(place.b);
  float sums[4][4] = {};
  for (int64_t first = place.begin; first < place.end; first += kStep) {
    FP_UNROLL
    for (int i = 0; i < kStep; i += kThreads / kTile) {
      const int k = thread / kTile + i;
      const int64_t token = first + k;
      const T* row = keys + token * w.keys.row_stride;
      factors.a[k][column] = token < place.end && at_a < w.keys.d ? to_float(row[at_a]) : 0.0f;
      factors.b[k][column] = token < place.end && at_b < w.keys.d ? to_float(row[at_b]) : 0.0f;
    }
    __syncthreads();
    multiply_step(factors, sums);
    __syncthreads();
  }
  FP_UNROLL
  for (int i = 0; i < 4; ++i) {
    Packed<float, 4> row;
    FP_UNROLL
    for (int j = 0; j < 4; ++j) row.v[j] = sums[i][j];
    *reinterpret_cast<Packed<float, 4>*>(place.partial + (thread / 16 * 4 + i) * kTile + thread % 16 * 4) = row;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) project_kernel(ProjectWork w, int blocks_of_sequence) {
  __shared__ Factors factors;
  alignas(16) __shared__ float staged[kTile * kRow];
  __shared__ float row_max[kTile];
  const ProjectPlace<kTile, kTile, false> place(w, blocks_of_sequence);
  if (place.rows == 0) return clear_rows<T, kThreads>(w, place);
  const int thread = static_cast<int>(threadIdx.x);
  const T* keys = w.keys.at<T>(place.b) + int64_t{place.first} * w.keys.row_stride;
  const float* directions = w.directions + place.b * w.direction_strides[0];
  for (int pass = 0; pass < place.passes; ++pass) {
    for (int chunk = 0; chunk < place.chunks; ++chunk) {
      float sums[4][4] = {};
      for (int first = 0; first < w.keys.d; first += kStep) {
        FP_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int a_k = thread % kStep, row = thread / kStep + 16 * i, b_k = thread / kTile + 4 * i;
          const int column = chunk * kTile + thread % kTile;
          factors.a[a_k][row] =
              row < place.rows && first + a_k < w.keys.d ? to_float(keys[row * w.keys.row_stride + first + a_k]) : 0.0f;
          factors.b[b_k][thread % kTile] =
              column < w.rank && first + b_k < w.keys.d
                  ? directions[(first + b_k) * w.direction_strides[1] + column * w.direction_strides[2]]
                  : 0.0f;
        }
        __syncthreads();
        multiply_step(factors, sums);
        __syncthreads();
      }
      FP_UNROLL
      for (int i = 0; i < 4; ++i) {
        FP_UNROLL
        for (int j = 0; j < 4; ++j) staged[(thread / 16 * 4 + i) * kRow + thread % 16 * 4 + j] = sums[i][j];
      }
      __syncthreads();
      finish_rows<T, kRow, kThreads>(w, place, chunk, pass, staged, row_max);
      __syncthreads();
    }
  }
}

// ---- what comes before and after the tensor cores ----

constexpr int kSplitColumns = 8, kSplitRows = kThreads / kSplitColumns;

// Directions as pairs of 16-bit numbers. A column is first brought to below 1, by a power of two: float16 has no others.
template <class T>
__global__ void __launch_bounds__(kThreads) split_kernel(ProjectWork w, T* parts, float* column_scale) {
  __shared__ float maxima[kSplitRows][kSplitColumns];
  const int thread = static_cast<int>(threadIdx.x), in_block = thread % kSplitColumns, slice = thread / kSplitColumns;
  const int64_t groups = w.columns / kSplitColumns, b = int64_t{blockIdx.x} / groups;
  const int column = static_cast<int>(int64_t{blockIdx.x} % groups) * kSplitColumns + in_block;
  const bool here = column < w.rank;
  const float* from = w.directions + b * w.direction_strides[0] + (here ? column : 0) * w.direction_strides[2];
  float max = 0.0f;
  for (int k = slice; k < w.keys.d; k += kSplitRows) max = fmaxf(max, fabsf(from[k * w.direction_strides[1]]));
  maxima[slice][in_block] = max;
  __syncthreads();
  for (int s = 0; s < kSplitRows; ++s) max = fmaxf(max, maxima[s][in_block]);
  int exponent = 0;
  if (here && max < INFINITY) static_cast<void>(frexpf(max, &exponent));
  exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
  const float down = ldexpf(1.0f, -exponent);
  T* to = parts + b * 2 * w.keys.d * w.columns + column;
  for (int k = slice; k < w.keys.d; k += kSplitRows) {
    const float x = here ? from[k * w.direction_strides[1]] * down : 0.0f;
    const T high = from_float<T>(x);
    to[int64_t{k} * w.columns] = high;
    to[(int64_t{w.keys.d} + k) * w.columns] = from_float<T>(x - to_float(high));
  }
  if (slice == 0) column_scale[b * w.columns + column] = here ? ldexpf(1.0f, exponent) : 0.0f;
}

constexpr int kPart = 32;  // a block adds up 32 x 32 places

__global__ void __launch_bounds__(kThreads) add_kernel(GramWork w, int m, int n, float* gram) {
  __shared__ float sums[kPart][kPart + 1];
  const Triangle tiles(w.keys.d, m, n), parts(w.keys.d, kPart, kPart);
  const int count = parts.count(), d = w.keys.d;
  const int64_t b = int64_t{blockIdx.x} / count;
  const Triangle::Tile part = parts.at(static_cast<int>(int64_t{blockIdx.x} % count));
  const int column = static_cast<int>(threadIdx.x) % kPart, first_row = static_cast<int>(threadIdx.x) / kPart;
  constexpr int kRows = kThreads / kPart, kEach = kPart / kRows;
  const int row_of_tile = part.row * kPart % m, column_of_tile = part.column * kPart % n;
  const int64_t tile = tiles.index(part.row * kPart / m, part.column * kPart / n), size = int64_t{m} * n;
  const float* from = w.partial + (b * w.splits * tiles.count() + tile) * size + column_of_tile + column;
  float sum[kEach] = {};
  for (int split = 0; split < w.splits; ++split, from += tiles.count() * size) {
    FP_UNROLL
    for (int i = 0; i < kEach; ++i) sum[i] += from[int64_t{row_of_tile + first_row + i * kRows} * n];
  }
  const bool diagonal = part.row == part.column;
  FP_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int row = first_row + i * kRows;
    if (!diagonal || row <= column) sums[row][column] = sum[i];
    if (diagonal && row < column) sums[column][row] = sum[i];
  }
  __syncthreads();
  gram += b * d * d;
  FP_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int in_part = first_row + i * kRows;
    const int row = part.row * kPart + in_part, at = part.column * kPart + column;
    if (row < d && at < d) gram[int64_t{row} * d + at] = sums[in_part][column];
    if (diagonal) continue;
    const int mirrored_row = part.column * kPart + in_part, mirrored_at = part.row * kPart + column;
    if (mirrored_row < d && mirrored_at < d) gram[int64_t{mirrored_row} * d + mirrored_at] = sums[column][in_part];
  }
}

// ---- which kernel ----

Keys keys_of(const Tensor& keys, const Tensor& length) {
  return {keys.data,
          keys.stride(0),
          keys.stride(1),
          keys.size(1),
          length.ptr<const int32_t>(),
          static_cast<int>(keys.size(2))};
}

bool has_pieces(const Tensor& keys) {  // of 16 bytes
  const auto steps = [&](int i) { return keys.size(i) <= 1 || keys.stride(i) % 8 == 0; };
  return keys.dtype != DType::Float32 && reinterpret_cast<uintptr_t>(keys.data) % 16 == 0 && steps(0) && steps(1) &&
         keys.size(2) % 8 == 0;
}

// The copy engine does not know of rows that are one and the same, nor of tensors without any.
bool fits_sm90(const Tensor& keys) {
  const auto steps = [&](int i) { return keys.size(i) == 1 || (keys.size(i) > 1 && keys.stride(i) > 0); };
  return steps(0) && steps(1) && keys.size(2) > 0;
}

int capability(const Stream& stream, const Tensor& keys) {
  int found = 0;
  stream.check(cudaDeviceGetAttribute(&found, cudaDevAttrComputeCapabilityMajor, keys.device_index));
  return found;
}

int64_t columns_for(int64_t rank) { return (rank + kSplitColumns - 1) / kSplitColumns * kSplitColumns; }

}  // namespace

int64_t kv_factorize_bytes(Tensor keys, int64_t rank) {
  const int64_t batch = keys.size(0), d = keys.size(2);
  Arena parts{nullptr};
  parts.take<bfloat16>(batch * 2 * d * columns_for(rank));
  parts.take<float>(batch * columns_for(rank));
  int64_t most = parts.used;
  for (const GramPlan& plan : {kPlainPlan, kPlanSm80, kPlanSm90}) {
    const int64_t bytes = plan.bytes(batch, keys.size(1), d);
    if (bytes > most) most = bytes;
  }
  return most;
}

void kv_factorize_gram(Tensor keys, Tensor length, Tensor workspace, Tensor gram) {
  const Stream stream("kv_factorize", keys);
  const int64_t batch = keys.size(0), d = keys.size(2);
  const bool halves = has_pieces(keys),
             hopper = halves && fits_sm90(keys) && kBuiltForSm90 && capability(stream, keys) == 9;
  const GramPlan plan = hopper ? kPlanSm90 : halves ? kPlanSm80 : kPlainPlan;
  const Splits splits = plan.splits(keys.size(1), d);
  const GramWork w = {keys_of(keys, length), splits.count, splits.tokens, workspace.ptr<float>()};
  if (hopper) {
    if constexpr (kBuiltForSm90) gram_sm90(stream, w, batch, keys.dtype);
  } else if (halves) {
    gram_sm80(stream, w, batch, keys.dtype);
  } else {
    visit_float(keys.dtype, [&]<class T>(T) {
      launch(gram_kernel<T>, batch * splits.count * plan.triangle(d).count(), kThreads, 0, stream, w);
    });
  }
  launch(add_kernel, batch * Triangle(w.keys.d, kPart, kPart).count(), kThreads, 0, stream, w, plan.m, plan.n,
         gram.ptr<float>());
}

void kv_factorize_project(Tensor keys, Tensor length, Tensor directions, Tensor workspace, Tensor u, Tensor scale) {
  const Stream stream("kv_factorize", keys);
  const int64_t batch = keys.size(0), d = keys.size(2), rank = directions.size(2), columns = columns_for(rank);
  Arena a{workspace.ptr<char>()};
  void* parts = a.take<bfloat16>(batch * 2 * d * columns);
  float* column_scale = a.take<float>(batch * columns);
  ProjectWork w = {};
  w.keys = keys_of(keys, length);
  w.rank = static_cast<int>(rank);
  w.columns = static_cast<int>(columns);
  w.parts = parts;
  w.column_scale = column_scale;
  w.directions = directions.ptr<const float>();
  for (int i = 0; i < 3; ++i) w.direction_strides[i] = directions.stride(i), w.u_strides[i] = u.stride(i);
  w.u = u.data;
  w.wide = u.dtype == DType::Float32;
  if (scale.defined()) {
    w.scale = scale.ptr<float>();
    for (int i = 0; i < 2; ++i) w.scale_strides[i] = scale.stride(i);
  }
  if (!has_pieces(keys)) {
    const int64_t blocks = blocks_for(keys.size(1), kTile);
    visit_float(keys.dtype,
                [&]<class T>(T) { launch(project_kernel<T>, batch * blocks, kThreads, 0, stream, w, blocks); });
    return;
  }
  const auto split = [&]<class T>(T) {
    launch(split_kernel<T>, batch * (columns / kSplitColumns), kThreads, 0, stream, w, static_cast<T*>(parts),
           column_scale);
  };
  keys.dtype == DType::BFloat16 ? split(bfloat16{}) : split(float16{});
  project_sm80(stream, w, batch, keys.dtype);
}

}  // namespace fastpost::cuda
