// SPDX-License-Identifier: Apache-2.0
// The kernels behind paged_attention on a CPU. They see the positions of one key head that are there, a pointer to each
// key and value; "vectors" are rows of queries that share them (all query heads of the key head, and several tokens).
// Products of many vectors, and what words and panels are: linear_logprob_fused_simd.h.
#pragma once

#include "core/dtype.h"
#include "core/isa.h"

namespace fastpost {

// Positions that are attended to at once by few vectors: a long sequence becomes so many units of work.
constexpr int64_t kSplit = 512;
constexpr int64_t kMostFew = 16;  // vectors of such a unit

constexpr int64_t kKeys = 128;     // positions of a block that many vectors meet
constexpr int64_t kSumLanes = 16;  // Σ p of one of many vectors is kept in so many parts

// logit = softcap(scaling·q·k), softcap off when 0.
struct LogitRule {
  float scaling, softcap;
};

// Rows of d elements in one dtype, any distance apart.
struct PointedRows {
  const char* const* row;
  int64_t count;
};

// What a vector sees of them: rows [begin, end).
struct Seen {
  int32_t begin, end;
};

struct AttentionKernels {
  // m <= kMostFew vectors (words, query_row apart) over at most kSplit positions: out [m][out_row] = Σ p·v with
  // p = e^(logit - max), stats [m][stats_row] = {max, Σ p}; {-inf, 0} and 0 where nothing is seen. Room for a multiple of
  // 16 floats in a row of out. logits: [m][kSplit] to work in.
  void (*few)(bool pairs, DType dtype, PointedRows keys, PointedRows values, int64_t d, const uint32_t* query,
              int64_t query_row, int64_t m, const Seen* seen, LogitRule rule, float* logits, float* out,
              int64_t out_row, float* stats, int64_t stats_row);

  // Panels of keys, whose lanes are rows and whose steps go along d: `lanes` rows each, steps·lanes words apart; and of
  // values, whose lanes go along d and whose steps are rows or pairs of rows, panel_words apart. What is missing is zero.
  void (*pack_across)(bool pairs, DType dtype, PointedRows rows, int64_t d, int64_t lanes, uint32_t* out);
  void (*pack_along)(bool pairs, DType dtype, PointedRows rows, int64_t d, int64_t lanes, int64_t panel_words,
                     uint32_t* out);

  // logits [m][kKeys], q·k of `used` more rows -> shares, p = e^(logit - max) as words [m][kKeys, half for pairs]. Brings
  // max [m] and sums [m][kSumLanes] up to date, and out [m][out_row] to a new maximum.
  void (*many)(bool pairs, float* logits, int64_t m, int64_t used, const Seen* seen, LogitRule rule, int64_t d,
               float* out, int64_t out_row, float* max, float* sums, uint32_t* shares);

  // Rows as words, row_words apart; what is missing in row_words is zero.
  void (*pack_rows)(bool pairs, DType dtype, PointedRows rows, int64_t d, uint32_t* out, int64_t row_words);

  // out [d] in dtype = Σ parts·e^(max - lse), over parts [count][part_row] with stats [count] {max, Σ p}, in their order,
  // begun (may be null) first. Returns lse, log of Σ e^logit. Overwrites stats.
  float (*finish)(DType dtype, const float* parts, int64_t part_row, float* stats, int64_t count, const float* begun,
                  float begun_lse, int64_t d, void* out);
};

FP_DECLARE_SIMD(AttentionKernels, attention_kernels)

}  // namespace fastpost
