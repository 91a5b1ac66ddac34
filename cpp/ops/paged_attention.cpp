// SPDX-License-Identifier: Apache-2.0
// Few vectors (rows of queries of one key head) are bound by reading keys and values: they go through them once, in splits
// of fixed size, so that results depend neither on threads nor on other sequences. Many are bound by the multipliers:
// tiles of them meet blocks of keys (paged_attention_products.cpp).
//
// One thread of a virtual AMD EPYC (Zen 4) that others used too, bfloat16: a token at 8192 positions, 9 heads, 3 key heads
// of 64, takes 0.58 ms with pages in order and 1.06 with pages in none (a copy of as many bytes 0.37; torch 8.7 on
// contiguous keys); at 32768 positions, 32 heads, 8 key heads of 128, 11.4 ms in no order (copy 7.3, torch 245). A prompt
// of 8192 in the first shape 476 ms, 162 GFLOP/s (a plain GEMM 179, torch 67).
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/parallel.h"
#include "cuda/ops.h"
#include "ops.h"
#include "ops/paged_attention_products.h"

namespace fastpost {
namespace {

using namespace paged;

constexpr const char* kOp = "paged_attention";

// ---- checks ----------------------------------------------------------------------------------------------------------

void expect_heads(const Tensor& query, const Tensor& keys) {
  const int64_t h = query.size(1), g = keys.size(1);
  if (g < 1 || h < 1 || h % g != 0 || keys.size(3) < 1 || query.size(2) < 1) {
    fail(kOp, "keys", "[R, G, P, page, d] with query heads (" + std::to_string(h) + ") a multiple of G, none of them 0",
         describe(keys));
  }
}

void expect_rows_of_pool(const char* argument, const Tensor& row, const Tensor& pool, int64_t b, const Tensor& query) {
  const int64_t r = pool.size(0);
  expect_optional(kOp, argument, row, {DType::Int32}, {b}, Layout::Contiguous, &query);
  if (!row.defined() && r != 1 && r != b) {
    fail(kOp, argument, "int32 [" + std::to_string(b) + "], which of the " + std::to_string(r) + " pools is whose",
         "None");
  }
}

void expect_values(const char* argument, const Tensor& t, int64_t low, int64_t high) {
  const int32_t* x = t.ptr<int32_t>();
  for (int64_t i = 0; i < t.numel(); ++i) {
    if (x[i] < low || x[i] >= high) {
      fail(kOp, argument, "numbers in [" + std::to_string(low) + ", " + std::to_string(high) + ")",
           std::to_string(x[i]) + " at index " + std::to_string(i));
    }
  }
}

// What the tables name is there, and new positions have a page.
void expect_pages(const char* argument, const Problem& p, const Pool& pool) {
  const int64_t pages = pool.pages.size(2);
  for (int64_t b = 0; b < p.sequences(); ++b) {
    for (int64_t g = 0; g < pool.table.size(1); ++g) {
      const int32_t* table = pool.table_of(b, g);
      const int64_t n = parts_of(p.total(b), p.page);
      int32_t least = 0, most = -1;
      for (int64_t i = 0; i < n; ++i) {
        least = std::min(least, table[i]);
        most = std::max(most, table[i]);
      }
      if (least < -1 || most >= pages) {
        fail(kOp, argument, "pages in [0, " + std::to_string(pages) + "), or -1",
             std::to_string(least < -1 ? least : most) + " for sequence " + std::to_string(b));
      }
      if (!p.new_keys.defined() || p.rows(b) == 0) continue;
      for (int64_t i = (p.total(b) - p.rows(b)) / p.page; i < n; ++i) {
        if (table[i] < 0) {
          fail(kOp, argument, "a page for every new position", "-1 for sequence " + std::to_string(b),
               "Give the sequence another page first.");
        }
      }
    }
  }
}

void check_values(const Problem& p) {
  const int64_t most = p.keys.table.size(2) * p.page;
  if (p.cu_seqlens.defined()) expect_segments(kOp, p.cu_seqlens, p.query.size(0));
  for (int64_t b = 0; b < p.sequences(); ++b) {
    // A row that has no position of its own sees nothing; a new key needs one.
    const int64_t least = p.cu_seqlens.defined() || p.new_keys.defined() ? p.rows(b) : 0;
    if (p.total(b) < least || p.total(b) > most) {
      fail(kOp, "length",
           "at least the rows of a sequence (" + std::to_string(least) + ") and at most what its table has room for (" +
               std::to_string(most) + ")",
           std::to_string(p.total(b)) + " for sequence " + std::to_string(b));
    }
  }
  if (p.keys.row.defined()) expect_values("key_row", p.keys.row, 0, p.keys.pages.size(0));
  if (p.values.row.defined()) expect_values("value_row", p.values.row, 0, p.values.pages.size(0));
  expect_pages("table", p, p.keys);
  if (p.values.table.data != p.keys.table.data || p.values.table.size(1) != p.keys.table.size(1) ||
      p.values.pages.size(2) < p.keys.pages.size(2)) {
    expect_pages("value_table", p, p.values);
  }
}

// ---- work ------------------------------------------------------------------------------------------------------------

// So many vectors [first, first + count) of (b, g): few on positions [split·kSplit, (split + 1)·kSplit), or a tile.
struct Unit {
  int64_t b, g, first, count, split, part;  // part: of the partial results, in order
  int64_t work;
};
constexpr int64_t kWhole = -1;  // instead of a split: a tile

// Partial results of a vector: parts [count] from `first` on; kWhole: a tile writes the result.
struct Parts {
  int64_t first, count;
};

struct Plan {
  std::vector<Unit> units;
  std::vector<Parts> parts;  // [T·H]
  int64_t total = 0;
};

void append(const Problem& p) {
  if (!p.new_keys.defined()) return;
  const int64_t size = p.d * itemsize(p.query.dtype), rows = p.query.size(0) * p.key_heads();
  const auto write = [&](const Pool& pool, const Tensor& from, int64_t b, int64_t g) {
    const int32_t* table = pool.table_of(b, g);
    char* base = pool.base(b, g);
    const char* source =
        from.ptr<char>() + (p.first_row(b) * from.stride(0) + g * from.stride(1)) * itemsize(from.dtype);
    for (int64_t i = 0, x = p.total(b) - p.rows(b); i < p.rows(b); ++i, ++x) {
      std::memcpy(base + table[x / p.page] * pool.bytes[2] + x % p.page * pool.bytes[3], source, size);
      source += from.stride(0) * itemsize(from.dtype);
    }
  };
  const int64_t pairs = p.sequences() * p.key_heads();
  const int64_t grain = std::max<int64_t>(1, pairs * (256 << 10) / std::max<int64_t>(1, rows * size));
  parallel_for(pairs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      write(p.keys, p.new_keys, i / p.key_heads(), i % p.key_heads());
      write(p.values, p.new_values, i / p.key_heads(), i % p.key_heads());
    }
  });
}

