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

// Rows lie in pages that are anywhere, where the hardware does not look ahead: so many rows are asked for in advance.
constexpr int64_t kAhead = 24;

template <class T>
inline void ask_for(const char* const* rows, int64_t i, int64_t count, int64_t d) {
  if (i >= count) return;
  for (int64_t c = 0; c < d * static_cast<int64_t>(sizeof(T)); c += 64) __builtin_prefetch(rows[i] + c, 0, 2);
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
            for (int r = 0; r < R; ++r) ask_for<T>(keys.row, i0 + i + r + kAhead, keys.count, d);
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

// out[v][C registers] += Σ_r p[v][r]·row r, for M vectors.
template <int M, int C, class T>
void weigh(const char* const* rows, int64_t count, int64_t begin, int64_t d, const float* p, float* out,
           int64_t out_row) {
  F32 sums[M][C];
#pragma GCC unroll 4
  for (int v = 0; v < M; ++v) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[v][c] = load(out + v * out_row + begin + c * kWidth);
  }
  for (int64_t r = 0; r < count; ++r) {
    const T* row = reinterpret_cast<const T*>(rows[r]) + begin;
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
    for (int64_t r = 0; r < kBlock; ++r) ask_for<T>(values.row, i + r + kBlock, values.count, d);
    for (int64_t v = 0; v < m; v += kAtOnce) {
      with_vectors(m - v, [&]<int M>() {
        int64_t c = 0;
        for (; c + C * kWidth <= d; c += C * kWidth) {
          weigh<M, C, T>(values.row + i, n, c, d, p + v * kSplit + i, out + v * out_row, out_row);
        }
        for (; c < d; c += kWidth) {
          weigh<M, 1, T>(values.row + i, n, c, d, p + v * kSplit + i, out + v * out_row, out_row);
        }
      });
    }
  }
}

void few(bool pairs, DType dtype, PointedRows keys, PointedRows values, int64_t d, const uint32_t* query,
         int64_t query_row, int64_t m, const Seen* seen, LogitRule rule, float* logits, float* out, int64_t out_row,
         float* stats, int64_t stats_row) {
  const int64_t padded = (d + 15) / 16 * 16;
  for (int64_t v = 0; v < m; ++v) {
    for (int64_t c = 0; c < padded; c += kWidth) store(out + v * out_row + c, broadcast(0.0f));
  }
  visit_words(dtype, pairs, [&]<class T, bool Pairs>() {
    all_dots<Pairs, T>(keys, d, query, query_row, m, logits);
    for (int64_t i = 0; i < kAhead; ++i) ask_for<T>(values.row, i, values.count, d);
    for (int64_t v = 0; v < m; ++v) soften(logits + v * kSplit, keys.count, seen[v], rule, stats + v * stats_row);
    weigh_all<T>(values, d, m, logits, out, out_row);
  });
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

constexpr AttentionKernels kKernels = {few, pack_rows, finish};

}  // namespace

const AttentionKernels* attention_kernels() { return &kKernels; }

}  // namespace fastpost::FP_ISA
