// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_gemm_simd.h"

#include "core/simd_words.h"

namespace fastpost::FP_ISA {
namespace {

constexpr int kWidth = F32::width;
#if defined(__AVX512F__)
constexpr int kLanes = 64;  // of a panel, as in linear_logprob_fused_simd.cpp
#else
constexpr int kLanes = 16;
#endif

template <class T>
const T* at(const GroupedRows& x, int64_t row, int64_t column) {
  return reinterpret_cast<const T*>(x.row(row)) + column;
}

// ---- packing ---------------------------------------------------------------------------------------------------------

// n elements as words; a pair that lacks its second half has zero there.
template <class T, bool Pairs>
inline void words_of(const T* from, int64_t n, uint32_t* out) {
  if constexpr (Pairs) {
    if (n % 2) out[n / 2] = 0;
    __builtin_memcpy(out, from, 2 * n);
  } else {
    float* to = reinterpret_cast<float*>(out);
    int64_t c = 0;
    for (; c + kWidth <= n; c += kWidth) store(to + c, load(from + c));
    for (; c < n; ++c) to[c] = to_float(from[c]);
  }
}

void pack_rows(bool pairs, const GroupedRows& x, int64_t first, int64_t count, int64_t begin, int64_t end,
               int64_t row_words, uint32_t* out) {
  visit_words(x.dtype, pairs, [&]<class T, bool Pairs>() {
    for (int64_t i = 0; i < count; ++i) {
      words_of<T, Pairs>(at<T>(x, first + i, begin), end - begin, out + i * row_words);
    }
  });
}

void pack_across(bool pairs, const GroupedRows& x, int64_t first, int64_t count, int64_t begin, int64_t end,
                 uint32_t* out) {
  visit_words(x.dtype, pairs, [&]<class T, bool Pairs>() {
    constexpr int64_t columns = Pairs ? 32 : 16;  // 16 words
    for (int64_t c = begin; c < end; c += columns, out += 16 * kLanes) {
      const int64_t n = end - c < columns ? end - c : columns, steps = Pairs ? (n + 1) / 2 : n;
      for (int64_t lane = 0; lane < count; lane += 16) {
        alignas(64) uint32_t words[16][16];
        for (int64_t i = 0; i < 16; ++i) {
          if (n < columns || lane + i >= count) __builtin_memset(words[i], 0, sizeof words[i]);
          if (lane + i < count) words_of<T, Pairs>(at<T>(x, first + lane + i, c), n, words[i]);
        }
        transpose([&](int i) { return words[i]; },
                  [&](int step, const auto& across) {
                    if (step < steps) put_words(out + step * kLanes + lane, across);
                  });
      }
    }
  });
}

// 16 words of two neighbouring rows, column by column.
#if defined(__AVX512BF16__)
inline void interleave(const bfloat16* first, const bfloat16* second, int64_t n, uint32_t* to) {
  const __mmask16 some = first_of(n);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, first));
  const __m512i high = second ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, second)) : _mm512_setzero_si512();
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

template <class T, bool Pairs>
inline void along(const T* one, [[maybe_unused]] const T* two, int64_t n, uint32_t* to) {
  if constexpr (Pairs) {
#if defined(__AVX512BF16__)
    interleave(one, two, n, to);
#endif
  } else {
    for (int64_t i = 0; i < 16; i += kWidth) {
      store(reinterpret_cast<float*>(to) + i, i < n ? load_part(one + i, n - i) : broadcast(0.0f));
    }
  }
}

