// SPDX-License-Identifier: Apache-2.0
#include "ops/paged_attention_simd.h"

#include "core/simd_words.h"

namespace fastpost::FP_ISA {
namespace {

constexpr int kWidth = F32::width;
constexpr float kInfinity = __builtin_inff();

// Sums under way at a time: they and their operands fit the registers.
#if defined(__AVX512F__)
constexpr int kSums = 16;
#else
constexpr int kSums = 8;
#endif
constexpr int kAtOnce = 4;  // vectors

inline int64_t up16(int64_t n) { return (n + 15) / 16 * 16; }

inline float first_lane(F32 x) {
  float lanes[kWidth];
  store(lanes, x);
  return lanes[0];
}
inline float exp_of(float x) { return first_lane(exp(broadcast(x))); }

template <class F>
void with_vectors(int64_t m, F&& f) {  // 1 to kAtOnce
  switch (m) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    default: return f.template operator()<4>();
  }
}

// ---- few vectors -----------------------------------------------------------------------------------------------------

// Rows lie in pages that are anywhere, where the hardware does not look ahead: so many rows are asked for in advance, a
// few at a time between the sums, so that memory never rests. Into the second-level cache, as more requests can be under
// way than for the first: 10 GB/s instead of 6.7 from pages of 4 KiB in no order (a loop that only reads: 9), 13 instead
// of 10 from pages in order (17).
constexpr int64_t kAhead = 48;

inline void ask_for(const char* from, int64_t bytes) {
  for (int64_t c = 0; c < bytes; c += 64) __builtin_prefetch(from + c, 0, 2);
}

// logits[v][r] = query v · row r, for M vectors and R rows.
template <bool Pairs, int M, int R, class T>
void dots(const char* const* rows, int64_t d, const uint32_t* query, int64_t query_row, float* logits) {
  constexpr int64_t columns = Pairs ? 2 * kWidth : kWidth;
  F32 sums[R * M];
#pragma GCC unroll 16
  for (F32& s : sums) s = broadcast(0.0f);
  for (int64_t c = 0; c < d; c += columns) {
    const uint32_t* words = query + (Pairs ? c / 2 : c);
    if constexpr (Pairs) {
#if defined(__AVX512BF16__)
      const int64_t left = d - c;
      const __mmask32 some = left >= 32 ? 0xffffffffu : (1u << left) - 1;
      __m512bh word[M];
#pragma GCC unroll 4
      for (int v = 0; v < M; ++v) word[v] = (__m512bh)_mm512_loadu_si512(words + v * query_row);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512bh part = (__m512bh)_mm512_maskz_loadu_epi16(some, rows[r] + 2 * c);
#pragma GCC unroll 4
        for (int v = 0; v < M; ++v) sums[r * M + v].v = _mm512_dpbf16_ps(sums[r * M + v].v, part, word[v]);
      }
#endif
    } else {
      F32 word[M];
#pragma GCC unroll 4
      for (int v = 0; v < M; ++v) word[v] = load(reinterpret_cast<const float*>(words) + v * query_row);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const F32 part = load_part(reinterpret_cast<const T*>(rows[r]) + c, d - c);
#pragma GCC unroll 4
        for (int v = 0; v < M; ++v) sums[r * M + v] = fma(part, word[v], sums[r * M + v]);
      }
    }
  }
  float results[R * M];
  sums_of(sums, results);
  for (int v = 0; v < M; ++v) {
    for (int r = 0; r < R; ++r) logits[v * kSplit + r] = results[r * M + v];
  }
}

