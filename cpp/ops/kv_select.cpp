// SPDX-License-Identifier: Apache-2.0
// A (row, key head) at a time by one thread, logits and scores staying in its cache; where there are fewer of them than
// threads, first all logits in parts of kPart chunks, then the rest of each. A logit is the same number either way.
//
// One thread of a virtual AMD EPYC that others used too, 4096 chunks of 8 key heads of 128, 32 query heads, landmarks
// not in cache: 0.50 ms, where a copy of as many bytes takes 0.21. Of that 0.35 are logits (0.23 products, the rest the
// transpose that lets 16 chunks lie side by side), 0.04 scores, 0.03 the choice, 0.01 the call from Python. torch on
// landmarks in bfloat16: 3.7 to 3.9 times as long.
#include <algorithm>
#include <cmath>
#include <string>

#include "core/arena.h"
#include "core/check.h"
#include "core/parallel.h"
#include "cuda/ops.h"
#include "ops.h"
#include "ops/kv_select_simd.h"

namespace fastpost {
namespace {

constexpr int64_t kPart = 256;

struct Space {
  char* query;    // packed
  float* logits;  // [heads, row]
  float* score;   // [row]
  int32_t* picked;
  int32_t* place;  // [C]: where a chunk is among the picked ones
  int64_t row;

  Space(Arena& a, int64_t heads, int64_t d, int64_t c)
      : query(a.take<char>(select_kernels().query_bytes(heads, d))), row((c + 15) / 16 * 16) {
    logits = a.take<float>(heads * row + kSelectLanes);
    score = a.take<float>(row);
    picked = a.take<int32_t>(row + kSelectLanes);
    place = a.take<int32_t>(row);
  }
};

struct Inputs {
  Tensor query, landmark, scale, source, count, kept, resident, chunks, slots, fresh;
  float scaling;
  int64_t heads, d;