void pack_along(bool pairs, const GroupedRows& x, int64_t first, int64_t count, int64_t begin, int64_t end,
                int64_t lanes, int64_t panel_words, uint32_t* out) {
  visit_words(x.dtype, pairs, [&]<class T, bool Pairs>() {
    constexpr int64_t rows = Pairs ? 2 : 1;
    for (int64_t r = 0, step = 0; r < count; r += rows, ++step) {
      const T* one = at<T>(x, first + r, begin);
      const T* two = Pairs && r + 1 < count ? at<T>(x, first + r + 1, begin) : nullptr;
      for (int64_t c = 0, panel = 0; c < end - begin; c += lanes, ++panel) {
        uint32_t* to = out + panel * panel_words + step * lanes;
        for (int64_t l = 0; l < lanes; l += 16) {
          const int64_t n = end - begin - c - l;
          if (n <= 0) {
            __builtin_memset(to + l, 0, 64);
          } else {
            along<T, Pairs>(one + c + l, two ? two + c + l : nullptr, n, to + l);
          }
        }
      }
    }
  });
}

// ---- few rows --------------------------------------------------------------------------------------------------------

constexpr int64_t kAhead =
    16 << 10;  // bytes to prefetch: rows are read from end to end, further than the hardware looks

// W is read from end to end, a row at a time: several rows side by side look like as many short streams to the memory and
// come at half the speed (576 columns of bfloat16, past the caches: 5.2 against 10.5 GB/s beside other work). Sums of so
// many rows wait for one transposition that adds up all their lanes.
template <int M>
constexpr int kFewW = M == 1   ? 16
                      : M == 2 ? 8
                      : M <= 4 ? 4
                               : 2;

template <bool Pairs, int M, class T>
void few_of(const char* w, int64_t w_row_bytes, int64_t count, int64_t k, const uint32_t* x, int64_t x_row, float* y,
            int64_t y_row) {
  constexpr int R = kFewW<M>;
  constexpr int64_t columns = Pairs ? 2 * kWidth : kWidth;
  // The even and the odd steps have sums of their own, so that one row of x does not wait for each product; for every M,
  // so that the bits of a row do not depend on others.
  const auto step = [&](const T* row, int64_t c, F32* sums) {
    const uint32_t* words = x + (Pairs ? c / 2 : c);
    if constexpr (Pairs) {
#if defined(__AVX512BF16__)
      const int64_t left = k - c;
      const __mmask32 some = left >= 32 ? 0xffffffffu : (1u << left) - 1;
      __builtin_prefetch(reinterpret_cast<const char*>(row + c) + kAhead);
      const __m512bh part = (__m512bh)_mm512_maskz_loadu_epi16(some, row + c);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        sums[i].v = _mm512_dpbf16_ps(sums[i].v, part, (__m512bh)_mm512_loadu_si512(words + i * x_row));
      }
#endif
    } else {
      const F32 part = load_part(row + c, k - c);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        sums[i] = fma(part, load(reinterpret_cast<const float*>(words) + i * x_row), sums[i]);
      }
    }
  };
  for (int64_t r0 = 0; r0 < count; r0 += R) {
    F32 sums[R * M];
    const int64_t rows = count - r0 < R ? count - r0 : R;
    for (int64_t r = 0; r < R; ++r) {
      const T* row = reinterpret_cast<const T*>(w + (r0 + r) * w_row_bytes);
      F32 even[M], odd[M];
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) even[i] = odd[i] = broadcast(0.0f);
      if (r < rows) {
        int64_t c = 0;
        for (; c + columns < k; c += 2 * columns) {
          step(row, c, even);
          step(row, c + columns, odd);
        }
        if (c < k) step(row, c, even);
      }
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sums[r * M + i] = even[i] + odd[i];
    }
    float results[R * M];
    sums_of(sums, results);
    for (int i = 0; i < M; ++i) {
      for (int64_t r = 0; r < rows; ++r) y[i * y_row + r0 + r] = results[r * M + i];
    }
  }
}

template <class F>
void with_rows(int64_t m, F&& f) {  // 1 to 8
  switch (m) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
    case 7: return f.template operator()<7>();
    default: return f.template operator()<8>();
  }
}

