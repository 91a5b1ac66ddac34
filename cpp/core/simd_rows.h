// SPDX-License-Identifier: Apache-2.0
// Rows of floats as int8 with one scale each. Included by *_simd.cpp only, as simd.h is.
#pragma once

#include "core/simd_words.h"

namespace fastpost::FP_ISA {

// Whole numbers within [-127, 127] as bytes; n of them where the register holds fewer.
inline void store_bytes(int8_t* p, F32 x, int64_t n) {
#if defined(__AVX512F__)
  _mm_mask_storeu_epi8(p, first_of(n), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
#else
  float lanes[F32::width];
  store(lanes, x);
  for (int64_t i = 0; i < n && i < F32::width; ++i) {
    p[i] = lanes[i] >= -127.0f && lanes[i] <= 127.0f ? static_cast<int8_t>(lanes[i]) : int8_t{0};
  }
#endif
}

// out = row / scale rounded half to even, scale = max|row| / 127, which is returned: 0 for zeros, NaN where one is.
inline float quantize_row(const float* row, int64_t n, int8_t* out) {
  const F32 zero = broadcast(0.0f);
  F32 most = zero;
  for (int64_t i = 0; i < n; i += F32::width) {
    const F32 x = load_part(row + i, n - i);
    most = max(most, max(x, zero - x));
  }
  const float scale = max_lane(most) / 127.0f;
  const F32 divisor = broadcast(scale > 0.0f ? scale : 1.0f);
  for (int64_t i = 0; i < n; i += F32::width) store_bytes(out + i, round(load_part(row + i, n - i) / divisor), n - i);
  return scale;
}

}  // namespace fastpost::FP_ISA
