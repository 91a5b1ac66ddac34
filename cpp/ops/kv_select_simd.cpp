// SPDX-License-Identifier: Apache-2.0
#include "ops/kv_select_simd.h"

#include "core/simd_words.h"

namespace fastpost::FP_ISA {
namespace {

constexpr float kInfinity = __builtin_inff(), kLowest = -3.402823466e38f;
constexpr int kHeads = 4;  // query heads that share one pass over the landmarks
constexpr int64_t kWidth = F32::width;

// Where bytes are multiplied in fours (VNNI), int8 landmarks meet queries of 24 bits: three signed digits of base 256,
// each product exact, against one float that rounds at every step. 24 instead of 48 instructions for a chunk of 128.
#if defined(__AVX512VNNI__)
constexpr bool kDigits = true;
#else
constexpr bool kDigits = false;
#endif
constexpr int kBase = 3;
constexpr int64_t kBlockWords = 256;  // that are transposed at a time, 16 KB: more dimensions go the other way
constexpr float kLargest = 127 * 65536 + 127 * 256 + 127;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Packed queries: [heads, round_up(d, 16)] floats, or per kHeads of them Digits and words [d / 4][heads][kBase].
struct Digits {
  float factor[kHeads];           // what 1 stands for
  int32_t begin[kHeads * kBase];  // -128 Σ digits, because landmarks become unsigned by adding 128
};

int64_t words_of(int64_t d) { return round_up(d, 4) / 4; }
int64_t digits_bytes(int64_t d) {
  return round_up(static_cast<int64_t>(sizeof(Digits)) + words_of(d) * kHeads * kBase * 4, 64);
}

bool by_digits(DType landmark, int64_t d) { return kDigits && landmark == DType::Int8 && words_of(d) <= kBlockWords; }

int64_t query_bytes(int64_t heads, int64_t d) {
  const int64_t floats = round_up(heads * round_up(d, 16) * 4, 64);
  const int64_t digits = kDigits ? round_up(heads, kHeads) / kHeads * digits_bytes(d) : 0;
  return floats > digits ? floats : digits;
}

template <class T>
void pack_floats(const T* query, int64_t stride, int64_t heads, int64_t d, float scaling, float* out) {
  for (int64_t h = 0; h < heads; ++h, query += stride, out += round_up(d, 16)) {
    for (int64_t i = 0; i < round_up(d, 16); ++i) out[i] = i < d ? to_float(query[i]) * scaling : 0.0f;
  }
}

template <class T>
void pack_digits(const T* query, int64_t stride, int heads, int64_t d, float scaling, char* out) {
  Digits& to = *reinterpret_cast<Digits*>(out);
  auto* bytes = reinterpret_cast<int8_t*>(out + sizeof(Digits));
  for (int64_t i = 0; i < words_of(d) * heads * kBase * 4; ++i) bytes[i] = 0;
  for (int h = 0; h < heads; ++h, query += stride) {
    float largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < d; ++i) {
      const float x = to_float(query[i]), size = x < 0 ? -x : x;
      finite &= size < kInfinity;
      largest = size > largest ? size : largest;
    }
    const bool none = !finite || largest == 0;
    to.factor[h] = finite ? largest / kLargest * scaling : __builtin_nanf("");
    const double inverse = none ? 0 : static_cast<double>(kLargest) / largest;
    int32_t sum[kBase] = {};
    for (int64_t i = 0; i < d && !none; ++i) {
      const double x = static_cast<double>(to_float(query[i])) * inverse;
      auto n = static_cast<int32_t>(x < 0 ? x - 0.5 : x + 0.5);
      for (int k = 0; k < kBase; ++k) {
        const auto digit = static_cast<int8_t>(n & 255);
        n = (n - digit) / 256;
        bytes[((i / 4 * heads + h) * kBase + k) * 4 + i % 4] = digit;
        sum[k] += digit;
      }
    }
    for (int k = 0; k < kBase; ++k) to.begin[h * kBase + k] = -128 * sum[k];
  }
}

void pack(DType dtype, const void* query, int64_t stride, int64_t heads, int64_t d, float scaling, DType landmark,
          void* packed) {
  visit_float(dtype, [&]<class T>(T) {
    const T* from = static_cast<const T*>(query);
    if (!by_digits(landmark, d)) {
      return pack_floats(from, stride, heads, d, scaling, static_cast<float*>(packed));
    }
    char* to = static_cast<char*>(packed);
    for (int64_t h = 0; h < heads; h += kHeads, to += digits_bytes(d)) {
      pack_digits(from + h * stride, stride, static_cast<int>(heads - h < kHeads ? heads - h : kHeads), d, scaling, to);
    }
  });
}

// f.template operator()<n>() for n in 1 .. kHeads.
template <class F>
void with_heads(int64_t n, F&& f) {
  switch (n) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    default: return f.template operator()<4>();
  }
}

