// SPDX-License-Identifier: Apache-2.0
// Rows of keys out of their factors: a gathered row of u times the basis of a key head, and RoPE while the product is
// in cache. A word is 32 bits: a float, or two bfloat16 that are neighbours along the rank ("pairs", where the CPU
// multiplies such pairs in one instruction; int8 and bfloat16 factors and a bfloat16 basis lose nothing by it).
#pragma once

#include "core/dtype.h"
#include "core/isa.h"

namespace fastpost {

constexpr int64_t kReconstructRows = 24;  // rows of a call at most

struct ReconstructShape {
  int64_t rank, d;
  DType u, keys;
  bool pairs;
  const char* rows;  // of u: token t at t · row_bytes
  int64_t row_bytes;
  const float* scale;  // [S], may be null
  DType table;         // of cos and sin [S', width]; width 0: no rotation
  const char *cos, *sin;
  int64_t cos_bytes, sin_bytes, width;
};

struct ReconstructKernels {
  bool pairs;  // whether pairs are supported
  // Words of the packed basis, and of what `rows` needs besides.
  int64_t (*basis_words)(int64_t rank, int64_t d, bool pairs);
  int64_t (*scratch_words)(int64_t rank, int64_t d, bool pairs);
  // basis [rank, d] with rows row_bytes apart.
  void (*pack)(DType dtype, const char* basis, int64_t row_bytes, int64_t rank, int64_t d, bool pairs, uint32_t* out);
  // out[i] [d] = the key of token[i], for i < count; the inputs of the `ahead` rows after them are fetched by the way.
  void (*rows)(const ReconstructShape& shape, const uint32_t* basis, const int64_t* token, char* const* out,
               int64_t count, int64_t ahead, uint32_t* scratch);
  // out [rows, d] = values [rows, d] int8 times scale [rows].
  void (*widen)(const int8_t* values, const float* scale, int64_t rows, int64_t d, DType dtype, char* out);
};

FP_DECLARE_SIMD(ReconstructKernels, reconstruct_kernels)

}  // namespace fastpost
