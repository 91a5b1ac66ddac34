// SPDX-License-Identifier: Apache-2.0
#include "ops/grouped_gemm_products.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "core/arena.h"
#include "core/check.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "ops/int4_gemm_simd.h"
#include "ops/linear_logprob_fused_simd.h"

namespace fastpost {
namespace {

constexpr const char* kOp = "grouped_gemm";

// ---- how the work is cut ---------------------------------------------------------------------------------------------

constexpr int64_t kFew = 16;           // rows of an expert that read W faster than panels do
constexpr int64_t kFewSteps = 8;       // of a weight gradient, whose results need no cache
constexpr int64_t kSumSteps = 512;     // of a product at a time: a panel of so many stays in the second-level cache
constexpr int64_t kTile = 128;         // outputs of a transposed W at a time
constexpr int64_t kFewColumns = 1024;  // outputs, for few rows
constexpr int64_t kTileRows = 512;     // rows of x, whose sums take as much cache again
constexpr int64_t kTileSums = 1024;    // rows of W
constexpr int64_t kPad = 16;  // words between rows, a cache line, so that they do not fight for the same places

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Words {
  bool pairs;
  int64_t per_word;  // elements
  explicit Words(DType dtype) : pairs(fused_kernels().pairs && dtype == DType::BFloat16), per_word(pairs ? 2 : 1) {}
  int64_t steps(int64_t elements) const { return ceil_div(elements, per_word); }
};

// Calls f(slot, expert, block) for every block of every expert with rows, blocks(rows) of them that cost cost(rows) each.
template <class Blocks, class Cost, class F>
void for_units(const Groups& groups, int64_t slots, Blocks&& blocks, Cost&& cost, F&& f) {
  int64_t total = 0;
  for (int64_t e = 0; e < groups.experts; ++e) total += blocks(groups.rows(e)) * cost(groups.rows(e));
  parallel_for(slots, 1, [&](int64_t first_slot, int64_t last_slot) {
    for (int64_t slot = first_slot; slot < last_slot; ++slot) {
      const int64_t low = slot * total / slots, high = (slot + 1) * total / slots;
      for (int64_t e = 0, at = 0; e < groups.experts; ++e) {
        const int64_t n = blocks(groups.rows(e)), each = cost(groups.rows(e));
        if (n * each == 0) continue;
        const auto begin_at = [&](int64_t bound) { return std::clamp<int64_t>(ceil_div(bound - at, each), 0, n); };
        const int64_t end = begin_at(high);
        for (int64_t b = low <= at ? 0 : begin_at(low); b < end; ++b) f(slot, e, b);
        at += n * each;
      }
    }
  });
}

const char* at(const Tensor& t, int64_t i) { return t.ptr<char>() + i * itemsize(t.dtype); }
char* row_part(const Tensor& t, int64_t row, int64_t column) { return t.row(row) + column * itemsize(t.dtype); }

// How many slots the workspace has room for; Space(arena, slots) says what they take.
template <class MakeSpace>
int64_t slots_for(const Tensor& workspace, const Tensor& like, MakeSpace&& make) {
  expect(kOp, "workspace", workspace, {DType::UInt8}, {kAny}, Layout::Contiguous, &like);
  for (int64_t slots = num_threads();; --slots) {
    Arena arena{workspace.ptr<char>()};
    make(arena, slots);
    if (arena.used <= workspace.size(0)) return slots;
    if (slots == 1) {
      fail(kOp, "workspace", "at least " + std::to_string(arena.used) + " bytes", std::to_string(workspace.size(0)));
    }
  }
}

// ---- W along K: rows of W times panels of x -----------------------------------------------------------------------------

struct Forward {
  Words words;
  int64_t r, n, k, experts, steps, lanes, few_row;
  Forward(DType dtype, int64_t rows, int64_t e, int64_t outputs, int64_t columns)
      : words(dtype),
        r(rows),
        n(outputs),
        k(columns),
        experts(e),
        steps(words.steps(columns)),
        lanes(fused_kernels().lanes),
        few_row(ceil_div(steps, 16) * 16 + kPad) {}
  int64_t panels() const { return r / lanes + std::min(experts, r / (kFew + 1)); }
};

struct ForwardSpace {
  uint32_t* panels;  // [panels][steps][lanes]
  uint32_t* few;     // [rows][few_row]
  uint32_t* w;       // [slots][kMaxBlock][kSumSteps + kPad], where W's rows are no words
  ForwardSpace(Arena& a, const Forward& s, int64_t slots)
      : panels(a.take<uint32_t>(s.panels() * s.steps * s.lanes)),
        few(a.take<uint32_t>(std::min(s.r, s.experts * kFew) * s.few_row)),
        w(a.take<uint32_t>(slots * kMaxBlock * (kSumSteps + kPad))) {}
};

class ForwardRun {
 public:
  ForwardRun(const GroupedRows& x, const Tensor& weight, const Groups& groups, const Tensor& bias,
             Activation activation, const Tensor& pre, const Tensor& out, const Forward& s, const ForwardSpace& space)
      : x_(x),
        weight_(weight),
        groups_(groups),
        bias_(bias),
        activation_(activation),
        pre_(pre),
        out_(out),
        s_(s),
        space_(space),
        parts_(activation == Activation::None ? 1 : 2),
        columns_(s.n / parts_),
        width_(kMaxBlock / parts_),
        row_bytes_(weight.stride(1) * itemsize(weight.dtype)),
        direct_(x.dtype == DType::Float32 ||
                (s.words.pairs && s.k % 2 == 0 && weight.stride(1) % 2 == 0 && weight.stride(0) % 2 == 0)) {}

