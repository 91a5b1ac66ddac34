// SPDX-License-Identifier: Apache-2.0
// Rows of four-bit weights as float32 or bfloat16 words, a block of 128 columns at a time. Included by *_simd.cpp only.
//
// Words come in the order in which shifts uncover them ("stored order"): 32-bit word w of a block shifted by 4·nibble
// gives step 16·nibble + w; for pairs of neighbouring columns, nibble is j = 0 to 3 and the word holds both. Whoever
// sums along K puts x in the same order; only results along K need columns in their own.
#pragma once

#include "core/simd.h"
#include "ops/int4_gemm_simd.h"

namespace fastpost::FP_ISA {

constexpr int kBlock = int4::kBlock, kUnit = 32, kUnits = kBlock / kUnit;  // a unit is the finest group
constexpr int64_t kMostBlocks = 32;                                        // that are decoded at a time

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

// Scales and zeros of a row as floats: one a block where groups are whole blocks, else one a unit.
struct Scales {
  alignas(64) float scale[kMostBlocks * kUnits], zero[kMostBlocks * kUnits];
};

inline bool whole_blocks(const Int4Rows& w) { return w.group_size % kBlock == 0; }

// Entries [first, first + count), in blocks or units. Past the last group scale and zero are 0.
inline void read_scales(const Int4Rows& w, int64_t row, int64_t first, int64_t count, Scales* out) {
  const int64_t per_group = w.group_size / (whole_blocks(w) ? kBlock : kUnit);
  const int64_t all = (w.k + w.group_size - 1) / w.group_size;
  const uint8_t* zeros = w.zeros ? w.zeros + row * w.zeros_row : nullptr;
  const float zero = w.table ? 0.0f : static_cast<float>(int4::kSymmetricZero);
  visit_float(w.scales_dtype, [&]<class T>(T) {
    const T* scales = reinterpret_cast<const T*>(w.scales + row * w.scales_row);
    int64_t i = 0;
    if (per_group == 1) {
      const int64_t there = first + count < all ? count : all - first;
      for (; i + F32::width <= there; i += F32::width) store(out->scale + i, load(scales + first + i));
      for (; i < there; ++i) out->scale[i] = to_float(scales[first + i]);
      for (int64_t k = 0; k < there; ++k) out->zero[k] = zeros ? static_cast<float>(zeros[first + k]) : zero;
    } else {
      for (int64_t group = first / per_group, left = per_group - first % per_group; i < count && group < all; ++i) {
        out->scale[i] = to_float(scales[group]);
        out->zero[i] = zeros ? static_cast<float>(zeros[group]) : zero;
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
  Table(const Table& base, float scale, float zero)
      : v(_mm512_mul_ps(_mm512_set1_ps(scale), _mm512_sub_ps(base.v, _mm512_set1_ps(zero)))) {}
  F32 operator()(const uint8_t* words, int nibble) const {
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_loadu_si512(words), 4 * nibble), v)};
  }
};
inline F32 of_units(const float* four) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(four))}; }  // lane w: four[w % 4]

#elif defined(__AVX2__)

struct Table {
  __m256 low, high;
  explicit Table(const float* p) : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
  Table(const Table& base, float scale, float zero)
      : low(_mm256_mul_ps(_mm256_set1_ps(scale), _mm256_sub_ps(base.low, _mm256_set1_ps(zero)))),
        high(_mm256_mul_ps(_mm256_set1_ps(scale), _mm256_sub_ps(base.high, _mm256_set1_ps(zero)))) {}
  F32 operator()(const uint8_t* words, int nibble) const {
    const __m256i i = _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)), 4 * nibble);
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i),
                             _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)))};
  }
};
inline F32 of_units(const float* four) { return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(four))}; }

#else

