// SPDX-License-Identifier: Apache-2.0
// x · Wᵀ for few rows of x, where reading W is what takes time: each code is read once, by the thread that needs it, which
// copies 16 bytes at a time to a ring of its own in shared memory, and goes through mma.m16n8k16 with W as the left factor.
// A warp has 16 rows of W and a slice of the columns; a block of threads has as many rows as give every multiprocessor one
// block, and adds up its slices in a fixed order: no workspace, no second kernel, the same bits every run.
//
// H200, 8192 x 8192, groups of 128, with clusters of two blocks in place of slices: 1 row 21.7 µs, 16 rows 30.5 (torch.mm in
// bfloat16 39.5 and 35.4; what reading takes: 8). With clusters of four 27 µs: the profiler saw multiprocessors without work
// and others with twice as much, which slices within a block cannot have. So, it passes its tests on the host; on a GPU
// part of them ran, and it is not yet timed. Loads to
// registers instead of the ring: 30 µs, because a thread waits for all of them when it needs one.
#include "cuda/ops/int4_gemm.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kWarpRows = 16;
constexpr int kPair = 2;      // blocks of codes that are copied together: whole lines of 128 bytes of a row
constexpr int kRing = 4;      // blocks that a thread has room for: up to 64 KB are under way on a multiprocessor
constexpr int kXPadding = 8;  // elements after a row of x in shared memory: its rows begin in other banks
constexpr int kMostShared = 216 << 10;

// Warps of a block of threads, 8·kTiles rows of x: what the registers allow.
__host__ __device__ constexpr int warps(int tiles) { return tiles > 2 ? 8 : 16; }

struct RowsWork {
  Int4Matrix w;
  int64_t m, blocks;  // rows of x; blocks of 128 columns
  const void* x;
  int64_t x_stride;
  const void* bias;  // or null
  void* out;
  int64_t out_stride;
  int row_warps;     // of a block of threads, each with 16 rows of W
  int slices;        // of the columns; row_warps · slices warps have work
  int slice_blocks;  // blocks of columns in a slice
  int chunk_blocks;  // of those, as many as shared memory has room for x; a multiple of kPair
};

__host__ __device__ constexpr int x_row_elements(int chunk_blocks) { return chunk_blocks * int4::kBlock + kXPadding; }
__host__ __device__ constexpr int ring_bytes(int tiles) { return warps(tiles) * kRing * kWarpRows * int4::kBlockBytes; }