  int64_t g() const { return landmark.size(1); }
  int64_t prompt(int64_t i) const { return source.defined() ? source.ptr<int32_t>()[i / g()] : i / g(); }
  int64_t open(int64_t i) const { return count.ptr<int32_t>()[i / g()]; }
};

char* at(const Tensor& t, int64_t i, int64_t j, int64_t k = 0) {
  return t.ptr<char>() + (i * t.stride(0) + j * t.stride(1) + (t.ndim > 2 ? k * t.stride(2) : 0)) * itemsize(t.dtype);
}

void pack(const Inputs& x, int64_t i, const Space& to) {
  const int64_t first = i % x.g() * x.heads;
  select_kernels().pack(x.query.dtype, at(x.query, i / x.g(), first), x.query.stride(1), x.heads, x.d, x.scaling,
                        x.landmark.dtype, to.query);
}

void logits(const Inputs& x, int64_t i, int64_t begin, int64_t end, const Space& to) {
  const int64_t p = x.prompt(i), j = i % x.g();
  const float* scale = x.scale.defined() ? reinterpret_cast<float*>(at(x.scale, p, j, begin)) : nullptr;
  select_kernels().logits(to.query, x.heads, x.d, x.landmark.dtype, at(x.landmark, p, j, begin), x.landmark.stride(2),
                          scale, end - begin, to.logits + begin, to.row);
}

// Slots of what is wanted, and what is resident from now on.
void settle(const int32_t* wanted, int64_t n, int64_t slots_of, int64_t c, int32_t* place, int32_t* resident,
            int32_t* chunks, int32_t* slots, uint8_t* fresh) {
  for (int64_t s = 0; s < slots_of; ++s) {
    if (resident[s] >= 0 && resident[s] < c) place[resident[s]] = -1;
  }
  for (int64_t k = 0; k < slots_of; ++k) {
    chunks[k] = k < n ? wanted[k] : -1;
    slots[k] = -1;
    fresh[k] = 0;
    if (k < n) place[wanted[k]] = static_cast<int32_t>(k);
  }
  for (int64_t s = slots_of - 1; s >= 0; --s) {  // of a chunk that should lie in two, the last
    const int32_t k = resident[s] >= 0 && resident[s] < c ? place[resident[s]] : -1;
    if (k >= 0 && slots[k] < 0) {
      slots[k] = static_cast<int32_t>(s);
    } else {
      resident[s] = -1;
    }
  }
  for (int64_t k = 0, s = 0; k < n; ++k) {
    if (slots[k] >= 0) continue;
    while (resident[s] >= 0) ++s;
    slots[k] = static_cast<int32_t>(s);
    resident[s] = wanted[k];
    fresh[k] = 1;
  }
}

void choose(const Inputs& x, int64_t i, const Space& of) {
  const int64_t open = x.open(i), n = x.resident.size(2), o = x.kept.defined() ? x.kept.size(2) : 0;
  const auto* kept = o > 0 ? reinterpret_cast<const int32_t*>(at(x.kept, i / x.g(), i % x.g())) : nullptr;
  const auto close = [&](float* row) {
    for (int64_t k = 0; k < o; ++k) {
      if (kept[k] >= 0 && kept[k] < open) row[kept[k]] = -INFINITY;
    }
  };
  for (int64_t h = 0; h < x.heads; ++h) close(of.logits + h * of.row);
  select_kernels().scores(of.logits, of.row, x.heads, open, of.score);
  close(of.score);
  const int64_t found = select_kernels().pick(of.score, open, n, of.logits, of.picked);
  settle(of.picked, found, n, x.landmark.size(2), of.place, x.resident.ptr<int32_t>() + i * n,
         x.chunks.ptr<int32_t>() + i * n, x.slots.ptr<int32_t>() + i * n, x.fresh.ptr<uint8_t>() + i * n);
}

void expect_below(const char* op, const char* argument, const Tensor& t, int64_t end, const char* what) {
  for (int64_t i = 0; i < t.size(0); ++i) {
    const int32_t x = t.ptr<int32_t>()[i];
    if (x < 0 || x >= end) {
      fail(op, argument, std::string(what) + " in [0, " + std::to_string(end) + ")",
           std::to_string(x) + " at row " + std::to_string(i));
    }
  }
}

}  // namespace

void kv_select(Tensor query, Tensor landmark, Tensor scale, Tensor source, Tensor count, Tensor kept, double scaling,
               Tensor workspace, Tensor resident, Tensor chunks, Tensor slots, Tensor fresh) {
  constexpr const char* op = "kv_select";
  expect(op, "query", query, kFloats, {kAny, kAny, kAny}, Layout::ContiguousRows);
  const int64_t b = query.size(0), h = query.size(1), d = query.size(2);
  expect(op, "landmark", landmark, {DType::Int8, DType::Float32, DType::BFloat16, DType::Float16},
         {source.defined() ? kAny : b, kAny, kAny, d}, Layout::ContiguousRows, &query);
  const int64_t p = landmark.size(0), g = landmark.size(1), c = landmark.size(2);
  if (g < 1 || h < 1 || h % g != 0) {
    fail(op, "query", "a multiple of the " + std::to_string(g) + " key heads of landmark",
         std::to_string(h) + " heads");
  }
  if (c > INT32_MAX) fail(op, "landmark", "fewer than 2^31 chunks", describe(landmark));
  if (landmark.dtype == DType::Int8) {
    expect(op, "scale", scale, {DType::Float32}, {p, g, c}, Layout::ContiguousRows, &query);
  } else if (scale.defined()) {
    fail(op, "scale", "None, as landmark is not int8", describe(scale));
  }
  expect_optional(op, "source", source, {DType::Int32}, {b}, Layout::Contiguous, &query);
  expect(op, "count", count, {DType::Int32}, {b}, Layout::Contiguous, &query);
  expect_optional(op, "kept", kept, {DType::Int32}, {b, g, kAny}, Layout::ContiguousRows, &query);
  expect(op, "resident", resident, {DType::Int32}, {b, g, kAny}, Layout::Contiguous, &query);
  const int64_t n = resident.size(2);
  expect(op, "chunks", chunks, {DType::Int32}, {b, g, n}, Layout::Contiguous, &query);
  expect(op, "slots", slots, {DType::Int32}, {b, g, n}, Layout::Contiguous, &query);
  expect(op, "fresh", fresh, {DType::UInt8}, {b, g, n}, Layout::Contiguous, &query);
  expect(op, "workspace", workspace, {DType::UInt8}, {kAny}, Layout::Contiguous, &query);
  if (query.device == Device::CUDA) {
    expect_workspace(op, workspace, cuda::kv_select_bytes(query, landmark), query);
    return cuda::kv_select(query, landmark, scale, source, count, kept, scaling, workspace, resident, chunks, slots,
                           fresh);
  }
  if (source.defined()) expect_below(op, "source", source, p, "numbers of prompts");
  expect_below(op, "count", count, c + 1, "numbers of chunks");

  const Inputs x{
      query, landmark, scale, source, count, kept, resident, chunks, slots, fresh, static_cast<float>(scaling),
      h / g, d};
  const int64_t items = b * g;
  if (items == 0) return;
  Arena measure{nullptr};
  const Space one(measure, x.heads, d, c);
  const int64_t bytes = measure.used, workers = std::min<int64_t>({num_threads(), items, workspace.size(0) / bytes});
  if (workers < 1) fail(op, "workspace", "at least " + std::to_string(bytes) + " bytes", describe(workspace));
  const auto space = [&](int64_t worker) {
    Arena arena{workspace.ptr<char>() + worker * bytes};
    return Space(arena, x.heads, d, c);
  };
  if (workers == items && num_threads() > items) {
    for (int64_t i = 0; i < items; ++i) pack(x, i, space(i));
    const int64_t parts = (c + kPart - 1) / kPart;
    parallel_for(items * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t i = k / parts, first = k % parts * kPart;
        logits(x, i, first, std::min(first + kPart, x.open(i)), space(i));
      }
    });
    return parallel_for(items, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) choose(x, i, space(i));
    });
  }
  parallel_for(workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first * items / workers; i < last * items / workers; ++i) {
      const Space mine = space(first);
      pack(x, i, mine);
      logits(x, i, 0, x.open(i), mine);
      choose(x, i, mine);
    }
  });
}

int64_t kv_select_bytes(Tensor query, Tensor landmark, int64_t threads) {
  if (query.ndim != 3 || landmark.ndim != 4 || landmark.size(1) < 1) return 0;  // refused by name when it is used
  if (query.device == Device::CUDA) return cuda::kv_select_bytes(query, landmark);
  const int64_t g = landmark.size(1);
  Arena arena{nullptr};
  const Space one(arena, (query.size(1) + g - 1) / g, query.size(2), landmark.size(2));
  static_cast<void>(one);
  return arena.used * std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, query.size(0) * g));
}

}  // namespace fastpost
