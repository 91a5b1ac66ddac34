// SPDX-License-Identifier: Apache-2.0
// Both products are that of linear_logprob_fused_simd.h. The Gram matrix packs a block of tokens as panels of columns, and
// multiplies panels with panels, one half of the pairs; the projection multiplies rows of keys, as they lie in memory
// where they are words already, with panels of directions.
//
// Sums run over tokens (over dimensions) in an order that depends on the shape alone.
#include <algorithm>
#include <cstring>
#include <string>

#include "core/arena.h"
#include "core/check.h"
#include "core/parallel.h"
#include "cuda/ops.h"
#include "ops.h"
#include "ops/grouped_gemm_simd.h"
#include "ops/kv_landmarks_simd.h"
#include "ops/linear_logprob_fused_simd.h"

namespace fastpost {
namespace {

constexpr const char* kOp = "kv_factorize";
constexpr int64_t kSteps = 512;   // of a product at a time: a panel of so many stays in the second-level cache
constexpr int64_t kRows = 96;     // of keys at a time
constexpr int64_t kTileRows = 6;  // of a tile, the least that a thread gets: what the product computes at once
constexpr int64_t kPad = 16;      // words between rows, a cache line, so that they do not fight for the same places

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Words {
  bool pairs;
  int64_t per_word, lanes;
  explicit Words(DType dtype)
      : pairs(fused_kernels().pairs && dtype == DType::BFloat16),
        per_word(pairs ? 2 : 1),
        lanes(fused_kernels().lanes) {}
  int64_t steps(int64_t elements) const { return ceil_div(elements, per_word); }
  int64_t panels(int64_t columns) const { return ceil_div(columns, lanes); }
};

struct GramSpace {
  uint32_t* panels;  // [panels][kSteps][lanes]
  float* tiles;      // [pairs of panels][lanes][lanes]
  GramSpace(Arena& a, const Words& w, int64_t d)
      : panels(a.take<uint32_t>(w.panels(d) * kSteps * w.lanes)),
        tiles(a.take<float>(w.panels(d) * (w.panels(d) + 1) / 2 * w.lanes * w.lanes)) {}
};

struct ProjectSpace {
  uint32_t* panels;  // [panels of r][steps of d][lanes]
  uint16_t* narrow;  // directions in bfloat16, for pairs
  uint32_t* rows;    // [slots][kRows][steps of d + kPad]
  float* sums;       // [slots][kRows][panels of r · lanes]
  ProjectSpace(Arena& a, const Words& w, int64_t d, int64_t r, int64_t slots)
      : panels(a.take<uint32_t>(w.panels(r) * w.steps(d) * w.lanes)),
        narrow(a.take<uint16_t>(w.pairs ? d * r : 0)),
        rows(a.take<uint32_t>(slots * kRows * (w.steps(d) + kPad))),
        sums(a.take<float>(slots * kRows * w.panels(r) * w.lanes)) {}
};

// Tokens of sequence i that count.
int64_t tokens_of(const Tensor& length, int64_t i, int64_t s) {
  return length.defined() ? length.ptr<int32_t>()[i] : s;
}

void check_keys(const Tensor& keys, const Tensor& length, const Tensor& workspace) {
  expect(kOp, "keys", keys, kFloats, {kAny, kAny, kAny}, Layout::ContiguousRows);
  expect_optional(kOp, "length", length, {DType::Int32}, {keys.size(0)}, Layout::Contiguous, &keys);
  expect(kOp, "workspace", workspace, {DType::UInt8}, {kAny}, Layout::Contiguous, &keys);
  for (int64_t i = 0; keys.device == Device::CPU && length.defined() && i < keys.size(0); ++i) {
    const int32_t n = length.ptr<int32_t>()[i];
    if (n < 0 || n > keys.size(1)) {
      fail(kOp, "length", "numbers in [0, " + std::to_string(keys.size(1)) + "] (the tokens of keys)",
           std::to_string(n));
    }
  }
}

GroupedRows rows_of(const Tensor& t, int64_t i) {  // of matrix i
  const int64_t size = itemsize(t.dtype);
  return {t.ptr<char>() + i * t.stride(0) * size, t.stride(1) * size, nullptr, 1, t.dtype};
}

// ---- Gram matrix -----------------------------------------------------------------------------------------------------------

struct Pair {
  int64_t row, column;  // panels, column <= row
  explicit Pair(int64_t index) : row(0), column(index) {
    while (column > row) column -= ++row;
  }
};

void gram_of(const GroupedRows& x, int64_t tokens, int64_t d, const Words& w, const GramSpace& space, float* gram) {
  const int64_t lanes = w.lanes, panels = w.panels(d), pairs = panels * (panels + 1) / 2, tile = lanes * lanes;
  const int64_t parts = ceil_div(lanes, kTileRows);
  if (tokens == 0) return static_cast<void>(std::memset(gram, 0, d * d * sizeof(float)));
  for (int64_t first = 0; first < tokens; first += kSteps * w.per_word) {
    const int64_t count = std::min(kSteps * w.per_word, tokens - first);
    parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        grouped_kernels().pack_along(w.pairs, x, first, count, p * lanes, std::min(d, (p + 1) * lanes), lanes, 0,
                                     space.panels + p * kSteps * lanes);
      }
    });
    parallel_for(pairs * parts, 4, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const Pair pair(at / parts);
        const bool diagonal = pair.row == pair.column;  // of which the lower half will do
        const int64_t stop = diagonal ? at + 1 : std::min(end, (at / parts + 1) * parts), row = at % parts * kTileRows;
        const int64_t rows = std::min(row + (stop - at) * kTileRows, lanes) - row;
        const int64_t used = diagonal ? row + rows : lanes;
        fused_kernels().multiply(w.pairs, space.panels + pair.row * kSteps * lanes + row, 1, lanes, rows,
                                 space.panels + pair.column * kSteps * lanes, w.steps(count), used,
                                 space.tiles + at / parts * tile + row * lanes, lanes, first > 0);
        at = stop;
      }
    });
  }
  parallel_for(pairs, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const Pair pair(p);
      const int64_t top = pair.row * lanes, left = pair.column * lanes;
      for (int64_t i = 0; i < std::min(lanes, d - top); ++i) {
        const float* from = space.tiles + p * tile + i * lanes;
        for (int64_t j = 0; j < std::min(lanes, top + i + 1 - left); ++j) {
          gram[(top + i) * d + left + j] = from[j];
          gram[(left + j) * d + top + i] = from[j];
        }
      }
    }
  });
}

