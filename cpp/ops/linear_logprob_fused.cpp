// SPDX-License-Identifier: Apache-2.0
// The CPU path of linear_logprob in which matrix product and softmax belong together.
//
// The vocabulary is cut into blocks whose weights fit the second-level cache, the rows of N into panels as wide as the
// matrix kernel. A block's logits for one panel exist only as a float32 tile on the stack: the forward turns it into
// statistics (and, where the caller keeps it, e^(z - block maximum)), the backward into a gradient, which goes straight
// into the two products that make the weight gradient (complete for a block, so nothing is summed in memory) and the
// hidden gradient (float32 sums).
//
// Every sum runs in an order that depends on shapes alone: a row's result has the same bits whatever else is in the
// batch, wherever the row stands and however many threads work.
#include <algorithm>
#include <cmath>

#include "core/arena.h"
#include "core/check.h"
#include "core/parallel.h"
#include "ops.h"
#include "ops/linear_logprob_fused_simd.h"

namespace fastpost {
namespace {

constexpr int64_t kSegments = 32;           // each has running statistics of its own, merged in order
constexpr int64_t kBlockBytes = 384 << 10;  // weights of a block, as words

struct Shape {
  int64_t n, d, v;
  bool pairs;
  int64_t lanes, panels, padded_n;               // panels of rows
  int64_t d_panels, padded_d, steps, row_steps;  // words of a row along d, words along all rows
  int64_t block, blocks;                         // rows of a block, number of blocks
  int64_t row_words, pair_words;                 // from one row of a gradient block to the next
  const int64_t* order;                          // vocabulary entry at each place of the sweep; null: as it stands
  bool direct;                                   // rows of the weight are words as they are

  Shape(int64_t rows, const Tensor& weight, const Tensor& order_of = Tensor(), bool ordered = false)
      : n(rows), d(weight.size(1)), v(weight.size(0)), order(order_of.defined() ? order_of.ptr<int64_t>() : nullptr) {
    const FusedKernels& k = fused_kernels();
    pairs = k.pairs && weight.dtype == DType::BFloat16;
    lanes = k.lanes;
    panels = (n + lanes - 1) / lanes;
    padded_n = panels * lanes;
    d_panels = (d + lanes - 1) / lanes;
    padded_d = d_panels * lanes;
    steps = pairs ? (d + 1) / 2 : d;
    row_steps = pairs ? padded_n / 2 : padded_n;
    // A cache line more than the data: at distances of a power of two, lines would fight for the same places.
    row_words = row_steps + 16;
    pair_words = padded_n + 16;
    block = kBlockBytes / (4 * steps) / 12 * 12;
    block = block < 48 ? 48 : block > kMaxBlock ? kMaxBlock : block;
    blocks = (v + block - 1) / block;
    const bool even = d % 2 == 0 && weight.stride(0) % 2 == 0;
    direct = !order && !ordered && weight.stride(1) == 1 && (pairs ? even : weight.dtype == DType::Float32);
  }
  int64_t begin(int64_t b) const { return b * block; }
  int64_t entry(int64_t place) const { return order ? order[place] : place; }
  int64_t rows_of(int64_t b) const { return b + 1 < blocks ? block : v - b * block; }
  int64_t rows_in_panel(int64_t p) const { return std::min(n - p * lanes, lanes); }
  int64_t columns_in_panel(int64_t p) const { return std::min(d - p * lanes, lanes); }
  // Words of a block along the vocabulary.
  int64_t block_steps(int64_t rows) const { return pairs ? (rows + 1) / 2 : rows; }
};

struct ForwardSpace {
  uint32_t* x;        // hidden, lanes across rows
  float* statistics;  // [segments][5][padded_n]
  uint32_t* weights;  // [slots][block][steps], unless the weight can be read directly