  void run(int64_t slots) {
    pack(slots);
    for_units(
        groups_, slots, [&](int64_t rows) { return rows ? ceil_div(columns_, width_) : 0; }, cost,
        [&](int64_t slot, int64_t e, int64_t b) {
          const int64_t begin = b * width_, count = std::min(width_, columns_ - begin);
          groups_.rows(e) <= kFew ? few(e, begin, count) : many(slot, e, begin, count);
        });
  }

 private:
  static int64_t cost(int64_t rows) { return rows <= kFew ? 16 + rows : ceil_div(rows, 16) * 16; }
  const char* weights(int64_t e, int64_t row) const {
    return weight_.ptr<char>() + e * weight_.stride(0) * itemsize(weight_.dtype) + row * row_bytes_;
  }
  const char* bias_of(int64_t e, int64_t i) const { return bias_.defined() ? at(bias_, e * s_.n + i) : nullptr; }
  // Where an expert's panels and few rows begin.
  std::pair<int64_t, int64_t> place(int64_t expert) const {
    int64_t panels = 0, few = 0;
    for (int64_t e = 0; e < expert; ++e) {
      const int64_t rows = groups_.rows(e);
      rows <= kFew ? few += rows : panels += ceil_div(rows, s_.lanes);
    }
    return {panels, few};
  }

  void pack(int64_t slots) {
    const auto units = [&](int64_t rows) { return rows <= kFew ? int64_t{rows > 0} : ceil_div(rows, s_.lanes); };
    for_units(
        groups_, slots, units, [](int64_t) { return 1; },
        [&](int64_t, int64_t e, int64_t p) {
          const auto [panels, few] = place(e);
          const int64_t first = groups_.first(e), rows = groups_.rows(e);
          if (rows > kFew) {
            const int64_t lane = p * s_.lanes, count = std::min(s_.lanes, rows - lane);
            grouped_kernels().pack_across(s_.words.pairs, x_, first + lane, count, 0, s_.k,
                                          space_.panels + (panels + p) * s_.steps * s_.lanes);
            return;
          }
          uint32_t* to = space_.few + few * s_.few_row;
          for (int64_t i = 0; i < rows; ++i) std::memset(to + (i + 1) * s_.few_row - kPad - 16, 0, 64);
          grouped_kernels().pack_rows(s_.words.pairs, x_, first, rows, 0, s_.k, s_.few_row, to);
        });
  }

