// SPDX-License-Identifier: Apache-2.0
// The functions of cuda/ops.h for Python's ctypes, which finds them by name. Tensor and Objective have C layout; an
// exception comes back as its text, null means that all went well.
#include <cstring>
#include <exception>
#include <string>

#include "cuda/core/launch.h"
#include "cuda/ops.h"
#include "cuda/ops/grouped_gemm.cuh"
#include "cuda/ops/kv_factorize.cuh"
#include "cuda/ops/kv_reconstruct.cuh"

namespace {

namespace cuda = fastpost::cuda;

template <auto F>
struct Guarded;
template <class... Args, void (*F)(Args...)>
struct Guarded<F> {
  static const char* call(Args... args) {
    static std::string message;
    try {
      F(args...);
      return nullptr;
    } catch (const std::exception& e) {
      message = e.what();
      return message.c_str();
    }
  }
};

// Sums the rows of a matrix through dynamic shared memory, one block each. Two ways to get it wrong: half of the
// threads pass by a barrier, or one thread waits for its warp while the others wait for the block.
enum Mistake : int64_t { kNone, kPassBarrier, kWaitForWarp };

void block_sum_kernel(const float* in, float* out, Mistake mistake) {
  FP_DYNAMIC_SHARED(float, values);
  values[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (mistake == kWaitForWarp && threadIdx.x == 0) __syncwarp();
    if (mistake != kPassBarrier || threadIdx.x < half) __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = values[0];
}

void block_sum(fastpost::Tensor in, fastpost::Tensor out, Mistake mistake) {
  const cuda::Stream stream("block_sum", in);
  const int threads = static_cast<int>(in.size(1));
  cuda::launch(block_sum_kernel, in.size(0), threads, sizeof(float) * threads, stream, in.ptr<float>(),
               out.ptr<float>(), mistake);
}

void forward_columns(fastpost::Tensor hidden, fastpost::Tensor weight, fastpost::Tensor out) {
  *out.ptr<int64_t>() = cuda::linear_logprob_forward_columns(hidden, weight);
}

// Which rows and columns the tiles of a grouped product are: out [tiles, 4], as many as there can be; -1 where there is none.
void tiles_kernel(const int32_t* offset, int experts, int rows, int tile_rows, int column_tiles, int32_t* out) {
  FP_DYNAMIC_SHARED(char, shared);
  const cuda::GroupedTiles tiles = cuda::make_tiles(offset, experts, rows, tile_rows, column_tiles, shared);
  for (int i = static_cast<int>(threadIdx.x); i < tiles.count(); i += static_cast<int>(blockDim.x)) {
    const cuda::GroupedTile tile = tiles.at(i);
    out[4 * i] = tile.expert;
    out[4 * i + 1] = tile.first_row;
    out[4 * i + 2] = tile.end_row;
    out[4 * i + 3] = tile.column_tile;
  }
}

void grouped_tiles(fastpost::Tensor offset, int64_t rows, int64_t tile_rows, int64_t column_tiles,
                   fastpost::Tensor out) {
  const cuda::Stream stream("grouped_gemm", offset);
  const int experts = static_cast<int>(offset.size(0)) - 1;
  if (cuda::most_row_tiles(rows, experts, static_cast<int>(tile_rows)) * column_tiles != out.size(0)) {
    throw std::runtime_error("out has another number of tiles");
  }
  cuda::launch(tiles_kernel, 1, 64, cuda::tiles_bytes(experts), stream, offset.ptr<int32_t>(), experts, rows, tile_rows,
               column_tiles, out.ptr<int32_t>());
}

// Row and column of each tile of a Gram matrix: out [tiles, 2].
void gram_tiles(int64_t d, int64_t m, int64_t n, fastpost::Tensor out) {
  const cuda::Triangle triangle(static_cast<int>(d), static_cast<int>(m), static_cast<int>(n));
  if (triangle.count() != out.size(0)) throw std::runtime_error("there are " + std::to_string(triangle.count()));
  for (int i = 0; i < triangle.count(); ++i) {
    const cuda::Triangle::Tile tile = triangle.at(i);
    if (triangle.index(tile.row, tile.column) != i) throw std::runtime_error("index of a tile");
    out.ptr<int64_t>()[2 * i] = tile.row;
    out.ptr<int64_t>()[2 * i + 1] = tile.column;
  }
}

// What each block of a mixed launch is: out [keys + values, 2] = (1 for keys, its number).
void mixed_blocks(int64_t keys, int64_t values, fastpost::Tensor out) {
  for (int64_t i = 0; i < keys + values; ++i) {
    const cuda::Mixed block = cuda::mixed(i, keys, values);
    out.ptr<int64_t>()[2 * i] = block.key;
    out.ptr<int64_t>()[2 * i + 1] = block.index;
  }
}

// A function of the core that returns bytes, as one that writes them to its last argument.
template <auto F>
struct BytesOf;
template <class... Args, int64_t (*F)(Args...)>
struct BytesOf<F> {
  static void call(Args... args, fastpost::Tensor out) { *out.ptr<int64_t>() = F(args...); }
};

struct Export {
  const char* name;
  void* function;
};
template <auto F>
void* address = reinterpret_cast<void*>(&Guarded<F>::call);

const Export exports[] = {
    {"token_logprob", address<cuda::token_logprob>},
    {"token_logprob_backward", address<cuda::token_logprob_backward>},
    {"linear_logprob_tile", address<cuda::linear_logprob_tile>},
    {"linear_logprob_finish", address<cuda::linear_logprob_finish>},
    {"linear_logprob_tile_backward", address<cuda::linear_logprob_tile_backward>},
    {"linear_logprob_rows", address<cuda::linear_logprob_rows>},
    {"linear_logprob_forward", address<cuda::linear_logprob_forward>},
    {"linear_logprob_exponentials_backward", address<cuda::linear_logprob_exponentials_backward>},
    {"forward_columns", address<forward_columns>},
    {"set_capability", address<cuda_on_host::set_capability>},
    {"set_pageable", address<cuda_on_host::set_pageable>},
    {"preference_loss", address<cuda::preference_loss>},
    {"preference_loss_backward", address<cuda::preference_loss_backward>},
    {"block_sum", address<block_sum>},
    {"policy_loss", address<cuda::policy_loss>},
    {"policy_loss_backward", address<cuda::policy_loss_backward>},
    {"int4_gemm", address<cuda::int4_gemm>},
    {"int4_gemm_dequantize", address<cuda::int4_gemm_dequantize>},
    {"moe_route", address<cuda::moe_route>},
    {"moe_route_backward", address<cuda::moe_route_backward>},
    {"moe_route_plan", address<cuda::moe_route_plan>},
    {"moe_dispatch", address<cuda::moe_dispatch>},
    {"moe_dispatch_backward", address<cuda::moe_dispatch_backward>},
    {"moe_combine", address<cuda::moe_combine>},
    {"moe_combine_backward", address<cuda::moe_combine_backward>},
    {"grouped_gemm", address<cuda::grouped_gemm>},
    {"grouped_gemm_activation_backward", address<cuda::grouped_gemm_activation_backward>},
    {"grouped_gemm_weight_gradient", address<cuda::grouped_gemm_weight_gradient>},
    {"grouped_gemm_activate", address<cuda::grouped_gemm_activate>},
    {"grouped_tiles", address<grouped_tiles>},
    {"grouped_bytes", address<BytesOf<cuda::grouped_gemm_bytes>::call>},
    {"gram_tiles", address<gram_tiles>},
    {"mixed_blocks", address<mixed_blocks>},
    {"kv_factorize_gram", address<cuda::kv_factorize_gram>},
    {"kv_factorize_project", address<cuda::kv_factorize_project>},
    {"kv_factorize_bytes", address<BytesOf<cuda::kv_factorize_bytes>::call>},
    {"kv_landmarks", address<cuda::kv_landmarks>},
    {"kv_select", address<cuda::kv_select>},
    {"kv_select_bytes", address<BytesOf<cuda::kv_select_bytes>::call>},
    {"kv_reconstruct", address<cuda::kv_reconstruct>},
    {"kv_reconstruct_bytes", address<BytesOf<cuda::kv_reconstruct_bytes>::call>},
    {"paged_attention", address<cuda::paged_attention>},
    {"paged_attention_bytes", address<BytesOf<cuda::paged_attention_bytes>::call>},
};

}  // namespace

extern "C" void* find_export(const char* name) {
  for (const Export& e : exports) {
    if (std::strcmp(e.name, name) == 0) return e.function;
  }
  return nullptr;
}
