// SPDX-License-Identifier: Apache-2.0
#include "cuda/ops.h"
#include "cuda/ops/grouped_gemm.cuh"

namespace fastpost::cuda {
namespace {

// ---- any dtype, any alignment: tiles of 64 by 64 in float32, without tensor cores ----

constexpr int kTile = 64, kStep = 16, kThreads = 256, kBlocksPerProcessor = 4;
constexpr int kRow = kTile + 8;  // floats; rows begin in other banks, at multiples of 16 bytes

struct Factors {
  float a[kStep][kRow], b[kStep][kRow];
};

// sums += aᵀ · b; a thread has 4 x 4 places.
__device__ inline void multiply_step(const Factors& f, float (&sums)[4][4]) {
  const int row = static_cast<int>(threadIdx.x) / 16 * 4, column = static_cast<int>(threadIdx.x) % 16 * 4;
  for (int k = 0; k < kStep; ++k) {
    FP_UNROLL
    for (int i = 0; i < 4; ++i) {
      FP_UNROLL
      for (int j = 0; j < 4; ++j) sums[i][j] += f.a[k][row + i] * f.b[k][column + j];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) product_kernel(GroupedWork w) {
  FP_DYNAMIC_SHARED(char, tile_arrays);
  __shared__ Factors factors;
  alignas(16) __shared__ float staged[kTile * kRow];
  clear_grad_gate(w);
  const GroupedTiles tiles = make_tiles(w.offset, w.experts, w.rows, kTile, w.column_tiles(kTile), tile_arrays);
  const int thread = static_cast<int>(threadIdx.x);
  const bool along_k = w.column_stride == 1;  // neighbouring threads read neighbours in memory
  for (int index = static_cast<int>(blockIdx.x); index < tiles.count(); index += static_cast<int>(gridDim.x)) {
    const GroupedTile tile = tiles.at(index);
    const int steps = tile.expert == w.experts ? 0 : (w.k + kStep - 1) / kStep;
    const T* weight = static_cast<const T*>(w.weight) + tile.expert * w.expert_stride;
    const T *x[4] = {}, *rows[4] = {};
    FP_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = tile.first_row + thread / kStep + 16 * i;
      if (steps && row < tile.end_row) x[i] = static_cast<const T*>(w.x.data) + w.x.row(row) * w.x.stride;
      const int n = w.weight_row(tile.column_tile, along_k ? thread / kStep + 16 * i : thread % kTile, kTile);
      if (n >= 0) rows[i] = weight + n * w.row_stride;
    }
    float sums[4][4] = {};
    for (int step = 0; step < steps; ++step) {
      FP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int k = thread % kStep, at = step * kStep + k;
        factors.a[k][thread / kStep + 16 * i] = x[i] && at < w.k ? to_float(x[i][at]) : 0.0f;
        const int weight_k = along_k ? k : thread / kTile + 4 * i, weight_at = step * kStep + weight_k;
        factors.b[weight_k][along_k ? thread / kStep + 16 * i : thread % kTile] =
            rows[i] && weight_at < w.k ? to_float(rows[i][weight_at * w.column_stride]) : 0.0f;
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
    finish_tile<T, kTile, kTile, kRow, kThreads>(w, tile, staged);
    __syncthreads();
  }
}

// A block for each tile of each expert's gradient, which sums over the expert's rows.
template <class T>
__global__ void __launch_bounds__(kThreads) gradient_kernel(GradientWork w, int across, int per_expert) {
  __shared__ Factors factors;
  const int thread = static_cast<int>(threadIdx.x), index = static_cast<int>(blockIdx.x) % per_expert;
  const int64_t expert = static_cast<int>(blockIdx.x) / per_expert;
  const int first_n = index / across * kTile, first_k = index % across * kTile;
  const Segment rows = segment(w.offset, expert, w.rows);
  float sums[4][4] = {};
  for (int64_t first = rows.begin; first < rows.end; first += kStep) {
    FP_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int step = thread / kTile + 4 * i, column = thread % kTile, row = static_cast<int>(first) + step;
      float grad = 0.0f, x = 0.0f;
      if (row < rows.end) {
        const int n = first_n + column, k = first_k + column;
        if (n < w.n) grad = to_float(static_cast<const T*>(w.grad.data)[w.grad.row(row) * w.grad.stride + n]);
        if (k < w.k) x = to_float(static_cast<const T*>(w.x.data)[w.x.row(row) * w.x.stride + k]);
      }
      factors.a[step][column] = grad;
      factors.b[step][column] = x;
    }
    __syncthreads();
    multiply_step(factors, sums);
    __syncthreads();
  }
  FP_UNROLL
  for (int i = 0; i < 4; ++i) {
    FP_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int n = first_n + thread / 16 * 4 + i, k = first_k + thread % 16 * 4 + j;
      if (n < w.n && k < w.k) {
        static_cast<T*>(w.out)[expert * w.expert_stride + n * w.row_stride + k * w.column_stride] =
            from_float<T>(sums[i][j]);
      }
    }
  }
}

// ---- sums over rows ----

constexpr int kSumColumns = 32, kSumSlices = kThreads / kSumColumns;  // of an expert's rows

template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_kernel(Gathered grad, const int32_t* offset, int rows, int n, int across, T* out, int64_t out_stride) {
  __shared__ float sums[kSumSlices][kSumColumns];
  const int column = static_cast<int>(threadIdx.x) % kSumColumns, slice = static_cast<int>(threadIdx.x) / kSumColumns;
  const int64_t expert = static_cast<int>(blockIdx.x) / across;
  const int at = static_cast<int>(blockIdx.x) % across * kSumColumns + column;
  const Segment mine = segment(offset, expert, rows);
  float sum = 0.0f;
  if (at < n) {
    for (int64_t row = mine.begin + slice; row < mine.end; row += kSumSlices) {
      sum += to_float(static_cast<const T*>(grad.data)[grad.row(static_cast<int>(row)) * grad.stride + at]);
    }
  }
  sums[slice][column] = sum;
  __syncthreads();
  if (slice != 0 || at >= n) return;
  for (int s = 1; s < kSumSlices; ++s) sum += sums[s][column];
  out[expert * out_stride + at] = from_float<T>(sum);
}

// grad_gate of a row is the sum of its tiles', in their order.
__global__ void __launch_bounds__(kThreads) gate_kernel(GroupedWork w, int column_tiles) {
  const int row = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (row < clamped(w.offset[0], 0, w.rows) || row >= clamped(w.offset[w.experts], 0, w.rows)) return;
  const int slot = w.x.order ? w.x.order[row] : row;
  float sum = 0.0f;
  for (int tile = 0; tile < column_tiles; ++tile) sum += w.partial[int64_t{tile} * w.rows + row];
  if (slot >= 0 && slot < w.slots) w.grad_gate[slot] = sum;
}

// ---- without a product ----

template <class T>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(const T* pre, int64_t pre_stride, int64_t rows, int width, int pieces, int activation,
                    const T* grad_out, int64_t grad_out_stride, T* out, int64_t out_stride, T* grad_pre,
                    int64_t grad_pre_stride) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, row = index / pieces;
  if (row >= rows) return;
  const int column = static_cast<int>(index % pieces) * kPiece, count = width - column;
  float first[kPiece], second[kPiece], grad[kPiece] = {}, value[kPiece];
  load_piece(pre + row * pre_stride + column, count, first);
  load_piece(pre + row * pre_stride + column + width, count, second);
  if (grad_out) load_piece(grad_out + row * grad_out_stride + column, count, grad);
  FP_UNROLL
  for (int c = 0; c < kPiece; ++c) {
    const Activated a = activate(activation, first[c]);
    value[c] = a.value * second[c];
    first[c] = grad[c] * second[c] * a.derivative;
    second[c] = grad[c] * a.value;
  }
  if (out) store_piece(out + row * out_stride + column, count, value);
  if (!grad_pre) return;
  store_piece(grad_pre + row * grad_pre_stride + column, count, first);
  store_piece(grad_pre + row * grad_pre_stride + column + width, count, second);
}

// ---- which kernel ----

constexpr int kFewRows =
    32;  // for each expert, if all had the same: weights then take longer to read than to multiply by

struct Hardware {
  int processors = 0, capability = 0;
};

Hardware hardware(const Stream& stream, const Tensor& x) {
  Hardware found;
  stream.check(cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, x.device_index));
  stream.check(cudaDeviceGetAttribute(&found.capability, cudaDevAttrComputeCapabilityMajor, x.device_index));
  return found;
}