// Few vectors are bound by memory, however long the sequence: it is cut so that all threads have some of it. A single row
// always counts as few, as there are no others to share panels with.
bool is_few(int64_t rows, int64_t groups) { return rows == 1 || rows * groups <= kMostFew; }

// Vectors of a tile, whole rows of them where they fit: many, as keys are packed once for each tile; fewer where there are
// more threads than that makes work for. What a vector gets does not depend on it.
int64_t tile_of(const Problem& p, int64_t threads) {
  int64_t tile = kTile;
  while (tile > 96 && threads > 1 && p.query.size(0) * p.heads < 4 * threads * tile) tile /= 2;
  return p.groups > tile ? kTile : tile / p.groups * p.groups;
}

Plan plan_of(const Problem& p, int64_t threads) {
  Plan plan;
  plan.parts.resize(p.query.size(0) * p.heads);
  const int64_t tile = tile_of(p, threads);
  for (int64_t b = 0; b < p.sequences(); ++b) {
    const int64_t vectors = p.rows(b) * p.groups;
    const bool few = is_few(p.rows(b), p.groups);
    const int64_t step = few ? kMostFew : tile;
    for (int64_t g = 0; g < p.key_heads(); ++g) {
      for (int64_t first = 0; first < vectors; first += step) {
        const int64_t count = std::min(step, vectors - first);
        const auto [begin, end] = span(p, b, first, count);
        const int64_t length = std::max<int64_t>(0, end - begin);
        const int64_t splits = !few ? kWhole : length > 0 ? parts_of(end, kSplit) - begin / kSplit : 0;
        for (int64_t v = first; v < first + count; ++v) {
          plan.parts[p.row_of(b, v) * p.heads + p.head_of(g, v)] = {plan.total + (v - first) * splits, splits};
        }
        if (!few) plan.units.push_back({b, g, first, count, kWhole, 0, count * length});
        for (int64_t s = 0; s < splits; ++s) {
          plan.units.push_back({b, g, first, count, begin / kSplit + s, plan.total + s, 0});
        }
        if (few) plan.total += count * splits;
      }
    }
  }
  // Long ones first, so that threads end together.
  std::stable_sort(plan.units.begin(), plan.units.end(), [](const Unit& x, const Unit& y) { return x.work > y.work; });
  return plan;
}

// Workspace: of each thread, and of all.
struct Scratch {
  std::vector<TileSpace> tiles;
  float *logits, *parts, *stats;
  uint32_t* query;
  int64_t part_row, query_row;

