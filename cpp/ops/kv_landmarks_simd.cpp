// SPDX-License-Identifier: Apache-2.0
#include "ops/kv_landmarks_simd.h"

#include "core/simd_rows.h"

namespace fastpost::FP_ISA {
namespace {

constexpr int64_t kWidth = F32::width;
constexpr int kGroup = 8;         // keys whose sums go side by side
constexpr float kLeast = 1e-20f;  // a norm: a key of zeros has cosine 0

// The mean of the whole chunk first; then products with it, while the keys are still in the first-level cache.
template <class T, bool Whole>
float mean_of(const char* keys, int64_t row_bytes, int64_t count, int64_t d, float* mean) {
  const auto part = [&]<class U>(const U* p, int64_t n) {  // Whole: d fills registers
    if constexpr (Whole) {
      return load(p);
    } else {
      return load_part(p, n);
    }
  };
  const auto row = [&](int64_t i) { return reinterpret_cast<const T*>(keys + i * row_bytes); };
  const F32 share = broadcast(1.0f / static_cast<float>(count));
  F32 square = broadcast(0.0f);
  for (int64_t c = 0; c < d; c += kWidth) {
    const int64_t n = d - c;
    F32 sum = part(row(0) + c, n);
    for (int64_t i = 1; i < count; ++i) sum = sum + part(row(i) + c, n);
    sum = sum * share;
    n >= kWidth ? store(mean + c, sum) : store_tail(mean + c, sum, n);
    square = fma(sum, sum, square);
  }
  const float norm = __builtin_sqrtf(sum(square));
  float least = __builtin_inff();
  for (int64_t i0 = 0; i0 < count; i0 += kGroup) {
    const T* of[kGroup];
    for (int64_t i = 0; i < kGroup; ++i) of[i] = row(i0 + i < count ? i0 + i : count - 1);
    F32 sums[2 * kGroup];
#pragma GCC unroll 16
    for (F32& s : sums) s = broadcast(0.0f);
    for (int64_t c = 0; c < d; c += kWidth) {
      const F32 m = part(mean + c, d - c);
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; ++i) {
        const F32 x = part(of[i] + c, d - c);
        sums[i] = fma(x, m, sums[i]);
        sums[kGroup + i] = fma(x, x, sums[kGroup + i]);
      }
    }
    float results[2 * kGroup];
    sums_of(sums, results);
    for (int i = 0; i < kGroup; ++i) {
      const float length = __builtin_sqrtf(results[kGroup + i]);
      const float cosine = results[i] / ((length > kLeast ? length : kLeast) * (norm > kLeast ? norm : kLeast));
      least = least < cosine ? least : cosine;  // NaN wins
    }
  }
  return least;
}

float mean_any(DType dtype, const char* keys, int64_t row_bytes, int64_t count, int64_t d, float* mean) {
  return visit_float(dtype, [&]<class T>(T) {
    return (d % kWidth == 0 ? mean_of<T, true> : mean_of<T, false>)(keys, row_bytes, count, d, mean);
  });
}

constexpr LandmarkKernels kKernels = {mean_any, quantize_row};

}  // namespace

const LandmarkKernels* landmark_kernels() { return &kKernels; }

}  // namespace fastpost::FP_ISA
