// SPDX-License-Identifier: Apache-2.0
// Rows of four-bit weights as float32 or bfloat16 words, a block of 128 columns at a time. Included by *_simd.cpp only.
//
// Words come in the order in which shifts uncover them ("stored order"): 32-bit word w of a block shifted by 4·nibble
// gives step 16·nibble + w; for pairs of neighbouring columns, nibble is j = 0 to 3 and the word holds both. Whoever
// sums along K puts x in the same order; only results along K need columns in their own.
#pragma once

#include "core/simd_words.h"
#include "ops/int4_gemm_simd.h"

namespace fastpost::FP_ISA {

constexpr int kBlock = int4::kBlock, kUnit = 32, kUnits = kBlock / kUnit;  // a unit is the finest group
constexpr int64_t kAhead =
    64 << 10;  // bytes to prefetch where rows are read from end to end: further than the hardware looks
constexpr int64_t kMostBlocks = 32;  // that are decoded at a time

// Functions of int4.h at compile time only: a copy of one of them made for this instruction set must not leave the file.
struct Stored {
  uint8_t of_column[kBlock];    // float32 words
  uint8_t of_pair[kBlock / 2];  // pairs
};
constexpr Stored kStored = [] {
  Stored s{};
  for (int c = 0; c < kBlock; ++c) {
    const int4::Place p = int4::place(c);
    s.of_column[c] = static_cast<uint8_t>(16 * p.nibble + p.word);
    if (c % 2 == 0) s.of_pair[c / 2] = s.of_column[c];
  }
  return s;
}();
static_assert(kStored.of_pair[1] == 4 && kStored.of_pair[4] == 16 && kStored.of_pair[16] == 1 &&
              kStored.of_column[1] == 64);

// ---- scales ----------------------------------------------------------------------------------------------------------

// Scales and zeros of a row as floats, one for each part of a block that lies in one group: 1, 2 or 4 parts.
struct Scales {
  alignas(64) float scale[kMostBlocks * kUnits], zero[kMostBlocks * kUnits];
};

inline int parts_of(const Int4Rows& w) { return w.group_size % kBlock == 0 ? 1 : w.group_size % 64 == 0 ? 2 : 4; }

// f.template operator()<Parts, Zeros>(): Zeros if each group has its own, else it is in the table.
template <class F>
inline void with_format(const Int4Rows& w, F&& f) {
  const int parts = parts_of(w);
  if (w.zeros) {
    parts == 1   ? f.template operator()<1, true>()
    : parts == 2 ? f.template operator()<2, true>()
                 : f.template operator()<4, true>();
  } else {
    parts == 1   ? f.template operator()<1, false>()
    : parts == 2 ? f.template operator()<2, false>()
                 : f.template operator()<4, false>();
  }
}

// Of parts [first, first + count). Past the last group the scale is 0.
template <bool Zeros>
inline void read_scales(const Int4Rows& w, int64_t row, int64_t first, int64_t count, Scales* out) {
  const int64_t per_group = w.group_size / (kBlock / parts_of(w));
  const int64_t all = (w.k + w.group_size - 1) / w.group_size;
  const uint8_t* zeros = Zeros ? w.zeros + row * w.zeros_row : nullptr;
  visit_float(w.scales_dtype, [&]<class T>(T) {
    const T* scales = reinterpret_cast<const T*>(w.scales + row * w.scales_row);
    int64_t i = 0;
    if (per_group == 1) {
      const int64_t there = first + count < all ? count : all - first;
      for (; i < there; i += F32::width) {
        store(out->scale + i, load_part(scales + first + i, there - i));
        if constexpr (Zeros) store(out->zero + i, load_part(zeros + first + i, there - i));
      }
      i = there;
    } else {
      for (int64_t group = first / per_group, left = per_group - first % per_group; i < count && group < all; ++i) {
        out->scale[i] = to_float(scales[group]);
        if constexpr (Zeros) out->zero[i] = static_cast<float>(zeros[group]);
        if (--left == 0) {
          ++group;
          left = per_group;
        }
      }
    }
    for (; i < count; ++i) out->scale[i] = out->zero[i] = 0.0f;
  });
}

// ---- float32 words ---------------------------------------------------------------------------------------------------

// 16 floats, and those of them that a nibble of each word asks for.
#if defined(__AVX512F__)

struct Table {
  __m512 v;
  explicit Table(const float* p) : v(_mm512_loadu_ps(p)) {}
  Table times(float scale) const { return Table(_mm512_mul_ps(_mm512_set1_ps(scale), v)); }
  Table minus(float zero) const { return Table(_mm512_sub_ps(v, _mm512_set1_ps(zero))); }
  F32 operator()(const uint8_t* words, int nibble) const {
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_loadu_si512(words), 4 * nibble), v)};
  }

 private:
  explicit Table(__m512 of) : v(of) {}
};
// Lane w of a register is of the part in which word w lies.
template <int Parts>
inline F32 of_parts(const float* p) {
  return {_mm512_broadcast_f32x4(Parts == 4 ? _mm_loadu_ps(p) : _mm_setr_ps(p[0], p[0], p[1], p[1]))};
}

