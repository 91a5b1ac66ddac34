// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_gemm_int8_simd.h"

#include "ops/int4_decode.h"

namespace fastpost::FP_ISA {
namespace {

#if defined(__AVX512VNNI__)

inline int64_t blocks_of(int64_t k) { return (k + kBlock - 1) / kBlock; }
inline __m512i bytes_of(const void* p) { return _mm512_loadu_si512(p); }
// sums += products of four neighbouring bytes.
inline __m512i dot(__m512i sums, __m512i codes, __m512i x) { return _mm512_dpbusd_epi32(sums, codes, x); }

// ---- x ---------------------------------------------------------------------------------------------------------------

// 16 floats of a row from column c on; zero past k.
template <class T>
inline F32 columns_at(const T* x, int64_t c, int64_t k) {
  return c + 16 <= k ? load(x + c) : c < k ? load_tail(x + c, k - c, 0.0f) : broadcast(0.0f);
}
inline F32 magnitude(F32 x) { return {_mm512_abs_ps(x.v)}; }
inline float poison(F32 x) { return sum(x * broadcast(0.0f)); }  // NaN if any lane is not finite

// Columns 8j + 2t + h of a unit -> byte 2h + j / 2 of 32-bit word 2t + j % 2: as the low and high halves of bytes of codes
// have them, nibbles 4h + j of the words that t counts.
inline __m256i in_order_of_codes(__m512i low, __m512i high) {
  const __m256i bytes = _mm256_set_m128i(_mm512_cvtepi32_epi8(high), _mm512_cvtepi32_epi8(low));
  const __m256i pairs = _mm256_setr_epi16(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
  const __m256i middle =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
  return _mm256_shuffle_epi8(_mm256_permutexvar_epi16(pairs, bytes), middle);
}

void add_to_parts(const Int4Rows& w, int64_t block, int unit, float value, float* sums) {
  const int parts = parts_of(w);
  sums[block * parts + unit * parts / kUnits] += value;
}

bool pack_digits(const Int4Rows& w, DType dtype, const void* src, const Int8Rows& out) {
  const int64_t blocks = blocks_of(w.k);
  for (int64_t i = 0; i < blocks * parts_of(w); ++i) out.sums[i] = 0.0f;
  return visit_float(dtype, [&]<class T>(T) {
    const T* x = static_cast<const T*>(src);
    float finite = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      F32 most = broadcast(0.0f);
      for (int64_t c = 0; c < kBlock; c += 16) {
        const F32 values = columns_at(x, b * kBlock + c, w.k);
        most = max(most, magnitude(values));
        finite += poison(values);
      }
      // 2^(e - 13) for 2^e <= most < 2^(e + 1): values have 14 bits and a sign.
      const uint32_t exponent = float_to_bits(max_lane(most)) >> 23, least = 14;
      const uint32_t of_scale = (exponent < least ? least : exponent) - 13;
      const float scale = bits_to_float(of_scale << 23);
      const F32 inverse = broadcast(bits_to_float((254 - of_scale) << 23));
      out.scale[b] = scale;
      uint32_t* to = reinterpret_cast<uint32_t*>(out.values + b * 2 * kBlock);
      for (int unit = 0; unit < kUnits; ++unit) {
        __m512i q[2], high[2], low[2];
        for (int half = 0; half < 2; ++half) {
          q[half] = _mm512_cvtps_epi32((columns_at(x, b * kBlock + 32 * unit + 16 * half, w.k) * inverse).v);
          high[half] = _mm512_srai_epi32(_mm512_add_epi32(q[half], _mm512_set1_epi32(128)), 8);
          low[half] = _mm512_sub_epi32(q[half], _mm512_slli_epi32(high[half], 8));
        }
        add_to_parts(w, b, unit, scale * static_cast<float>(_mm512_reduce_add_epi32(_mm512_add_epi32(q[0], q[1]))),
                     out.sums);
        uint32_t words[2][8];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words[0]), in_order_of_codes(high[0], high[1]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words[1]), in_order_of_codes(low[0], low[1]));
        for (int digit = 0; digit < 2; ++digit) {
          for (int t = 0; t < 4; ++t) {
            for (int p = 0; p < 2; ++p) to[32 * digit + 16 * p + 4 * t + unit] = words[digit][2 * t + p];
          }
        }
      }
    }
    return finite == 0;
  });
}

void pack(const Int4Rows& w, DType dtype, const void* src, int64_t row, const Int8Rows& out) {
  const int64_t blocks = blocks_of(w.k), parts = parts_of(w);
  float *scales = out.scale + row * blocks * kUnits, *sums = out.sums + row * blocks * parts;
  int8_t* to = out.values + row * int8_row(blocks);
  for (int64_t i = 0; i < blocks * parts; ++i) sums[i] = 0.0f;
  visit_float(dtype, [&]<class T>(T) {
    const T* x = static_cast<const T*>(src);
    for (int64_t u = 0; u < blocks * kUnits; ++u) {
      const F32 low = columns_at(x, u * kUnit, w.k), high = columns_at(x, u * kUnit + 16, w.k);
      const float scale = max_lane(max(magnitude(low), magnitude(high))) / 127.0f;
      const F32 divisor = broadcast(scale > 0 ? scale : 1.0f);
      const __m512i q0 = _mm512_cvtps_epi32((low / divisor).v), q1 = _mm512_cvtps_epi32((high / divisor).v);
      scales[u] = scale + poison(low) + poison(high);
      add_to_parts(w, u / kUnits, static_cast<int>(u % kUnits),
                   scales[u] * static_cast<float>(_mm512_reduce_add_epi32(_mm512_add_epi32(q0, q1))), sums);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + u * kUnit), in_order_of_codes(q0, q1));
    }
  });
}