  void few(int64_t e, int64_t begin, int64_t count) {
    constexpr int64_t kStep = 96;
    const uint32_t* words = space_.few + place(e).second * s_.few_row;
    for (int64_t j = begin; j < begin + count; j += kStep) {
      const int64_t n = std::min(kStep, begin + count - j);
      for (int64_t i0 = 0; i0 < groups_.rows(e); i0 += 8) {
        const int64_t rows = std::min<int64_t>(8, groups_.rows(e) - i0);
        alignas(64) float y[2][8 * kStep];
        for (int64_t p = 0; p < parts_; ++p) {
          const int64_t column = p * columns_ + j;
          grouped_kernels().few(s_.words.pairs, x_.dtype, weights(e, column), row_bytes_, n, s_.k,
                                words + i0 * s_.few_row, s_.few_row, rows, y[p], kStep);
          if (parts_ == 2 && bias_.defined()) {
            grouped_kernels().add_bias(y[p], kStep, rows, n, bias_of(e, column), x_.dtype, false);
          }
          for (int64_t i = 0; parts_ == 2 && pre_.defined() && i < rows; ++i) {
            int4_kernels().finish(y[p] + i * kStep, n, x_.dtype, nullptr,
                                  row_part(pre_, groups_.first(e) + i0 + i, column));
          }
        }
        if (parts_ == 2) grouped_kernels().activate(activation_, y[0], y[1], kStep, rows, ceil_div(n, 16) * 16);
        for (int64_t i = 0; i < rows; ++i) {
          int4_kernels().finish(y[0] + i * kStep, n, x_.dtype, parts_ == 1 ? bias_of(e, j) : nullptr,
                                row_part(out_, groups_.first(e) + i0 + i, j));
        }
      }
    }
  }

  void many(int64_t slot, int64_t e, int64_t begin, int64_t count) {
    alignas(64) float sums[2][kMaxBlock * kMaxLanes];
    const int64_t first = groups_.first(e), rows = groups_.rows(e);
    const uint32_t* panels = space_.panels + place(e).first * s_.steps * s_.lanes;
    uint32_t* decoded = space_.w + slot * kMaxBlock * (kSumSteps + kPad);
    // A W that is no words is decoded for one panel of rows after the other; kSumSteps of it fit the cache.
    for (int64_t lane = 0, p = 0; lane < rows; lane += s_.lanes, ++p) {
      const int64_t used = std::min(s_.lanes, rows - lane);
      for (int64_t half = 0; half < parts_; ++half) {
        const int64_t column = half * columns_ + begin;
        if (s_.k == 0) std::memset(sums[half], 0, sizeof sums[half]);
        for (int64_t step = 0; step < s_.steps; step += kSumSteps) {
          const int64_t steps = std::min(kSumSteps, s_.steps - step), from = step * s_.words.per_word;
          const uint32_t* a = reinterpret_cast<const uint32_t*>(weights(e, column)) + step;
          int64_t a_row = row_bytes_ / 4;
          if (!direct_) {
            const GroupedRows w{weights(e, 0), row_bytes_, nullptr, 1, weight_.dtype};
            a_row = kSumSteps + kPad;
            grouped_kernels().pack_rows(s_.words.pairs, w, column, count, from,
                                        std::min(from + kSumSteps * s_.words.per_word, s_.k), a_row, decoded);
            a = decoded;
          }
          fused_kernels().multiply(s_.words.pairs, a, a_row, 1, count, panels + (p * s_.steps + step) * s_.lanes, steps,
                                   used, sums[half], s_.lanes, step > 0);
        }
        if (parts_ == 1) break;
        if (bias_.defined()) {
          grouped_kernels().add_bias(sums[half], s_.lanes, count, used, bias_of(e, column), x_.dtype, true);
        }
        if (pre_.defined()) finish(sums[half], count, used, nullptr, pre_, first + lane, column);
      }
      if (parts_ == 2) {
        grouped_kernels().activate(activation_, sums[0], sums[1], s_.lanes, count, ceil_div(used, 16) * 16);
      }
      finish(sums[0], count, used, parts_ == 1 ? bias_of(e, begin) : nullptr, out_, first + lane, begin);
    }
  }