  ForwardSpace(Arena& a, const Shape& s, int64_t slots)
      : x(a.take<uint32_t>(s.panels * s.steps * s.lanes)),
        statistics(a.take<float>(kSegments * 5 * s.padded_n)),
        weights(a.take<uint32_t>(s.direct ? 0 : slots * s.block * s.steps)) {}
};

struct BackwardSpace {
  uint32_t *x_across, *x_along;                  // hidden, for the logits and for the weight gradient
  float *grad_hidden, *rows;                     // [padded_n][padded_d]; logprob, lse, entropy, g, h, each [padded_n]
  uint32_t *weights, *along, *by_row, *by_pair;  // of one slot after the other
  uint8_t* alive;  // [blocks][panels]: tiles that are not skipped; then [panels]: whose rows were all kept
  float* masses;   // [slots][blocks]: of one row, to be sorted

  BackwardSpace(Arena& a, const Shape& s, int64_t slots, bool recompute, bool hidden, bool weight)
      : x_across(a.take<uint32_t>(recompute ? s.panels * s.steps * s.lanes : 0)),
        x_along(a.take<uint32_t>(weight ? s.d_panels * s.row_steps * s.lanes : 0)),
        grad_hidden(a.take<float>(hidden ? s.padded_n * s.padded_d : 0)),
        rows(a.take<float>(5 * s.padded_n)),
        weights(a.take<uint32_t>(s.direct ? 0 : slots * s.block * s.steps)),
        along(a.take<uint32_t>(hidden ? slots * along_words(s) : 0)),
        by_row(a.take<uint32_t>(slots * s.block * s.row_words)),
        by_pair(a.take<uint32_t>(s.pairs && hidden ? slots * pair_words(s) : 0)),
        alive(a.take<uint8_t>((s.blocks + 1) * s.panels)),
        masses(a.take<float>(slots * s.blocks)) {}
  static int64_t along_words(const Shape& s) { return s.d_panels * s.block_steps(s.block) * s.lanes; }
  static int64_t pair_words(const Shape& s) { return s.block_steps(s.block) * s.pair_words; }
};

// What the backward has of the logits of the first rows: e^(z - maximum of the block), [block][panel][row][lane], then
// these maxima, [block][lane].
struct Kept {
  int64_t n = 0;
  char* values = nullptr;
  float* maxima = nullptr;
  DType dtype = DType::Float32;
  int64_t size = 4;
  Kept() = default;
  Kept(const Tensor& t, const Shape& s, int64_t rows)
      : n(rows), values(t.ptr<char>()), dtype(t.dtype), size(itemsize(t.dtype)) {
    maxima = reinterpret_cast<float*>(values + s.v * n * size);
  }
  static int64_t bytes(const Shape& s, int64_t rows, int64_t size) { return s.v * rows * size + s.blocks * rows * 4; }
  char* tile(const Shape& s, int64_t b, int64_t panel) const {
    return values + (s.begin(b) * n + panel * s.rows_of(b) * s.lanes) * size;
  }
  float* maximum(int64_t b, int64_t panel_begin) const { return maxima + b * n + panel_begin; }
};

// Rows of the weight as the left operand of the product that makes logits.
struct BlockWeights {
  const uint32_t* words;
  int64_t row;
  BlockWeights(const Tensor& weight, const Shape& s, int64_t b, uint32_t* space) {
    if (s.direct) {
      words = reinterpret_cast<const uint32_t*>(weight.row(s.begin(b)));
      row = weight.stride(0) * itemsize(weight.dtype) / 4;
    } else {
      fused_kernels().pack_rows(weight.dtype, s.pairs, s.order ? weight.ptr<char>() : weight.row(s.begin(b)),
                                weight.stride(0) * itemsize(weight.dtype), s.order ? s.order + s.begin(b) : nullptr,
                                s.rows_of(b), s.d, space);
      words = space;
      row = s.steps;
    }
  }
};

int64_t row_bytes(const Tensor& t) { return t.stride(0) * itemsize(t.dtype); }

const float* block_bias(const Tensor& bias, int64_t begin) {
  return bias.defined() ? bias.ptr<float>() + begin : nullptr;
}

int64_t target_of(const Tensor& target, const Tensor& rows, int64_t i) {
  return target.ptr<int64_t>()[rows.defined() ? rows.ptr<int64_t>()[i] : i];
}

const int64_t* index_of(const Tensor& rows) { return rows.defined() ? rows.ptr<int64_t>() : nullptr; }

// What both directions take; returns the number of rows.
int64_t expect_operands(const char* op, const Tensor& hidden, const Tensor& weight, const Tensor& bias,
                        const Tensor& target, const Tensor& rows, float temperature, float softcap) {
  expect(op, "hidden", hidden, kFloats, {kAny, kAny}, Layout::ContiguousRows);
  expect(op, "weight", weight, {hidden.dtype}, {kAny, hidden.size(1)}, Layout::ContiguousRows, &hidden);
  expect_optional(op, "bias", bias, {DType::Float32}, {weight.size(0)}, Layout::Contiguous, &hidden);
  expect(op, "target", target, {DType::Int64}, {hidden.size(0)}, Layout::Contiguous, &hidden);
  expect_optional(op, "rows", rows, {DType::Int64}, {kAny}, Layout::Contiguous, &hidden);
  expect_transform(op, temperature, softcap);
  return rows.defined() ? rows.size(0) : hidden.size(0);
}

// Rows of hidden as panels whose lanes are rows.
void pack_hidden(const Shape& s, const Tensor& hidden, const Tensor& rows, uint32_t* out) {
  const int64_t* index = index_of(rows);
  parallel_for(s.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * s.lanes;
      fused_kernels().pack_across(hidden.dtype, s.pairs, index ? hidden.ptr<char>() : hidden.row(first),
                                  row_bytes(hidden), index ? index + first : nullptr, s.rows_in_panel(p), s.d,
                                  out + p * s.steps * s.lanes);
    }
  });
}