bool few(int64_t rows, int64_t experts) { return rows <= kFewRows * experts; }

bool is_half(const Tensor& t) { return t.dtype == DType::BFloat16 || t.dtype == DType::Float16; }
bool starts_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; }
bool steps_aligned(const Tensor& t, int dimension) { return t.size(dimension) <= 1 || t.stride(dimension) % 8 == 0; }

bool rows_aligned(const Tensor& t) {
  return is_half(t) && starts_aligned(t) && steps_aligned(t, 0) && t.size(1) % 8 == 0;
}

// The dimension of a weight [E, N, K] that has stride 1.
int unit_dimension(const Tensor& w) { return w.stride(2) == 1 ? 2 : 1; }

bool weight_aligned(const Tensor& w, bool gated) {
  const int unit = unit_dimension(w);
  return starts_aligned(w) && steps_aligned(w, 0) && steps_aligned(w, 3 - unit) &&
         (unit == 2 || w.size(1) % (gated ? 16 : 8) == 0);
}

// The copy engine does not know of experts that share one matrix, nor of matrices without columns.
bool fits_sm90(const Tensor& x, const Tensor& weight) {
  for (int i = 0; i < 3; ++i) {
    if (weight.size(i) > 1 && weight.stride(i) <= 0) return false;
  }
  return weight.size(0) <= kMostExpertsSm90 && x.size(1) > 0 && x.size(0) > 0 && (x.size(0) == 1 || x.stride(0) > 0);
}

