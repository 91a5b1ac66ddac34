// SPDX-License-Identifier: Apache-2.0
#include "ops/kv_reconstruct_simd.h"

#include "core/simd_words.h"

namespace fastpost::FP_ISA {
namespace {

// 6 x 4 accumulators fill 24 of AVX-512's 32 registers, 6 x 2 fill 12 of AVX2's 16 (linear_logprob_fused_simd.cpp).
constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
constexpr int64_t kWidth = F32::width, kLanes = kVectors * kWidth;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t steps_of(int64_t rank, bool pairs) { return pairs ? (rank + 1) / 2 : rank; }

// Panels of kLanes columns, words [step][lane], one panel after the other; what is missing at the edges is zero.
int64_t basis_words(int64_t rank, int64_t d, bool pairs) { return steps_of(rank, pairs) * round_up(d, kLanes); }
// The rows of u as words [row][step], with room for a register at the end, and their products [row][d].
int64_t u_words(int64_t rank, bool pairs) { return round_up(kReconstructRows * steps_of(rank, pairs) + 16, 16); }
int64_t scratch_words(int64_t rank, int64_t d, bool pairs) {
  return u_words(rank, pairs) + kReconstructRows * round_up(d, kLanes);
}

void pack(DType dtype, const char* basis, int64_t row_bytes, int64_t rank, int64_t d, bool pairs, uint32_t* out) {
  visit_words(dtype, pairs, [&]<class T, bool Pairs>() {
    for (int64_t begin = 0; begin < d; begin += kLanes) {
      const int64_t n = d - begin < kLanes ? d - begin : kLanes;
      for (int64_t k = 0; k < rank; k += Pairs ? 2 : 1, out += kLanes) {
        const T* first = reinterpret_cast<const T*>(basis + k * row_bytes) + begin;
        if constexpr (Pairs) {
          const bool alone = k + 1 == rank;
          const T* second = reinterpret_cast<const T*>(basis + (alone ? k : k + 1) * row_bytes) + begin;
          const uint32_t keep = alone ? 0 : 0xffff0000u;
          for (int64_t l = 0; l < n; ++l)
            out[l] = first[l].bits | ((static_cast<uint32_t>(second[l].bits) << 16) & keep);
        } else {
          for (int64_t l = 0; l < n; ++l) out[l] = float_to_bits(to_float(first[l]));
        }
        for (int64_t l = n; l < kLanes; ++l) out[l] = 0;
      }
    }
  });
}

// A row of u as words; may write up to a register beyond them.
template <class T, bool Pairs>
void widen_row(const T* u, int64_t rank, uint32_t* out) {
  if constexpr (Pairs && sizeof(T) == 2) {
    out[(rank - 1) / 2] = 0;
    __builtin_memcpy(out, u, static_cast<size_t>(rank) * 2);
  } else if constexpr (Pairs) {
    auto* to = reinterpret_cast<bfloat16*>(out);
    for (int64_t k = 0; k < rank; k += kWidth) store(to + k, load_part(u + k, rank - k));
  } else {
    auto* to = reinterpret_cast<float*>(out);
    for (int64_t k = 0; k < rank; k += kWidth) store(to + k, load_part(u + k, rank - k));
  }
}

// c[r][lane] = Σ_k a[r][k] · b[k][lane] for up to Rows rows.
template <bool Pairs, int Rows, int Vectors>
void multiply(const uint32_t* a, int64_t rows, const uint32_t* b, int64_t steps, float* c, int64_t c_row) {
  const uint32_t* a_of[Rows];
  for (int r = 0; r < Rows; ++r) a_of[r] = a + (r < rows ? r : rows - 1) * steps;  // the last row again, unused
  F32 sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int j = 0; j < Vectors; ++j) sum[r][j] = broadcast(0.0f);
  }
  for (int64_t k = 0; k < steps; ++k, b += kLanes) {
#if defined(__AVX512BF16__)
    if constexpr (Pairs) {
      __m512bh lanes[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) lanes[j] = (__m512bh)_mm512_loadu_si512(b + j * kWidth);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a_of[r][k]));
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) sum[r][j].v = _mm512_dpbf16_ps(sum[r][j].v, pair, lanes[j]);
      }
      continue;
    }
#endif
    F32 lanes[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) lanes[j] = load(reinterpret_cast<const float*>(b + j * kWidth));
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const F32 x = broadcast(reinterpret_cast<const float*>(a_of[r])[k]);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[r][j] = fma(x, lanes[j], sum[r][j]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < Vectors; ++j) store(c + r * c_row + j * kWidth, sum[r][j]);
  }
}

template <bool Pairs>
void multiply_panel(const uint32_t* a, int64_t rows, const uint32_t* b, int64_t steps, int64_t used, float* c,
                    int64_t c_row) {
  const auto with = [&]<int Vectors>() {
    (rows > 2 ? multiply<Pairs, kRows, Vectors> : multiply<Pairs, 2, Vectors>)(a, rows, b, steps, c, c_row);
  };
  const int64_t vectors = (used + kWidth - 1) / kWidth;
  if (vectors == 1) {
    with.template operator()<1>();
  } else if (vectors == 2) {
    with.template operator()<2>();
  } else if (vectors == 3) {
    with.template operator() < kVectors<3 ? kVectors : 3>();
  } else {
    with.template operator()<kVectors>();
  }
}