// The space for as many slots as there are threads and pieces of work, or as many as the workspace has room for.
template <class Space, class... Options>
std::pair<Space, int64_t> take_space(const char* op, const Tensor& workspace, const Shape& s, int64_t pieces,
                                     Options... options) {
  expect(op, "workspace", workspace, {DType::UInt8}, {kAny});
  int64_t slots = num_threads() < pieces ? num_threads() : pieces;
  for (;; --slots) {
    Arena arena{workspace.ptr<char>()};
    const Space space(arena, s, slots, options...);
    if (arena.used <= workspace.size(0)) return {space, slots};
    if (slots <= 1) {
      fail(op, "workspace", "at least " + std::to_string(arena.used) + " bytes", std::to_string(workspace.size(0)));
    }
  }
}

// Which tiles (block, panel) hold more than what may be dropped. A row gives up its lightest blocks as long as their
// probabilities add up to no more than skip_mass; a tile is skipped when all its rows give it up and none has its target
// there. dropped? [n + 1]: the mass that each row loses, then the share of tiles that is computed.
void find_alive(const Shape& s, const Tensor& log_masses, const int64_t* place, const float* lse, const Tensor& target,
                const Tensor& rows, float skip_mass, int64_t slots, uint8_t* alive, float* masses, float* dropped) {
  const float* log_mass = log_masses.ptr<float>();
  const int64_t stride = log_masses.size(1);
  const auto mass_of = [&](int64_t b, int64_t i) {
    return std::exp(log_mass[b * stride + (place ? place[i] : i)] - lse[i]);
  };
  parallel_for(slots, 1, [&](int64_t slot_begin, int64_t slot_end) {
    for (int64_t slot = slot_begin; slot < slot_end; ++slot) {
      float* sorted = masses + slot * s.blocks;
      for (int64_t p = slot * s.panels / slots; p < (slot + 1) * s.panels / slots; ++p) {
        for (int64_t b = 0; b < s.blocks; ++b) alive[b * s.panels + p] = 0;
        for (int64_t i = p * s.lanes; i < (p + 1) * s.lanes && i < s.n; ++i) {
          for (int64_t b = 0; b < s.blocks; ++b) sorted[b] = mass_of(b, i);
          std::sort(sorted, sorted + s.blocks);
          float sum = 0, least = INFINITY;  // of the blocks that must stay
          for (int64_t b = 0; b < s.blocks; ++b) {
            sum += sorted[b];
            if (!(sum <= skip_mass)) {  // NaN stays
              least = sorted[b];
              break;
            }
          }
          for (int64_t b = 0; b < s.blocks; ++b) alive[b * s.panels + p] |= !(mass_of(b, i) < least);
          const int64_t at = target_of(target, rows, i);
          if (at >= 0 && at < s.v) alive[at / s.block * s.panels + p] = 1;
        }
        for (int64_t i = p * s.lanes; dropped && i < (p + 1) * s.lanes && i < s.n; ++i) {
          dropped[i] = 0;
          for (int64_t b = 0; b < s.blocks; ++b) dropped[i] += alive[b * s.panels + p] ? 0.0f : mass_of(b, i);
        }
      }
    }
  });
  if (dropped) {
    int64_t computed = 0;
    for (int64_t t = 0; t < s.blocks * s.panels; ++t) computed += alive[t];
    dropped[s.n] = static_cast<float>(computed) / static_cast<float>(s.blocks * s.panels);
  }
}

}  // namespace