void few(bool pairs, DType dtype, const char* w, int64_t w_row_bytes, int64_t count, int64_t k, const uint32_t* x,
         int64_t x_row, int64_t m, float* y, int64_t y_row) {
  visit_words(dtype, pairs, [&]<class T, bool Pairs>() {
    with_rows(m, [&]<int M>() { few_of<Pairs, M, T>(w, w_row_bytes, count, k, x, x_row, y, y_row); });
  });
}

// Sums stay in y, which the first-level cache holds, while W goes by row by row.
template <bool Pairs, int M, class T>
void few_along_of(const char* w, int64_t w_row_bytes, int64_t count, int64_t columns, const uint32_t* x, int64_t x_row,
                  float* y, int64_t y_row) {
  constexpr int R = Pairs ? 8 : 4;  // rows of W at once
  for (int64_t r0 = 0; r0 < count; r0 += R) {
    const int64_t n = count - r0 < R ? count - r0 : R;
    const T* row[R];
    for (int r = 0; r < R; ++r) row[r] = reinterpret_cast<const T*>(w + (r0 + (r < n ? r : n - 1)) * w_row_bytes);
    if constexpr (Pairs) {
#if defined(__AVX512BF16__)
      const uint32_t* words = x + r0 / 2;
      alignas(64) uint16_t lanes[2][32];
      for (int i = 0; i < 32; ++i) {
        for (int half = 0; half < 2; ++half) lanes[half][i] = static_cast<uint16_t>(16 * half + i / 2 + i % 2 * 32);
      }
      const __m512i first = _mm512_load_si512(lanes[0]), second = _mm512_load_si512(lanes[1]);
      for (int64_t c = 0; c < columns; c += 32) {
        const int64_t left = columns - c;
        const __mmask32 some = left >= 32 ? 0xffffffffu : (1u << left) - 1;
        __m512 sums[M][2];
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
          sums[i][0] = _mm512_loadu_ps(y + i * y_row + c);
          sums[i][1] = _mm512_loadu_ps(y + i * y_row + c + 16);
        }
#pragma GCC unroll 4
        for (int p = 0; p < R / 2; ++p) {
          if (2 * p >= n) break;
          __builtin_prefetch(reinterpret_cast<const char*>(row[2 * p] + c) + R * w_row_bytes);
          __builtin_prefetch(reinterpret_cast<const char*>(row[2 * p + 1] + c) + R * w_row_bytes);
          const __m512i one = _mm512_maskz_loadu_epi16(some, row[2 * p] + c);
          const __m512i two = _mm512_maskz_loadu_epi16(2 * p + 1 < n ? some : 0u, row[2 * p + 1] + c);
          const __m512bh low = (__m512bh)_mm512_permutex2var_epi16(one, first, two);
          const __m512bh high = (__m512bh)_mm512_permutex2var_epi16(one, second, two);
#pragma GCC unroll 8
          for (int i = 0; i < M; ++i) {
            const __m512bh word = (__m512bh)_mm512_set1_epi32(static_cast<int>(words[i * x_row + p]));
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], word, low);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], word, high);
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
          _mm512_storeu_ps(y + i * y_row + c, sums[i][0]);
          _mm512_storeu_ps(y + i * y_row + c + 16, sums[i][1]);
        }
      }
#endif
    } else {
      const float* words = reinterpret_cast<const float*>(x) + r0;
      for (int64_t c = 0; c < columns; c += kWidth) {
        F32 part[R];
        for (int r = 0; r < n; ++r) part[r] = load_part(row[r] + c, columns - c);
        for (int i = 0; i < M; ++i) {
          F32 sum = load(y + i * y_row + c);
          for (int r = 0; r < n; ++r) sum = fma(broadcast(words[i * x_row + r]), part[r], sum);
          store(y + i * y_row + c, sum);
        }
      }
    }
  }
}

