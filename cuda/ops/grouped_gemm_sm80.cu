// SPDX-License-Identifier: Apache-2.0
// grouped_gemm by mma.m16n8k16, for bfloat16 and float16 on compute capability 8.0 and later: a ring of tiles in shared memory
// that cp.async fills, row by row where rows are gathered, and ldmatrix reads, swizzled. Two blocks to a multiprocessor, so
// that one multiplies while the other writes its result or waits for its first tiles.
//
// Two shapes: 128 x 128 tiles, a warp 64 x 64; and for few rows to an expert 32 x 32 tiles, where each of four warps takes a
// quarter of every step's columns: reading the weights is what takes time then, and small tiles give every multiprocessor some.
// On Hopper the second runs here, too.
//
// No GPU has run it yet; tests run it on the host. nvcc 13.0, sm_80 and sm_90a: large tiles 234 and 238 registers, their
// gradient 226 and 234, 68 KB of shared memory; small ones 114 to 131 registers, 64 KB; 8 bytes for each expert; no spills.
#include "cuda/core/mma_tile.cuh"
#include "cuda/ops/grouped_gemm.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kThreads = 128, kBlocksPerProcessor = 2;

using Large = Shape<128, 128, 32, 2, 2, 1, 4>;
using Few = Shape<32, 32, 128, 1, 1, 4, 4>;
static_assert(Large::kThreads == kThreads && Few::kThreads == kThreads);

template <class T, class S, bool kTransposed>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) product_kernel(GroupedWork w) {
  constexpr int kKChunks = S::kK / 8, kNChunks = S::kN / 8;
  constexpr int kACopies = S::kM * kKChunks / kThreads, kBCopies = S::kN * kKChunks / kThreads;  // of a thread
  constexpr int kARows = kThreads / kKChunks;  // between a thread's rows
  constexpr int kBRows = kThreads / (kTransposed ? kNChunks : kKChunks);
  FP_DYNAMIC_SHARED(char, shared);
  clear_grad_gate(w);
  const GroupedTiles tiles = make_tiles(w.offset, w.experts, w.rows, S::kM, w.column_tiles(S::kN), shared + S::kBytes);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int warp_m = warp % S::kWarpsM, warp_n = warp / S::kWarpsM % S::kWarpsN;
  const int warp_k = warp / (S::kWarpsM * S::kWarpsN);

  for (int index = static_cast<int>(blockIdx.x); index < tiles.count(); index += static_cast<int>(gridDim.x)) {
    const GroupedTile tile = tiles.at(index);
    const int steps = tile.expert == w.experts ? 0 : (w.k + S::kK - 1) / S::kK;
    const T* weight = static_cast<const T*>(w.weight) + tile.expert * w.expert_stride;
    const T *from_a[kACopies] = {}, *from_b[kBCopies] = {};  // of the first step; null: zeros
    const int a_row = thread / kKChunks, k_chunk = thread % kKChunks;
    const int b_row = thread / (kTransposed ? kNChunks : kKChunks),
              b_chunk = thread % (kTransposed ? kNChunks : kKChunks);
    if (steps) {
      FP_UNROLL
      for (int i = 0; i < kACopies; ++i) {
        const int row = tile.first_row + a_row + i * kARows;
        if (row < tile.end_row) {
          from_a[i] = static_cast<const T*>(w.x.data) + w.x.row(row) * w.x.stride + k_chunk * 8;
        }
      }
      if constexpr (!kTransposed) {
        FP_UNROLL
        for (int i = 0; i < kBCopies; ++i) {
          const int n = w.weight_row(tile.column_tile, b_row + i * kBRows, S::kN);
          if (n >= 0) from_b[i] = weight + n * w.row_stride + b_chunk * 8;
        }
      } else {
        const int n = w.weight_row(tile.column_tile, b_chunk * 8, S::kN);
        if (n >= 0) from_b[0] = weight + n + b_row * w.column_stride;
      }
    }
    const auto fetch = [&](int step, int slot) {
      char *a = shared + slot * S::kStageBytes, *b = a + S::kABytes;
      const int first = step * S::kK;
      FP_UNROLL
      for (int i = 0; i < kACopies; ++i) {
        const bool exists = from_a[i] && first + k_chunk * 8 < w.k;
        copy_async(a + swizzled<kKChunks>(a_row + i * kARows, k_chunk), exists ? from_a[i] + first : w.x.data, exists);
      }
      FP_UNROLL
      for (int i = 0; i < kBCopies; ++i) {
        if constexpr (!kTransposed) {
          const bool exists = from_b[i] && first + b_chunk * 8 < w.k;
          copy_async(b + swizzled<kKChunks>(b_row + i * kBRows, b_chunk), exists ? from_b[i] + first : w.weight,
                     exists);
        } else {
          const int row = i * kBRows;
          const bool exists = from_b[0] && first + b_row + row < w.k;
          copy_async(b + swizzled<kNChunks>(b_row + row, b_chunk),
                     exists ? from_b[0] + (first + row) * w.column_stride : w.weight, exists);
        }
      }
    };
    Sums<S> sums = {};
    pipeline<S::kStages>(steps, fetch, [&](int slot) {
      const char* a = shared + slot * S::kStageBytes;
      multiply_step<T, S, false, kTransposed>(a, a + S::kABytes, warp_m, warp_n, warp_k, lane, sums);
    });
    float* staged = reinterpret_cast<float*>(shared);
    stage_sums<S>(sums, staged, warp_m, warp_n, warp_k, lane);
    finish_tile<T, S::kM, S::kN, S::kStride, kThreads>(w, tile, staged);
    __syncthreads();
  }
}