bool linear_logprob_fused_preferred(Tensor weight) {
  const Isa isa = cpu_isa();
  return weight.dtype == DType::BFloat16 ? isa == Isa::Avx512Bf16 && !has_matrix_units()
                                         : isa >= Isa::Avx512 && is_amd();
}

std::pair<int64_t, int64_t> linear_logprob_fused_bytes(Tensor weight, int64_t rows, bool hidden, bool weights,
                                                       bool recompute, int64_t threads, bool ordered) {
  const Shape s(rows, weight, Tensor(), ordered);
  Arena forward{nullptr}, backward{nullptr};
  ForwardSpace(forward, s, threads < kSegments ? threads : kSegments);
  BackwardSpace(backward, s, threads < s.blocks ? threads : s.blocks, recompute, hidden, weights);
  return {forward.used, backward.used};
}

std::pair<int64_t, int64_t> linear_logprob_fused_tiles(Tensor weight, int64_t rows) {
  const Shape s(rows, weight);
  return {s.blocks, s.padded_n};
}

std::pair<int64_t, int64_t> linear_logprob_fused_kept(Tensor weight, int64_t rows, int64_t budget) {
  const Shape s(rows, weight);
  const int64_t size = weight.dtype == DType::BFloat16 ? 2 : 4;
  int64_t panels = s.panels;
  while (panels > 0 && Kept::bytes(s, panels * s.lanes, size) > budget) {
    panels = panels > 64 ? budget / Kept::bytes(s, s.lanes, size) : panels - 1;
  }
  const int64_t kept = panels * s.lanes;
  return {kept, (Kept::bytes(s, kept, size) + size - 1) / size};
}