void few_along(bool pairs, DType dtype, const char* w, int64_t w_row_bytes, int64_t count, int64_t columns,
               const uint32_t* x, int64_t x_row, int64_t m, float* y, int64_t y_row) {
  visit_words(dtype, pairs, [&]<class T, bool Pairs>() {
    with_rows(m, [&]<int M>() { few_along_of<Pairs, M, T>(w, w_row_bytes, count, columns, x, x_row, y, y_row); });
  });
}

// So few steps that results go straight from registers to memory. (Past the caches is no faster: new memory has just been
// cleared, so its lines are there.)
template <bool Pairs, class T>
void outer_of(const uint32_t* a, int64_t a_step, int64_t count, const uint32_t* panels, int64_t steps, int64_t columns,
              char* out, int64_t out_row) {
  constexpr int R = 4, kVectors = kLanes / kWidth;
  for (int64_t r0 = 0; r0 < count; r0 += R) {
    const int64_t rows = count - r0 < R ? count - r0 : R;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const uint32_t* b = panels + c * steps;
      F32 sums[R][kVectors];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = broadcast(0.0f);
      }
      for (int64_t s = 0; s < steps; ++s, b += kLanes) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const uint32_t word = a[s * a_step + r0 + (r < rows ? r : 0)];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            if constexpr (Pairs) {
#if defined(__AVX512BF16__)
              sums[r][v].v = _mm512_dpbf16_ps(sums[r][v].v, (__m512bh)_mm512_set1_epi32(static_cast<int>(word)),
                                              (__m512bh)_mm512_loadu_si512(b + v * kWidth));
#endif
            } else {
              sums[r][v] =
                  fma(broadcast(bits_to_float(word)), load(reinterpret_cast<const float*>(b) + v * kWidth), sums[r][v]);
            }
          }
        }
      }
      const int64_t left = columns - c;
      for (int r = 0; r < rows; ++r) {
        T* to = reinterpret_cast<T*>(out + (r0 + r) * out_row) + c;
        for (int v = 0; v < kVectors && v * kWidth < left; ++v) {
          const int64_t n = left - v * kWidth;
          n >= kWidth ? store(to + v * kWidth, sums[r][v]) : store_tail(to + v * kWidth, sums[r][v], n);
        }
      }
    }
  }
}

void outer(bool pairs, DType dtype, const uint32_t* a, int64_t a_step, int64_t count, const uint32_t* panels,
           int64_t steps, int64_t columns, char* out, int64_t out_row) {
  visit_words(dtype, pairs, [&]<class T, bool Pairs>() {
    outer_of<Pairs, T>(a, a_step, count, panels, steps, columns, out, out_row);
  });
}

// ---- activations -----------------------------------------------------------------------------------------------------

inline F32 negative(F32 x) { return broadcast(0.0f) - x; }
inline F32 one_where_positive(F32 x) { return broadcast(1.0f) - one_where_zero(max(broadcast(0.0f), x)); }

struct Value {
  F32 value, slope;
};