  Scratch(Arena& arena, const Tensor& query_, const Tensor& keys, const Tensor& table, int64_t threads) {
    const int64_t t = query_.size(0), h = query_.size(1), b = table.size(0), g = keys.size(1);
    part_row = up(query_.size(2), 16);
    query_row = query_words(query_, in_pairs(query_));
    logits = arena.take<float>(threads * kMostFew * kSplit);
    query = arena.take<uint32_t>(threads * kMostFew * query_row);
    const int64_t most =
        std::min(t * h, b * g * std::max(kMostFew, h / g)) * parts_of(table.size(2) * keys.size(3), kSplit);
    parts = arena.take<float>(most * part_row);
    stats = arena.take<float>(most * 2);
    if (t > b || !is_few(t, h / g)) {
      for (int64_t i = 0; i < threads; ++i) tiles.emplace_back(arena, query_);
    }
  }
};

void attend(const Problem& p, const Scratch& s, const Unit& u, int64_t splits, int64_t thread) {
  const AttentionKernels& kernels = attention_kernels();
  const auto [lowest, highest] = span(p, u.b, u.first, u.count);
  const int64_t begin = std::max(lowest, u.split * kSplit), end = std::min(highest, (u.split + 1) * kSplit);
  Present present;
  present.find(p, u.b, u.g, begin, end);
  const char* vectors[kMostFew];
  Seen seen[kMostFew];
  for (int64_t v = 0; v < u.count; ++v) {
    const int64_t i = (u.first + v) / p.groups;
    vectors[v] = p.vector(u.b, u.g, u.first + v);
    seen[v].begin = present.below(p, u.b, u.g, begin, end, p.begin(u.b, i));
    seen[v].end = std::max(seen[v].begin, present.below(p, u.b, u.g, begin, end, p.end(u.b, i)));
  }
  uint32_t* words = s.query + thread * kMostFew * s.query_row;
  kernels.pack_rows(p.pairs, p.query.dtype, {vectors, u.count}, p.d, words, s.query_row);
  kernels.few(p.pairs, p.query.dtype, {present.key, present.count}, {present.value, present.count}, p.d, words,
              s.query_row, u.count, seen, p.rule, s.logits + thread * kMostFew * kSplit, s.parts + u.part * s.part_row,
              splits * s.part_row, s.stats + u.part * 2, splits * 2);
}

void compute(const Problem& p, const Plan& plan, const Scratch& s, int64_t threads) {
  // Whoever is free takes the next unit: what it gives does not depend on who that is.
  std::atomic<int64_t> next{0};
  const int64_t units = static_cast<int64_t>(plan.units.size());
  parallel_for(std::min(threads, units), 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
        const Unit& u = plan.units[i];
        if (u.split == kWhole) {
          attend_tile(p, s.tiles[thread], u.b, u.g, u.first, u.count);
          continue;
        }
        attend(p, s, u, plan.parts[p.row_of(u.b, u.first) * p.heads + p.head_of(u.g, u.first)].count, thread);
      }
    }
  });
  const int64_t vectors = p.query.size(0) * p.heads;
  const int64_t grain = std::max<int64_t>(1, vectors * 65536 / std::max<int64_t>(1, (plan.total + vectors) * p.d));
  parallel_for(vectors, grain, [&](int64_t first, int64_t last) {
    for (int64_t v = first; v < last; ++v) {
      const Parts& of = plan.parts[v];
      if (of.count == kWhole) continue;
      const float lse =
          attention_kernels().finish(p.out.dtype, s.parts + of.first * s.part_row, s.part_row, s.stats + of.first * 2,
                                     of.count, p.begun_out.defined() ? p.begun_out.ptr<float>() + v * p.d : nullptr,
                                     p.begun_lse.defined() ? p.begun_lse.ptr<float>()[v] : 0.0f, p.d,
                                     p.out.ptr<char>() + v * p.d * itemsize(p.out.dtype));
      if (p.lse.defined()) p.lse.ptr<float>()[v] = lse;
    }
  });
}

}  // namespace

int64_t paged_attention_bytes(Tensor query, Tensor keys, Tensor key_table, int64_t threads) {
  expect(kOp, "query", query, kFloats, {kAny, kAny, kAny}, Layout::ContiguousRows);
  expect(kOp, "keys", keys, {query.dtype}, {kAny, kAny, kAny, kAny, query.size(2)}, Layout::ContiguousRows, &query);
  expect_heads(query, keys);
  expect(kOp, "table", key_table, {DType::Int32}, {kAny, kAny, kAny}, Layout::Contiguous, &query);
  if (query.device == Device::CUDA) return cuda::paged_attention_bytes(query, keys, key_table);
  Arena arena{nullptr};
  Scratch(arena, query, keys, key_table, threads);
  return arena.used;
}