// ---- one row of digits -----------------------------------------------------------------------------------------------

constexpr int kDigitRows = 4;  // rows of W that share what is loaded of x

template <int Parts, bool Zeros>
inline void add_digits(const Int4Rows& w, int64_t row, int64_t last, const Int8Rows& x, F32* out) {
  const int64_t blocks = blocks_of(w.k);
  const __m512i nibbles = _mm512_set1_epi8(15), none = _mm512_setzero_si512();
  const uint8_t* codes[kDigitRows];
  for (int r = 0; r < kDigitRows; ++r) codes[r] = w.codes + (row + r < last ? row + r : last) * w.codes_row;
  Scales s[kDigitRows];
  F32 sums[kDigitRows];
  for (F32& of_row : sums) of_row = broadcast(0.0f);
  for (int64_t begin = 0; begin < blocks; begin += kMostBlocks) {
    const int64_t n = blocks - begin < kMostBlocks ? blocks - begin : kMostBlocks;
    for (int r = 0; r < kDigitRows; ++r) {
      read_scales<Zeros>(w, row + r < last ? row + r : last, begin * Parts, n * Parts, s + r);
      // Once for all of its codes, each part takes off zero·scale·Σ x; then its scale becomes that of the products.
      for (int64_t i = 0; i < n * Parts; i += 16) {
        const __mmask16 there = first_of(n * Parts - i);
        const __m512 scale = _mm512_maskz_loadu_ps(there, s[r].scale + i);
        const __m512 zero = Zeros ? _mm512_maskz_loadu_ps(there, s[r].zero + i) : _mm512_set1_ps(int4::kSymmetricZero);
        const __m512 off = _mm512_mul_ps(zero, _mm512_maskz_loadu_ps(there, x.sums + begin * Parts + i));
        sums[r].v = _mm512_fnmadd_ps(scale, off, sums[r].v);
      }
    }
    for (int64_t b = 0; b < n; ++b) {
      const int8_t* digits = x.values + (begin + b) * 2 * kBlock;
      const __m512i high0 = bytes_of(digits), high1 = bytes_of(digits + 64);
      const __m512i low0 = bytes_of(digits + 128), low1 = bytes_of(digits + 192);
      const F32 x_scale = broadcast(x.scale[begin + b]);
      const int64_t at = (begin + b) * int4::kBlockBytes;
#pragma GCC unroll 4
      for (int r = 0; r < kDigitRows; ++r) {
        __builtin_prefetch(codes[r] + at + kAhead, 0, 1);
        const __m512i v = bytes_of(codes[r] + at);
        const __m512i even = _mm512_and_si512(v, nibbles), odd = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibbles);
        const __m512i high = dot(dot(none, even, high0), odd, high1), low = dot(dot(none, even, low0), odd, low1);
        const F32 product = {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low))};
        const F32 scale = Parts == 1 ? broadcast(s[r].scale[b]) : of_parts<Parts>(s[r].scale + Parts * b);
        sums[r] = fma(product, scale * x_scale, sums[r]);
      }
    }
  }
  for (int r = 0; r < kDigitRows; ++r) out[r] = sums[r];
}

void multiply_digits(const Int4Rows& w, int64_t begin, int64_t end, const Int8Rows& x, float* y) {
  static_assert(kStep % 16 == 0);
  F32 sums[kStep];
  for (F32& s : sums) s = broadcast(0.0f);
  with_format(w, [&]<int Parts, bool Zeros>() {
    for (int64_t row = begin; row < end; row += kDigitRows) {
      add_digits<Parts, Zeros>(w, row, end - 1, x, sums + (row - begin));
    }
  });
  sums_of(sums, y);
}

// ---- rows of int8 ----------------------------------------------------------------------------------------------------

constexpr int kSteps = 8;  // of a unit: four words, even and odd nibbles of each

