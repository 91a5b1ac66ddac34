// SPDX-License-Identifier: Apache-2.0
// F32: as many floats as one register holds, the same few operations for every instruction set. Only *_simd.cpp files
// include this, each compiled once per set in a namespace of its own (FP_ISA), so that no copy can leak into another.
//
// NaN passes through everything: in max(a, b), clamps and exp the data is the operand that wins.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/dtype.h"

namespace fastpost::FP_ISA {

inline float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
inline float to_float(float16 h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = (h.bits >> 10) & 31u, mantissa = h.bits & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {  // round to nearest even
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
inline float16 from_float<float16>(float x) {  // round to nearest even, overflow to infinity
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x38800000u) {  // subnormal: let the float adder round at 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - float_to_bits(0.5f)))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
}

#if defined(__AVX512F__)

struct F32 {
  static constexpr int width = 16;
  __m512 v;
};
inline F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32 load(const bfloat16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline F32 load(const float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
inline void store(bfloat16* p, F32 x) {
#if defined(__AVX512BF16__)
  const __m256i h = (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  const __m512i u = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_or_si512(u, _mm512_set1_epi32(0x400000)));
  const __m256i h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
}
inline void store(float16* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 max(F32 bound, F32 x) { return {_mm512_max_ps(bound.v, x.v)}; }  // x if x is NaN
inline F32 min(F32 bound, F32 x) { return {_mm512_min_ps(bound.v, x.v)}; }
inline F32 round(F32 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 scale_by_power_of_two(F32 x, F32 n) { return {_mm512_scalef_ps(x.v, n.v)}; }
inline F32 one_where_zero(F32 x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_EQ_OQ), _mm512_set1_ps(1.0f))};
}
inline float sum(F32 x) { return _mm512_reduce_add_ps(x.v); }
using Mask = __mmask16;
inline Mask not_at_most(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ); }  // true for NaN
inline F32 select(Mask m, F32 a, F32 b) { return {_mm512_mask_mov_ps(b.v, m, a.v)}; }

#elif defined(__AVX2__)

struct F32 {
  static constexpr int width = 8;
  __m256 v;
};
inline F32 broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline F32 load(const bfloat16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
inline F32 load(const float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
inline void store(bfloat16* p, F32 x) {
  const __m256i u = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
  const __m256i high = _mm256_srli_epi32(kept, 16);
  const __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
}
inline void store(float16* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 max(F32 bound, F32 x) { return {_mm256_max_ps(bound.v, x.v)}; }
inline F32 min(F32 bound, F32 x) { return {_mm256_min_ps(bound.v, x.v)}; }
inline F32 round(F32 x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 scale_by_power_of_two(F32 x, F32 n) {  // in two steps, so that n may go down to -252
  const __m256i all = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(all, 1);
  const auto power = [](__m256i k) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23));
  };
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, power(half)), power(_mm256_sub_epi32(all, half)))};
}
inline F32 one_where_zero(F32 x) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_EQ_OQ), _mm256_set1_ps(1.0f))};
}
inline float sum(F32 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
struct Mask {
  __m256 v;
};
inline Mask not_at_most(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)}; }
inline F32 select(Mask m, F32 a, F32 b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }

#else  // plain C++: short loops that the compiler turns into what the target has (SSE2, NEON, …)

struct F32 {
  static constexpr int width = 8;
  float v[8];
};
#define FP_LANES(expression)             \
  F32 r;                                 \
  for (int i = 0; i < F32::width; ++i) { \
    r.v[i] = expression;                 \
  }                                      \
  return r