Gathered gathered(const Tensor& x, const Tensor& order, int64_t top_k) {
  return {x.data, x.stride(0), static_cast<int>(x.size(0)), order.defined() ? order.ptr<const int32_t>() : nullptr,
          divisor(top_k)};
}

GroupedWork product_of(const Tensor& x, const Tensor& order, int64_t top_k, const Tensor& weight, const Tensor& offset,
                       const Tensor& out) {
  GroupedWork w = {};
  w.x = gathered(x, order, top_k);
  w.weight = weight.data;
  w.expert_stride = weight.stride(0);
  w.row_stride = weight.stride(1);
  w.column_stride = weight.stride(2);
  w.offset = offset.ptr<const int32_t>();
  w.experts = static_cast<int>(weight.size(0));
  w.rows = static_cast<int>(out.size(0));
  w.k = static_cast<int>(weight.size(2));
  w.out = out.data;
  w.out_stride = out.stride(0);
  return w;
}

void set_rows(const Tensor& t, void*& data, int64_t& stride) {
  if (!t.defined()) return;
  data = t.data;
  stride = t.stride(0);
}

void multiply(const Stream& stream, const Tensor& x, const Tensor& weight, GroupedWork& w) {
  const Hardware found = hardware(stream, x);
  const bool is_few = few(w.rows, w.experts),
             aligned = rows_aligned(x) && is_half(weight) && weight_aligned(weight, w.finish == Finish::kGated);
  const GroupedType type = {x.dtype, unit_dimension(weight) == 1};
  int tile_columns = kTile;
  if (!aligned) {
    const int64_t tiles = most_row_tiles(w.rows, w.experts, kTile) * w.column_tiles(kTile);
    const int64_t most = int64_t{kBlocksPerProcessor} * found.processors;
    visit_float(x.dtype, [&]<class T>(T) {
      launch(product_kernel<T>, tiles < most ? tiles : most, kThreads, tiles_bytes(w.experts), stream, w);
    });
  } else if (kBuiltForSm90 && found.capability == 9 && !is_few && fits_sm90(x, weight)) {
    tile_columns = kWideN;
    if constexpr (kBuiltForSm90) multiply_grouped_sm90(stream, w, type, found.processors);
  } else {
    tile_columns = tile_columns_sm80(is_few);
    multiply_grouped_sm80(stream, w, type, is_few, found.processors);
  }
  if (w.grad_gate) {
    launch(gate_kernel, blocks_for(w.rows, kThreads), kThreads, 0, stream, w, w.column_tiles(tile_columns));
  }
}

}  // namespace

int64_t grouped_gemm_bytes(Tensor weight, int64_t rows) {
  const int64_t n = weight.size(1), k = weight.size(2);
  const int narrowest = few(rows, weight.size(0)) ? tile_columns_sm80(true) : kTile;
  return blocks_for(n > k ? n : k, narrowest) * rows * static_cast<int64_t>(sizeof(float));
}

void grouped_gemm(Tensor x, Tensor order, int64_t top_k, Tensor weight, Tensor offset, Tensor bias, int64_t activation,
                  Tensor, Tensor pre, Tensor out) {
  const Stream stream("grouped_gemm", x);
  GroupedWork w = product_of(x, order, top_k, weight, offset, out);
  w.finish = activation ? Finish::kGated : Finish::kPlain;
  w.activation = static_cast<int>(activation);
  w.width = static_cast<int>(out.size(1));
  if (bias.defined()) {
    w.bias = bias.data;
    w.bias_stride = bias.stride(0);
  }
  set_rows(pre, w.pre, w.pre_stride);
  multiply(stream, x, weight, w);
}