#elif defined(__AVX2__)

struct Table {
  __m256 low, high;
  explicit Table(const float* p) : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
  Table times(float s) const { return {_mm256_mul_ps(_mm256_set1_ps(s), low), _mm256_mul_ps(_mm256_set1_ps(s), high)}; }
  Table minus(float z) const { return {_mm256_sub_ps(low, _mm256_set1_ps(z)), _mm256_sub_ps(high, _mm256_set1_ps(z))}; }
  F32 operator()(const uint8_t* words, int nibble) const {
    const __m256i i = _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)), 4 * nibble);
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i),
                             _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)))};
  }

 private:
  Table(__m256 l, __m256 h) : low(l), high(h) {}
};
template <int Parts>
inline F32 of_parts(const float* p) {
  const __m128 four = Parts == 4 ? _mm_loadu_ps(p) : _mm_setr_ps(p[0], p[0], p[1], p[1]);
  return {_mm256_set_m128(four, four)};
}

#else

struct Table {
  float v[16];
  explicit Table(const float* p) { __builtin_memcpy(v, p, sizeof v); }
  Table times(float scale) const {
    Table r = *this;
    for (float& x : r.v) x *= scale;
    return r;
  }
  Table minus(float zero) const {
    Table r = *this;
    for (float& x : r.v) x -= zero;
    return r;
  }
  F32 operator()(const uint8_t* words, int nibble) const {
    F32 r;
    for (int i = 0; i < F32::width; ++i) r.v[i] = v[words[4 * i + nibble / 2] >> (nibble % 2 * 4) & 15];
    return r;
  }
};
template <int Parts>
inline F32 of_parts(const float* p) {
  F32 r;
  for (int i = 0; i < F32::width; ++i) r.v[i] = p[i % 4 * Parts / 4];
  return r;
}

#endif

constexpr float kCodes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
template <bool Zeros>
inline Table base_of(const Int4Rows& w) {
  if (w.table) return Table(w.table);
  const Table codes(kCodes);
  return Zeros ? codes : codes.minus(int4::kSymmetricZero);
}

