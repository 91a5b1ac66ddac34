// SPDX-License-Identifier: Apache-2.0
// Rows in int8 with one float32 scale each: scale = max|row| / 127, row / scale rounded half to even, with the bits of
// cpp/core/simd_rows.h: a product with the inverse would be rounded twice.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/core/launch.h"

namespace fastpost::cuda {

// The larger, but NaN if either is: a row with NaN must not look like one without.
__device__ inline float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

struct Int8Row {
  float scale, divisor;

  __device__ explicit Int8Row(float max) : scale(max / 127.0f), divisor(scale > 0.0f ? scale : 1.0f) {}
  __device__ int8_t operator()(float x) const {
    return static_cast<int8_t>(rintf(fminf(fmaxf(x / divisor, -127.0f), 127.0f)));
  }
};

}  // namespace fastpost::cuda
