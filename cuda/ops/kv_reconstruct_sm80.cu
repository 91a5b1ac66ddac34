// SPDX-License-Identifier: Apache-2.0
// kv_reconstruct by mma.m16n8k16, for keys of 16 bits on compute capability 8.0 and later: int8 factors and their products with a
// bfloat16 basis are exact in float32, a float32 basis is the sum of two bfloat16 numbers.
//
// A block has up to 32 picks of a key head, and its four warps share their rows, those that are fresh, 16 at a time: rows of u
// become bfloat16 on the way to shared memory, where the head's basis already lies, sums go through shared memory to lie in
// order for the rotation. Only the basis is shared between warps. What takes time is waiting for rows of u, tables and basis,
// not the products, so all of a row is asked for at once.
//
// No GPU has run it yet; tests run it on the host. nvcc 13.0, sm_80 and sm_90a: up to 64, 128 and 256 columns 143, 182 and 239
// registers, no spills; rank 160 by 128 columns has 64 KB of shared memory, 106 KB with a float32 basis.
#include "cuda/core/mma.cuh"
#include "cuda/ops/kv_reconstruct.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16;
constexpr int kPickedRows = 2 * kWarps * kRows;  // of a block, fresh or not
constexpr int kMostBytes = 110 << 10;            // two blocks to a multiprocessor (Hopper)

__host__ __device__ constexpr int picks_of_block(int chunk) {
  const int picks = kPickedRows / chunk;
  return picks < 1 ? 1 : picks < 32 ? picks : 32;
}

// How shared memory is laid out: the basis, [step][d], twice where it is split; then of each warp 16 rows of u, and in the same
// place 8 rows of sums. Rows are 16 bytes longer than they would have to be: neighbouring ones then begin in other banks.
struct Layout {
  int step, steps;  // of the rank, a multiple of 16
  int basis_row, part_bytes, parts, u_row, sum_row, warp_bytes;

  __host__ __device__ constexpr Layout(int rank, int columns, bool split, int most)
      : step((rank + 15) / 16 * 16), steps(1), parts(split ? 2 : 1) {
    basis_row = (columns + 8) * 2;
    sum_row = (columns + 4) * 4;
    set(step);
    while (bytes() > most && step > 16) set((step / 2 + 15) / 16 * 16);
    steps = (rank + step - 1) / step;
  }
  __host__ __device__ constexpr void set(int to) {
    step = to;
    part_bytes = step * basis_row;
    u_row = (step + 8) * 2;
    warp_bytes = kRows * u_row > kRows / 2 * sum_row ? kRows * u_row : kRows / 2 * sum_row;
  }
  __host__ __device__ constexpr int bytes() const { return parts * part_bytes + kWarps * warp_bytes; }
};

// 16 bytes from eight values.
__device__ __forceinline__ void store_eight(char* to, const float (&x)[8]) {
  Packed<uint32_t, 4> packed;
  FP_UNROLL
  for (int i = 0; i < 4; ++i) packed.v[i] = pair_of<bfloat16>(x[2 * i], x[2 * i + 1]);
  *reinterpret_cast<Packed<uint32_t, 4>*>(to) = packed;
}

// Rows [first, first + step) of a head's basis, zeros where there are none; by the block, and there after copies_wait and a
// barrier. Whole rows are asked for before any has come.
template <int kColumns>
__device__ __forceinline__ void load_basis(const ReconstructWork& w, const Layout& l, int64_t p, int64_t g, int first,
                                           char* shared) {
  constexpr int kPieces = kColumns / 8, kAhead = 4;
  const int64_t head = p * w.basis_strides[0] + g * w.basis_strides[1];
  const int count = l.step * kPieces, thread = static_cast<int>(threadIdx.x);
  const auto place = [&](int i) { return shared + i / kPieces * l.basis_row + i % kPieces * 16; };
  if (w.basis_pieces && !w.basis_wide) {
    const bfloat16* from = static_cast<const bfloat16*>(w.basis) + head;
    for (int i = thread; i < count; i += kThreads) {
      const int k = first + i / kPieces, column = i % kPieces * 8;
      const bool exists = k < w.rank && column < w.d;
      copy_async(place(i), from + (exists ? k * w.basis_strides[2] + column : 0), exists);
    }
    copies_commit();
    return;
  }
  for (int begin = thread; begin < count; begin += kAhead * kThreads) {
    float x[kAhead][8];
    FP_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      const int i = begin + a * kThreads, k = first + i / kPieces, column = i % kPieces * 8;
      const int there = i < count && k < w.rank ? w.d - column : 0;
      const int64_t at = there > 0 ? head + k * w.basis_strides[2] + column : head;
      if (w.basis_pieces) {  // float32; a whole piece is there, or none
        const auto* from = reinterpret_cast<const Packed<float, 4>*>(static_cast<const float*>(w.basis) + at);
        const Packed<float, 4> low = from[0], high = from[1];
        FP_UNROLL
        for (int c = 0; c < 8; ++c) x[a][c] = there > 0 ? c < 4 ? low.v[c] : high.v[c - 4] : 0.0f;
      } else {
        FP_UNROLL
        for (int c = 0; c < 8; ++c) {
          x[a][c] = c >= there     ? 0.0f
                    : w.basis_wide ? static_cast<const float*>(w.basis)[at + c]
                                   : to_float(static_cast<const bfloat16*>(w.basis)[at + c]);
        }
      }
    }
    FP_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      const int i = begin + a * kThreads;
      if (i >= count) break;
      store_eight(place(i), x[a]);
      if (l.parts == 1) continue;
      FP_UNROLL
      for (int c = 0; c < 8; ++c) x[a][c] -= to_float(from_float<bfloat16>(x[a][c]));
      store_eight(place(i) + l.part_bytes, x[a]);
    }
  }
}