// put(block, nibble, first word, F32) for blocks [first, first + count) of a row. `ahead`: bytes to what is read soon,
// where the hardware would not see it coming.
template <int Parts, bool Zeros, class Put>
[[gnu::always_inline]] inline void decode_floats(const Int4Rows& w, int64_t row, int64_t first, int64_t count,
                                                 int64_t ahead, Put&& put) {
  const uint8_t* codes = w.codes + row * w.codes_row + first * int4::kBlockBytes;
  const Table base = base_of<Zeros>(w);
  Scales s;
  for (int64_t begin = 0; begin < count; begin += kMostBlocks) {
    const int64_t n = count - begin < kMostBlocks ? count - begin : kMostBlocks;
    read_scales<Zeros>(w, row, (first + begin) * Parts, n * Parts, &s);
    for (int64_t b = 0; b < n; ++b, codes += int4::kBlockBytes) {
      __builtin_prefetch(codes + ahead, 0, 1);
      const float *scale = s.scale + Parts * b, *zero = s.zero + Parts * b;
      if constexpr (Parts == 1) {
        const Table table = (Zeros ? base.minus(*zero) : base).times(*scale);
        for (int nibble = 0; nibble < 8; ++nibble) {
          for (int i = 0; i < 16; i += F32::width) put(begin + b, nibble, i, table(codes + 4 * i, nibble));
        }
      } else {
        const F32 scales = of_parts<Parts>(scale), zeros = Zeros ? of_parts<Parts>(zero) : scales;
        for (int nibble = 0; nibble < 8; ++nibble) {
          for (int i = 0; i < 16; i += F32::width) {
            const F32 value = base(codes + 4 * i, nibble);
            put(begin + b, nibble, i, scales * (Zeros ? value - zeros : value));
          }
        }
      }
    }
  }
}

// ---- pairs of bfloat16 -----------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)

// put(block, j, registers of 16 pairs, one for each of Rows rows); rows past `last` are that one again. A register holds
// two tables of 16 values. Where all of a block uses one table, it stands there twice, so that the bit above a code, which
// belongs to another, does not matter; else that place of the index says which part's table.
template <int Parts, bool Zeros, int Rows, class Put>
[[gnu::always_inline]] inline void decode_pairs(const Int4Rows& w, int64_t row, int64_t last, int64_t first,
                                                int64_t count, int64_t ahead, Put&& put) {
  const uint8_t* codes[Rows];
  for (int r = 0; r < Rows; ++r) codes[r] = w.codes + (row + r < last ? row + r : last) * w.codes_row;
  const Table base = base_of<Zeros>(w);
  const __m512i code = _mm512_set1_epi16(15);
  const __m512i of_part = _mm512_broadcast_i32x4(Parts == 4 ? _mm_setr_epi16(0, 0, 16, 16, 32, 32, 48, 48)
                                                            : _mm_setr_epi16(0, 0, 0, 0, 16, 16, 16, 16));
  Scales s[Rows];
  for (int64_t begin = 0; begin < count; begin += kMostBlocks) {
    const int64_t n = count - begin < kMostBlocks ? count - begin : kMostBlocks;
    for (int r = 0; r < Rows; ++r) {
      read_scales<Zeros>(w, row + r < last ? row + r : last, (first + begin) * Parts, n * Parts, s + r);
    }
    for (int64_t b = 0; b < n; ++b) {
      const int64_t at = (first + begin + b) * int4::kBlockBytes;
      __m512i low[Rows], high[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        __builtin_prefetch(codes[r] + at + ahead, 0, 1);
        const auto table = [&](int part) {
          return (Zeros ? base.minus(s[r].zero[Parts * b + part]) : base).times(s[r].scale[Parts * b + part]).v;
        };
        const auto two = [&](int part0, int part1) { return (__m512i)_mm512_cvtne2ps_pbh(table(part1), table(part0)); };
        if constexpr (Parts == 1) {
          const __m512 one = table(0);
          low[r] = (__m512i)_mm512_cvtne2ps_pbh(one, one);
        } else {
          low[r] = two(0, 1);
          if constexpr (Parts == 4) high[r] = two(2, 3);
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __m512i pairs[Rows];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          __m512i index = _mm512_srli_epi16(_mm512_loadu_si512(codes[r] + at), 4 * j);
          if constexpr (Parts > 1)
            index = _mm512_ternarylogic_epi32(index, code, of_part, 0xea);  // index & code | part
          pairs[r] =
              Parts == 4 ? _mm512_permutex2var_epi16(low[r], index, high[r]) : _mm512_permutexvar_epi16(index, low[r]);
        }
        put(begin + b, j, pairs);
      }
    }
  }
}

#endif

}  // namespace fastpost::FP_ISA
