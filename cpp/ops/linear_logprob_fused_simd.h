// SPDX-License-Identifier: Apache-2.0
// The kernels of the fused CPU path of linear_logprob: one small matrix product, and what happens to a block of logits
// while it is still in cache.
//
// A word is 32 bits: a float, or two bfloat16 that are neighbours along the summed dimension ("pairs", where the CPU
// multiplies such pairs in one instruction). A panel is `lanes` columns wide; its words lie [step][lane]. Of a panel at
// an edge only the first `used` lanes count: whole registers of others are neither computed nor written.
#pragma once

#include "core/dtype.h"
#include "core/isa.h"
#include "ops/token_logprob_simd.h"

namespace fastpost {

constexpr int kMaxLanes = 64, kMaxBlock = 192;  // columns of a panel, rows of a block

// Statistics and gradients of the rows of N that a panel holds, `lanes` floats each.
struct PanelGradient {
  const float *logprob, *lse, *entropy, *g, *h;  // entropy and h may be null
};

struct FusedKernels {
  int lanes;
  bool pairs;  // whether pairs are supported

  // c[r][lane] (+)= Σ_k a(r, k)·b[k][lane] for any number of rows; a(r, k) = a[r·a_row + k·a_step].
  void (*multiply)(bool pairs, const uint32_t* a, int64_t a_row, int64_t a_step, int64_t rows, const uint32_t* b,
                   int64_t steps, int64_t used, float* c, int64_t c_row, bool add);

  // Rows src + index[i]·row_bytes of d elements (index null: i itself) as words. `across` makes panels whose lanes are
  // rows and whose steps go along d; `along` makes panels whose lanes go along d and whose steps are rows (or pairs of
  // rows), panel_steps of room for each; `rows` keeps the layout, [count][steps]. What is missing at the edges is zero.
  void (*pack_across)(DType dtype, bool pairs, const char* src, int64_t row_bytes, const int64_t* index, int64_t count,
                      int64_t d, uint32_t* out);
  void (*pack_along)(DType dtype, bool pairs, const char* src, int64_t row_bytes, const int64_t* index, int64_t count,
                     int64_t d, int64_t panel_steps, uint32_t* out);
  void (*pack_rows)(DType dtype, bool pairs, const char* src, int64_t row_bytes, const int64_t* index, int64_t count,
                    int64_t d, uint32_t* out);

  // z [v][lanes] holds products; becomes transformed logits. stats [4][lanes]: RowStats of the block, per lane.
  // kept [v][lanes] of `dtype` (may be null) gets e^(z - stats.max).
  void (*statistics)(float* z, int64_t v, int64_t used, const float* bias, const LogitTransform& t, bool with_entropy,
                     float* stats, DType dtype, void* kept);
  // Folds a block's stats [4][lanes] into running ones, whose rows are `stride` floats apart.
  void (*merge)(const float* block, float* running, int64_t stride);

  // z [v][lanes] = d(g·logp + h·H)/d product, all but the target's entries: from products, or from what was kept.
  void (*derivative)(float* z, int64_t v, int64_t used, const float* bias, const LogitTransform& t,
                     const PanelGradient& grad);
  // offset[lane] (null: lane itself) is where a lane's values begin, in elements, each `lanes` after the one before.
  void (*derivative_of_kept)(DType dtype, const void* kept, const int64_t* offset, const float* block_max, int64_t v,
                             int64_t used, const LogitTransform& t, const PanelGradient& grad, float* z);
  // z as the words of two products: by_row [v][·] with steps along the lanes, and for pairs by_pair [v / 2][·] with
  // steps along v (null: not wanted). Distances are in words. sums [v] (may be null) += Σ over lanes.
  void (*write_gradient)(bool pairs, const float* z, int64_t v, int64_t used, uint32_t* by_row, int64_t row_words,
                         uint32_t* by_pair, int64_t pair_words, float* sums);
  // n floats -> dtype.
  void (*convert)(const float* src, DType dtype, char* out, int64_t n);
  // The same for rows of up to `lanes` floats that nobody reads soon, past the caches where they fill lines.
  void (*convert_away)(const float* src, int64_t rows, DType dtype, char* const* out, int64_t n);
};

FP_DECLARE_SIMD(FusedKernels, fused_kernels)

}  // namespace fastpost
