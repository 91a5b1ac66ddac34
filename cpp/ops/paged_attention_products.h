// SPDX-License-Identifier: Apache-2.0
// What both CPU paths of paged_attention know of a call, and the path of many vectors: tiles of them meet blocks of keys
// and values, which become panels once for all query heads of a key head.
#pragma once

#include <algorithm>
#include <utility>

#include "core/arena.h"
#include "core/tensor.h"
#include "ops/linear_logprob_fused_simd.h"
#include "ops/paged_attention_simd.h"

namespace fastpost::paged {

inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Pages of keys or of values.
struct Pool {
  Tensor pages, table, row;
  int64_t bytes[4];  // between pools, key heads, pages and positions
  Pool(Tensor pages_, Tensor table_, Tensor row_) : pages(pages_), table(table_), row(row_) {
    for (int i = 0; i < 4; ++i) bytes[i] = pages.stride(i) * itemsize(pages.dtype);
  }
  const int32_t* table_of(int64_t b, int64_t g) const {
    return table.ptr<int32_t>() + (b * table.size(1) + (table.size(1) > 1 ? g : 0)) * table.size(2);
  }
  char* base(int64_t b, int64_t g) const {
    const int64_t r = pages.size(0) == 1 ? 0 : row.defined() ? row.ptr<int32_t>()[b] : b;
    return pages.ptr<char>() + r * bytes[0] + g * bytes[1];
  }
};

struct Problem {
  Tensor query, length, cu_seqlens, new_keys, new_values, begun_out, begun_lse, out, lse;
  Pool keys, values;
  LogitRule rule;
  int64_t window;
  int64_t heads, groups, d, page;  // groups: query heads of a key head
  bool pairs;

  int64_t first_row(int64_t b) const { return cu_seqlens.defined() ? cu_seqlens.ptr<int32_t>()[b] : b; }
  int64_t rows(int64_t b) const { return first_row(b + 1) - first_row(b); }
  int64_t total(int64_t b) const { return length.ptr<int32_t>()[b]; }
  int64_t sequences() const { return length.size(0); }
  int64_t key_heads() const { return keys.pages.size(1); }
  // Positions that row i of sequence b sees.
  int64_t end(int64_t b, int64_t i) const { return total(b) - (rows(b) - 1 - i); }
  int64_t begin(int64_t b, int64_t i) const { return window > 0 ? std::max<int64_t>(0, end(b, i) - window) : 0; }
  // Vector v of (b, g) is a query head of a row, heads of a row one after the other.
  int64_t row_of(int64_t b, int64_t v) const { return first_row(b) + v / groups; }
  int64_t head_of(int64_t g, int64_t v) const { return g * groups + v % groups; }
  const char* vector(int64_t b, int64_t g, int64_t v) const {
    return query.ptr<char>() +
           (row_of(b, v) * query.stride(0) + head_of(g, v) * query.stride(1)) * itemsize(query.dtype);
  }
};

inline int64_t query_words(const Tensor& query, bool pairs) {
  return up(query.size(2), pairs ? 32 : 16) / (pairs ? 2 : 1);
}
inline bool in_pairs(const Tensor& query) { return query.dtype == DType::BFloat16 && fused_kernels().pairs; }

// The positions [begin, end) of (b, g) that are there.
struct Present {
  const char *key[kSplit], *value[kSplit];
  int64_t count = 0;
  bool whole = true;

  void find(const Problem& p, int64_t b, int64_t g, int64_t begin, int64_t end) {
    const int32_t *key_table = p.keys.table_of(b, g), *value_table = p.values.table_of(b, g);
    const char *keys = p.keys.base(b, g), *values = p.values.base(b, g);
    count = 0;
    for (int64_t x = begin; x < end;) {
      const int64_t t = x / p.page, in_page = x - t * p.page, n = std::min(p.page - in_page, end - x);
      x += n;
      if (key_table[t] < 0 || value_table[t] < 0) continue;
      const char* k = keys + key_table[t] * p.keys.bytes[2] + in_page * p.keys.bytes[3];
      const char* v = values + value_table[t] * p.values.bytes[2] + in_page * p.values.bytes[3];
      for (int64_t i = 0; i < n; ++i, k += p.keys.bytes[3], v += p.values.bytes[3]) {
        key[count] = k;
        value[count++] = v;
      }
    }
    whole = count == end - begin;
  }

  // How many of them lie below x.
  int32_t below(const Problem& p, int64_t b, int64_t g, int64_t begin, int64_t end, int64_t x) const {
    if (x <= begin) return 0;
    if (x >= end) return static_cast<int32_t>(count);
    if (whole) return static_cast<int32_t>(x - begin);
    const int32_t *key_table = p.keys.table_of(b, g), *value_table = p.values.table_of(b, g);
    int64_t n = 0;
    for (int64_t y = begin; y < x;) {
      const int64_t t = y / p.page, next = std::min(x, (t + 1) * p.page);
      if (key_table[t] >= 0 && value_table[t] >= 0) n += next - y;
      y = next;
    }
    return static_cast<int32_t>(n);
  }
};

// Positions that vectors [first, first + count) see at all.
inline std::pair<int64_t, int64_t> span(const Problem& p, int64_t b, int64_t first, int64_t count) {
  return {p.begin(b, first / p.groups), std::max<int64_t>(0, p.end(b, (first + count - 1) / p.groups))};
}

constexpr int64_t kTile = 768;  // vectors of a tile at most

// A thread's workspace for tiles.
struct TileSpace {
  uint32_t *query, *key_panels, *value_panels, *shares;
  float *logits, *out, *max, *sums;
  TileSpace(Arena& arena, const Tensor& query);
};

// Attends for the vectors [first, first + count) of (b, g), at most kTile and whole rows of heads unless one row is more.
void attend_tile(const Problem& p, const TileSpace& space, int64_t b, int64_t g, int64_t first, int64_t count);

}  // namespace fastpost::paged
