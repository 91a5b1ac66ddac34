// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/dtype.h"
#include "core/isa.h"

namespace fastpost {

struct LandmarkKernels {
  // mean [d] of `count` keys that are row_bytes apart; returns the least cosine between one of them and the mean.
  float (*mean)(DType dtype, const char* keys, int64_t row_bytes, int64_t count, int64_t d, float* mean);
  // A row as int8; returns its scale.
  float (*quantize)(const float* row, int64_t n, int8_t* out);
};

FP_DECLARE_SIMD(LandmarkKernels, landmark_kernels)

}  // namespace fastpost