  void finish(const float* sums, int64_t count, int64_t used, const char* bias, const Tensor& to, int64_t row,
              int64_t column) {
    int4_kernels().finish_across(sums, s_.lanes, count, used, x_.dtype, bias, row_part(to, row, column),
                                 to.stride(0) * itemsize(to.dtype));
  }

  const GroupedRows& x_;
  const Tensor& weight_;
  const Groups& groups_;
  const Tensor& bias_;
  const Activation activation_;
  const Tensor &pre_, &out_;
  const Forward& s_;
  const ForwardSpace& space_;
  const int64_t parts_, columns_, width_, row_bytes_;
  const bool direct_;
};

// ---- W along N: rows of x times panels of W -------------------------------------------------------------------------------

struct Across {
  Words words;
  int64_t r, n, k, row_words, blocks;
  Across(DType dtype, int64_t rows, int64_t outputs, int64_t columns)
      : words(dtype),
        r(rows),
        n(outputs),
        k(columns),
        row_words(words.steps(columns) + kPad),
        blocks(ceil_div(outputs, kTile)) {}
  int64_t sums() const { return std::max(std::min(r, kTileRows) * kTile, 2 * std::min(r, kFew) * kFewColumns); }
};

struct AcrossSpace {
  uint32_t* x;      // [rows][row_words], unless its rows are words as they lie
  uint32_t* w;      // [slots][kTileSums][kTile]
  float* sums;      // [slots][kTileRows][kTile], or [slots][2][kFew][kFewColumns]
  float* partials;  // [blocks][rows], of grad_gate
  AcrossSpace(Arena& a, const Across& s, int64_t slots)
      : x(a.take<uint32_t>(s.r * s.row_words)),
        w(a.take<uint32_t>(slots * kTileSums * kTile)),
        sums(a.take<float>(slots * s.sums())),
        partials(a.take<float>(s.blocks * s.r)) {}
};

// The outputs from `begin` on of an expert with few rows, which begin at `words`: W is not packed.
template <class F>
void few_transposed(const uint32_t* words, int64_t x_row, const Tensor& weight, const Groups& groups, int64_t e,
                    int64_t begin, const Across& s, float* sums, F&& f) {
  constexpr int64_t kRows = 128;  // of W at a time, which stay in cache for the second half of the rows of x
  const int64_t rows = groups.rows(e), columns = std::min(kFewColumns, s.n - begin), size = rows * kFewColumns;
  const int64_t w_row = weight.stride(2) * itemsize(weight.dtype);
  const char* w = weight.ptr<char>() + (e * weight.stride(0) + begin) * itemsize(weight.dtype);
  float* part = sums + size;
  std::memset(sums, 0, size * sizeof(float));
  for (int64_t k = 0; k < s.k; k += kRows) {
    std::memset(part, 0, size * sizeof(float));
    for (int64_t i = 0; i < rows; i += 8) {
      grouped_kernels().few_along(s.words.pairs, weight.dtype, w + k * w_row, w_row, std::min(kRows, s.k - k), columns,
                                  words + i * x_row + k / s.words.per_word, x_row, std::min<int64_t>(8, rows - i),
                                  part + i * kFewColumns, kFewColumns);
    }
    for (int64_t i = 0; i < size; ++i) sums[i] += part[i];
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; c += kTile) {
      f(sums + i * kFewColumns + c, e, groups.first(e) + i, begin + c, std::min(kTile, columns - c));
    }
  }
}

// f(sums of one row, expert, grouped row, first output, outputs) for every row and block of kTile outputs.
template <class F>
void multiply_across(const GroupedRows& x, const Tensor& weight, const Groups& groups, const Across& s,
                     const AcrossSpace& space, int64_t slots, F&& f) {
  const bool direct =
      !x.order && (x.dtype == DType::Float32 || (s.words.pairs && s.k % 2 == 0 && x.row_bytes % 4 == 0));
  const uint32_t* words = direct ? reinterpret_cast<const uint32_t*>(x.base) : space.x;
  const int64_t x_row = direct ? x.row_bytes / 4 : s.row_words, last = groups.offset[groups.experts];
  if (!direct) {
    parallel_for(last, 16, [&](int64_t begin, int64_t end) {
      grouped_kernels().pack_rows(s.words.pairs, x, begin, end - begin, 0, s.k, s.row_words,
                                  space.x + begin * s.row_words);
    });
  }
  const int64_t lanes = fused_kernels().lanes, panel_words = kTileSums / s.words.per_word * lanes;
  const auto blocks = [&](int64_t rows) {
    return rows == 0 ? 0 : rows <= kFew ? ceil_div(s.n, kFewColumns) : ceil_div(rows, kTileRows) * s.blocks;
  };
  // Packing a tile of W costs about as much as 24 rows.
  const auto cost = [](int64_t rows) {
    return rows <= kFew ? kFewColumns / kTile * (16 + rows) : std::min(rows, kTileRows) + 24;
  };
  for_units(groups, slots, blocks, cost, [&](int64_t slot, int64_t e, int64_t unit) {
    const int64_t top = unit / s.blocks * kTileRows, rows = std::min(kTileRows, groups.rows(e) - top);
    const int64_t begin = unit % s.blocks * kTile, columns = std::min(kTile, s.n - begin),
                  first = groups.first(e) + top;
    if (groups.rows(e) <= kFew) {
      few_transposed(words + groups.first(e) * x_row, x_row, weight, groups, e, unit * kFewColumns, s,
                     space.sums + slot * s.sums(), f);
      return;
    }
    uint32_t* packed = space.w + slot * kTileSums * kTile;
    float* sums = space.sums + slot * s.sums();
    const GroupedRows w{weight.ptr<char>() + e * weight.stride(0) * itemsize(weight.dtype),
                        weight.stride(2) * itemsize(weight.dtype), nullptr, 1, weight.dtype};
    if (s.k == 0) std::memset(sums, 0, rows * kTile * sizeof(float));
    for (int64_t k = 0; k < s.k; k += kTileSums) {
      const int64_t count = std::min(kTileSums, s.k - k);
      grouped_kernels().pack_along(s.words.pairs, w, k, count, begin, begin + columns, lanes, panel_words, packed);
      for (int64_t c = 0; c < columns; c += lanes) {
        fused_kernels().multiply(s.words.pairs, words + first * x_row + k / s.words.per_word, x_row, 1, rows,
                                 packed + c / lanes * panel_words, s.words.steps(count), std::min(lanes, columns - c),
                                 sums + c, kTile, k > 0);
      }
    }
    for (int64_t i = 0; i < rows; ++i) f(sums + i * kTile, e, first + i, begin, columns);
  });
}

// ---- weight gradient ------------------------------------------------------------------------------------------------------

struct Outer {
  Words words;
  int64_t r, n, k, experts, lanes, panels;
  Outer(DType dtype, int64_t rows, int64_t e, int64_t outputs, int64_t columns)
      : words(dtype),
        r(rows),
        n(outputs),
        k(columns),
        experts(e),
        lanes(fused_kernels().lanes),
        panels(ceil_div(columns, lanes)) {}
  int64_t steps() const { return words.steps(r + (words.pairs ? std::min(experts, r) : 0)); }
};

struct OuterSpace {
  uint32_t* x;     // [steps of all experts][panels][lanes], expert by expert, panel by panel
  uint32_t* grad;  // [slots][kSumSteps][kMaxBlock]
  float* sums;     // [slots][panels][kMaxBlock][lanes]
  OuterSpace(Arena& a, const Outer& s, int64_t slots)
      : x(a.take<uint32_t>(s.steps() * s.panels * s.lanes)),
        grad(a.take<uint32_t>(slots * std::min(kSumSteps, s.steps()) * kMaxBlock)),
        sums(a.take<float>(slots * kMaxBlock * s.lanes * (s.steps() > kSumSteps ? s.panels : 1))) {}
};

void weight_gradient(const GroupedRows& grad, const GroupedRows& x, const Groups& groups, const Outer& s,
                     const OuterSpace& space, int64_t slots, const Tensor& out, const Tensor& grad_bias) {
  const auto steps_before = [&](int64_t expert) {
    int64_t steps = 0;
    for (int64_t e = 0; e < expert; ++e) steps += s.words.steps(groups.rows(e));
    return steps;
  };
  for_units(
      groups, slots, [&](int64_t) { return s.panels; }, [](int64_t rows) { return rows; },
      [&](int64_t, int64_t e, int64_t p) {
        const int64_t steps = s.words.steps(groups.rows(e));
        uint32_t* to = space.x + (steps_before(e) * s.panels + p * steps) * s.lanes;
        grouped_kernels().pack_along(s.words.pairs, x, groups.first(e), groups.rows(e), p * s.lanes,
                                     std::min(s.k, (p + 1) * s.lanes), s.lanes, 0, to);
      });
  for_units(
      groups, slots, [&](int64_t) { return ceil_div(s.n, kMaxBlock); }, [](int64_t rows) { return rows + 24; },
      [&](int64_t slot, int64_t e, int64_t b) {
        const int64_t begin = b * kMaxBlock, count = std::min<int64_t>(kMaxBlock, s.n - begin);
        const int64_t rows = groups.rows(e), all = s.words.steps(rows), first = groups.first(e);
        const auto row_of = [&](int64_t i) {
          return out.ptr<char>() + (e * out.stride(0) + (begin + i) * out.stride(1)) * itemsize(out.dtype);
        };
        if (rows == 0) {
          for (int64_t i = 0; i < count; ++i) std::memset(row_of(i), 0, s.k * itemsize(out.dtype));
          if (grad_bias.defined())
            std::memset(const_cast<char*>(at(grad_bias, e * s.n + begin)), 0, count * itemsize(out.dtype));
          return;
        }
        const int64_t room = std::min(kSumSteps, s.steps());
        uint32_t* a = space.grad + slot * room * kMaxBlock;
        const bool chunked = s.steps() > kSumSteps;
        float* sums = space.sums + slot * kMaxBlock * s.lanes * (chunked ? s.panels : 1);
        const uint32_t* panels = space.x + steps_before(e) * s.panels * s.lanes;
        for (int64_t step = 0; step < all; step += kSumSteps) {
          const int64_t steps = std::min(kSumSteps, all - step), from = step * s.words.per_word;
          grouped_kernels().pack_along(s.words.pairs, grad, first + from,
                                       std::min(rows - from, steps * s.words.per_word), begin, begin + count, kMaxBlock,
                                       0, a);
          if (all <= kFewSteps) {
            grouped_kernels().outer(s.words.pairs, out.dtype, a, kMaxBlock, count, panels, all, s.k, row_of(0),
                                    out.stride(1) * itemsize(out.dtype));
            break;
          }
          for (int64_t p = 0; p < s.panels; ++p) {
            const int64_t column = p * s.lanes, used = std::min(s.lanes, s.k - column);
            float* c = sums + (chunked ? p * kMaxBlock * s.lanes : 0);
            fused_kernels().multiply(s.words.pairs, a, 1, kMaxBlock, count, panels + (p * all + step) * s.lanes, steps,
                                     used, c, s.lanes, step > 0);
            if (step + steps < all) continue;
            for (int64_t i = 0; i < count; ++i) {
              fused_kernels().convert(c + i * s.lanes, out.dtype, row_of(i) + column * itemsize(out.dtype), used);
            }
          }
        }
        if (grad_bias.defined()) {
          float bias[kMaxBlock] = {};
          grouped_kernels().add_rows(grad, first, rows, begin, count, bias);
          fused_kernels().convert(bias, grad_bias.dtype, const_cast<char*>(at(grad_bias, e * s.n + begin)), count);
        }
      });
}

}  // namespace