inline F32 broadcast(float x) { FP_LANES(x); }
template <class T>
inline F32 load(const T* p) {
  FP_LANES(to_float(p[i]));
}
template <class T>
inline void store(T* p, F32 x) {
  for (int i = 0; i < F32::width; ++i) p[i] = from_float<T>(x.v[i]);
}
inline F32 operator+(F32 a, F32 b) { FP_LANES(a.v[i] + b.v[i]); }
inline F32 operator-(F32 a, F32 b) { FP_LANES(a.v[i] - b.v[i]); }
inline F32 operator*(F32 a, F32 b) { FP_LANES(a.v[i] * b.v[i]); }
inline F32 operator/(F32 a, F32 b) { FP_LANES(a.v[i] / b.v[i]); }
inline F32 fma(F32 a, F32 b, F32 c) { FP_LANES(a.v[i] * b.v[i] + c.v[i]); }
inline F32 max(F32 bound, F32 x) { FP_LANES(bound.v[i] > x.v[i] ? bound.v[i] : x.v[i]); }
inline F32 min(F32 bound, F32 x) { FP_LANES(bound.v[i] < x.v[i] ? bound.v[i] : x.v[i]); }
// Adding and taking away 1.5·2^23 rounds to the nearest integer for |x| < 2^22, which is all that exp needs.
inline F32 round(F32 x) { FP_LANES((x.v[i] + 12582912.0f) - 12582912.0f); }
inline float power_of_two(int32_t k) { return bits_to_float(static_cast<uint32_t>(k + 127) << 23); }
inline F32 scale_by_power_of_two(F32 x, F32 n) {  // in two steps, so that n may go down to -252
  int32_t all[F32::width];
  for (int i = 0; i < F32::width; ++i) all[i] = static_cast<int32_t>(n.v[i] == n.v[i] ? n.v[i] : 0.0f);
  FP_LANES(x.v[i] * power_of_two(all[i] >> 1) * power_of_two(all[i] - (all[i] >> 1)));
}
inline F32 one_where_zero(F32 x) { FP_LANES(x.v[i] == 0.0f ? 1.0f : 0.0f); }
inline float sum(F32 x) {
  float s = 0;
  for (int i = 0; i < F32::width; ++i) s += x.v[i];
  return s;
}
struct Mask {
  bool v[8];
};
inline Mask not_at_most(F32 a, F32 b) {
  Mask m;
  for (int i = 0; i < F32::width; ++i) m.v[i] = !(a.v[i] <= b.v[i]);
  return m;
}
inline F32 select(Mask m, F32 a, F32 b) { FP_LANES(m.v[i] ? a.v[i] : b.v[i]); }
#undef FP_LANES

#endif

inline float max_lane(F32 x) {  // NaN if any lane is NaN
  float lanes[F32::width], m = 0;
  store(lanes, x);
  m = lanes[0];
  for (int i = 1; i < F32::width; ++i) m = (lanes[i] > m || lanes[i] != lanes[i]) ? lanes[i] : m;
  return m;
}

// The last n < width elements; the rest of the register holds `fill`.
template <class T>
inline F32 load_tail(const T* p, int64_t n, float fill) {
  float lanes[F32::width];
  for (int i = 0; i < F32::width; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}
template <class T>
inline void store_tail(T* p, F32 x, int64_t n) {
  T lanes[F32::width];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

constexpr float kExpUnderflow = -104.0f;  // e^x rounds to zero from here on

// e^x within 2 ulp; 0 at and below kExpUnderflow, e^88.3 above 88.3, NaN kept. Cody-Waite reduction by ln 2 in two
// parts and the Taylor series to degree 7 on |r| <= ln(2)/2, whose remainder (r^8/8!) is 5e-9.
inline F32 exp(F32 x) {
  x = max(broadcast(kExpUnderflow), min(broadcast(88.3f), x));
  const F32 n = round(x * broadcast(1.44269504f));
  F32 r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  F32 p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return scale_by_power_of_two(p, n);
}

// tanh through exp; absolute error below 2e-7.
inline F32 tanh(F32 x) {
  const F32 one = broadcast(1.0f);
  return one - broadcast(2.0f) / (exp(x + x) + one);
}

}  // namespace fastpost::FP_ISA