void linear_logprob_fused(Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor rows, float temperature,
                          float softcap, bool with_entropy, int64_t kept_rows, Tensor kept, Tensor order,
                          Tensor log_masses, Tensor workspace, Tensor stats) {
  constexpr const char* op = "linear_logprob";
  const int64_t n = expect_operands(op, hidden, weight, bias, target, rows, temperature, softcap);
  expect(op, "stats", stats, {DType::Float32}, {5, n});
  expect_optional(op, "order", order, {DType::Int64}, {weight.size(0)});
  const Shape s(n, weight, order);
  expect_optional(op, "log_masses", log_masses, {DType::Float32}, {s.blocks, s.padded_n});
  const auto [space, slots] = take_space<ForwardSpace>(op, workspace, s, kSegments);
  const Kept keep = kept_rows ? Kept(kept, s, kept_rows) : Kept();
  const FusedKernels& k = fused_kernels();
  const LogitTransform transform{1.0f / temperature, softcap};

  pack_hidden(s, hidden, rows, space.x);
  parallel_for(slots, 1, [&](int64_t slot_begin, int64_t slot_end) {
    alignas(64) float z[kMaxBlock * kMaxLanes], of_block[4 * kMaxLanes] = {};
    for (int64_t slot = slot_begin; slot < slot_end; ++slot) {
      for (int64_t g = slot * kSegments / slots; g < (slot + 1) * kSegments / slots; ++g) {
        float* running = space.statistics + g * 5 * s.padded_n;
        for (int64_t i = 0; i < s.padded_n; ++i) {
          running[i] = -INFINITY;
          for (int r = 1; r < 4; ++r) running[r * s.padded_n + i] = 0;
          running[4 * s.padded_n + i] = NAN;  // stays where a target is in no segment
        }
        for (int64_t b = g * s.blocks / kSegments; b < (g + 1) * s.blocks / kSegments; ++b) {
          const int64_t v0 = s.begin(b), vb = s.rows_of(b);
          const BlockWeights w(weight, s, b, space.weights + (s.direct ? 0 : slot * s.block * s.steps));
          const float* block_biases = block_bias(bias, v0);
          for (int64_t p = 0; p < s.panels; ++p) {
            const int64_t first = p * s.lanes;
            const int64_t used = s.rows_in_panel(p);
            k.multiply(s.pairs, w.words, w.row, 1, vb, space.x + p * s.steps * s.lanes, s.steps, used, z, s.lanes,
                       false);
            const bool keeps = first < keep.n;
            k.statistics(z, vb, used, block_biases, transform, with_entropy, of_block, keep.dtype,
                         keeps ? keep.tile(s, b, p) : nullptr);
            if (keeps) std::memcpy(keep.maximum(b, first), of_block, s.lanes * sizeof(float));
            for (int64_t l = 0; log_masses.defined() && l < s.lanes; ++l) {
              log_masses.ptr<float>()[b * s.padded_n + first + l] =
                  of_block[l] + std::log(of_block[s.lanes + l] + of_block[2 * s.lanes + l]);
            }
            k.merge(of_block, running + first, s.padded_n);
            for (int64_t i = first; i < first + s.lanes && i < n; ++i) {
              const int64_t t = target_of(target, rows, i) - v0;
              if (t >= 0 && t < vb) running[4 * s.padded_n + i] = z[t * s.lanes + i - first];
            }
          }
        }
      }
    }
  });
  parallel_for(s.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * s.lanes; first < end * s.lanes; first += s.lanes) {
      float* total = space.statistics + first;
      alignas(64) float one[4 * kMaxLanes];
      for (int64_t g = 1; g < kSegments; ++g) {
        const float* next = space.statistics + g * 5 * s.padded_n + first;
        for (int r = 0; r < 4; ++r) std::memcpy(one + r * s.lanes, next + r * s.padded_n, s.lanes * sizeof(float));
        k.merge(one, total, s.padded_n);
        for (int64_t l = 0; l < s.lanes; ++l) {
          const float t = next[4 * s.padded_n + l];
          if (t == t) total[4 * s.padded_n + l] = t;
        }
      }
      for (int64_t l = 0; l < s.lanes && first + l < n; ++l) {
        for (int r = 0; r < 5; ++r) stats.ptr<float>()[r * n + first + l] = total[r * s.padded_n + l];
      }
    }
  });
}

