// SPDX-License-Identifier: Apache-2.0
// What kv_select does with one key head: logits of its query heads, scores of chunks, the best of them.
#pragma once

#include "core/dtype.h"
#include "core/isa.h"

namespace fastpost {

constexpr int64_t kSelectLanes = 16;  // chunks side by side: rows of logits and scores are a multiple of it long

struct SelectKernels {
  // Bytes of the packed queries of `heads` query heads.
  int64_t (*query_bytes)(int64_t heads, int64_t d);
  // Queries (rows query_stride elements apart) times scaling, as `logits` wants them for landmarks of that dtype.
  void (*pack)(DType dtype, const void* query, int64_t query_stride, int64_t heads, int64_t d, float scaling,
               DType landmark, void* packed);
  // out[h · row + i] = query h times landmark i (times scale[i], may be null) for a number of landmarks, row_stride
  // elements apart; up to the next multiple of kSelectLanes anything may be written.
  void (*logits)(const void* packed, int64_t heads, int64_t d, DType dtype, const void* landmark, int64_t row_stride,
                 const float* scale, int64_t count, float* out, int64_t row);
  // score[i] = max over h of logits[h · row + i] - log Σ_i e^logits[h · row + i]; NaN counts as lowest, the rest of
  // the last kSelectLanes becomes -inf.
  void (*scores)(float* logits, int64_t row, int64_t heads, int64_t count, float* score);
  // Indices in ascending order of the `wanted` largest scores above -inf, the lower index of two equal ones; returns
  // how many. scratch and picked have room for kSelectLanes more than count.
  int64_t (*pick)(const float* score, int64_t count, int64_t wanted, float* scratch, int32_t* picked);
};

FP_DECLARE_SIMD(SelectKernels, select_kernels)

}  // namespace fastpost
