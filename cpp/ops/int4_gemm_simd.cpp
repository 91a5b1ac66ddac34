// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_gemm_simd.h"

#include "core/simd.h"

namespace fastpost::FP_ISA {
namespace {

inline float scale_at(const Int4Rows& w, int64_t row, int64_t group) {
  const char* p = w.scales + row * w.scales_row;
  return visit_float(w.scales_dtype, [&]<class T>(T) { return to_float(reinterpret_cast<const T*>(p)[group]); });
}

void dequantize(const Int4Rows& w, int64_t row, DType dtype, void* out) {
  visit_float(dtype, [&]<class T>(T) {
    const uint8_t* codes = w.codes + row * w.codes_row;
    for (int64_t k = 0; k < w.k; ++k) {
      const int64_t group = k / w.group_size;
      const float scale = scale_at(w, row, group);
      const int code = int4::code_at(codes + k / int4::kBlock * int4::kBlockBytes, k % int4::kBlock);
      const int zero = w.zeros ? w.zeros[row * w.zeros_row + group] : int4::kSymmetricZero;
      static_cast<T*>(out)[k] =
          from_float<T>(w.table ? int4::weight(code, scale, w.table) : int4::weight(code, scale, zero));
    }
  });
}

float dot(DType dtype, const void* x, const float* w, int64_t k) {
  return visit_float(dtype, [&]<class T>(T) {
    const T* values = static_cast<const T*>(x);
    F32 s = broadcast(0.0f);
    int64_t i = 0;
    for (; i + F32::width <= k; i += F32::width) s = fma(load(values + i), load(w + i), s);
    if (i < k) s = fma(load_tail(values + i, k - i, 0.0f), load_tail(w + i, k - i, 0.0f), s);
    return sum(s);
  });
}

void add(float a, const float* w, int64_t k, float* out) {
  const F32 factor = broadcast(a);
  int64_t i = 0;
  for (; i + F32::width <= k; i += F32::width) store(out + i, fma(factor, load(w + i), load(out + i)));
  for (; i < k; ++i) out[i] += a * w[i];
}

void convert(const float* src, DType dtype, void* out, int64_t n) {
  visit_float(dtype, [&]<class T>(T) {
    for (int64_t i = 0; i < n; ++i) static_cast<T*>(out)[i] = from_float<T>(src[i]);
  });
}

constexpr Int4Kernels kKernels = {dequantize, dot, add, convert};

}  // namespace

const Int4Kernels* int4_kernels() { return &kKernels; }

}  // namespace fastpost::FP_ISA
