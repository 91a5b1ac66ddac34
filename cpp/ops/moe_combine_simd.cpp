// SPDX-License-Identifier: Apache-2.0
#include "ops/moe_combine_simd.h"

#include "core/simd.h"

namespace fastpost::FP_ISA {
namespace {

constexpr int64_t kAtOnce = 4;  // registers of one row that are under way, against the latency of fma

template <class T>
void sum_rows(const T* const* rows, const float* gate, int64_t count, int64_t n, T* out) {
  constexpr int64_t w = F32::width;
  int64_t i = 0;
  for (; i + kAtOnce * w <= n; i += kAtOnce * w) {
    F32 sum[kAtOnce];
    for (F32& s : sum) s = broadcast(0.0f);
    for (int64_t k = 0; k < count; ++k) {
      const F32 g = broadcast(gate ? gate[k] : 1.0f);
      for (int64_t a = 0; a < kAtOnce; ++a) sum[a] = fma(load(rows[k] + i + a * w), g, sum[a]);
    }
    for (int64_t a = 0; a < kAtOnce; ++a) store(out + i + a * w, sum[a]);
  }
  for (; i < n; i += w) {
    F32 sum = broadcast(0.0f);
    const int64_t rest = n - i;
    for (int64_t k = 0; k < count; ++k) {
      sum =
          fma(rest < w ? load_tail(rows[k] + i, rest, 0.0f) : load(rows[k] + i), broadcast(gate ? gate[k] : 1.0f), sum);
    }
    rest < w ? store_tail(out + i, sum, rest) : store(out + i, sum);
  }
}

void sum_rows(const double* const* rows, const double* gate, int64_t count, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += rows[k][i] * (gate ? gate[k] : 1.0);
    out[i] = sum;
  }
}

template <class T>
double scale_and_dot(const T* x, const T* y, float gate, int64_t n, T* out) {
  constexpr int64_t w = F32::width;
  const F32 g = broadcast(gate);
  F32 dot[kAtOnce];
  for (F32& d : dot) d = broadcast(0.0f);
  const auto step = [&](int64_t i, F32& d) {
    const F32 a = load(x + i);
    if (y) d = fma(a, load(y + i), d);
    if (out) store(out + i, a * g);
  };
  int64_t i = 0;
  for (; i + kAtOnce * w <= n; i += kAtOnce * w) {
    for (int64_t a = 0; a < kAtOnce; ++a) step(i + a * w, dot[a]);
  }
  for (; i + w <= n; i += w) step(i, dot[0]);
  if (i < n) {
    const F32 a = load_tail(x + i, n - i, 0.0f);
    if (y) dot[0] = fma(a, load_tail(y + i, n - i, 0.0f), dot[0]);
    if (out) store_tail(out + i, a * g, n - i);
  }
  return sum((dot[0] + dot[1]) + (dot[2] + dot[3]));
}

double scale_and_dot(const double* x, const double* y, double gate, int64_t n, double* out) {
  double dot = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (y) dot += x[i] * y[i];
    if (out) out[i] = x[i] * gate;
  }
  return dot;
}

void sum_any(DType dtype, const void* const* rows, const void* gate, int64_t count, int64_t n, void* out) {
  if (dtype == DType::Float64) {
    return sum_rows(reinterpret_cast<const double* const*>(rows), static_cast<const double*>(gate), count, n,
                    static_cast<double*>(out));
  }
  visit_float(dtype, [&]<class T>(T) {
    sum_rows(reinterpret_cast<const T* const*>(rows), static_cast<const float*>(gate), count, n, static_cast<T*>(out));
  });
}

double scale_and_dot_any(DType dtype, const void* x, const void* y, double gate, int64_t n, void* out) {
  if (dtype == DType::Float64) {
    return scale_and_dot(static_cast<const double*>(x), static_cast<const double*>(y), gate, n,
                         static_cast<double*>(out));
  }
  return visit_float(dtype, [&]<class T>(T) {
    return scale_and_dot(static_cast<const T*>(x), static_cast<const T*>(y), static_cast<float>(gate), n,
                         static_cast<T*>(out));
  });
}

constexpr CombineKernels kKernels = {sum_any, scale_and_dot_any};

}  // namespace

const CombineKernels* combine_kernels() { return &kKernels; }

}  // namespace fastpost::FP_ISA