// A block for each tile of each expert's gradient: the expert's rows are what is summed over.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) gradient_kernel(GradientWork w, int down, int across) {
  using S = Large;
  constexpr int kChunks = S::kM / 8, kRows = kThreads / kChunks, kCopies = S::kK / kRows;
  static_assert(S::kM == S::kN);
  FP_DYNAMIC_SHARED(char, shared);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const GradientTile tile = gradient_tile(static_cast<int>(blockIdx.x), down, across);
  const int first_n = tile.row_tile * S::kM, first_k = tile.column_tile * S::kN;
  const Segment rows = segment(w.offset, tile.expert, w.rows);
  const int begin = static_cast<int>(rows.begin), end = static_cast<int>(rows.end);

  const int first = thread / kChunks, chunk = thread % kChunks;
  const bool in_n = first_n + chunk * 8 < w.n, in_k = first_k + chunk * 8 < w.k;
  const T* grad = static_cast<const T*>(w.grad.data) + (in_n ? first_n + chunk * 8 : 0);
  const T* x = static_cast<const T*>(w.x.data) + (in_k ? first_k + chunk * 8 : 0);
  // Where rows of the next step are: an order is read a step ahead, for the copies need what it says at once.
  int grad_rows[kCopies], x_rows[kCopies];
  const auto look_up = [&](int step) {
    FP_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      const int row = begin + step * S::kK + first + i * kRows;
      grad_rows[i] = row < end ? w.grad.row(row) : -1;
      x_rows[i] = row < end ? w.x.row(row) : -1;
    }
  };
  const auto fetch = [&](int step, int slot) {
    char *a = shared + slot * S::kStageBytes, *b = a + S::kABytes;
    FP_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      const int to = swizzled<kChunks>(first + i * kRows, chunk);
      const bool exists = grad_rows[i] >= 0;
      copy_async(a + to, grad + (exists ? grad_rows[i] * w.grad.stride : 0), exists && in_n);
      copy_async(b + to, x + (exists ? x_rows[i] * w.x.stride : 0), exists && in_k);
    }
    look_up(step + 1);
  };
  look_up(0);
  Sums<S> sums = {};
  pipeline<S::kStages>((end - begin + S::kK - 1) / S::kK, fetch, [&](int slot) {
    const char* a = shared + slot * S::kStageBytes;
    multiply_step<T, S, true, true>(a, a + S::kABytes, warp % 2, warp / 2, 0, lane, sums);
  });
  float* staged = reinterpret_cast<float*>(shared);
  stage_sums<S>(sums, staged, warp % 2, warp / 2, 0, lane);
  for (int i = thread; i < S::kM * (S::kN / kPiece); i += kThreads) {
    const int n = i / (S::kN / kPiece), column = i % (S::kN / kPiece) * kPiece;
    float piece[kPiece];
    read_piece(staged + n * S::kStride + column, piece);
    store_gradient<T>(w, tile.expert, first_n + n, first_k + column, piece);
  }
}

template <class S>
void launch_product(const Stream& stream, const GroupedWork& work, GroupedType type, int processors) {
  const int64_t tiles = most_row_tiles(work.rows, work.experts, S::kM) * work.column_tiles(S::kN);
  const int64_t most = int64_t{kBlocksPerProcessor} * processors;
  const int shared = S::kBytes + tiles_bytes(work.experts);
  const auto go = [&]<class T>(T) {
    with_flag(type.transposed, [&](auto transposed) {
      auto* kernel = product_kernel<T, S, decltype(transposed)::value>;
      allow_shared(stream, kernel, shared);
      launch(kernel, tiles < most ? tiles : most, kThreads, shared, stream, work);
    });
  };
  type.dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace

int tile_columns_sm80(bool few) { return few ? Few::kN : Large::kN; }

void multiply_grouped_sm80(const Stream& stream, const GroupedWork& work, GroupedType type, bool few, int processors) {
  few ? launch_product<Few>(stream, work, type, processors) : launch_product<Large>(stream, work, type, processors);
}

void multiply_gradient_sm80(const Stream& stream, const GradientWork& work, DType dtype) {
  const int64_t down = blocks_for(work.n, Large::kM), across = blocks_for(work.k, Large::kN);
  const auto go = [&]<class T>(T) {
    auto* kernel = gradient_kernel<T>;
    allow_shared(stream, kernel, Large::kBytes);
    launch(kernel, work.experts * down * across, kThreads, Large::kBytes, stream, work, down, across);
  };
  dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace fastpost::cuda