int64_t product_bytes(DType dtype, int64_t r, int64_t e, int64_t n, int64_t k, int64_t threads) {
  Arena forward{nullptr}, across{nullptr}, outer{nullptr};
  ForwardSpace(forward, Forward(dtype, r, e, n, k), threads);
  AcrossSpace(across, Across(dtype, r, n, k), threads);
  OuterSpace(outer, Outer(dtype, r, e, n, k), threads);
  return std::max({forward.used, across.used, outer.used});
}

void multiply_forward(const GroupedRows& x, const Tensor& weight, const Groups& groups, const Tensor& bias,
                      Activation activation, const Tensor& workspace, const Tensor& pre, const Tensor& out) {
  const Forward s(x.dtype, out.size(0), weight.size(0), weight.size(1), weight.size(2));
  const int64_t slots = slots_for(workspace, out, [&](Arena& a, int64_t count) { ForwardSpace(a, s, count); });
  Arena arena{workspace.ptr<char>()};
  const ForwardSpace space(arena, s, slots);
  ForwardRun(x, weight, groups, bias, activation, pre, out, s, space).run(slots);
}

void multiply_transposed(const GroupedRows& x, const Tensor& weight, const Groups& groups, const Tensor& bias,
                         const Tensor& workspace, const Tensor& out) {
  const Across s(x.dtype, out.size(0), weight.size(1), weight.size(2));
  const int64_t slots = slots_for(workspace, out, [&](Arena& a, int64_t count) { AcrossSpace(a, s, count); });
  Arena arena{workspace.ptr<char>()};
  const AcrossSpace space(arena, s, slots);
  multiply_across(x, weight, groups, s, space, slots,
                  [&](float* sums, int64_t e, int64_t row, int64_t begin, int64_t count) {
                    int4_kernels().finish(sums, count, x.dtype, bias.defined() ? at(bias, e * s.n + begin) : nullptr,
                                          row_part(out, row, begin));
                  });
}

