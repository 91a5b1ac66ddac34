// SPDX-License-Identifier: Apache-2.0
// x · Wᵀ for few rows of x, where reading W is what takes time: each code is read once, by the thread that needs it, which
// copies 16 bytes at a time to a ring of its own in shared memory, and goes through mma.m16n8k16 with W as the left factor. A block of threads has 128 rows of W, a warp 16 of them. On
// compute capability 9.0 up to 8 blocks, a cluster, share the columns of the same rows, and add their sums through
// distributed shared memory, always in the same order: no workspace, no second kernel, the same bits every run.
#include "cuda/ops/int4_gemm.cuh"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

namespace fastpost::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kTileRows = 16 * kWarps;
constexpr int kPair = 2;            // blocks of codes that are copied together: whole lines of 128 bytes of a row
constexpr int kRing = 6;            // blocks that a thread has room for: 64 to 96 KB are under way on a multiprocessor
constexpr int kXPadding = 8;        // elements after a row of x in shared memory: its rows begin in other banks
constexpr int kShared = 200 << 10;  // bytes of a multiprocessor, for all blocks of threads on it
constexpr int kMostSplits = 8;

// Blocks of threads on a multiprocessor: what the registers of 8·kTiles rows allow.
constexpr int resident(int tiles) { return tiles > 2 ? 1 : 2; }

struct RowsWork {
  Int4Matrix w;
  int64_t m, blocks;  // rows of x; blocks of 128 columns
  const void* x;
  int64_t x_stride;
  const void* bias;  // or null
  void* out;
  int64_t out_stride;
  int splits;        // blocks of threads that share the columns
  int split_blocks;  // blocks of columns that each takes
  int chunk_blocks;  // of those, as many as shared memory has room for x; a multiple of kPair
};

__host__ __device__ constexpr int x_row_elements(int chunk_blocks) { return chunk_blocks * int4::kBlock + kXPadding; }

constexpr int kRingBytes = kWarps * kRing * 16 * int4::kBlockBytes;

constexpr size_t shared_bytes(int chunk_blocks, int x_rows) {
  const size_t staged = kRingBytes + size_t{2} * x_rows * x_row_elements(chunk_blocks);
  const size_t sums = size_t{4} * x_rows * kTileRows;
  return staged > sums ? staged : sums;
}