// out [m <= 8·kTiles, 16·row_warps rows of W].
template <class T, int kTiles, bool kTable, int kGroupStep>
__global__ void __launch_bounds__(32 * warps(kTiles), 1) rows_kernel(RowsWork work) {
  constexpr int kThreads = 32 * warps(kTiles), kXRows = 8 * kTiles;
  FP_DYNAMIC_SHARED(char, shared);
  const Int4Matrix& w = work.w;
  const int row_elements = x_row_elements(work.chunk_blocks), m = static_cast<int>(work.m);
  T* x_shared = reinterpret_cast<T*>(shared + ring_bytes(kTiles));  // [slice][row of x][columns of a chunk]

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const int slice = warp / work.row_warps, tile_rows = kWarpRows * work.row_warps;
  const int64_t tile_row = int64_t{static_cast<int>(blockIdx.x)} * tile_rows;
  const int blocks = static_cast<int>(work.blocks);
  const auto slice_begin = [&](int s) { return s * work.slice_blocks < blocks ? s * work.slice_blocks : blocks; };
  const int first_block = slice < work.slices ? slice_begin(slice) : blocks;
  const int end_block = slice < work.slices ? slice_begin(slice + 1) : blocks;

  // A thread reads chunk t of rows g and g + 8 of its warp's 16.
  int64_t rows[2];
  const uint8_t* codes[2];
  FP_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t row = tile_row + kWarpRows * (warp % work.row_warps) + g + 8 * half;
    rows[half] = row < w.n ? row : w.n - 1;
    codes[half] = w.codes + rows[half] * w.codes_stride + 16 * t;
  }
  using Chunk = Packed<uint32_t, 4>;
  Chunk* ring = reinterpret_cast<Chunk*>(shared) + warp * kRing * 64 + lane;  // [slot][half][lane]
  int fetched = first_block, free_slot = 0;
  const auto fetch = [&] {
    FP_UNROLL
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
  const auto copy_x = [&](int chunk) {  // its columns of each slice
    for (int s = 0; s < work.slices; ++s) {
      const int from = slice_begin(s) + chunk, end = slice_begin(s + 1);
      const int count = (from + work.chunk_blocks < end ? work.chunk_blocks : end - from) * (int4::kBlock / 8);
      for (int row = 0; row < m; ++row) {
        for (int i = thread; i < count; i += kThreads) {
          const int64_t column = int64_t{int4::kBlock} * from + 8 * i;
          const T* x = static_cast<const T*>(work.x) + (column < w.k ? row * work.x_stride + column : 0);
          copy_async(x_shared + (s * m + row) * row_elements + 8 * i, x, column < w.k);
        }
      }
    }
    copies_commit();
  };
  copy_x(0);
  FP_UNROLL
  for (int d = 0; d < kRing; d += kPair) fetch();

  ByteTable table = {};
  if constexpr (kTable) table = byte_table<T>(w.table);
  // Several sums at a time: a matrix instruction waits for the one before it on the same sum.
  constexpr int kChains = kTiles == 1 ? 4 : kTiles == 2 ? 2 : 1;
  float total[kTiles][4] = {}, sum[kTiles][kChains][4] = {};
  const int first_group = int4_group(w, 4 * first_block);
  int left = (first_group + 1) * w.group_units - 4 * first_block;
  float scale[2] = {};
  uint32_t offset[2] = {};
  Int4Groups groups(w, rows, first_group < w.groups ? first_group : w.groups - 1);
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
  // Rows that x lacks are read as its last: they only get into sums that nobody writes.
  const T* x_rows[kTiles];
  FP_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    const int row = 8 * n + lane % 8 < m ? 8 * n + lane % 8 : m - 1;
    x_rows[n] = x_shared + ((slice < work.slices ? slice : 0) * m + row) * row_elements + lane / 8 * 8;
  }

  int slot = 0;
  for (int chunk = 0; chunk < work.slice_blocks; chunk += work.chunk_blocks) {
    if (chunk == 0) {
      copies_wait<kRing / kPair>();
    } else {
      __syncthreads();  // all are done with what shared memory held
      copy_x(chunk);
      copies_wait<0>();
    }
    __syncthreads();
    const int begin = first_block + chunk;
    const int end = begin + work.chunk_blocks < end_block ? begin + work.chunk_blocks : end_block;
    for (int block = begin; block < end; block += kPair) {
      copies_wait<kRing / kPair - 1>();
      FP_UNROLL
      for (int d = 0; d < kPair; ++d) {
        if (block + d >= end) break;
        const Chunk packed[2] = {ring[(slot + d) * 64], ring[(slot + d) * 64 + 32]};
        const int column = (block + d - begin) * int4::kBlock;
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
            load_matrices(x_rows[n] + column + 32 * i, b);
            mma<T>(sum[n][2 * i % kChains], {low[0], high[0], low[1], high[1]}, b[0], b[1]);
            mma<T>(sum[n][(2 * i + 1) % kChains], {low[2], high[2], low[3], high[3]}, b[2], b[3]);
          }
          if ((i + 1) % kGroupStep == 0 && (left -= kGroupStep) == 0) {  // the same for all lanes
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

  copies_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);  // [slice][row of x][row of W]
  if (slice < work.slices) {
    FP_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      FP_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int x_row = 8 * n + 2 * t + r % 2, w_row = kWarpRows * (warp % work.row_warps) + g + 8 * (r / 2);
        sums[(slice * kXRows + x_row) * tile_rows + w_row] = total[n][r];
      }
    }
  }
  __syncthreads();
  for (int i = thread; i < m * tile_rows; i += kThreads) {
    const int64_t n = tile_row + i % tile_rows;
    if (n >= w.n) continue;
    float value = 0;
    for (int s = 0; s < work.slices; ++s) value += sums[s * kXRows * tile_rows + i];
    if (work.bias) value += to_float(static_cast<const T*>(work.bias)[n]);
    static_cast<T*>(work.out)[i / tile_rows * work.out_stride + n] = from_float<T>(value);
  }
}

template <class T, int kTiles, bool kTable, int kGroupStep>
void launch_rows(const Stream& stream, RowsWork& work, int processors) {
  const int64_t row_warps = blocks_for(blocks_for(work.w.n, kWarpRows), processors);
  work.row_warps = static_cast<int>(row_warps < warps(kTiles) ? row_warps : warps(kTiles));
  work.slices = warps(kTiles) / work.row_warps;
  work.slice_blocks = static_cast<int>(blocks_for(work.blocks, work.slices));
  work.chunk_blocks = static_cast<int>(blocks_for(work.slice_blocks, kPair)) * kPair;
  const auto x_bytes = [&] { return 2 * work.slices * static_cast<int>(work.m) * x_row_elements(work.chunk_blocks); };
  while (work.chunk_blocks > kPair && ring_bytes(kTiles) + x_bytes() > kMostShared) work.chunk_blocks -= kPair;
  const int staged = ring_bytes(kTiles) + x_bytes();
  const int sums = 4 * 8 * kTiles * warps(kTiles) * kWarpRows, shared = staged > sums ? staged : sums;
  auto* kernel = rows_kernel<T, kTiles, kTable, kGroupStep>;
#ifdef __CUDACC__
  stream.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
#endif
  launch(kernel, blocks_for(work.w.n, kWarpRows * work.row_warps), 32 * warps(kTiles), shared, stream, work);
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
  int processors = 0;
  stream.check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.device_index));
  const auto go = [&]<class T>(T) {
    with_flag(w.table != nullptr, [&](auto table) {
      constexpr bool kTable = decltype(table)::value;
      with_group_step(w, [&](auto step) {
        constexpr int kStep = decltype(step)::value;
        if (work.m <= 8) return launch_rows<T, 1, kTable, kStep>(stream, work, processors);
        if (work.m <= 16) return launch_rows<T, 2, kTable, kStep>(stream, work, processors);
        if (work.m <= 32) return launch_rows<T, 4, kTable, kStep>(stream, work, processors);
        launch_rows<T, 8, kTable, kStep>(stream, work, processors);
      });
    });
  };
  x.dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace fastpost::cuda