template <bool Pairs, class T>
void all_dots(PointedRows keys, int64_t d, const uint32_t* query, int64_t query_row, int64_t m, float* logits) {
  constexpr int64_t kBlock = 16;  // rows that stay in the first-level cache for all vectors
  for (int64_t i0 = 0; i0 < keys.count; i0 += kBlock) {
    const int64_t n = keys.count - i0 < kBlock ? keys.count - i0 : kBlock;
    const char* rows[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) rows[i] = keys.row[i0 + (i < n ? i : n - 1)];  // the last again, unused
    for (int64_t v = 0; v < m; v += kAtOnce) {
      with_vectors(m - v, [&]<int M>() {
        constexpr int R = kSums / (M == 3 ? 4 : M);
        for (int64_t i = 0; i < n; i += R) {
          if (v == 0) {
            for (int64_t r = i0 + i + kAhead; r < i0 + i + kAhead + R && r < keys.count; ++r) {
              ask_for(keys.row[r], d * static_cast<int64_t>(sizeof(T)));
            }
          }
          dots<Pairs, M, R, T>(rows + i, d, query + v * query_row, query_row, logits + v * kSplit + i0 + i);
        }
      });
    }
  }
}

// One vector's logits -> e^(logit - max), 0 where it does not see.
void soften(float* z, int64_t count, Seen seen, LogitRule rule, float* stats) {
  const int64_t padded = (count + kWidth - 1) / kWidth * kWidth;
  const F32 scaling = broadcast(rule.scaling), cap = broadcast(rule.softcap);
  for (int64_t i = 0; i < padded; i += kWidth) {
    F32 a = load(z + i) * scaling;
    if (rule.softcap != 0) a = cap * tanh(a / cap);
    store(z + i, a);
  }
  for (int64_t i = 0; i < seen.begin; ++i) z[i] = -kInfinity;
  for (int64_t i = seen.end; i < padded; ++i) z[i] = -kInfinity;
  F32 most = broadcast(-kInfinity);
  for (int64_t i = 0; i < padded; i += kWidth) most = max(most, load(z + i));
  stats[0] = max_lane(most);
  stats[1] = 0;
  if (stats[0] == -kInfinity) {
    for (int64_t i = 0; i < padded; ++i) z[i] = 0;
    return;
  }
  const F32 shift = broadcast(stats[0]);
  F32 total = broadcast(0.0f);
  for (int64_t i = 0; i < padded; i += kWidth) {
    const F32 p = exp(load(z + i) - shift);
    store(z + i, p);
    total = total + p;
  }
  stats[1] = sum(total);
}