void paged_attention(Tensor query, Tensor keys, Tensor values, Tensor key_table, Tensor value_table, Tensor length,
                     Tensor cu_seqlens, Tensor key_row, Tensor value_row, Tensor new_keys, Tensor new_values,
                     Tensor begun_out, Tensor begun_lse, double scaling, double softcap, int64_t window,
                     Tensor workspace, Tensor out, Tensor lse) {
  expect(kOp, "query", query, kFloats, {kAny, kAny, kAny}, Layout::ContiguousRows);
  const int64_t t = query.size(0), h = query.size(1), d = query.size(2);
  expect(kOp, "keys", keys, {query.dtype}, {kAny, kAny, kAny, kAny, d}, Layout::ContiguousRows, &query);
  expect_heads(query, keys);
  const int64_t g = keys.size(1), page = keys.size(3);
  expect(kOp, "values", values, {query.dtype}, {kAny, g, kAny, page, d}, Layout::ContiguousRows, &query);
  expect(kOp, "length", length, {DType::Int32}, {kAny}, Layout::Contiguous, &query);
  const int64_t b = length.size(0);
  const auto expect_table = [&](const char* argument, const Tensor& table) {
    expect(kOp, argument, table, {DType::Int32}, {b, kAny, kAny}, Layout::Contiguous, &query);
    if (table.size(1) != 1 && table.size(1) != g) {
      fail(kOp, argument, "int32 [" + std::to_string(b) + ", 1 or " + std::to_string(g) + ", any]", describe(table));
    }
  };
  expect_table("table", key_table);
  if (value_table.defined()) {
    expect_table("value_table", value_table);
    if (value_table.size(2) != key_table.size(2)) {
      fail(kOp, "value_table", "as many pages as table (" + std::to_string(key_table.size(2)) + ")",
           describe(value_table));
    }
  }
  expect_optional(kOp, "cu_seqlens", cu_seqlens, {DType::Int32}, {b + 1}, Layout::Contiguous, &query);
  if (!cu_seqlens.defined() && t != b) {
    fail(kOp, "cu_seqlens",
         "int32 [" + std::to_string(b + 1) + "], as there are " + std::to_string(t) + " rows of " + std::to_string(b) +
             " sequences",
         "None");
  }
  expect_rows_of_pool("key_row", key_row, keys, b, query);
  expect_rows_of_pool("value_row", value_row, values, b, query);
  if (new_keys.defined() != new_values.defined()) {
    fail(kOp, new_keys.defined() ? "new_values" : "new_keys", "both new_keys and new_values, or none", "None");
  }
  expect_optional(kOp, "new_keys", new_keys, {query.dtype}, {t, g, d}, Layout::ContiguousRows, &query);
  expect_optional(kOp, "new_values", new_values, {query.dtype}, {t, g, d}, Layout::ContiguousRows, &query);
  if (begun_out.defined() != begun_lse.defined()) fail(kOp, "begun", "a pair (out, lse)", "one of the two");
  expect_optional(kOp, "begun out", begun_out, {DType::Float32}, {t, h, d}, Layout::Contiguous, &query);
  expect_optional(kOp, "begun lse", begun_lse, {DType::Float32}, {t, h}, Layout::Contiguous, &query);
  if (!(softcap >= 0)) fail(kOp, "softcap", "a number above 0, or None", std::to_string(softcap));
  if (window < 0) fail(kOp, "window", "a number above 0, or None", std::to_string(window));
  expect(kOp, "out", out, {query.dtype, DType::Float32}, {t, h, d}, Layout::Contiguous, &query);
  expect_optional(kOp, "lse", lse, {DType::Float32}, {t, h}, Layout::Contiguous, &query);
  const int64_t threads = num_threads();
  expect_workspace(kOp, workspace, paged_attention_bytes(query, keys, key_table, threads), query);
  if (query.device == Device::CUDA) {
    return cuda::paged_attention(query, keys, values, key_table, value_table, length, cu_seqlens, key_row, value_row,
                                 new_keys, new_values, begun_out, begun_lse, scaling, softcap, window, workspace, out,
                                 lse);
  }

  const Problem p{query,
                  length,
                  cu_seqlens,
                  new_keys,
                  new_values,
                  begun_out,
                  begun_lse,
                  out,
                  lse,
                  Pool(keys, key_table, key_row),
                  Pool(values, value_table.defined() ? value_table : key_table, value_row),
                  {static_cast<float>(scaling), static_cast<float>(softcap)},
                  window,
                  h,
                  h / g,
                  d,
                  page,
                  in_pairs(query)};
  check_values(p);
  append(p);
  const Plan plan = plan_of(p, threads);
  Arena arena{workspace.ptr<char>()};
  const Scratch scratch(arena, query, keys, key_table, threads);
  compute(p, plan, scratch, threads);
}

}  // namespace fastpost