// 16 rows of u, [first, first + step) of each, by a warp; zeros where there are none. token(row): of a row, -1: none.
template <class Token>
__device__ __forceinline__ void load_rows(const ReconstructWork& w, const Layout& l, int64_t p, int first, char* rows,
                                          int lane, Token token) {
  const int left = w.rank - first, there = left < l.step ? left : l.step;
  if (w.u_pieces && !w.scale) {  // bfloat16, as it is; there after copies_wait
    const bfloat16* u = static_cast<const bfloat16*>(w.u) + p * w.u_strides[0] + first;
    const int pieces = l.step / 8;
    for (int i = lane; i < kRows * pieces; i += 32) {
      const int column = i % pieces * 8;
      const int64_t t = column < there ? token(i / pieces) : -1;
      copy_async(rows + i / pieces * l.u_row + i % pieces * 16, t < 0 ? w.u : u + t * w.u_strides[1] + column, t >= 0);
    }
    copies_commit();
    return;
  }
  if (w.u_pieces) {            // int8, 16 at a time
    constexpr int kAhead = 5;  // a rank of 160 at once
    const int8_t* u = static_cast<const int8_t*>(w.u) + p * w.u_strides[0] + first;
    const int pieces = l.step / 16, count = kRows * pieces;
    for (int begin = lane; begin < count; begin += kAhead * 32) {
      Packed<int8_t, 16> ahead[kAhead];
      FP_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        const int i = begin + a * 32, column = i % pieces * 16;
        const int64_t t = i < count && column < there ? token(i / pieces) : -1;
        ahead[a] = {};
        if (t >= 0) ahead[a] = *reinterpret_cast<const Packed<int8_t, 16>*>(u + t * w.u_strides[1] + column);
      }
      FP_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        const int i = begin + a * 32;
        if (i >= count) break;
        FP_UNROLL
        for (int half = 0; half < 2; ++half) {
          float x[8];
          FP_UNROLL
          for (int c = 0; c < 8; ++c) x[c] = static_cast<float>(ahead[a].v[8 * half + c]);
          store_eight(rows + i / pieces * l.u_row + i % pieces * 32 + half * 16, x);
        }
      }
    }
    return;
  }
  const int64_t t = token(lane / 2);  // two lanes have a row
  const int64_t at = p * w.u_strides[0] + (t < 0 ? 0 : t) * w.u_strides[1] + first;
  char* to = rows + lane / 2 * l.u_row;
  for (int k = lane % 2 * 8; k < l.step; k += 16) {
    float x[8];
    FP_UNROLL
    for (int c = 0; c < 8; ++c) {
      x[c] = t < 0 || k + c >= there ? 0.0f
             : w.scale               ? static_cast<float>(static_cast<const int8_t*>(w.u)[at + k + c])
                                     : to_float(static_cast<const bfloat16*>(w.u)[at + k + c]);
    }
    store_eight(to + k * 2, x);
  }
}

