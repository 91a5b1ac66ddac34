// SPDX-License-Identifier: Apache-2.0
// kv_factorize by mma.m16n8k16, for bfloat16 and float16 on compute capability 8.0 and later.
//
// Gram: 128 x 128 tiles on and above the diagonal, two blocks to a multiprocessor; blocks of one share of the tokens are
// neighbours, so that the L2 cache has them. Project: 128 tokens and up to 256 columns; keys are exact in 16 bits, directions are
// the sum of two such numbers, which leaves 2^-17 of a column's largest direction (bfloat16; float16 less): int8 rows round at
// 2^-8 of their largest value, and float32 ones should not have a 16-bit number's error.
//
// No GPU has run it yet; tests run it on the host. nvcc 13.0, sm_80 and sm_90a: gram 224 and 228 registers, 68 KB of shared memory;
// project by 160 columns 232 and 236, 93 KB (an A100 then has one block to a multiprocessor); no spills.
#include "cuda/core/mma_tile.cuh"
#include "cuda/ops/kv_factorize.cuh"

namespace fastpost::cuda {
namespace {

// ---- gram ----

using Square = Shape<128, 128, 32, 2, 2, 1, 4>;
static_assert(kPlanSm80.m == Square::kM && kPlanSm80.n == Square::kN);

template <class T>
__global__ void __launch_bounds__(Square::kThreads, 2) gram_kernel(GramWork w) {
  using S = Square;
  constexpr int kChunks = S::kM / 8, kRows = S::kThreads / kChunks, kCopies = S::kK / kRows;
  FP_DYNAMIC_SHARED(char, shared);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const GramPlace place(w, Triangle(w.keys.d, S::kM, S::kN), blockIdx.x);
  const bool diagonal = place.tile.row == place.tile.column;  // one factor then serves as both

  const int row = thread / kChunks, chunk = thread % kChunks;
  const int first_a = place.tile.row * S::kM + chunk * 8, first_b = place.tile.column * S::kN + chunk * 8;
  const bool in_a = first_a < w.keys.d, in_b = first_b < w.keys.d;
  const T* keys = w.keys.at<T>(place.b) + (place.begin + row) * w.keys.row_stride;
  const T *from_a = keys + (in_a ? first_a : 0), *from_b = keys + (in_b ? first_b : 0);
  const int64_t tokens = place.end - place.begin;
  const auto fetch = [&](int step, int slot) {
    char *a = shared + slot * S::kStageBytes, *b = a + S::kABytes;
    FP_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      const int to = swizzled<kChunks>(row + i * kRows, chunk), from = step * S::kK + i * kRows;
      const bool exists = row + from < tokens;
      copy_async(a + to, exists ? from_a + from * w.keys.row_stride : w.keys.data, exists && in_a);
      if (!diagonal) copy_async(b + to, exists ? from_b + from * w.keys.row_stride : w.keys.data, exists && in_b);
    }
  };
  Sums<S> sums = {};
  pipeline<S::kStages>(static_cast<int>((tokens + S::kK - 1) / S::kK), fetch, [&](int slot) {
    const char* a = shared + slot * S::kStageBytes;
    multiply_step<T, S, true, true>(a, diagonal ? a : a + S::kABytes, warp % 2, warp / 2, 0, lane, sums);
  });
  float* staged = reinterpret_cast<float*>(shared);
  stage_sums<S>(sums, staged, warp % 2, warp / 2, 0, lane);
  for (int i = thread; i < S::kM * (S::kN / 4); i += S::kThreads) {
    const int r = i / (S::kN / 4), c = i % (S::kN / 4) * 4;
    copy<4>(staged + r * S::kStride + c, place.partial + r * S::kN + c);
  }
}

// ---- project ----

constexpr int kMostColumns = 256;
template <int kColumns, int kWarpsM_>
struct Wide {
  static constexpr int kM = 128, kN = kColumns, kK = 32, kStages = 3, kWarpsM = kWarpsM_, kThreads = 64 * kWarpsM;
  static constexpr int kMBlocks = kM / kWarpsM / 16, kNBlocks = kN / 16;  // of a warp; two of them along the columns
  // Bytes between rows; the padding puts eight neighbouring ones in different banks.
  static constexpr int kARow = (kK + 8) * 2, kBRow = (kN + 8) * 2;
  static constexpr int kABytes = kM * kARow, kPartBytes = kK * kBRow, kStageBytes = kABytes + 2 * kPartBytes;
  static constexpr int kStride = kN + 8, kSumBytes = kM * kStride * 4;
  static constexpr int kBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static constexpr bool kWhole = kN < kMostColumns;  // else a rank may have more
  static constexpr int kBlocks = kWhole ? 2 : 1;     // of a multiprocessor
  static constexpr int kAPieces = kK / 8, kARows = kThreads / kAPieces, kACopies = kM / kARows;
  static constexpr int kBLanes = kThreads / (2 * kK), kBCopies = kN / 8 / kBLanes;
  static_assert(kNBlocks % 2 == 0 && kN / 8 % kBLanes == 0 && kM % kARows == 0);
};

template <class T, class S>
__device__ __forceinline__ void multiply_parts(const char* a, int warp_m, int warp_n, int lane,
                                               float (&sums)[S::kMBlocks][S::kNBlocks][4]) {
  const char* b = a + S::kABytes;
  const int row = lane % 8, matrix = lane / 8;
#ifdef __CUDACC__
#pragma unroll 1  // or the second half's loads come so early that registers do not suffice
#endif
  for (int k = 0; k < S::kK; k += 16) {
    uint32_t from_a[S::kMBlocks][4];
    FP_UNROLL
    for (int m = 0; m < S::kMBlocks; ++m) {  // matrices: rows 0 to 7, 8 to 15, then 8 columns on
      const int at = 16 * (warp_m * S::kMBlocks + m) + matrix % 2 * 8 + row;
      load_matrices(a + at * S::kARow + (k + matrix / 2 * 8) * 2, from_a[m]);
    }
    FP_UNROLL
    for (int n = 0; n < S::kNBlocks; n += 2) {
      FP_UNROLL
      for (int part = 0; part < 2; ++part) {  // matrices: rows 0 to 7, 8 to 15 of k, then of the next block of columns
        const int column = (warp_n * S::kNBlocks + n) * 8 + matrix / 2 * 8, at = k + matrix % 2 * 8 + row;
        uint32_t from_b[4];
        load_matrices_transposed(b + part * S::kPartBytes + at * S::kBRow + column * 2, from_b);
        FP_UNROLL
        for (int m = 0; m < S::kMBlocks; ++m) {
          mma<T>(sums[m][n], from_a[m], from_b[0], from_b[1]);
          mma<T>(sums[m][n + 1], from_a[m], from_b[2], from_b[3]);
        }
      }
    }
  }
}

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) project_kernel(ProjectWork w, int blocks_of_sequence) {
  FP_DYNAMIC_SHARED(char, shared);
  __shared__ float row_max[S::kM];
  const ProjectPlace<S::kM, S::kN, S::kWhole> place(w, blocks_of_sequence);
  if (place.rows == 0) return clear_rows<T, S::kThreads>(w, place);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int warp_m = warp % S::kWarpsM, warp_n = warp / S::kWarpsM;
  const T* keys = w.keys.at<T>(place.b) + int64_t{place.first} * w.keys.row_stride;
  // A thread copies one piece (16 bytes) of some rows of A and every few of one row of B, in either of its parts.
  const int a_row = thread / S::kAPieces, a_piece = thread % S::kAPieces;
  const int b_row = thread / S::kBLanes, b_piece = thread % S::kBLanes, b_k = b_row % S::kK, part = b_row / S::kK;
  const T* from_a =
      a_row < place.rows && a_piece * 8 < w.keys.d ? keys + a_row * w.keys.row_stride + a_piece * 8 : keys;
  const T* from_b = static_cast<const T*>(w.parts) + int64_t{place.b * 2 + part} * w.keys.d * w.columns +
                    (b_k < w.keys.d ? int64_t{b_k} * w.columns : 0) + (b_piece * 8 < w.columns ? b_piece * 8 : 0);
  const int to_a = a_row * S::kARow + a_piece * 16;
  const int to_b = S::kABytes + part * S::kPartBytes + b_k * S::kBRow + b_piece * 16;
  const int steps = (w.keys.d + S::kK - 1) / S::kK;

  for (int pass = 0; pass < place.passes; ++pass) {
    for (int chunk = 0; chunk < place.chunks; ++chunk) {
      const int pieces = (w.columns - chunk * S::kN) / 8;  // of a row of B that are there
      const auto fetch = [&](int step, int slot) {
        char* to = shared + slot * S::kStageBytes;
        const bool in_a = step * S::kK + a_piece * 8 < w.keys.d, in_b = step * S::kK + b_k < w.keys.d;
        const T* a = from_a + (in_a ? step * S::kK : 0);
        FP_UNROLL
        for (int i = 0; i < S::kACopies; ++i) {
          const bool exists = in_a && a_row + i * S::kARows < place.rows;
          copy_async(to + to_a + i * (S::kARows * S::kARow), exists ? a + i * S::kARows * w.keys.row_stride : from_a,
                     exists);
        }
        const T* b = from_b + chunk * S::kN + (in_b ? step * S::kK * w.columns : 0);
        FP_UNROLL
        for (int i = 0; i < S::kBCopies; ++i) {
          const bool exists = in_b && b_piece + i * S::kBLanes < pieces;
          copy_async(to + to_b + i * (S::kBLanes * 16), exists ? b + i * S::kBLanes * 8 : from_b, exists);
        }
      };
      float sums[S::kMBlocks][S::kNBlocks][4] = {};
      pipeline<S::kStages>(steps, fetch, [&](int slot) {
        multiply_parts<T, S>(shared + slot * S::kStageBytes, warp_m, warp_n, lane, sums);
      });
      float* staged = reinterpret_cast<float*>(shared);
      const float* scale = w.column_scale + int64_t{place.b} * w.columns;
      FP_UNROLL
      for (int n = 0; n < S::kNBlocks; ++n) {
        const int column = (warp_n * S::kNBlocks + n) * 8 + lane % 4 * 2, at = chunk * S::kN + column;
        const float first = at < w.columns ? scale[at] : 0.0f, second = at < w.columns ? scale[at + 1] : 0.0f;
        FP_UNROLL
        for (int m = 0; m < S::kMBlocks; ++m) {
          FP_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int row = 16 * (warp_m * S::kMBlocks + m) + lane / 4 + 8 * half;
            const Packed<float, 2> pair = {{sums[m][n][2 * half] * first, sums[m][n][2 * half + 1] * second}};
            *reinterpret_cast<Packed<float, 2>*>(staged + row * S::kStride + column) = pair;
          }
        }
      }
      __syncthreads();
      finish_rows<T, S::kStride, S::kThreads>(w, place, chunk, pass, staged, row_max);
      __syncthreads();
    }
  }
}

}  // namespace