void linear_logprob_fused_backward(Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor rows,
                                   float temperature, float softcap, Tensor logprob, Tensor lse, Tensor entropy,
                                   Tensor grad_logprob, Tensor grad_entropy, int64_t kept_rows, Tensor kept,
                                   Tensor place_of, Tensor order, Tensor log_masses, float skip_mass, Tensor dropped,
                                   Tensor workspace, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias,
                                   bool add_weight) {
  constexpr const char* op = "linear_logprob_backward";
  const int64_t n = expect_operands(op, hidden, weight, bias, target, rows, temperature, softcap);
  for (auto [name, t] : {std::pair{"logprob", &logprob}, {"lse", &lse}, {"grad_logprob", &grad_logprob}}) {
    expect(op, name, *t, {DType::Float32}, {n});
  }
  expect_optional(op, "grad_entropy", grad_entropy, {DType::Float32}, {n});
  if (grad_entropy.defined()) expect(op, "entropy", entropy, {DType::Float32}, {n});
  expect_optional(op, "grad_hidden", grad_hidden, {hidden.dtype}, {hidden.size(0), hidden.size(1)});
  expect_optional(op, "grad_weight", grad_weight, {add_weight ? DType::Float32 : hidden.dtype},
                  {weight.size(0), weight.size(1)});
  expect_optional(op, "grad_bias", grad_bias, {DType::Float32}, {weight.size(0)});
  expect_optional(op, "order", order, {DType::Int64}, {weight.size(0)});
  expect_optional(op, "dropped", dropped, {DType::Float32}, {n + 1});
  const Shape s(n, weight, order);
  const bool skips = log_masses.defined() && skip_mass > 0;
  if (log_masses.defined()) expect(op, "log_masses", log_masses, {DType::Float32}, {s.blocks, kAny});
  expect_optional(op, "place", place_of, {DType::Int64}, {n});
  const Kept keep = kept_rows ? Kept(kept, s, kept_rows) : Kept();
  const int64_t* place = place_of.defined() ? place_of.ptr<int64_t>() : nullptr;
  const auto is_kept = [&](int64_t panel) {
    for (int64_t i = panel * s.lanes; i < (panel + 1) * s.lanes && i < n; ++i) {
      if ((place ? place[i] : i) >= keep.n) return false;
    }
    return true;
  };
  bool recompute = false;
  for (int64_t p = 0; p < s.panels && !recompute; ++p) recompute = !is_kept(p);
  const auto [space, slots] =
      take_space<BackwardSpace>(op, workspace, s, s.blocks, recompute, grad_hidden.defined(), grad_weight.defined());
  uint8_t* kept_panel = space.alive + s.blocks * s.panels;
  for (int64_t p = 0; p < s.panels; ++p) kept_panel[p] = is_kept(p);
  const FusedKernels& k = fused_kernels();
  const LogitTransform transform{1.0f / temperature, softcap};
  const int64_t* index = index_of(rows);

  // Per row, padded so that what is no row has probability and gradient 0.
  const float* of_row[5] = {logprob.ptr<float>(), lse.ptr<float>(),
                            grad_entropy.defined() ? entropy.ptr<float>() : nullptr, grad_logprob.ptr<float>(),
                            grad_entropy.defined() ? grad_entropy.ptr<float>() : nullptr};
  for (int r = 0; r < 5; ++r) {
    float* to = space.rows + r * s.padded_n;
    for (int64_t i = 0; i < s.padded_n; ++i) to[i] = i < n ? (of_row[r] ? of_row[r][i] : 0.0f) : r == 1 ? INFINITY : 0;
  }
  const auto panel_gradient = [&](int64_t first) {
    const float* r = space.rows + first;
    const bool h = grad_entropy.defined();
    return PanelGradient{r, r + s.padded_n, h ? r + 2 * s.padded_n : nullptr, r + 3 * s.padded_n,
                         h ? r + 4 * s.padded_n : nullptr};
  };
  if (recompute) {
    pack_hidden(s, hidden, rows, space.x_across);
  }
  const int64_t real = s.pairs ? (n + 1) / 2 : n;  // steps along the rows that are not only padding
  if (grad_weight.defined()) {
    k.pack_along(hidden.dtype, s.pairs, hidden.ptr<char>(), row_bytes(hidden), index, n, s.d, s.row_steps,
                 space.x_along);
  }
  if (grad_hidden.defined()) std::memset(space.grad_hidden, 0, s.padded_n * s.padded_d * sizeof(float));

  if (skips) {
    find_alive(s, log_masses, place, lse.ptr<float>(), target, rows, skip_mass, slots, space.alive, space.masses,
               dropped.defined() ? dropped.ptr<float>() : nullptr);
  }
  const auto skipped = [&](int64_t b, int64_t panel) { return skips && !space.alive[b * s.panels + panel]; };

  // One block a slot and round: first everything that belongs to the block alone, then the sums that all share.
  for (int64_t round = 0; round < s.blocks; round += slots) {
    const int64_t active = s.blocks - round < slots ? s.blocks - round : slots;
    parallel_for(active, 1, [&](int64_t slot_begin, int64_t slot_end) {
      alignas(64) float z[kMaxBlock * kMaxLanes], bias_sums[kMaxBlock];
      for (int64_t slot = slot_begin; slot < slot_end; ++slot) {
        const int64_t b = round + slot, v0 = s.begin(b), vb = s.rows_of(b);
        uint32_t* by_row = space.by_row + slot * s.block * s.row_words;
        uint32_t* by_pair =
            s.pairs && grad_hidden.defined() ? space.by_pair + slot * BackwardSpace::pair_words(s) : nullptr;
        const BlockWeights w(weight, s, b, space.weights + (s.direct ? 0 : slot * s.block * s.steps));
        const float* block_biases = block_bias(bias, v0);
        std::memset(bias_sums, 0, sizeof bias_sums);
        for (int64_t p = 0; p < s.panels; ++p) {
          const int64_t first = p * s.lanes, used = s.rows_in_panel(p);
          if (skipped(b, p)) continue;
          const PanelGradient grad = panel_gradient(first);
          struct {
            int64_t lane, row;
            float raw;
          } targets[kMaxLanes];
          int found = 0;
          for (int64_t i = first; i < first + s.lanes && i < n; ++i) {
            const int64_t t = target_of(target, rows, i) - v0;
            if (t >= 0 && t < vb) targets[found++] = {i - first, t, 0.0f};
          }
          if (kept_panel[p]) {
            int64_t offset[kMaxLanes];
            alignas(64) float maxima[kMaxLanes];
            for (int64_t l = 0; place && l < s.lanes; ++l) {  // of padding: any lane
              const int64_t old = place[first + l < n ? first + l : n - 1];
              offset[l] = old / s.lanes * vb * s.lanes + old % s.lanes;
              maxima[l] = *keep.maximum(b, old);
            }
            k.derivative_of_kept(keep.dtype, keep.tile(s, b, place ? 0 : p), place ? offset : nullptr,
                                 place ? maxima : keep.maximum(b, first), vb, used, transform, grad, z);
          } else {
            k.multiply(s.pairs, w.words, w.row, 1, vb, space.x_across + p * s.steps * s.lanes, s.steps, used, z,
                       s.lanes, false);
            for (int i = 0; i < found; ++i) {
              targets[i].raw = z[targets[i].row * s.lanes + targets[i].lane];
              if (block_biases) targets[i].raw += block_biases[targets[i].row];
            }
            k.derivative(z, vb, used, block_biases, transform, grad);
          }
          for (int i = 0; i < found; ++i) {  // 1 - p cancels when p is near 1, and -expm1(log p) does not
            const int64_t l = targets[i].lane;
            float d = grad.g[l] * -std::expm1(grad.logprob[l]);
            if (grad.h) {
              d -= grad.h[l] * std::exp(grad.logprob[l]) * (std::fmax(-104.0f, grad.logprob[l]) + grad.entropy[l]);
            }
            if (softcap != 0) {
              const float unit = std::tanh(targets[i].raw / softcap);
              d *= 1.0f - unit * unit;
            }
            z[targets[i].row * s.lanes + l] = d * transform.inverse_temperature;
          }
          const int64_t row_first = s.pairs ? first / 2 : first;
          k.write_gradient(s.pairs, z, vb, used, by_row + row_first, s.row_words, by_pair ? by_pair + first : nullptr,
                           s.pair_words, grad_bias.defined() ? bias_sums : nullptr);
        }
        for (int64_t i = 0; grad_bias.defined() && i < vb; ++i) grad_bias.ptr<float>()[s.entry(v0 + i)] = bias_sums[i];
        if (grad_weight.defined()) {
          for (int64_t p = 0; p < s.d_panels; ++p) {
            bool add = false;
            for (int64_t from = 0, to; from < s.panels; from = to) {  // runs of panels that are not skipped
              for (to = from + 1; to < s.panels && skipped(b, to) == skipped(b, from); ++to) {
              }
              if (skipped(b, from)) continue;
              const int64_t steps = s.row_steps / s.panels, begin = from * steps, end = std::min(to * steps, real);
              k.multiply(s.pairs, by_row + begin, s.row_words, 1, vb,
                         space.x_along + (p * s.row_steps + begin) * s.lanes, end - begin, s.columns_in_panel(p), z,
                         s.lanes, add);
              add = true;
            }
            if (!add) std::memset(z, 0, vb * s.lanes * sizeof(float));
            const int64_t first = p * s.lanes, count = s.d - first < s.lanes ? s.d - first : s.lanes;
            char* out[kMaxBlock];
            for (int64_t i = 0; i < vb; ++i) {
              out[i] = grad_weight.row(s.entry(v0 + i)) + first * itemsize(grad_weight.dtype);
              for (int64_t l = 0; add_weight && l < count; ++l)
                reinterpret_cast<float*>(out[i])[l] += z[i * s.lanes + l];
            }
            if (!add_weight) k.convert_away(z, vb, grad_weight.dtype, out, count);
          }
        }
        if (grad_hidden.defined()) {
          k.pack_along(weight.dtype, s.pairs, s.order ? weight.ptr<char>() : weight.row(v0), row_bytes(weight),
                       s.order ? s.order + v0 : nullptr, vb, s.d, s.block_steps(vb),
                       space.along + slot * BackwardSpace::along_words(s));
        }
      }
    });
    if (!grad_hidden.defined()) continue;
    const auto add_hidden = [&](int64_t slot, int64_t first, int64_t count) {
      const int64_t steps = s.block_steps(s.rows_of(round + slot));
      const uint32_t* a =
          s.pairs ? space.by_pair + slot * BackwardSpace::pair_words(s) : space.by_row + slot * s.block * s.row_words;
      const uint32_t* w = space.along + slot * BackwardSpace::along_words(s);
      for (int64_t p = 0; p < s.d_panels; ++p) {
        k.multiply(s.pairs, a + first, 1, s.pairs ? s.pair_words : s.row_words, count, w + p * steps * s.lanes, steps,
                   s.columns_in_panel(p), space.grad_hidden + first * s.padded_d + p * s.lanes, s.padded_d, true);
      }
    };
    if (skips) {
      parallel_for(s.panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t slot = 0; slot < active; ++slot) {
          for (int64_t p = begin; p < end; ++p) {
            if (!skipped(round + slot, p)) add_hidden(slot, p * s.lanes, s.rows_in_panel(p));
          }
        }
      });
    } else {
      parallel_for((n + 5) / 6, 1, [&](int64_t begin, int64_t end) {
        const int64_t first = 6 * begin, count = (6 * end < n ? 6 * end : n) - first;
        for (int64_t slot = 0; slot < active; ++slot) add_hidden(slot, first, count);
      });
    }
  }
  if (grad_hidden.defined()) {
    parallel_for(n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        k.convert(space.grad_hidden + i * s.padded_d, grad_hidden.dtype, grad_hidden.row(index ? index[i] : i), s.d);
      }
    });
  }
}

}  // namespace fastpost