// out[8·kTiles >= m rows] for 128 rows of W.
template <class T, int kTiles, bool kTable, int kGroupStep>
__global__ void __launch_bounds__(kThreads, resident(kTiles)) rows_kernel(RowsWork work) {
  constexpr int kXRows = 8 * kTiles;
  FP_DYNAMIC_SHARED(char, shared);
  const Int4Matrix& w = work.w;
  const int row_elements = x_row_elements(work.chunk_blocks);
  T* x_shared = reinterpret_cast<T*>(shared + kRingBytes);

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const int split = static_cast<int>(blockIdx.x) % work.splits;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) / work.splits * kTileRows;
  const int first_block = split * work.split_blocks;
  const int end_block =
      static_cast<int>(first_block + work.split_blocks < work.blocks ? first_block + work.split_blocks : work.blocks);

  // A thread reads chunk t of rows g and g + 8 of its warp's 16.
  int64_t rows[2];
  const uint8_t* codes[2];
  FP_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + 16 * warp + g + 8 * half;
    rows[half] = row < w.n ? row : w.n - 1;
    codes[half] = w.codes + rows[half] * w.codes_stride + 16 * t;
  }
  using Chunk = Packed<uint32_t, 4>;
  Chunk* ring = reinterpret_cast<Chunk*>(shared) + warp * kRing * 64 + lane;  // [slot][half][lane]
  int fetched = first_block, free_slot = 0;
  const auto fetch = [&] {
    for (int d = 0; d < kPair; ++d, ++fetched) {
      if (fetched >= end_block) break;
      FP_UNROLL
      for (int half = 0; half < 2; ++half) {
        copy_async(ring + (free_slot + d) * 64 + half * 32, codes[half] + int64_t{fetched} * int4::kBlockBytes, true);
      }
    }
    free_slot = free_slot + kPair == kRing ? 0 : free_slot + kPair;
    copies_commit();
  };
  const auto copy_x = [&](int chunk, int chunk_end) {
    // Rows that x lacks are left as they are: they only get into sums that nobody writes.
    for (int row = 0; row < work.m; ++row) {
      for (int i = thread; i < (chunk_end - chunk) * (int4::kBlock / 8); i += kThreads) {
        const int64_t from = static_cast<int64_t>(chunk) * int4::kBlock + 8 * i;
        const T* x = static_cast<const T*>(work.x) + (from < w.k ? row * work.x_stride + from : 0);
        copy_async(x_shared + row * row_elements + 8 * i, x, from < w.k);
      }
    }
    copies_commit();
  };
  const auto end_of = [&](int chunk) {
    return chunk + work.chunk_blocks < end_block ? chunk + work.chunk_blocks : end_block;
  };
  copy_x(first_block, end_of(first_block));
  FP_UNROLL
  for (int d = 0; d < kRing; d += kPair) fetch();

  ByteTable table = {};
  if constexpr (kTable) table = byte_table<T>(w.table);
  // Several sums at a time: a matrix instruction waits for the one before it on the same sum.
  constexpr int kChains = kTiles == 1 ? 4 : kTiles == 2 ? 2 : 1;
  float total[kTiles][4] = {}, sum[kTiles][kChains][4] = {};
  const int first_group = int4_group(w, 4 * first_block);
  int left = (first_group + 1) * w.group_units - 4 * first_block;
  float scale[2];
  uint32_t offset[2];
  Int4Groups groups(w, rows, first_group);
  const auto begin_group = [&] {
    groups.next([&](int half, uint32_t bits, float zero) {
      scale[half] = int4_scale(w, bits);
      if constexpr (!kTable) offset[half] = pair_of<T>(-Pair<T>::kMagicValue - zero);
    });
  };
  const auto end_group = [&] {
    FP_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      FP_UNROLL
      for (int r = 0; r < 4; ++r) {
        float all = sum[n][0][r];
        sum[n][0][r] = 0;
        FP_UNROLL
        for (int c = 1; c < kChains; ++c) {
          all += sum[n][c][r];
          sum[n][c][r] = 0;
        }
        total[n][r] += scale[r / 2] * all;
      }
    }
  };
  begin_group();

  int slot = 0;
  for (int chunk = first_block; chunk < end_block; chunk += work.chunk_blocks) {
    const int chunk_end = end_of(chunk);
    if (chunk == first_block) {
      copies_wait<kRing / kPair>();
    } else {
      __syncthreads();  // all are done with what shared memory held
      copy_x(chunk, chunk_end);
      copies_wait<0>();
    }
    __syncthreads();
    for (int block = chunk; block < chunk_end; block += kPair) {
      copies_wait<kRing / kPair - 1>();
      FP_UNROLL
      for (int d = 0; d < kPair; ++d) {
        if (block + d >= chunk_end) break;
        const Chunk packed[2] = {ring[(slot + d) * 64], ring[(slot + d) * 64 + 32]};
        const T* x_block = x_shared + (block + d - chunk) * int4::kBlock + lane % 8 * row_elements + lane / 8 * 8;
        FP_UNROLL
        for (int i = 0; i < 4; ++i) {
          uint32_t low[4], high[4];  // rows g and g + 8
          if constexpr (kTable) {
            int4_values(packed[0].v[i], table, low);
            int4_values(packed[1].v[i], table, high);
          } else {
            int4_differences<T>(packed[0].v[i], offset[0], low);
            int4_differences<T>(packed[1].v[i], offset[1], high);
          }
          FP_UNROLL
          for (int n = 0; n < kTiles; ++n) {
            uint32_t b[4];
            load_matrices(x_block + 8 * n * row_elements + 32 * i, b);
            mma<T>(sum[n][2 * i % kChains], {low[0], high[0], low[1], high[1]}, b[0], b[1]);
            mma<T>(sum[n][(2 * i + 1) % kChains], {low[2], high[2], low[3], high[3]}, b[2], b[3]);
          }
          if ((i + 1) % kGroupStep == 0 && (left -= kGroupStep) == 0) {  // the same for all threads
            end_group();
            begin_group();
            left = w.group_units;
          }
        }
      }
      slot = slot + kPair == kRing ? 0 : slot + kPair;
      fetch();
    }
  }
  if (left != w.group_units) end_group();  // one that reaches beyond

  // Sums [x row][128] to shared memory; each block of the cluster adds up its share of them over all blocks.
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
  FP_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    FP_UNROLL
    for (int r = 0; r < 4; ++r) {
      sums[(8 * n + 2 * t + r % 2) * kTileRows + 16 * warp + g + 8 * (r / 2)] = total[n][r];
    }
  }
  const auto finish = [&](auto sum_at) {
    const int share = kXRows * kTileRows / work.splits;
    for (int i = split * share + thread; i < (split + 1) * share; i += kThreads) {
      const int m = i / kTileRows;
      const int64_t n = first_row + i % kTileRows;
      if (m >= work.m || n >= w.n) continue;
      float value = sum_at(i);
      if (work.bias) value += to_float(static_cast<const T*>(work.bias)[n]);
      static_cast<T*>(work.out)[m * work.out_stride + n] = from_float<T>(value);
    }
  };
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (work.splits > 1) {
    const auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    finish([&](int i) {
      float value = 0;
      for (int s = 0; s < work.splits; ++s) value += cluster.map_shared_rank(sums, s)[i];
      return value;
    });
    cluster.sync();  // nobody leaves while others read
    return;
  }