void grouped_gemm_activation_backward(Tensor grad, Tensor order, int64_t top_k, Tensor weight, Tensor offset,
                                      Tensor pre, int64_t activation, Tensor gate, Tensor workspace, Tensor grad_pre,
                                      Tensor activated, Tensor grad_gate) {
  const Stream stream("grouped_gemm", grad);
  GroupedWork w = product_of(grad, order, top_k, weight, offset, grad_pre);
  w.finish = Finish::kBackward;
  w.activation = static_cast<int>(activation);
  w.width = static_cast<int>(grad_pre.size(1) / 2);
  set_rows(pre, w.pre, w.pre_stride);
  set_rows(activated, w.activated, w.activated_stride);
  if (gate.defined()) {
    w.gate = gate.ptr<const float>();
    w.slots = static_cast<int>(gate.numel());
  }
  if (grad_gate.defined()) {
    w.grad_gate = grad_gate.ptr<float>();
    w.slots = static_cast<int>(grad_gate.numel());
    w.partial = workspace.ptr<float>();
  }
  multiply(stream, grad, weight, w);
}

void grouped_gemm_weight_gradient(Tensor grad, Tensor grad_order, int64_t grad_top_k, Tensor x, Tensor order,
                                  int64_t top_k, Tensor offset, Tensor, Tensor grad_weight, Tensor grad_bias) {
  const Stream stream("grouped_gemm", grad);
  const int64_t rows = grad_order.defined() ? grad_order.size(0) : grad.size(0);
  const int experts = static_cast<int>(grad_weight.size(0)), n = static_cast<int>(grad_weight.size(1));
  const int k = static_cast<int>(grad_weight.size(2));
  GradientWork w = {gathered(grad, grad_order, grad_top_k),
                    gathered(x, order, top_k),
                    offset.ptr<const int32_t>(),
                    experts,
                    static_cast<int>(rows),
                    n,
                    k,
                    grad_weight.data,
                    grad_weight.stride(0),
                    grad_weight.stride(1),
                    grad_weight.stride(2)};  // clang-format off
  // clang-format on
  if (rows_aligned(grad) && rows_aligned(x) && weight_aligned(grad_weight, false)) {
    if (unit_dimension(grad_weight) == 1) {  // its transpose, then
      const GradientWork v = w;
      w.grad = v.x;
      w.x = v.grad;
      w.n = v.k;
      w.k = v.n;
      w.row_stride = v.column_stride;
      w.column_stride = v.row_stride;
    }
    const Hardware found = hardware(stream, grad);
    if (kBuiltForSm90 && found.capability == 9) {
      if constexpr (kBuiltForSm90) multiply_gradient_sm90(stream, w, grad.dtype, found.processors);
    } else {
      multiply_gradient_sm80(stream, w, grad.dtype);
    }
  } else {
    const int64_t across = blocks_for(k, kTile), per_expert = across * blocks_for(n, kTile);
    visit_float(grad.dtype, [&]<class T>(T) {
      launch(gradient_kernel<T>, experts * per_expert, kThreads, 0, stream, w, across, per_expert);
    });
  }
  if (!grad_bias.defined()) return;
  const int64_t across = blocks_for(n, kSumColumns);
  visit_float(grad.dtype, [&]<class T>(T) {
    launch(bias_kernel<T>, experts * across, kThreads, 0, stream, gathered(grad, grad_order, grad_top_k), w.offset,
           rows, n, across, grad_bias.ptr<T>(), grad_bias.stride(0));
  });
}

void grouped_gemm_activate(Tensor pre, int64_t activation, Tensor grad_out, Tensor out, Tensor grad_pre) {
  const Stream stream("grouped_gemm", pre);
  const int64_t rows = pre.size(0), width = pre.size(1) / 2, pieces = blocks_for(width, kPiece);
  visit_float(pre.dtype, [&]<class T>(T) {
    const T* grad = grad_out.defined() ? grad_out.ptr<const T>() : nullptr;
    launch(activate_kernel<T>, blocks_for(rows * pieces, kThreads), kThreads, 0, stream, pre.ptr<const T>(),
           pre.stride(0), rows, width, pieces, activation, grad, grad ? grad_out.stride(0) : 0,
           out.defined() ? out.ptr<T>() : nullptr, out.defined() ? out.stride(0) : 0,
           grad_pre.defined() ? grad_pre.ptr<T>() : nullptr, grad_pre.defined() ? grad_pre.stride(0) : 0);
  });
}

}  // namespace fastpost::cuda
