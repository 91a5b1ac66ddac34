// SPDX-License-Identifier: Apache-2.0
#include "ops/paged_attention_products.h"

namespace fastpost::paged {
namespace {

// Vectors whose logits and shares stay in the first-level cache; a multiple of what `multiply` takes at once.
constexpr int64_t kAtOnce = 24;

struct Sizes {
  bool pairs;
  int64_t lanes, query_row, query_steps, out_row, value_steps;
  explicit Sizes(const Tensor& query) {
    const int64_t d = query.size(2);
    pairs = in_pairs(query);
    lanes = fused_kernels().lanes;
    query_row = query_words(query, pairs);
    query_steps = pairs ? (d + 1) / 2 : d;
    out_row = up(d, 16);
    value_steps = pairs ? kKeys / 2 : kKeys;
  }
};

}  // namespace

TileSpace::TileSpace(Arena& arena, const Tensor& query_) {
  const Sizes s(query_);
  query = arena.take<uint32_t>(kTile * s.query_row);
  key_panels = arena.take<uint32_t>(up(kKeys, s.lanes) * s.query_steps);
  value_panels = arena.take<uint32_t>(up(query_.size(2), s.lanes) * s.value_steps);
  shares = arena.take<uint32_t>(kAtOnce * s.value_steps);
  logits = arena.take<float>(kAtOnce * kKeys);
  out = arena.take<float>(kTile * s.out_row);
  max = arena.take<float>(kTile);
  sums = arena.take<float>(kTile * kSumLanes);
}

void attend_tile(const Problem& p, const TileSpace& space, int64_t b, int64_t g, int64_t first, int64_t count) {
  const AttentionKernels& kernels = attention_kernels();
  const auto multiply = fused_kernels().multiply;
  const Sizes s(p.query);
  const char* vectors[kTile];
  for (int64_t v = 0; v < count; ++v) vectors[v] = p.vector(b, g, first + v);
  kernels.pack_rows(p.pairs, p.query.dtype, {vectors, count}, p.d, space.query, s.query_row);
  std::fill_n(space.out, count * s.out_row, 0.0f);
  std::fill_n(space.max, count, -__builtin_inff());
  std::fill_n(space.sums, count * kSumLanes, 0.0f);

  const auto [lowest, highest] = span(p, b, first, count);
  Present present;
  Seen seen[kTile];
  for (int64_t block = lowest / kKeys * kKeys; block < highest; block += kKeys) {
    // From the block's start on, whatever the tile's first row sees: a row's sums then fall into the same lanes in every
    // tile, so that its bits do not depend on how rows were shared out.
    const int64_t end = std::min(highest, block + kKeys);
    present.find(p, b, g, block, end);
    const int32_t unseen = present.below(p, b, g, block, end, lowest);
    if (unseen == present.count) continue;
    // No row looks at these, and they may hold anything: 0 times NaN is NaN.
    std::fill_n(present.key, unseen, present.key[unseen]);
    std::fill_n(present.value, unseen, present.value[unseen]);
    const PointedRows keys{present.key, present.count}, values{present.value, present.count};
    kernels.pack_across(p.pairs, p.query.dtype, keys, p.d, s.lanes, space.key_panels);
    kernels.pack_along(p.pairs, p.query.dtype, values, p.d, s.lanes, s.lanes * s.value_steps, space.value_panels);
    for (int64_t v = 0; v < count; ++v) {
      const int64_t i = (first + v) / p.groups;
      if (v > 0 && i == (first + v - 1) / p.groups) {
        seen[v] = seen[v - 1];
        continue;
      }
      seen[v].begin = present.below(p, b, g, block, end, p.begin(b, i));
      seen[v].end = std::max(seen[v].begin, present.below(p, b, g, block, end, p.end(b, i)));
    }
    for (int64_t v = 0; v < count; v += kAtOnce) {
      const int64_t rows = std::min(kAtOnce, count - v);
      const int64_t used = seen[v + rows - 1].end;  // later rows see further
      if (used == 0) continue;
      for (int64_t j = 0; j < used; j += s.lanes) {
        multiply(p.pairs, space.query + v * s.query_row, s.query_row, 1, rows, space.key_panels + j * s.query_steps,
                 s.query_steps, std::min(s.lanes, used - j), space.logits + j, kKeys, false);
      }
      kernels.many(p.pairs, space.logits, rows, used, seen + v, p.rule, p.d, space.out + v * s.out_row, s.out_row,
                   space.max + v, space.sums + v * kSumLanes, space.shares);
      for (int64_t c = 0; c < p.d; c += s.lanes) {
        multiply(p.pairs, space.shares, s.value_steps, 1, rows, space.value_panels + c * s.value_steps,
                 p.pairs ? (used + 1) / 2 : used, std::min(s.lanes, p.d - c), space.out + v * s.out_row + c, s.out_row,
                 true);
      }
    }
  }
  for (int64_t v = 0; v < count; ++v) {
    const int64_t to = p.row_of(b, first + v) * p.heads + p.head_of(g, first + v);
    float total = 0;
    for (int64_t i = 0; i < kSumLanes; ++i) total += space.sums[v * kSumLanes + i];
    float stats[2] = {space.max[v], total};
    const float lse = kernels.finish(p.out.dtype, space.out + v * s.out_row, s.out_row, stats, 1,
                                     p.begun_out.defined() ? p.begun_out.ptr<float>() + to * p.d : nullptr,
                                     p.begun_lse.defined() ? p.begun_lse.ptr<float>()[to] : 0.0f, p.d,
                                     p.out.ptr<char>() + to * p.d * itemsize(p.out.dtype));
    if (p.lse.defined()) p.lse.ptr<float>()[to] = lse;
  }
}

}  // namespace fastpost::paged