void decode(const Int4Rows& w, int64_t row, uint8_t* codes, float* scales, float* zeros) {
  const int64_t blocks = blocks_of(w.k), parts = parts_of(w);
  const __m512i nibbles = _mm512_set1_epi8(15);
  const auto at = [&](int64_t r) { return row + r < w.n ? row + r : w.n - 1; };  // the last row again, unused
  for (int64_t r0 = 0; r0 < kInt8Rows; r0 += 16) {
    const uint8_t* rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = w.codes + at(r0 + i) * w.codes_row;
    for (int64_t b = 0; b < blocks; ++b) {
      uint8_t* to = codes + b * kUnits * kSteps * 128 + 4 * r0;
      transpose([&](int i) { return rows[i] + b * int4::kBlockBytes; },
                [&](int word, __m512i v) {
                  uint8_t* step = to + (word % 4 * kSteps + word / 4 * 2) * 128;
                  _mm512_storeu_si512(step, _mm512_and_si512(v, nibbles));
                  _mm512_storeu_si512(step + 128, _mm512_and_si512(_mm512_srli_epi16(v, 4), nibbles));
                });
    }
  }
  Scales s;
  for (int64_t r = 0; r < kInt8Rows; ++r) {
    for (int64_t begin = 0; begin < blocks; begin += kMostBlocks) {
      const int64_t n = (blocks - begin < kMostBlocks ? blocks - begin : kMostBlocks) * parts;
      w.zeros ? read_scales<true>(w, at(r), begin * parts, n, &s) : read_scales<false>(w, at(r), begin * parts, n, &s);
      for (int64_t i = 0; i < n; ++i) {
        scales[(begin * parts + i) * kInt8Rows + r] = s.scale[i];
        zeros[(begin * parts + i) * kInt8Rows + r] = w.zeros ? s.zero[i] : int4::kSymmetricZero;
      }
    }
  }
}

template <int M, int Parts>
void multiply_rows(int64_t blocks, const uint8_t* codes, const float* scales, const float* zeros, const Int8Rows& x,
                   int64_t first, const uint8_t* soon, float* y) {
  const int8_t* values[M];
  const float *x_scale[M], *x_sum[M];
  for (int i = 0; i < M; ++i) {
    values[i] = x.values + (first + i) * int8_row(blocks);
    x_scale[i] = x.scale + (first + i) * blocks * kUnits;
    x_sum[i] = x.sums + (first + i) * blocks * Parts;
  }
  F32 sums[M][2];
  for (auto& row : sums) row[0] = row[1] = broadcast(0.0f);
  for (int64_t part = 0; part < blocks * Parts; ++part) {
    F32 of_part[M][2];
    for (int u = 0; u < kUnits / Parts; ++u) {
      const int64_t unit = part * (kUnits / Parts) + u;
      if (soon) {
        for (int step = 0; step < kSteps; ++step, soon += 64) __builtin_prefetch(soon, 0, 2);
      }
      __m512i products[M][2];
      for (auto& row : products) row[0] = row[1] = _mm512_setzero_si512();
      for (int step = 0; step < kSteps; ++step, codes += 128) {
        const __m512i c0 = bytes_of(codes), c1 = bytes_of(codes + 64);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
          int32_t word;
          __builtin_memcpy(&word, values[i] + unit * kUnit + 4 * step, 4);
          const __m512i four = _mm512_set1_epi32(word);
          products[i][0] = dot(products[i][0], c0, four);
          products[i][1] = dot(products[i][1], c1, four);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const F32 scale = broadcast(x_scale[i][unit]);
        for (int v = 0; v < 2; ++v) {
          const F32 product = {_mm512_cvtepi32_ps(products[i][v])};
          of_part[i][v] = u == 0 ? product * scale : fma(product, scale, of_part[i][v]);
        }
      }
    }
    for (int v = 0; v < 2; ++v) {
      const F32 scale = load(scales + part * kInt8Rows + 16 * v), zero = load(zeros + part * kInt8Rows + 16 * v);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const F32 off = {_mm512_fnmadd_ps(zero.v, _mm512_set1_ps(x_sum[i][part]), of_part[i][v].v)};
        sums[i][v] = fma(off, scale, sums[i][v]);
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < 2; ++v) store(y + i * kInt8Rows + 16 * v, sums[i][v]);
  }
}

void multiply(const Int4Rows& w, const uint8_t* codes, const float* scales, const float* zeros, const Int8Rows& x,
              int64_t first, int64_t rows, const uint8_t* soon, float* y) {
  const int64_t blocks = blocks_of(w.k);
  const auto with_parts = [&]<int M>() {
    switch (parts_of(w)) {
      case 1: return multiply_rows<M, 1>(blocks, codes, scales, zeros, x, first, soon, y);
      case 2: return multiply_rows<M, 2>(blocks, codes, scales, zeros, x, first, soon, y);
      default: return multiply_rows<M, 4>(blocks, codes, scales, zeros, x, first, soon, y);
    }
  };
  switch (rows) {
    case 1: return with_parts.operator()<1>();
    case 2: return with_parts.operator()<2>();
    case 3: return with_parts.operator()<3>();
    case 4: return with_parts.operator()<4>();
    case 5: return with_parts.operator()<5>();
    case 6: return with_parts.operator()<6>();
    case 7: return with_parts.operator()<7>();
    default: return with_parts.operator()<8>();
  }
}

constexpr Int8Kernels kKernels = {true, pack_digits, pack, multiply_digits, decode, multiply};

#else

constexpr Int8Kernels kKernels = {};

#endif

}  // namespace

const Int8Kernels* int8_kernels() { return &kKernels; }

}  // namespace fastpost::FP_ISA