template <Activation A>
inline Value act(F32 x) {
  const F32 one = broadcast(1.0f), half = broadcast(0.5f);
  if constexpr (A == Activation::SwiGlu) {
    const F32 s = one / (one + exp(negative(x)));
    return {x * s, s * fma(x, one - s, one)};
  } else if constexpr (A == Activation::GeGlu) {
    // x·Φ(x), Φ through erfc by Chebyshev's approximation of Numerical Recipes, §6.2: relative error below 1.2e-7.
    const F32 z = max(x, negative(x)) * broadcast(0.70710678f), t = one / fma(half, z, one);
    F32 p = broadcast(0.17087277f);
    constexpr float kSeries[] = {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f,
                                 0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
    for (const float c : kSeries) {
      p = fma(p, t, broadcast(c));
    }
    const F32 tail = half * t * exp(fma(negative(z), z, p)), positive = one_where_positive(x);
    const F32 phi = fma(positive, one - tail - tail, tail);
    return {x * phi, fma(x * broadcast(0.39894228f), exp(negative(z) * z), phi)};
  } else if constexpr (A == Activation::GeGluTanh) {
    const F32 c = broadcast(0.79788456f), cubic = broadcast(0.044715f), x2 = x * x;
    const F32 t = tanh(c * x * fma(cubic, x2, one)), slope = c * fma(broadcast(3.0f) * cubic, x2, one);
    return {half * x * (one + t), half * fma(x * slope, fma(negative(t), t, one), one + t)};
  } else {
    return {max(broadcast(0.0f), x), one_where_positive(x)};
  }
}

template <class F>
void with_activation(Activation a, F&& f) {
  switch (a) {
    case Activation::SwiGlu: return f.template operator()<Activation::SwiGlu>();
    case Activation::GeGlu: return f.template operator()<Activation::GeGlu>();
    case Activation::GeGluTanh: return f.template operator()<Activation::GeGluTanh>();
    default: return f.template operator()<Activation::ReGlu>();
  }
}

void add_bias(float* z, int64_t z_row, int64_t rows, int64_t used, const char* bias, DType dtype, bool by_row) {
  visit_float(dtype, [&]<class T>(T) {
    const T* b = reinterpret_cast<const T*>(bias);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < used; ++j) z[i * z_row + j] += to_float(b[by_row ? i : j]);
    }
  });
}

void activate(Activation activation, float* first, const float* second, int64_t z_row, int64_t rows, int64_t used) {
  with_activation(activation, [&]<Activation A>() {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < used; j += kWidth) {
        float* to = first + i * z_row + j;
        store(to, act<A>(load(to)).value * load(second + i * z_row + j));
      }
    }
  });
}

template <Activation A, class T>
float backward_of(const T* first, const T* second, const float* grad, float gate, int64_t n, T* out, T* grad_first,
                  T* grad_second) {
  const F32 scale = broadcast(gate);
  F32 dot = broadcast(0.0f);
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t left = n - i;
    const bool whole = left >= kWidth;
    const auto get = [&](const auto* p) { return whole ? load(p + i) : load_tail(p + i, left, 0.0f); };
    const auto put = [&](T* p, F32 x) { p == nullptr ? void() : whole ? store(p + i, x) : store_tail(p + i, x, left); };
    const F32 u = get(second);
    const Value v = act<A>(get(first));
    put(out, scale * v.value * u);
    if (!grad) continue;
    const F32 d = get(grad);
    dot = fma(d, v.value * u, dot);
    put(grad_first, scale * d * v.slope * u);
    put(grad_second, scale * d * v.value);
  }
  return sum(dot);
}

float activation_backward(Activation activation, DType dtype, const void* first, const void* second, const float* grad,
                          float gate, int64_t n, void* out, void* grad_first, void* grad_second) {
  float dot = 0.0f;
  with_activation(activation, [&]<Activation A>() {
    visit_float(dtype, [&]<class T>(T) {
      dot = backward_of<A>(static_cast<const T*>(first), static_cast<const T*>(second), grad, gate, n,
                           static_cast<T*>(out), static_cast<T*>(grad_first), static_cast<T*>(grad_second));
    });
  });
  return dot;
}

void add_rows(const GroupedRows& x, int64_t first, int64_t count, int64_t begin, int64_t n, float* sums) {
  visit_float(x.dtype, [&]<class T>(T) {
    for (int64_t r = 0; r < count; ++r) {
      const T* from = at<T>(x, first + r, begin);
      int64_t i = 0;
      for (; i + kWidth <= n; i += kWidth) store(sums + i, load(sums + i) + load(from + i));
      for (; i < n; ++i) sums[i] += to_float(from[i]);
    }
  });
}

constexpr GroupedKernels kKernels = {pack_across, pack_along, pack_rows,           few,     few_along, outer,
                                     add_bias,    activate,   activation_backward, add_rows};

}  // namespace

const GroupedKernels* grouped_kernels() { return &kKernels; }

}  // namespace fastpost::FP_ISA
