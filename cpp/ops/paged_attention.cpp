// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/check.h"
#include "core/parallel.h"
#include "cuda/ops.h"
#include "ops.h"
#include "ops/linear_logprob_fused_simd.h"
#include "ops/paged_attention_simd.h"

namespace fastpost {
namespace {

constexpr const char* kOp = "paged_attention";

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

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

int64_t query_words(const Tensor& query, bool pairs) { return up(query.size(2), pairs ? 32 : 16) / (pairs ? 2 : 1); }
bool in_pairs(const Tensor& query) { return query.dtype == DType::BFloat16 && fused_kernels().pairs; }

// ---- checks ----------------------------------------------------------------------------------------------------------

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
  if (p.values.table.data != p.keys.table.data || p.values.pages.size(2) < p.keys.pages.size(2)) {
    expect_pages("value_table", p, p.values);
  }
}

// ---- work ------------------------------------------------------------------------------------------------------------

// So many vectors [first, first + count) of (b, g), on positions [split·kSplit, (split + 1)·kSplit).
struct Unit {
  int64_t b, g, first, count, split, part;  // part: of the partial results, in order
};

// Partial results of a vector: parts [count] from `first` on.
struct Parts {
  int64_t first, count;
};

struct Plan {
  std::vector<Unit> units;
  std::vector<Parts> parts;  // [B·G·vectors]
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
std::pair<int64_t, int64_t> span(const Problem& p, int64_t b, int64_t first, int64_t count) {
  return {p.begin(b, first / p.groups), std::max<int64_t>(0, p.end(b, (first + count - 1) / p.groups))};
}

Plan plan_of(const Problem& p) {
  Plan plan;
  plan.parts.resize(p.query.size(0) * p.heads);
  for (int64_t b = 0; b < p.sequences(); ++b) {
    const int64_t vectors = p.rows(b) * p.groups;
    for (int64_t g = 0; g < p.key_heads(); ++g) {
      for (int64_t first = 0; first < vectors; first += kMostFew) {
        const int64_t count = std::min(kMostFew, vectors - first);
        const auto [begin, end] = span(p, b, first, count);
        const int64_t splits = end > begin ? parts_of(end, kSplit) - begin / kSplit : 0;
        for (int64_t v = first; v < first + count; ++v) {
          plan.parts[p.row_of(b, v) * p.heads + p.head_of(g, v)] = {plan.total + (v - first) * splits, splits};
        }
        for (int64_t s = 0; s < splits; ++s) {
          plan.units.push_back({b, g, first, count, begin / kSplit + s, plan.total + s});
        }
        plan.total += count * splits;
      }
    }
  }
  return plan;
}

// Workspace: of each thread, and of all.
struct Scratch {
  float *logits, *parts, *stats;
  uint32_t* query;
  int64_t part_row, query_row;

  Scratch(Arena& arena, const Tensor& query_, int64_t threads, int64_t most_parts) {
    part_row = up(query_.size(2), 16);
    query_row = query_words(query_, in_pairs(query_));
    logits = arena.take<float>(threads * kMostFew * kSplit);
    query = arena.take<uint32_t>(threads * kMostFew * query_row);
    parts = arena.take<float>(most_parts * part_row);
    stats = arena.take<float>(most_parts * 2);
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
        attend(p, s, u, plan.parts[p.row_of(u.b, u.first) * p.heads + p.head_of(u.g, u.first)].count, thread);
      }
    }
  });
  const int64_t vectors = p.query.size(0) * p.heads;
  const int64_t grain = std::max<int64_t>(1, vectors * 65536 / std::max<int64_t>(1, (plan.total + vectors) * p.d));
  parallel_for(vectors, grain, [&](int64_t first, int64_t last) {
    for (int64_t v = first; v < last; ++v) {
      const Parts& of = plan.parts[v];
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
  expect(kOp, "table", key_table, {DType::Int32}, {kAny, kAny, kAny}, Layout::Contiguous, &query);
  if (query.device == Device::CUDA) return cuda::paged_attention_bytes(query, keys, key_table);
  const int64_t splits = parts_of(key_table.size(2) * keys.size(3), kSplit);
  Arena arena{nullptr};
  Scratch(arena, query, threads, query.size(0) * query.size(1) * splits);
  return arena.used;
}

void paged_attention(Tensor query, Tensor keys, Tensor values, Tensor key_table, Tensor value_table, Tensor length,
                     Tensor cu_seqlens, Tensor key_row, Tensor value_row, Tensor new_keys, Tensor new_values,
                     Tensor begun_out, Tensor begun_lse, double scaling, double softcap, int64_t window,
                     Tensor workspace, Tensor out, Tensor lse) {
  expect(kOp, "query", query, kFloats, {kAny, kAny, kAny}, Layout::ContiguousRows);
  const int64_t t = query.size(0), h = query.size(1), d = query.size(2);
  expect(kOp, "keys", keys, {query.dtype}, {kAny, kAny, kAny, kAny, d}, Layout::ContiguousRows, &query);
  const int64_t g = keys.size(1), page = keys.size(3);
  if (g < 1 || h % g != 0 || page < 1 || d < 1) {
    fail(kOp, "keys", "[R, G, P, page, d] with query heads (" + std::to_string(h) + ") a multiple of G",
         describe(keys));
  }
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
  expect(kOp, "workspace", workspace, {DType::UInt8}, {kAny}, Layout::Contiguous, &query);
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
  const int64_t threads = num_threads(), needed = paged_attention_bytes(query, keys, key_table, threads);
  if (workspace.size(0) < needed) {
    fail(kOp, "workspace", "at least " + std::to_string(needed) + " bytes", std::to_string(workspace.size(0)),
         "Ask paged_attention_bytes.");
  }
  append(p);
  const Plan plan = plan_of(p);
  Arena arena{workspace.ptr<char>()};
  const Scratch scratch(arena, query, threads, t * h * parts_of(key_table.size(2) * page, kSplit));
  compute(p, plan, scratch, threads);
}

}  // namespace fastpost