#if defined(__AVX512VNNI__)

// The 16 rows from `next` on (may be null), stride apart, are fetched a line at a time: as many as there are words. All
// of them in one burst kept the loads of the transpose waiting, a third of the time.
template <int Heads>
void multiply_digits(const char* packed, const __m512i* columns, int64_t words, __m512 scale, const int8_t* next,
                     int64_t stride, float* out, int64_t row) {
  const Digits& of = *reinterpret_cast<const Digits*>(packed);
  const auto* q = reinterpret_cast<const int32_t*>(packed + sizeof(Digits));
  __m512i sum[Heads * kBase];
#pragma GCC unroll 12
  for (int j = 0; j < Heads * kBase; ++j) sum[j] = _mm512_set1_epi32(of.begin[j]);
  for (int64_t w = 0; w < words; ++w, q += Heads * kBase) {
    const __m512i column = columns[w];
    if (next) __builtin_prefetch(next + w % 16 * stride + w / 16 * 64);
#pragma GCC unroll 12
    for (int j = 0; j < Heads * kBase; ++j) sum[j] = _mm512_dpbusd_epi32(sum[j], column, _mm512_set1_epi32(q[j]));
  }
#pragma GCC unroll 4
  for (int h = 0; h < Heads; ++h) {
    __m512 x = _mm512_cvtepi32_ps(sum[h * kBase]);
    x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[h * kBase + 1]), _mm512_set1_ps(256), x);
    x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[h * kBase + 2]), _mm512_set1_ps(65536), x);
    _mm512_storeu_ps(out + h * row, _mm512_mul_ps(x, _mm512_mul_ps(scale, _mm512_set1_ps(of.factor[h]))));
  }
}

void logits_by_digits(const char* packed, int64_t heads, int64_t d, const int8_t* landmark, int64_t stride,
                      const float* scale, int64_t count, float* out, int64_t row) {
  alignas(64) __m512i columns[kBlockWords];
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int64_t words = words_of(d);
  for (int64_t i = 0; i < count; i += 16) {
    const int8_t* row_of[16];  // the last row again where there are no more
    for (int64_t r = 0; r < 16; ++r) row_of[r] = landmark + (i + r < count ? i + r : count - 1) * stride;
    for (int64_t k = 0; k < d; k += 64) {
      const auto put = [&](int c, __m512i x) { _mm512_store_si512(columns + k / 4 + c, _mm512_xor_si512(x, flip)); };
      if (d - k >= 64) {
        transpose([&](int r) { return row_of[r] + k; }, put);
      } else {
        alignas(64) int8_t rest[16][64];
        const __mmask64 there = (uint64_t{1} << (d - k)) - 1;
        for (int r = 0; r < 16; ++r) _mm512_store_si512(rest[r], _mm512_maskz_loadu_epi8(there, row_of[r] + k));
        transpose([&](int r) { return rest[r]; }, put);
      }
    }
    const __m512 by = scale ? load_part(scale + i, count - i).v : _mm512_set1_ps(1);
    const int8_t* next = i + 32 <= count ? landmark + (i + 16) * stride : nullptr;
    for (int64_t h = 0; h < heads; h += kHeads) {
      with_heads(heads - h, [&]<int Heads>() {
        multiply_digits<Heads>(packed + h / kHeads * digits_bytes(d), columns, words, by, h == 0 ? next : nullptr,
                               stride, out + h * row + i, row);
      });
    }
  }
}

