// SPDX-License-Identifier: Apache-2.0
// Words of 32 bits: what they hold, parts of registers, transposes of 16 by 16, sums across lanes. Included by
// *_simd.cpp only, as simd.h is.
#pragma once

#include "core/simd.h"

namespace fastpost::FP_ISA {

// The first n numbers from p on, or as many as a register holds; 0 for the rest.
#if defined(__AVX512F__)
inline __mmask16 first_of(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1 << n) - 1); }
inline F32 load_part(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_of(n), p)}; }
inline F32 load_part(const bfloat16* p, int64_t n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_of(n), p)), 16))};
}
inline F32 load_part(const float16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_of(n), p))};
}
inline F32 load_part(const uint8_t* p, int64_t n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_of(n), p)))};
}
inline F32 load_part(const int8_t* p, int64_t n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_of(n), p)))};
}
#else
template <class T>
inline F32 load_part(const T* p, int64_t n) {
  return n >= F32::width ? load(p) : load_tail(p, n, 0.0f);
}
template <class Byte>
inline F32 load_bytes(const Byte* p, int64_t n) {
  float lanes[F32::width];
  for (int i = 0; i < F32::width; ++i) lanes[i] = i < n ? static_cast<float>(p[i]) : 0.0f;
  return load(lanes);
}
inline F32 load_part(const uint8_t* p, int64_t n) { return load_bytes(p, n); }
inline F32 load_part(const int8_t* p, int64_t n) { return load_bytes(p, n); }
#endif

// Whether two neighbouring bfloat16 are multiplied as one word; other words are float32.
#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// f.template operator()<T, Pairs>() for elements T and what becomes of them.
template <class F>
inline void visit_words(DType dtype, bool pairs, F&& f) {
  if (pairs && kPairs) {
    f.template operator()<bfloat16, kPairs>();
  } else {
    visit_float(dtype, [&]<class T>(T) { f.template operator()<T, false>(); });
  }
}

// put(column, register of its 16 words) for 16 rows of 16 words, row(i) -> where row i begins.
template <class Row, class Put>
inline void transpose(Row&& row, Put&& put) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(row(i));
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // a[i + q]: column 4·lane + q of rows i to i + 3
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int q = 0; q < 4; ++q) {
    const __m512i low0 = _mm512_shuffle_i32x4(a[q], a[q + 4], 0x44),
                  low1 = _mm512_shuffle_i32x4(a[q + 8], a[q + 12], 0x44);
    const __m512i high0 = _mm512_shuffle_i32x4(a[q], a[q + 4], 0xee);
    const __m512i high1 = _mm512_shuffle_i32x4(a[q + 8], a[q + 12], 0xee);
    put(q, _mm512_shuffle_i32x4(low0, low1, 0x88));
    put(4 + q, _mm512_shuffle_i32x4(low0, low1, 0xdd));
    put(8 + q, _mm512_shuffle_i32x4(high0, high1, 0x88));
    put(12 + q, _mm512_shuffle_i32x4(high0, high1, 0xdd));
  }
#else
  struct Words {
    uint32_t v[16];
  };
  for (int c = 0; c < 16; ++c) {
    Words column;
    for (int i = 0; i < 16; ++i) column.v[i] = row(i)[c];
    put(c, column);
  }
#endif
}

template <class Register>
inline void put_words(void* to, const Register& words) {
  __builtin_memcpy(to, &words, 64);
}

// out[i] = Σ of the lanes of v[i], for 16 registers in a quarter of the steps that they take one by one.
#if defined(__AVX512F__)
inline __m512 sums_of_16(const F32* v) {
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[i] =
        _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i].v, v[2 * i + 1].v), _mm512_unpackhi_ps(v[2 * i].v, v[2 * i + 1].v));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  for (int i = 0; i < 2; ++i) {
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x44),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xee));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}
#endif

// The same for any number of them, each in the same order wherever it stands.
template <int Count>
inline void sums_of(const F32 (&v)[Count], float* out) {
#if defined(__AVX512F__)
  constexpr int whole = Count / 16 * 16;
#pragma GCC unroll 4
  for (int i = 0; i < whole; i += 16) _mm512_storeu_ps(out + i, sums_of_16(v + i));
  if constexpr (whole < Count) {
    F32 rest[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rest[i] = whole + i < Count ? v[whole + i] : broadcast(0.0f);
    _mm512_mask_storeu_ps(out + whole, first_of(Count - whole), sums_of_16(rest));
  }
#else
  for (int i = 0; i < Count; ++i) out[i] = sum(v[i]);
#endif
}

}  // namespace fastpost::FP_ISA