// out[v][C registers] += Σ_r p[v][r]·row r, for M vectors; the first `ahead` rows are not the last kAhead of all.
template <int M, int C, class T>
void weigh(const char* const* rows, int64_t count, int64_t ahead, int64_t begin, int64_t d, const float* p, float* out,
           int64_t out_row) {
  F32 sums[M][C];
#pragma GCC unroll 4
  for (int v = 0; v < M; ++v) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[v][c] = load(out + v * out_row + begin + c * kWidth);
  }
  for (int64_t r = 0; r < count; ++r) {
    const T* row = reinterpret_cast<const T*>(rows[r]) + begin;
    if (r < ahead) ask_for(rows[r + kAhead] + begin * sizeof(T), C * kWidth * static_cast<int64_t>(sizeof(T)));
    F32 part[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) part[c] = C > 1 ? load(row + c * kWidth) : load_part(row, d - begin);
#pragma GCC unroll 4
    for (int v = 0; v < M; ++v) {
      const F32 share = broadcast(p[v * kSplit + r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[v][c] = fma(share, part[c], sums[v][c]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < M; ++v) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(out + v * out_row + begin + c * kWidth, sums[v][c]);
  }
}

template <class T>
void weigh_all(PointedRows values, int64_t d, int64_t m, const float* p, float* out, int64_t out_row) {
  constexpr int64_t kBlock = 32;
  constexpr int C = kSums / kAtOnce;
  for (int64_t i = 0; i < values.count; i += kBlock) {
    const int64_t n = values.count - i < kBlock ? values.count - i : kBlock;
    for (int64_t v = 0; v < m; v += kAtOnce) {
      with_vectors(m - v, [&]<int M>() {
        int64_t c = 0;
        for (; c + C * kWidth <= d; c += C * kWidth) {
          weigh<M, C, T>(values.row + i, n, v ? 0 : values.count - i - kAhead, c, d, p + v * kSplit + i,
                         out + v * out_row, out_row);
        }
        for (; c < d; c += kWidth) {
          weigh<M, 1, T>(values.row + i, n, 0, c, d, p + v * kSplit + i, out + v * out_row, out_row);
        }
      });
    }
  }
}

void few(bool pairs, DType dtype, PointedRows keys, PointedRows values, int64_t d, const uint32_t* query,
         int64_t query_row, int64_t m, const Seen* seen, LogitRule rule, float* logits, float* out, int64_t out_row,
         float* stats, int64_t stats_row) {
  const int64_t padded = up16(d);
  for (int64_t v = 0; v < m; ++v) {
    for (int64_t c = 0; c < padded; c += kWidth) store(out + v * out_row + c, broadcast(0.0f));
  }
  visit_words(dtype, pairs, [&]<class T, bool Pairs>() {
    all_dots<Pairs, T>(keys, d, query, query_row, m, logits);
    for (int64_t i = 0; i < kAhead && i < values.count; ++i) {
      ask_for(values.row[i], d * static_cast<int64_t>(sizeof(T)));
    }
    for (int64_t v = 0; v < m; ++v) soften(logits + v * kSplit, keys.count, seen[v], rule, stats + v * stats_row);
    weigh_all<T>(values, d, m, logits, out, out_row);
  });
}

// ---- many vectors ----------------------------------------------------------------------------------------------------

// n elements as words, zero up to 16 words.
template <class T, bool Pairs>
inline void words_of(const char* from, int64_t n, uint32_t* out) {
  if constexpr (Pairs) {
    if (n < 32) __builtin_memset(out, 0, 64);
    __builtin_memcpy(out, from, 2 * n);
  } else {
    for (int64_t i = 0; i < 16; i += kWidth) {
      store(reinterpret_cast<float*>(out) + i,
            i < n ? load_part(reinterpret_cast<const T*>(from) + i, n - i) : broadcast(0.0f));
    }
  }
}

void pack_across(bool pairs, DType dtype, PointedRows rows, int64_t d, int64_t lanes, uint32_t* out) {
  visit_words(dtype, pairs, [&]<class T, bool Pairs>() {
    constexpr int64_t columns = Pairs ? 32 : 16;  // 16 words
    const int64_t steps = Pairs ? (d + 1) / 2 : d;
    for (int64_t i0 = 0; i0 < rows.count; i0 += 16) {
      uint32_t* to = out + i0 / lanes * lanes * steps + i0 % lanes;
      for (int64_t c = 0; c < d; c += columns, to += 16 * lanes) {
        const int64_t n = d - c < columns ? d - c : columns, here = Pairs ? (n + 1) / 2 : n;
        const auto put = [&](int step, const auto& across) {
          if (step < here) put_words(to + step * lanes, across);
        };
        if (Pairs && n == 32 && i0 + 16 <= rows.count) {
          transpose([&](int i) { return reinterpret_cast<const uint32_t*>(rows.row[i0 + i] + 2 * c); }, put);
          continue;
        }
        alignas(64) uint32_t words[16][16];
        for (int64_t i = 0; i < 16; ++i) {
          if (i0 + i < rows.count) {
            words_of<T, Pairs>(rows.row[i0 + i] + c * static_cast<int64_t>(sizeof(T)), n, words[i]);
          } else {
            __builtin_memset(words[i], 0, 64);
          }
        }
        transpose([&](int i) { return words[i]; }, put);
      }
    }
  });
}

void pack_along(bool pairs, DType dtype, PointedRows rows, int64_t d, int64_t lanes, int64_t panel_words,
                uint32_t* out) {
  visit_words(dtype, pairs, [&]<class T, bool Pairs>() {
    constexpr int64_t together = Pairs ? 2 : 1;
    for (int64_t r = 0, step = 0; r < rows.count; r += together, ++step) {
      const T* one = reinterpret_cast<const T*>(rows.row[r]);
      for (int64_t c = 0; c < up16(d); c += 16) {
        uint32_t* to = out + c / lanes * panel_words + step * lanes + c % lanes;
        if constexpr (Pairs) {
#if defined(__AVX512BF16__)
          const __mmask16 some = first_of(d - c);
          const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, one + c));
          __m512i high = _mm512_setzero_si512();
          if (r + 1 < rows.count) {
            high =
                _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, reinterpret_cast<const T*>(rows.row[r + 1]) + c));
          }
          _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#endif
        } else {
          words_of<T, false>(reinterpret_cast<const char*>(one + c), d - c < 16 ? d - c : 16, to);
        }
      }
    }
  });
}