// ---- projection ------------------------------------------------------------------------------------------------------------

void write_row(const float* sums, int64_t r, const Tensor& u, const Tensor& scale, int64_t i, int64_t row) {
  char* out = u.ptr<char>() + (i * u.stride(0) + row * u.stride(1)) * itemsize(u.dtype);
  float* s = scale.defined() ? scale.ptr<float>() + i * scale.stride(0) + row : nullptr;
  if (!sums) {
    std::memset(out, 0, r * itemsize(u.dtype));
    if (s) *s = 0;
  } else if (s) {
    *s = landmark_kernels().quantize(sums, r, reinterpret_cast<int8_t*>(out));
  } else {
    fused_kernels().convert(sums, u.dtype, out, r);
  }
}

void project(const Tensor& keys, int64_t i, int64_t tokens, const Words& w, const ProjectSpace& space, int64_t slots,
             const Tensor& u, const Tensor& scale) {
  const int64_t d = keys.size(2), r = u.size(2), lanes = w.lanes, steps = w.steps(d), width = w.panels(r) * lanes;
  const GroupedRows x = rows_of(keys, i);
  const bool direct = keys.dtype == DType::Float32 ||
                      (w.pairs && d % 2 == 0 && x.row_bytes % 4 == 0 && reinterpret_cast<uintptr_t>(x.base) % 4 == 0);
  const int64_t blocks = ceil_div(keys.size(1), kRows);
  slots = std::min(slots, blocks);
  parallel_for(slots, 1, [&](int64_t first_slot, int64_t last_slot) {
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      float* sums = space.sums + slot * kRows * width;
      uint32_t* packed = space.rows + slot * kRows * (steps + kPad);
      for (int64_t b = slot * blocks / slots; b < (slot + 1) * blocks / slots; ++b) {
        const int64_t first = b * kRows, last = std::min(first + kRows, keys.size(1));
        const int64_t count = std::clamp<int64_t>(tokens - first, 0, last - first);
        if (count > 0 && !direct) {
          grouped_kernels().pack_rows(w.pairs, x, first, count, 0, d, steps + kPad, packed);
        }
        const uint32_t* a = direct ? reinterpret_cast<const uint32_t*>(x.row(first)) : packed;
        const int64_t a_row = direct ? x.row_bytes / 4 : steps + kPad;
        for (int64_t p = 0; count > 0 && p < w.panels(r); ++p) {
          for (int64_t k = 0; k < steps; k += kSteps) {
            fused_kernels().multiply(w.pairs, a + k, a_row, 1, count, space.panels + (p * steps + k) * lanes,
                                     std::min(kSteps, steps - k), std::min(lanes, r - p * lanes), sums + p * lanes,
                                     width, k > 0);
          }
        }
        for (int64_t row = first; row < last; ++row) {
          write_row(row < tokens ? sums + (row - first) * width : nullptr, r, u, scale, i, row);
        }
      }
    }
  });
}