void multiply_activation_backward(const GroupedRows& grad, const Tensor& weight, const Groups& groups,
                                  const Tensor& pre, Activation activation, const Tensor& gate, const Tensor& workspace,
                                  const Tensor& grad_pre, const Tensor& activated, const Tensor& grad_gate) {
  const int64_t r = pre.size(0), n = weight.size(1);
  const Across s(grad.dtype, r, n, weight.size(2));
  const int64_t slots = slots_for(workspace, pre, [&](Arena& a, int64_t count) { AcrossSpace(a, s, count); });
  Arena arena{workspace.ptr<char>()};
  const AcrossSpace space(arena, s, slots);
  const auto slot_of = [&](int64_t row) { return grad.order ? grad.order[row] : row; };
  multiply_across(grad, weight, groups, s, space, slots,
                  [&](float* sums, int64_t, int64_t row, int64_t begin, int64_t count) {
                    space.partials[begin / kTile * r + row] = grouped_kernels().activation_backward(
                        activation, grad.dtype, row_part(pre, row, begin), row_part(pre, row, n + begin), sums,
                        gate.defined() ? gate.ptr<float>()[slot_of(row)] : 1.0f, count,
                        activated.defined() ? row_part(activated, row, begin) : nullptr, row_part(grad_pre, row, begin),
                        row_part(grad_pre, row, n + begin));
                  });
  if (!grad_gate.defined()) return;
  for (int64_t row = groups.first(0); row < groups.offset[groups.experts]; ++row) {
    float sum = 0.0f;
    for (int64_t b = 0; b < s.blocks; ++b) sum += space.partials[b * r + row];
    grad_gate.ptr<float>()[slot_of(row)] = sum;
  }
}

void multiply_outer(const GroupedRows& grad, const GroupedRows& x, int64_t r, const Groups& groups,
                    const Tensor& workspace, const Tensor& grad_weight, const Tensor& grad_bias) {
  prefer_large_pages(grad_weight.data, grad_weight.numel() * itemsize(grad_weight.dtype));
  const Outer s(grad_weight.dtype, r, grad_weight.size(0), grad_weight.size(1), grad_weight.size(2));
  const int64_t slots = slots_for(workspace, grad_weight, [&](Arena& a, int64_t count) { OuterSpace(a, s, count); });
  Arena arena{workspace.ptr<char>()};
  const OuterSpace space(arena, s, slots);
  weight_gradient(grad, x, groups, s, space, slots, grad_weight, grad_bias);
}

}  // namespace fastpost
