// SPDX-License-Identifier: Apache-2.0
#include "ops/int4_gemm_simd.h"

#include "ops/int4_decode.h"

namespace fastpost::FP_ISA {
namespace {

constexpr int kWidth = F32::width;
#if defined(__AVX512F__)
constexpr int kLanes = 64;  // of a panel, as in linear_logprob_fused_simd.cpp
constexpr int kFewX = 4;    // rows of x whose sums fit the registers, for four rows of W
#else
constexpr int kLanes = 16;
constexpr int kFewX = 2;
#endif

template <bool Pairs>
constexpr int kSteps = Pairs ? kBlock / 2 : kBlock;  // of a block

template <class F>
void with_pairs(bool pairs, F&& f) {
  pairs&& kPairs ? f.template operator()<kPairs>() : f.template operator()<false>();
}

inline int64_t blocks_of(int64_t k) { return (k + kBlock - 1) / kBlock; }

// ---- weights ---------------------------------------------------------------------------------------------------------

constexpr int64_t kRowsAhead = 16;  // to prefetch where a block of columns is read

// Blocks of a row one after the other, in stored order.
template <bool Pairs>
void decode_blocks(const Int4Rows& w, int64_t row, int64_t first, int64_t count, int64_t ahead, uint32_t* out) {
  with_format(w, [&]<int Parts, bool Zeros>() {
#if defined(__AVX512BF16__)
    if constexpr (Pairs) {
      decode_pairs<Parts, Zeros, 1>(w, row, row, first, count, ahead, [&](int64_t b, int j, const __m512i* pairs) {
        _mm512_storeu_si512(out + b * kSteps<true> + 16 * j, *pairs);
      });
      return;
    }
#endif
    decode_floats<Parts, Zeros>(w, row, first, count, ahead, [&](int64_t b, int nibble, int word, F32 x) {
      store(reinterpret_cast<float*>(out) + b * kSteps<false> + 16 * nibble + word, x);
    });
  });
}

void decode(bool pairs, const Int4Rows& w, int64_t row, uint32_t* out) {
  with_pairs(pairs, [&]<bool Pairs>() { decode_blocks<Pairs>(w, row, 0, blocks_of(w.k), kAhead, out); });
}

// A block in stored order -> in the order of its columns.
inline void in_own_order(const float* stored, float* out) {
#if defined(__AVX512F__)
  // Registers of nibbles j and j + 4 hold neighbours: of words 4t + i, columns 32i + 8j + {0, ..., 7}.
  const __m512i index = _mm512_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28, 1, 17, 5, 21, 9, 25, 13, 29);
  for (int j = 0; j < 4; ++j) {
    const __m512 even = _mm512_loadu_ps(stored + 16 * j), odd = _mm512_loadu_ps(stored + 16 * (j + 4));
    for (int i = 0; i < 4; i += 2) {
      const __m512 two = _mm512_permutex2var_ps(even, _mm512_add_epi32(index, _mm512_set1_epi32(i)), odd);
      _mm256_storeu_ps(out + 32 * i + 8 * j, _mm512_castps512_ps256(two));
      _mm256_storeu_ps(out + 32 * (i + 1) + 8 * j, _mm512_extractf32x8_ps(two, 1));
    }
  }
#else
  for (int c = 0; c < kBlock; ++c) out[c] = stored[kStored.of_column[c]];
#endif
}

void dequantize(const Int4Rows& w, int64_t row, DType dtype, void* out) {
  visit_float(dtype, [&]<class T>(T) {
    for (int64_t b = 0; b * kBlock < w.k; ++b) {
      float stored[kBlock], values[kBlock];
      decode_blocks<false>(w, row, b, 1, kAhead, reinterpret_cast<uint32_t*>(stored));
      in_own_order(stored, values);
      T* to = static_cast<T*>(out) + b * kBlock;
      const int64_t n = w.k - b * kBlock < kBlock ? w.k - b * kBlock : kBlock;
      int64_t c = 0;
      for (; c + kWidth <= n; c += kWidth) store(to + c, load(values + c));
      if (c < n) store_tail(to + c, load(values + c), n - c);
    }
  });
}

void decode_along(bool pairs, const Int4Rows& w, int64_t row, int64_t count, int64_t block, int64_t panel_steps,
                  uint32_t* out) {
  const auto at = [&](int64_t step, int column) {
    return out + (column / kLanes * panel_steps + step) * kLanes + column % kLanes;
  };
#if defined(__AVX512BF16__)
  if (pairs) {
    // 16-bit lane 2w + h of a register is column 32i + 8j + 2t + h; a word takes it from two rows.
    alignas(64) uint16_t lanes[2][32];
    for (int half = 0; half < 2; ++half) {
      for (int d = 0; d < 16; ++d) {
        const int i = 2 * half + d / 8, t = d % 8 / 2, h = d % 2;
        lanes[half][2 * d] = static_cast<uint16_t>(2 * (4 * t + i) + h);
        lanes[half][2 * d + 1] = static_cast<uint16_t>(lanes[half][2 * d] + 32);
      }
    }
    const __m512i index[2] = {_mm512_load_si512(lanes[0]), _mm512_load_si512(lanes[1])};
    with_format(w, [&]<int Parts, bool Zeros>() {
      for (int64_t r = 0; r < count; r += 2) {
        __m512i first[4], second[4];
        decode_pairs<Parts, Zeros, 2>(w, row + r, row + count - 1, block, 1, kRowsAhead * w.codes_row,
                                      [&](int64_t, int j, const __m512i* pairs) {
                                        first[j] = pairs[0];
                                        second[j] = r + 1 < count ? pairs[1] : _mm512_setzero_si512();
                                      });
        for (int j = 0; j < 4; ++j) {
          for (int half = 0; half < 2; ++half) {
            const __m512i two = _mm512_permutex2var_epi16(first[j], index[half], second[j]);
            const int column = 64 * half + 8 * j;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at(r / 2, column)), _mm512_castsi512_si256(two));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at(r / 2, column + 32)), _mm512_extracti64x4_epi64(two, 1));
          }
        }
      }
    });
    return;
  }