#if defined(__AVX512F__)
inline bool any_above(F32 x, float bound) { return not_at_most(x, broadcast(bound)) != 0; }
inline float highest(F32 x) { return _mm512_reduce_max_ps(x.v); }
#else
inline bool any_above(F32 x, float bound) { return !(max_lane(x) <= bound); }
inline float highest(F32 x) { return max_lane(x); }
#endif

// 2^x within 8e-5 of itself, for what is rounded to bfloat16 anyway: the best polynomial of degree 3 on [0, 1).
#if defined(__AVX512BF16__)
inline F32 exp2_for_pairs(F32 x) {
  const F32 r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};  // x - floor(x); 0 for -inf
  F32 p = fma(broadcast(0.07802427503726364f), r, broadcast(0.22606726686183243f));
  p = fma(p, r, broadcast(0.6958336265348373f));
  p = fma(p, r, broadcast(0.9999251946412039f));
  return {_mm512_scalef_ps(p.v, x.v)};  // p·2^floor(x)
}
#endif

template <bool Pairs>
void many_of(float* logits, int64_t m, int64_t used, const Seen* seen, LogitRule rule, int64_t d, float* out,
             int64_t out_row, float* max_of, float* sums, uint32_t* shares) {
  constexpr int64_t unit = Pairs ? 32 : kWidth;
  const int64_t padded = (used + unit - 1) / unit * unit;
  // Scaling by a number above 0 keeps the order of logits: it is left to the exponential.
  const bool transform = rule.softcap != 0 || !(rule.scaling > 0);
  const float factor = transform ? 1.0f : rule.scaling;
  const F32 scaling = broadcast(rule.scaling), cap = broadcast(rule.softcap);
  for (int64_t v = 0; v < m; ++v) {
    float* z = logits + v * kKeys;
    if (transform) {
      for (int64_t i = 0; i < used; i += kWidth) {
        F32 a = load(z + i) * scaling;
        if (rule.softcap != 0) a = cap * tanh(a / cap);
        store(z + i, a);
      }
    }
    for (int64_t i = 0; i < seen[v].begin; ++i) z[i] = -kInfinity;
    for (int64_t i = seen[v].end; i < padded; ++i) z[i] = -kInfinity;
    F32 most = load(z);
    for (int64_t i = kWidth; i < padded; i += kWidth) most = max(most, load(z + i));
    F32 total = load(sums + v * kSumLanes);
    if (any_above(most * broadcast(factor), max_of[v])) {
      const float next = highest(most) * factor, before = max_of[v];
      max_of[v] = next;
      if (before != -kInfinity) {
        const F32 change = exp(broadcast(before - next));
        for (int64_t i = 0; i < kSumLanes; i += kWidth) {
          store(sums + v * kSumLanes + i, load(sums + v * kSumLanes + i) * change);
        }
        total = load(sums + v * kSumLanes);
        for (int64_t c = 0; c < d; c += kWidth) {
          store(out + v * out_row + c, load(out + v * out_row + c) * change);
        }
      }
    }
    // Nothing seen so far: every logit is -inf, and so is the maximum, which 0 stands in for.
    const float shift = max_of[v] == -kInfinity ? 0.0f : max_of[v];
    if constexpr (Pairs) {
#if defined(__AVX512BF16__)
      constexpr float kLog2E = 1.44269504f;
      const F32 scale = broadcast(factor * kLog2E), minus = broadcast(-shift * kLog2E);
      for (int64_t i = 0; i < padded; i += 32) {
        const F32 one = exp2_for_pairs(fma(load(z + i), scale, minus));
        const F32 two = exp2_for_pairs(fma(load(z + i + 16), scale, minus));
        total = total + (one + two);
        _mm512_storeu_si512(shares + v * (kKeys / 2) + i / 2, (__m512i)_mm512_cvtne2ps_pbh(two.v, one.v));
      }
#endif
    } else {
      const F32 scale = broadcast(factor), minus = broadcast(-shift);
      for (int64_t i = 0; i < padded; i += kWidth) {
        const F32 p = exp(fma(load(z + i), scale, minus));
        total = total + p;
        store(reinterpret_cast<float*>(shares) + v * kKeys + i, p);
      }
    }
    store(sums + v * kSumLanes, total);
  }
}