void pack_directions(const Tensor& directions, int64_t i, const Words& w, const ProjectSpace& space) {
  const int64_t d = directions.size(1), r = directions.size(2);
  GroupedRows x = rows_of(directions, i);
  if (w.pairs) {
    for (int64_t k = 0; k < d; ++k) {
      fused_kernels().convert(reinterpret_cast<const float*>(x.row(k)), DType::BFloat16,
                              reinterpret_cast<char*>(space.narrow + k * r), r);
    }
    x = {reinterpret_cast<const char*>(space.narrow), r * 2, nullptr, 1, DType::BFloat16};
  }
  grouped_kernels().pack_along(w.pairs, x, 0, d, 0, r, w.lanes, w.steps(d) * w.lanes, space.panels);
}

}  // namespace

void kv_factorize_gram(Tensor keys, Tensor length, Tensor workspace, Tensor gram) {
  check_keys(keys, length, workspace);
  const int64_t b = keys.size(0), s = keys.size(1), d = keys.size(2);
  expect(kOp, "gram", gram, {DType::Float32}, {b, d, d}, Layout::Contiguous, &keys);
  if (keys.device == Device::CUDA) {
    expect_workspace(kOp, workspace, cuda::kv_factorize_bytes(keys, 0), keys);
    return cuda::kv_factorize_gram(keys, length, workspace, gram);
  }
  Arena arena{workspace.ptr<char>()};
  const Words w(keys.dtype);
  const GramSpace space(arena, w, d);
  expect_workspace(kOp, workspace, arena.used, keys);
  for (int64_t i = 0; i < b; ++i) {
    gram_of(rows_of(keys, i), tokens_of(length, i, s), d, w, space, gram.ptr<float>() + i * d * d);
  }
}

void kv_factorize_project(Tensor keys, Tensor length, Tensor directions, Tensor workspace, Tensor u, Tensor scale) {
  check_keys(keys, length, workspace);
  const int64_t b = keys.size(0), s = keys.size(1), d = keys.size(2);
  expect(kOp, "directions", directions, {DType::Float32}, {b, d, kAny}, Layout::ContiguousRows, &keys);
  const int64_t r = directions.size(2);
  if (scale.defined()) {
    expect(kOp, "u", u, {DType::Int8}, {b, s, r}, Layout::ContiguousRows, &keys);
    expect(kOp, "scale", scale, {DType::Float32}, {b, s}, Layout::ContiguousRows, &keys);
  } else {
    expect(kOp, "u", u, {keys.dtype, DType::Float32}, {b, s, r}, Layout::ContiguousRows, &keys);
  }
  if (keys.device == Device::CUDA) {
    expect_workspace(kOp, workspace, cuda::kv_factorize_bytes(keys, r), keys);
    return cuda::kv_factorize_project(keys, length, directions, workspace, u, scale);
  }
  const Words w(keys.dtype);
  const auto space_for = [&](Arena& arena, int64_t slots) { return ProjectSpace(arena, w, d, r, slots); };
  int64_t slots = num_threads();
  for (; slots > 1; --slots) {  // as many as there is room for
    Arena arena{nullptr};
    space_for(arena, slots);
    if (arena.used <= workspace.size(0)) break;
  }
  Arena arena{workspace.ptr<char>()};
  const ProjectSpace space = space_for(arena, slots);
  expect_workspace(kOp, workspace, arena.used, keys);
  for (int64_t i = 0; i < b; ++i) {
    pack_directions(directions, i, w, space);
    project(keys, i, tokens_of(length, i, s), w, space, slots, u, scale);
  }
}

int64_t kv_factorize_bytes(Tensor keys, int64_t rank, int64_t threads) {
  if (keys.ndim != 3 || rank < 0) return 0;  // refused by name when it is used
  if (keys.device == Device::CUDA) return cuda::kv_factorize_bytes(keys, rank);
  const Words w(keys.dtype);
  Arena gram{nullptr}, project{nullptr};
  GramSpace(gram, w, keys.size(2));
  ProjectSpace(project, w, keys.size(2), rank, threads);
  return std::max(gram.used, project.used);
}

}  // namespace fastpost