#endif
  (void)pairs;
  for (int64_t r = 0; r < count; ++r) {
    float stored[kBlock], values[kBlock];
    decode_blocks<false>(w, row + r, block, 1, kRowsAhead * w.codes_row, reinterpret_cast<uint32_t*>(stored));
    in_own_order(stored, values);
    for (int c = 0; c < kBlock; c += kWidth) store(reinterpret_cast<float*>(at(r, c)), load(values + c));
  }
}

// ---- rows of x -------------------------------------------------------------------------------------------------------

// The words of one block of a row, in their own order; zero past column k.
template <class T, bool Pairs>
inline void words_of(const T* src, int64_t k, int64_t block, uint32_t* out) {
  const T* from = src + block * kBlock;
  const int64_t n = k - block * kBlock < kBlock ? k - block * kBlock : kBlock;
  if constexpr (Pairs) {
    __builtin_memcpy(out, from, 2 * n);
    __builtin_memset(reinterpret_cast<char*>(out) + 2 * n, 0, 2 * (kBlock - n));
  } else {
    float* to = reinterpret_cast<float*>(out);
    int64_t c = 0;
    for (; c + kWidth <= n; c += kWidth) store(to + c, load(from + c));
    for (; c < n; ++c) to[c] = to_float(from[c]);
    for (; c < kBlock; ++c) to[c] = 0.0f;
  }
}

template <bool Pairs>
constexpr const uint8_t* kStepOf = Pairs ? kStored.of_pair : kStored.of_column;

void pack(DType dtype, bool pairs, const void* src, int64_t k, uint32_t* out) {
  visit_words(dtype, pairs, [&]<class T, bool Pairs>() {
    for (int64_t b = 0; b * kBlock < k; ++b, out += kSteps<Pairs>) {
      uint32_t words[kBlock];
      words_of<T, Pairs>(static_cast<const T*>(src), k, b, words);
      for (int d = 0; d < kSteps<Pairs>; ++d) out[kStepOf<Pairs>[d]] = words[d];
    }
  });
}

void pack_across(DType dtype, bool pairs, const char* src, int64_t row_bytes, int64_t count, int64_t k, int64_t lanes,
                 uint32_t* out) {
  visit_words(dtype, pairs, [&]<class T, bool Pairs>() {
    for (int64_t b = 0; b * kBlock < k; ++b, out += kSteps<Pairs> * lanes) {
      for (int64_t lane = 0; lane < lanes; lane += 16) {
        alignas(64) uint32_t words[16][kSteps<Pairs>];
        for (int64_t i = 0; i < 16; ++i) {
          if (lane + i < count) {
            words_of<T, Pairs>(reinterpret_cast<const T*>(src + (lane + i) * row_bytes), k, b, words[i]);
          } else {
            __builtin_memset(words[i], 0, sizeof words[i]);
          }
        }
        for (int d = 0; d < kSteps<Pairs>; d += 16) {
          transpose([&](int i) { return words[i] + d; },
                    [&](int column, const auto& across) {
                      put_words(out + kStepOf<Pairs>[d + column] * lanes + lane, across);
                    });
        }
      }
    }
  });
}

// ---- few rows of x ---------------------------------------------------------------------------------------------------

// So many rows of W at once that their sums fit the registers and each word of x is of use to several.
template <bool Pairs, int M>
constexpr int kFewW = !Pairs   ? 1
                      : M <= 5 ? 4
                               : 3;