struct Table {
  float v[16];
  explicit Table(const float* p) { __builtin_memcpy(v, p, sizeof v); }
  Table(const Table& base, float scale, float zero) {
    for (int i = 0; i < 16; ++i) v[i] = scale * (base.v[i] - zero);
  }
  F32 operator()(const uint8_t* words, int nibble) const {
    F32 r;
    for (int i = 0; i < F32::width; ++i) r.v[i] = v[words[4 * i + nibble / 2] >> (nibble % 2 * 4) & 15];
    return r;
  }
};
inline F32 of_units(const float* four) {
  F32 r;
  for (int i = 0; i < F32::width; ++i) r.v[i] = four[i % 4];
  return r;
}

#endif

constexpr float kCodes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
inline const float* base_values(const Int4Rows& w) { return w.table ? w.table : kCodes; }

// put(block, nibble, first word, F32) for blocks [first, first + count) of a row.
template <class Put>
inline void decode_floats(const Int4Rows& w, int64_t row, int64_t first, int64_t count, Put&& put) {
  const uint8_t* codes = w.codes + row * w.codes_row + first * int4::kBlockBytes;
  const bool whole = whole_blocks(w);
  const Table base(base_values(w));
  Scales s;
  for (int64_t begin = 0; begin < count; begin += kMostBlocks) {
    const int64_t n = count - begin < kMostBlocks ? count - begin : kMostBlocks, per = whole ? 1 : kUnits;
    read_scales(w, row, (first + begin) * per, n * per, &s);
    for (int64_t b = 0; b < n; ++b, codes += int4::kBlockBytes) {
      if (whole) {
        const Table table(base, s.scale[b], s.zero[b]);
        for (int nibble = 0; nibble < 8; ++nibble) {
          for (int word = 0; word < 16; word += F32::width)
            put(begin + b, nibble, word, table(codes + 4 * word, nibble));
        }
      } else {
        const F32 scale = of_units(s.scale + kUnits * b), zero = of_units(s.zero + kUnits * b);
        for (int nibble = 0; nibble < 8; ++nibble) {
          for (int word = 0; word < 16; word += F32::width) {
            put(begin + b, nibble, word, scale * (base(codes + 4 * word, nibble) - zero));
          }
        }
      }
    }
  }
}

// ---- pairs of bfloat16 -----------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)

// put(block, j, register of 16 pairs). A table of 16 values stands twice in a register, so that the bit above a code,
// which belongs to another, does not matter; with a table for each unit, that place of the index says which.
template <class Put>
inline void decode_pairs(const Int4Rows& w, int64_t row, int64_t first, int64_t count, Put&& put) {
  const uint8_t* codes = w.codes + row * w.codes_row + first * int4::kBlockBytes;
  const bool whole = whole_blocks(w);
  const Table base(base_values(w));
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i of_unit = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 0, 16, 16, 32, 32, 48, 48));
  Scales s;
  for (int64_t begin = 0; begin < count; begin += kMostBlocks) {
    const int64_t n = count - begin < kMostBlocks ? count - begin : kMostBlocks, per = whole ? 1 : kUnits;
    read_scales(w, row, (first + begin) * per, n * per, &s);
    for (int64_t b = 0; b < n; ++b, codes += int4::kBlockBytes) {
      const __m512i v = _mm512_loadu_si512(codes);
      if (whole) {
        const Table of_block(base, s.scale[b], s.zero[b]);
        const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(of_block.v, of_block.v);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) put(begin + b, j, _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4 * j), table));
      } else {
        const float *scale = s.scale + kUnits * b, *zero = s.zero + kUnits * b;
        const Table t0(base, scale[0], zero[0]), t1(base, scale[1], zero[1]);
        const Table t2(base, scale[2], zero[2]), t3(base, scale[3], zero[3]);
        const __m512i low = (__m512i)_mm512_cvtne2ps_pbh(t1.v, t0.v), high = (__m512i)_mm512_cvtne2ps_pbh(t3.v, t2.v);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          // (v >> 4j & 15) | 16·unit
          const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(v, 4 * j), nibble, of_unit, 0xea);
          put(begin + b, j, _mm512_permutex2var_epi16(low, index, high));
        }
      }
    }
  }
}

#endif

}  // namespace fastpost::FP_ISA