void many(bool pairs, float* logits, int64_t m, int64_t used, const Seen* seen, LogitRule rule, int64_t d, float* out,
          int64_t out_row, float* max_of, float* sums, uint32_t* shares) {
  (pairs && kPairs ? many_of<kPairs> : many_of<false>)(logits, m, used, seen, rule, d, out, out_row, max_of, sums,
                                                       shares);
}

// ---- before and after ------------------------------------------------------------------------------------------------

void pack_rows(bool pairs, DType dtype, PointedRows rows, int64_t d, uint32_t* out, int64_t row_words) {
  visit_words(dtype, pairs, [&]<class T, bool Pairs>() {
    for (int64_t i = 0; i < rows.count; ++i, out += row_words) {
      const T* row = reinterpret_cast<const T*>(rows.row[i]);
      if constexpr (Pairs) {
        __builtin_memset(out + d / 2, 0, (row_words - d / 2) * 4);
        __builtin_memcpy(out, row, 2 * d);
      } else {
        float* to = reinterpret_cast<float*>(out);
        int64_t c = 0;
        for (; c + kWidth <= d; c += kWidth) store(to + c, load(row + c));
        for (; c < row_words; ++c) to[c] = c < d ? to_float(row[c]) : 0.0f;
      }
    }
  });
}

float finish(DType dtype, const float* parts, int64_t part_row, float* stats, int64_t count, const float* begun,
             float begun_lse, int64_t d, void* out) {
  float most = begun ? begun_lse : -kInfinity;
  for (int64_t i = 0; i < count; ++i) {
    const float x = stats[2 * i];
    most = x > most || x != x ? x : most;
  }
  const bool goes_on = begun && begun_lse != -kInfinity;
  const float begun_share = goes_on ? exp_of(begun_lse - most) : 0.0f;
  float total = begun_share;
  for (int64_t i = 0; i < count; ++i) {
    const float share = stats[2 * i] == -kInfinity ? 0.0f : exp_of(stats[2 * i] - most);
    total += share * stats[2 * i + 1];
    stats[2 * i] = share;
  }
  const bool nothing = most == -kInfinity;
  const F32 scale = broadcast(nothing ? 0.0f : 1.0f / total), first = broadcast(begun_share);
  visit_float(dtype, [&]<class T>(T) {
    T* to = static_cast<T*>(out);
    for (int64_t c = 0; c < d; c += kWidth) {
      F32 sum = goes_on ? first * load_part(begun + c, d - c) : broadcast(0.0f);
      for (int64_t i = 0; i < count; ++i) {
        if (stats[2 * i] != 0) sum = fma(broadcast(stats[2 * i]), load(parts + i * part_row + c), sum);
      }
      c + kWidth <= d ? store(to + c, sum * scale) : store_tail(to + c, sum * scale, d - c);
    }
  });
  return nothing ? -kInfinity : most + __builtin_logf(total);
}

constexpr AttentionKernels kKernels = {few, pack_across, pack_along, many, pack_rows, finish};

}  // namespace

const AttentionKernels* attention_kernels() { return &kKernels; }

}  // namespace fastpost::FP_ISA