template <bool Pairs, int M>
void few_of(const Int4Rows& w, int64_t begin, int64_t end, const uint32_t* x, int64_t x_row, float* y) {
  constexpr int R = kFewW<Pairs, M>;
  const int64_t blocks = blocks_of(w.k);
  with_format(w, [&]<int Parts, bool Zeros>() {
    for (int64_t row = begin; row < end; row += R) {
      F32 sums[R * M];
#pragma GCC unroll 24
      for (F32& s : sums) s = broadcast(0.0f);
      if constexpr (Pairs) {
#if defined(__AVX512BF16__)
        decode_pairs<Parts, Zeros, R>(w, row, end - 1, 0, blocks, kAhead, [&](int64_t b, int j, const __m512i* pairs) {
#pragma GCC unroll 8
          for (int i = 0; i < M; ++i) {
            const __m512bh words = (__m512bh)_mm512_loadu_si512(x + i * x_row + b * kSteps<true> + 16 * j);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
              sums[r * M + i].v = _mm512_dpbf16_ps(sums[r * M + i].v, (__m512bh)pairs[r], words);
          }
        });
#endif
      } else {
        decode_floats<Parts, Zeros>(w, row, 0, blocks, kAhead, [&](int64_t b, int nibble, int word, F32 value) {
          for (int i = 0; i < M; ++i) {
            const float* words = reinterpret_cast<const float*>(x + i * x_row + b * kSteps<false> + 16 * nibble + word);
            sums[i] = fma(value, load(words), sums[i]);
          }
        });
      }
      float results[R * M];
      sums_of(sums, results);
      for (int i = 0; i < M; ++i) {
        for (int r = 0; r < R && row + r < end; ++r) y[i * kStep + row - begin + r] = results[r * M + i];
      }
    }
  });
}

void few(bool pairs, const Int4Rows& w, int64_t begin, int64_t end, const uint32_t* x, int64_t x_row, int64_t m,
         float* y) {
  with_pairs(pairs, [&]<bool Pairs>() {
    switch (m) {
      case 1: return few_of<Pairs, 1>(w, begin, end, x, x_row, y);
      case 2: return few_of<Pairs, 2>(w, begin, end, x, x_row, y);
      case 3: return few_of<Pairs, 3>(w, begin, end, x, x_row, y);
      case 4: return few_of<Pairs, 4>(w, begin, end, x, x_row, y);
      case 5: return few_of<Pairs, 5>(w, begin, end, x, x_row, y);
      case 6: return few_of<Pairs, 6>(w, begin, end, x, x_row, y);
      case 7: return few_of<Pairs, 7>(w, begin, end, x, x_row, y);
      default: return few_of<Pairs, 8>(w, begin, end, x, x_row, y);
    }
  });
}

// ---- results ---------------------------------------------------------------------------------------------------------

template <class T>
inline void finish_row(const float* y, int64_t n, const T* bias, T* out) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, bias ? load(y + i) + load(bias + i) : load(y + i));
  if (i == n) return;
  const F32 rest = load_tail(y + i, n - i, 0.0f);
  store_tail(out + i, bias ? rest + load_tail(bias + i, n - i, 0.0f) : rest, n - i);
}

void finish(const float* y, int64_t n, DType dtype, const void* bias, void* out) {
  visit_float(dtype, [&]<class T>(T) { finish_row(y, n, static_cast<const T*>(bias), static_cast<T*>(out)); });
}

void finish_across(const float* c, int64_t lanes, int64_t n, int64_t used, DType dtype, const void* bias, char* out,
                   int64_t out_row) {
  visit_float(dtype, [&]<class T>(T) {
    for (int64_t j = 0; j < n; j += 16) {
      const int64_t columns = n - j < 16 ? n - j : 16;
      for (int64_t lane = 0; lane < used; lane += 16) {
        alignas(64) float tile[16][16];
        if (columns < 16) {
          for (int64_t i = 0; i < 16; ++i) {
            for (int64_t r = 0; r < columns; ++r) tile[i][r] = c[(j + r) * lanes + lane + i];
          }
        } else {
          const uint32_t* first = reinterpret_cast<const uint32_t*>(c) + j * lanes + lane;
          transpose([&](int i) { return first + i * lanes; }, [&](int i, const auto& row) { put_words(tile[i], row); });
        }
        for (int64_t i = 0; i < 16 && lane + i < used; ++i) {
          finish_row(tile[i], columns, bias ? static_cast<const T*>(bias) + j : nullptr,
                     reinterpret_cast<T*>(out + (lane + i) * out_row) + j);
        }
      }
    }
  });
}

constexpr Int4Kernels kKernels = {decode, decode_along, dequantize, pack, pack_across, few, finish, finish_across};

}  // namespace

const Int4Kernels* int4_kernels() { return &kKernels; }

}  // namespace fastpost::FP_ISA