#endif

#if defined(__AVX512F__)
constexpr int kRows = 4;
#else
constexpr int kRows = 2;
#endif

template <int Heads, class T>
void multiply_floats(const float* query, int64_t d, const T* landmark, int64_t stride, const float* scale,
                     int64_t count, float* out, int64_t row) {
  for (int64_t i = 0; i < count; i += kRows) {
    const T* row_of[kRows];
    for (int r = 0; r < kRows; ++r) row_of[r] = landmark + (i + r < count ? i + r : count - 1) * stride;
    F32 sum[kRows * Heads];
    for (F32& s : sum) s = broadcast(0.0f);
    for (int64_t k = 0; k < d; k += kWidth) {
      F32 q[Heads];
      for (int h = 0; h < Heads; ++h) q[h] = load(query + h * round_up(d, 16) + k);
      for (int r = 0; r < kRows; ++r) {
        const F32 x = load_part(row_of[r] + k, d - k);
        for (int h = 0; h < Heads; ++h) sum[r * Heads + h] = fma(x, q[h], sum[r * Heads + h]);
      }
    }
    float total[kRows * Heads];
    sums_of(sum, total);
    for (int r = 0; r < kRows && i + r < count; ++r) {
      for (int h = 0; h < Heads; ++h) out[h * row + i + r] = total[r * Heads + h] * (scale ? scale[i + r] : 1.0f);
    }
  }
}

void logits(const void* packed, int64_t heads, int64_t d, DType dtype, const void* landmark, int64_t stride,
            const float* scale, int64_t count, float* out, int64_t row) {
  if (count <= 0) return;
#if defined(__AVX512VNNI__)
  if (by_digits(dtype, d)) {
    return logits_by_digits(static_cast<const char*>(packed), heads, d, static_cast<const int8_t*>(landmark), stride,
                            scale, count, out, row);
  }
#endif
  const auto with = [&]<class T>(T) {
    for (int64_t h = 0; h < heads; h += kHeads) {
      with_heads(heads - h, [&]<int Heads>() {
        multiply_floats<Heads>(static_cast<const float*>(packed) + h * round_up(d, 16), d,
                               static_cast<const T*>(landmark), stride, scale, count, out + h * row, row);
      });
    }
  };
  dtype == DType::Int8 ? with(int8_t{}) : visit_float(dtype, with);
}

void scores(float* logits, int64_t row, int64_t heads, int64_t count, float* score) {
  const int64_t end = round_up(count, kSelectLanes);
  for (int64_t i = 0; i < end; i += kWidth) store(score + i, broadcast(kLowest));
  for (int64_t h = 0; h < heads; ++h) {
    float* of = logits + h * row;
    for (int64_t i = count; i < end; ++i) of[i] = -kInfinity;
    F32 most = broadcast(-kInfinity), sums[2] = {broadcast(0.0f), broadcast(0.0f)};
    for (int64_t i = 0; i < end; i += kWidth) most = max(most, load(of + i));
    const float m = max_lane(most);
    if (m == -kInfinity) continue;  // nothing is open
    for (int64_t i = 0; i < end; i += kSelectLanes) {
      for (int64_t j = 0; j < kSelectLanes; j += kWidth) {
        sums[j / kWidth % 2] = sums[j / kWidth % 2] + exp(load(of + i + j) - broadcast(m));
      }
    }
    const F32 lse = broadcast(m + __builtin_logf(sum(sums[0] + sums[1])));
    for (int64_t i = 0; i < end; i += kWidth) store(score + i, max(load(of + i) - lse, load(score + i)));
  }
  for (int64_t i = count; i < end; ++i) score[i] = -kInfinity;
}