#endif
  __syncthreads();
  finish([&](int i) { return sums[i]; });
}

// How many blocks of threads share the columns: as many as fill the GPU once, and no part is left empty.
[[maybe_unused]] int best_splits(int64_t tiles, int64_t blocks, int slots) {
  int best = 1;
  double best_share = 0;
  for (int splits = 1; splits <= kMostSplits; splits *= 2) {
    if (splits > 1 && blocks / splits < 2) break;
    const int64_t work = tiles * splits, waves = blocks_for(work, slots);
    const double share = static_cast<double>(work) / static_cast<double>(waves * slots);
    if (share > best_share + 0.02) best = splits, best_share = share;
  }
  return best;
}

template <class T, int kTiles, bool kTable, int kGroupStep>
void launch_rows(const Stream& stream, RowsWork& work, int device) {
  auto* kernel = rows_kernel<T, kTiles, kTable, kGroupStep>;
  const auto bytes = [&](int chunk) { return shared_bytes(chunk, 8 * kTiles); };
  int major = 0;
  stream.check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  const int64_t tiles = blocks_for(work.w.n, kTileRows);
  work.splits = 1;
#ifdef __CUDACC__
  int processors = 0;
  stream.check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  if (major >= 9) work.splits = best_splits(tiles, work.blocks, resident(kTiles) * processors);
#endif
  work.split_blocks = static_cast<int>(blocks_for(work.blocks, work.splits));
  work.chunk_blocks = static_cast<int>(blocks_for(work.split_blocks, kPair)) * kPair;
  while (work.chunk_blocks > kPair && bytes(work.chunk_blocks) > kShared / resident(kTiles)) work.chunk_blocks -= kPair;
  const size_t shared = bytes(work.chunk_blocks);
#ifdef __CUDACC__
  stream.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
#endif
  launch(kernel, tiles * work.splits, kThreads, shared, stream, Cluster{work.splits}, work);
}

}  // namespace

void multiply_rows(const Stream& stream, const Tensor& x, const Int4Matrix& w, const Tensor& bias, const Tensor& out) {
  RowsWork work = {};
  work.w = w;
  work.m = x.size(0);
  work.blocks = blocks_for(w.k, int4::kBlock);
  work.x = x.data;
  work.x_stride = x.stride(0);
  work.bias = bias.defined() ? bias.data : nullptr;
  work.out = out.data;
  work.out_stride = out.stride(0);
  if (work.m == 0 || w.n == 0) return;
  const auto go = [&]<class T>(T) {
    with_flag(w.table != nullptr, [&](auto table) {
      constexpr bool kTable = decltype(table)::value;
      with_group_step(w, [&](auto step) {
        constexpr int kStep = decltype(step)::value;
        if (work.m <= 8) return launch_rows<T, 1, kTable, kStep>(stream, work, x.device_index);
        if (work.m <= 16) return launch_rows<T, 2, kTable, kStep>(stream, work, x.device_index);
        if (work.m <= 32) return launch_rows<T, 4, kTable, kStep>(stream, work, x.device_index);
        launch_rows<T, 8, kTable, kStep>(stream, work, x.device_index);
      });
    });
  };
  x.dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace fastpost::cuda