template <class T>
void store_part(T* p, F32 x, int64_t n) {
  n >= kWidth ? store(p, x) : store_tail(p, x, n);
}

template <class T, class Table>
void finish_row(const float* x, float scale, const Table* cos, const Table* sin, int64_t w, int64_t d, T* out) {
  const F32 by = broadcast(scale), zero = broadcast(0.0f);
  for (int64_t k = 0; k < w; k += kWidth) {
    const F32 a = load_part(x + k, w - k) * by, b = load_part(x + w + k, w - k) * by;
    const F32 c = load_part(cos + k, w - k), s = load_part(sin + k, w - k);
    store_part(out + k, fma(a, c, zero - b * s), w - k);
    store_part(out + w + k, fma(b, c, a * s), w - k);
  }
  for (int64_t k = 2 * w; k < d; k += kWidth) store_part(out + k, load_part(x + k, d - k) * by, d - k);
}

[[gnu::always_inline]] inline void fetch(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// What a row will read and write. GCC takes a function that only prefetches for one without effect and leaves out its
// calls, unless it is inlined first.
[[gnu::always_inline]] inline void fetch_row(const ReconstructShape& s, int64_t token, const char* out) {
  const int64_t table_bytes = s.width * itemsize(s.table), out_bytes = s.d * itemsize(s.keys);
  fetch(s.rows + token * s.row_bytes, s.rank * itemsize(s.u));
  if (s.scale) __builtin_prefetch(s.scale + token);
  if (s.width) {
    fetch(s.cos + token * s.cos_bytes, table_bytes);
    fetch(s.sin + token * s.sin_bytes, table_bytes);
  }
  for (int64_t i = 0; i < out_bytes; i += 64) __builtin_prefetch(out + i, 1);
}

template <class U, bool Pairs>
void rows_of(const ReconstructShape& s, const uint32_t* basis, const int64_t* token, char* const* out, int64_t count,
             int64_t ahead, uint32_t* scratch) {
  const int64_t steps = steps_of(s.rank, Pairs), c_row = round_up(s.d, kLanes), panels = c_row / kLanes;
  auto* c = reinterpret_cast<float*>(scratch + u_words(s.rank, Pairs));
  for (int64_t i = 0; i < count; ++i) {
    widen_row<U, Pairs>(reinterpret_cast<const U*>(s.rows + token[i] * s.row_bytes), s.rank, scratch + i * steps);
  }
  const int64_t groups = (count + kRows - 1) / kRows, turns = panels * groups;
  int64_t next = count, turn = 0;
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t g = 0; g < groups; ++g) {
      for (const int64_t end = count + ahead * ++turn / turns; next < end; ++next) fetch_row(s, token[next], out[next]);
      const int64_t first = g * kRows, n = count - first < kRows ? count - first : kRows;
      multiply_panel<Pairs>(scratch + first * steps, n, basis + p * steps * kLanes, steps, s.d - p * kLanes,
                            c + first * c_row + p * kLanes, c_row);
    }
  }
  visit_float(s.keys, [&]<class T>(T) {
    visit_float(s.table, [&]<class Table>(Table) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = token[i];
        finish_row(c + i * c_row, s.scale ? s.scale[t] : 1.0f, reinterpret_cast<const Table*>(s.cos + t * s.cos_bytes),
                   reinterpret_cast<const Table*>(s.sin + t * s.sin_bytes), s.width, s.d, reinterpret_cast<T*>(out[i]));
      }
    });
  });
}

void rows(const ReconstructShape& s, const uint32_t* basis, const int64_t* token, char* const* out, int64_t count,
          int64_t ahead, uint32_t* scratch) {
  if (s.u == DType::Int8) {
    (s.pairs && kPairs ? rows_of<int8_t, kPairs> : rows_of<int8_t, false>)(s, basis, token, out, count, ahead, scratch);
  } else {
    visit_words(s.u, s.pairs,
                [&]<class T, bool Pairs>() { rows_of<T, Pairs>(s, basis, token, out, count, ahead, scratch); });
  }
}

void widen(const int8_t* values, const float* scale, int64_t rows, int64_t d, DType dtype, char* out) {
  visit_float(dtype, [&]<class T>(T) {
    T* to = reinterpret_cast<T*>(out);
    for (int64_t i = 0; i < rows; ++i, values += d, to += d) {
      const F32 by = broadcast(scale[i]);
      for (int64_t k = 0; k < d; k += kWidth) store_part(to + k, load_part(values + k, d - k) * by, d - k);
    }
  });
}

constexpr ReconstructKernels kKernels = {kPairs, basis_words, scratch_words, pack, rows, widen};

}  // namespace

const ReconstructKernels* reconstruct_kernels() { return &kKernels; }

}  // namespace fastpost::FP_ISA