void gram_sm80(const Stream& stream, const GramWork& work, int64_t batch, DType dtype) {
  const int64_t blocks = batch * work.splits * Triangle(work.keys.d, Square::kM, Square::kN).count();
  const auto go = [&]<class T>(T) {
    auto* kernel = gram_kernel<T>;
    allow_shared(stream, kernel, Square::kBytes);
    launch(kernel, blocks, Square::kThreads, Square::kBytes, stream, work);
  };
  dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

void project_sm80(const Stream& stream, const ProjectWork& work, int64_t batch, DType dtype) {
  const auto go = [&]<class T, class S>(T, S) {
    const int64_t blocks = blocks_for(work.keys.tokens, S::kM);
    auto* kernel = project_kernel<T, S>;
    allow_shared(stream, kernel, S::kBytes);
    launch(kernel, batch * blocks, S::kThreads, S::kBytes, stream, work, blocks);
  };
  const auto sized = [&]<class T>(T t) {
    work.rank <= 64 ? go(t, Wide<64, 2>{}) : work.rank <= 160 ? go(t, Wide<160, 2>{}) : go(t, Wide<kMostColumns, 4>{});
  };
  dtype == DType::BFloat16 ? sized(bfloat16{}) : sized(float16{});
}

}  // namespace fastpost::cuda