template <int kBlocks>
__device__ __forceinline__ void multiply(const Layout& l, const char* rows, const char* basis, int lane,
                                         float (&sums)[kBlocks][4]) {
  const int row = lane % 8, matrix = lane / 8;
  const char* from_rows = rows + (matrix % 2 * 8 + row) * l.u_row + matrix / 2 * 16;
  const char* from_basis = basis + (matrix % 2 * 8 + row) * l.basis_row + matrix / 2 * 16;
  for (int k = 0; k < l.step; k += 16) {
    uint32_t a[4];
    load_matrices(from_rows + k * 2, a);
    for (int part = 0; part < l.parts; ++part) {
      const char* b = from_basis + part * l.part_bytes + k * l.basis_row;
      FP_UNROLL
      for (int n = 0; n < kBlocks; n += 2) {
        uint32_t from_b[4];
        load_matrices_transposed(b + n * 16, from_b);
        mma<bfloat16>(sums[n], a, from_b[0], from_b[1]);
        mma<bfloat16>(sums[n + 1], a, from_b[2], from_b[3]);
      }
    }
  }
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads, kColumns <= 64 ? 3 : 2)
    reconstruct_kernel(ReconstructWork w, Layout l, int64_t rows, int64_t key_blocks, int64_t value_blocks) {
  FP_DYNAMIC_SHARED(char, shared);
  constexpr int kBlocks = kColumns / 8;
  __shared__ Pick picks[32];
  __shared__ int picked;
  const Mixed block = mixed(blockIdx.x, key_blocks, value_blocks);
  if (!block.key) return copy_values<T, kWarps>(w, block.index, rows);

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int of_block = picks_of_block(w.chunk);
  const int64_t groups = (w.picks + of_block - 1) / of_block, first_pick = block.index % groups * of_block;
  const int64_t g = block.index / groups % w.heads, b = block.index / groups / w.heads;
  const int64_t p = prompt_of(w, b);
  if (p < 0) return;
  if (warp == 0) {
    Pick pick = {0, -1};
    if (lane < of_block && first_pick + lane < w.picks) pick = pick_of(w, b, g, first_pick + lane, w.tokens / w.chunk);
    const uint32_t wanted = __ballot_sync(0xffffffffu, pick.slot >= 0);
    if (pick.slot >= 0) picks[__popc(wanted & ((1u << lane) - 1))] = pick;
    if (lane == 0) picked = __popc(wanted);
  }
  __syncthreads();
  const int all = picked * w.chunk;  // rows
  if (all == 0) return;
  if (l.steps == 1) load_basis<kColumns>(w, l, p, g, 0, shared);

  char* mine = shared + l.parts * l.part_bytes + warp * l.warp_bytes;
  const auto pick_of_row = [&](int row) { return picks[row / w.chunk]; };
  const auto token_of_row = [&](int row) {
    return row < all ? int64_t{pick_of_row(row).chunk} * w.chunk + row % w.chunk : int64_t{-1};
  };
  for (int base = 0; base < all; base += kWarps * kRows) {
    const int first_row = base + warp * kRows;
    const bool busy = first_row < all;
    float sums[kBlocks][4] = {};
    for (int step = 0; step < l.steps; ++step) {
      if (l.steps > 1) {
        __syncthreads();  // nobody reads the last one
        load_basis<kColumns>(w, l, p, g, step * l.step, shared);
      }
      if (busy) {
        load_rows(w, l, p, step * l.step, mine, lane, [&](int row) { return token_of_row(first_row + row); });
      }
      copies_wait<0>();
      if (l.steps > 1 || base == 0) __syncthreads();  // the basis has just been asked for
      if (!busy) continue;
      __syncwarp();
      multiply(l, mine, shared, lane, sums);
      __syncwarp();
    }
    if (!busy) continue;
    FP_UNROLL
    for (int half = 0; half < 2; ++half) {  // 8 rows
      FP_UNROLL
      for (int n = 0; n < kBlocks; ++n) {
        const Packed<float, 2> pair = {{sums[n][2 * half], sums[n][2 * half + 1]}};
        *reinterpret_cast<Packed<float, 2>*>(mine + lane / 4 * l.sum_row + (n * 8 + lane % 4 * 2) * 4) = pair;
      }
      __syncwarp();
      const int row = first_row + half * 8 + lane / 4;  // four lanes have a row
      if (row < all) {
        const Pick pick = pick_of_row(row);
        const int64_t token = token_of_row(row);
        const float scale = w.scale ? w.scale[p * w.scale_strides[0] + token * w.scale_strides[1]] : 1.0f;
        T* to = static_cast<T*>(w.keys) + b * w.key_strides[0] + g * w.key_strides[1] + pick.slot * w.key_strides[2] +
                int64_t{row % w.chunk} * w.d;
        const float* from = reinterpret_cast<const float*>(mine + lane / 4 * l.sum_row);
        if (w.width % 8 == 0 && w.d % 8 == 0) {
          finish_row<T, 8>(w, from, scale, p, token, to, lane % 4, 4);
        } else {
          finish_row<T, 1>(w, from, scale, p, token, to, lane % 4, 4);
        }
      }
      __syncwarp();
    }
  }
}

int columns_for(int d) { return d <= 64 ? 64 : d <= 128 ? 128 : 256; }

}  // namespace

bool fits_sm80(const ReconstructWork& work, DType keys) {
  return keys != DType::Float32 && work.d <= 256 && (work.scale || work.u_type == DType::BFloat16);
}

void reconstruct_sm80(const Stream& stream, const ReconstructWork& work, int64_t rows, DType keys) {
  const auto go = [&]<class T>(T, auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    const Layout layout(work.rank, kColumns, work.basis_wide, kMostBytes);
    const int64_t key_blocks = rows * work.heads * blocks_for(work.picks, picks_of_block(work.chunk));
    const int64_t value_blocks = work.values ? blocks_for(rows * work.heads * work.picks, kWarps) : 0;
    auto* kernel = reconstruct_kernel<T, kColumns>;
    allow_shared(stream, kernel, layout.bytes());
    launch(kernel, key_blocks + value_blocks, kThreads, static_cast<size_t>(layout.bytes()), stream, work, layout, rows,
           key_blocks, value_blocks);
  };
  const auto sized = [&]<class T>(T t) {
    switch (columns_for(work.d)) {
      case 64: return go(t, std::integral_constant<int, 64>{});
      case 128: return go(t, std::integral_constant<int, 128>{});
      default: return go(t, std::integral_constant<int, 256>{});
    }
  };
  keys == DType::BFloat16 ? sized(bfloat16{}) : sized(float16{});
}

}  // namespace fastpost::cuda