int64_t count_from(const float* score, int64_t count, float bound) {
  int32_t n = 0;
  for (int64_t i = 0; i < count; ++i) n += score[i] >= bound;
  return n;
}

// Integers in the order of the floats, -0 and +0 apart.
inline int32_t to_order(float x) {
  const auto bits = static_cast<int32_t>(float_to_bits(x));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline float from_order(int32_t n) { return bits_to_float(static_cast<uint32_t>(n ^ ((n >> 31) & 0x7fffffff))); }

// to = the scores in [from, below), then -inf up to a multiple of kSelectLanes; returns how many. `to` may be `score`.
int64_t gather_between(const float* score, int64_t count, float from, float below, float* to) {
  int64_t n = 0;
#if defined(__AVX512F__)
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 x = _mm512_loadu_ps(score + i);
    const __mmask16 in = _mm512_cmp_ps_mask(x, _mm512_set1_ps(from), _CMP_GE_OQ);
    const __mmask16 both = _mm512_mask_cmp_ps_mask(in, x, _mm512_set1_ps(below), _CMP_LT_OQ);
    _mm512_storeu_ps(to + n, _mm512_maskz_compress_ps(both, x));
    n += __builtin_popcount(both);
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    to[n] = score[i];
    n += score[i] >= from && score[i] < below;
  }
#endif
  for (int64_t i = n; i < round_up(n, kSelectLanes); ++i) to[i] = -kInfinity;
  return n;
}

// Halves the range in which the bound lies until it parts exactly `wanted`, or two neighbouring floats; once few scores
// are left in the range, only those are counted.
int64_t pick(const float* score, int64_t count, int64_t wanted, float* scratch, int32_t* picked) {
  float above = kLowest, tie = kInfinity;  // taken are the scores from `above` on, and the first `ties` equal to `tie`
  int64_t ties = 0, from_low = count_from(score, count, kLowest), from_high = 0;
  if (from_low > wanted) {
    int32_t low = to_order(kLowest), high = to_order(kInfinity);
    const float* left = score;
    int64_t more = count, beyond = 0;  // scores in `left`, and those above all of them
    while (high - int64_t{low} > 1) {
      const auto middle = static_cast<int32_t>((int64_t{low} + high) >> 1);
      const int64_t n = count_from(left, more, from_order(middle)) + beyond;
      if (n > wanted) {
        low = middle;
        from_low = n;
      } else {
        high = middle;
        from_high = n;
        if (n == wanted) break;
      }
      if (from_low - from_high <= more / 4) {
        more = gather_between(left, more, from_order(low), from_order(high), scratch);
        left = scratch;
        beyond = from_high;
      }
    }
    above = from_order(high);
    tie = from_order(low);
    ties = wanted - from_high;
  }
  int64_t n = 0;
#if defined(__AVX512F__)
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < count; i += 16, index = _mm512_add_epi32(index, _mm512_set1_epi32(16))) {
    const __m512 x = _mm512_loadu_ps(score + i);
    __mmask16 take = _mm512_cmp_ps_mask(x, _mm512_set1_ps(above), _CMP_GE_OQ);
    if (ties > 0) {
      for (unsigned equal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(tie), _CMP_EQ_OQ); equal && ties > 0; --ties) {
        take |= static_cast<__mmask16>(equal & (0u - equal));
        equal &= equal - 1;
      }
    }
    _mm512_storeu_si512(picked + n, _mm512_maskz_compress_epi32(take, index));
    n += __builtin_popcount(take);
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    const bool equal = ties > 0 && score[i] == tie;
    picked[n] = static_cast<int32_t>(i);
    n += score[i] >= above || equal;
    ties -= equal;
  }
#endif
  return n;
}

constexpr SelectKernels kKernels = {query_bytes, pack, logits, scores, pick};

}  // namespace

const SelectKernels* select_kernels() { return &kKernels; }

}  // namespace fastpost::FP_ISA
