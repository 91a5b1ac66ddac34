// SPDX-License-Identifier: Apache-2.0
// On a CPU, W is decoded piece by piece into registers or caches and multiplied there.
//
// Few rows of x: a table of 16 values per group turns codes into weights, which go straight into sums of neighbouring
// columns; eight rows of x at a time. Many: as many rows of W as fit the second-level cache, against one panel of x after
// the other, whose lanes are rows of x. The backward decodes 128 columns of W at a time, with columns in the lanes.
// Int8 multipliers take codes as they are: one row of bfloat16 in two digits (kept finer than bfloat16 would be), or
// rows of eight bits where those are allowed.
//
// Every sum runs in an order that depends on the shape of W and the way alone, not on the number of threads. So a row has
// the same bits whatever other rows there are, as long as they are as few or as many.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "core/arena.h"
#include "core/check.h"
#include "core/parallel.h"
#include "cuda/ops.h"
#include "ops.h"
#include "ops/int4_gemm_int8_simd.h"
#include "ops/int4_gemm_simd.h"
#include "ops/linear_logprob_fused_simd.h"

namespace fastpost {
namespace {

constexpr const char* kOp = "int4_gemm";
constexpr const char* kFitting = "what int4_gemm_fits accepts";

static_assert([] {  // each place of a block is that of one column
  for (int c = 0; c < int4::kBlock; ++c) {
    const int4::Place p = int4::place(c);
    if (p.word < 0 || p.word > 15 || p.nibble < 0 || p.nibble > 7 || int4::column(p.word, p.nibble) != c) return false;
  }
  return true;
}());

// The weight of `columns` columns, on the device of `like`.
void expect_weight(const Tensor& codes, const Tensor& scales, const Tensor& zeros, const Tensor& table, int64_t columns,
                   int64_t group_size, const Tensor& like) {
  if (group_size <= 0 || group_size % 32 != 0) {
    fail(kOp, "group_size", "a positive multiple of 32", std::to_string(group_size));
  }
  expect(kOp, "codes", codes, {DType::UInt8}, {kAny, int4::row_bytes(columns)}, Layout::ContiguousRows, &like);
  const int64_t n = codes.size(0), groups = (columns + group_size - 1) / group_size;
  expect(kOp, "scales", scales, kFloats, {n, groups}, Layout::ContiguousRows, &like);
  expect_optional(kOp, "zeros", zeros, {DType::UInt8}, {n, groups}, Layout::ContiguousRows, &like);
  expect_optional(kOp, "table", table, {DType::Float32}, {16}, Layout::Contiguous, &like);
  if (zeros.defined() && table.defined()) fail(kOp, "zeros", "None beside a table", describe(zeros));
}

Int4Rows rows_of(const Tensor& codes, const Tensor& scales, const Tensor& zeros, const Tensor& table, int64_t columns,
                 int64_t group_size) {
  return {codes.ptr<uint8_t>(),
          codes.stride(0),
          scales.ptr<char>(),
          scales.stride(0) * itemsize(scales.dtype),
          scales.dtype,
          zeros.defined() ? zeros.ptr<uint8_t>() : nullptr,
          zeros.defined() ? zeros.stride(0) : 0,
          table.defined() ? table.ptr<float>() : nullptr,
          codes.size(0),
          columns,
          group_size};
}

// ---- how the work is cut ----------------------------------------------------------------------------------------------

constexpr int64_t kFew = 24;                  // rows of x in bfloat16 that are faster without panels
constexpr int64_t kFineRows = 4;              // rows that W4A8 gains nothing for
constexpr int64_t kDecodedBytes = 384 << 10;  // of W at a time, of the second-level cache
constexpr int64_t kBackwardRows = 1024;       // of W at a time, one block of columns wide
constexpr int64_t kBackwardSums = 512;        // rows of grad, whose sums take as much again

struct Shape {
  int64_t m, n, k, blocks, steps;  // blocks of columns; steps: words of a row of W
  bool pairs;
  int64_t lanes, panels, row_words, block_rows;  // panels of rows of x; rows of W that are decoded at a time
  int64_t sum_steps;                             // summed on their own: a chain of thousands costs float32 a digit

  Shape(int64_t rows, int64_t outputs, int64_t columns, DType dtype)
      : m(rows), n(outputs), k(columns), blocks((k + int4::kBlock - 1) / int4::kBlock) {
    pairs = fused_kernels().pairs && dtype == DType::BFloat16;
    steps = blocks * (pairs ? int4::kBlock / 2 : int4::kBlock);
    lanes = fused_kernels().lanes;
    panels = (m + lanes - 1) / lanes;
    row_words = steps + 16;  // a cache line more, so that rows do not fight for the same places
    sum_steps = pairs ? steps : 512;
    block_rows = std::clamp<int64_t>(kDecodedBytes / (4 * row_words) / 48 * 48, 12, kMaxBlock);
  }
  bool few() const { return m <= (pairs ? kFew : kFewRows); }
  bool digits() const { return m == 1; }  // what int8 multipliers do with one row of x
  int64_t row_blocks() const { return (n + block_rows - 1) / block_rows; }
  int64_t int8_panels() const { return (n + kInt8Rows - 1) / kInt8Rows; }
  int64_t tiles() const { return (m + kBackwardSums - 1) / kBackwardSums * blocks; }
};

struct Int8Space {
  Int8Rows x;
  uint8_t* codes;         // [slots][kInt8Rows][blocks][128]
  float *scales, *zeros;  // [slots][blocks][4][kInt8Rows]
  Int8Space(Arena& a, const Shape& s, int64_t slots)
      : x{a.take<int8_t>(s.digits() ? 2 * s.blocks * int4::kBlock : s.m * int8_row(s.blocks)),
          a.take<float>(s.m * s.blocks * 4), a.take<float>(s.m * s.blocks * 4)},
        codes(a.take<uint8_t>(s.digits() ? 0 : slots * codes_of(s))),
        scales(a.take<float>(s.digits() ? 0 : slots * scales_of(s))),
        zeros(a.take<float>(s.digits() ? 0 : slots * scales_of(s))) {}
  static int64_t codes_of(const Shape& s) { return kInt8Rows * s.blocks * int4::kBlock; }
  static int64_t scales_of(const Shape& s) { return kInt8Rows * s.blocks * 4; }
};

struct ForwardSpace {
  uint32_t* x;  // rows, row_words apart, or panels
  uint32_t* w;  // [slots][block_rows][row_words]
  ForwardSpace(Arena& a, const Shape& s, int64_t slots)
      : x(a.take<uint32_t>(s.few() ? s.m * s.row_words : s.panels * s.lanes * s.steps)),
        w(a.take<uint32_t>(s.few() ? 0 : slots * s.block_rows * s.row_words)) {}
};

struct BackwardSpace {
  uint32_t* grad;  // [m][grad_words], unless its rows are words as they are
  uint32_t* w;     // [slots][kBackwardRows][128]
  float* sums;     // [slots][kBackwardSums][128]
  BackwardSpace(Arena& a, const Shape& s, int64_t slots, bool direct)
      : grad(a.take<uint32_t>(direct ? 0 : s.m * grad_words(s))),
        w(a.take<uint32_t>(slots * kBackwardRows * int4::kBlock)),
        sums(a.take<float>(slots * std::min(s.m, kBackwardSums) * int4::kBlock)) {}
  static int64_t grad_words(const Shape& s) { return s.pairs ? (s.n + 1) / 2 : s.n; }
};

bool rows_are_words(const Tensor& grad, const Shape& s) {
  return s.pairs ? s.n % 2 == 0 && grad.stride(0) % 2 == 0 : grad.dtype == DType::Float32;
}

// The space for as many slots as there are threads and pieces of work, or as many as the workspace has room for.
template <class Space, class... Options>
std::pair<Space, int64_t> take_space(const Tensor& workspace, const Tensor& like, const Shape& s, int64_t pieces,
                                     Options... options) {
  expect(kOp, "workspace", workspace, {DType::UInt8}, {kAny}, Layout::Contiguous, &like);
  for (int64_t slots = std::max<int64_t>(1, std::min<int64_t>(num_threads(), pieces));; --slots) {
    Arena arena{workspace.ptr<char>()};
    const Space space(arena, s, slots, options...);
    if (arena.used <= workspace.size(0)) return {space, slots};
    if (slots == 1) {
      fail(kOp, "workspace", "at least " + std::to_string(arena.used) + " bytes", std::to_string(workspace.size(0)));
    }
  }
}

// f(slot, begin, end): pieces [begin, end) for each slot.
template <class F>
void for_slots(int64_t slots, int64_t pieces, F&& f) {
  parallel_for(slots, 1, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) f(slot, slot * pieces / slots, (slot + 1) * pieces / slots);
  });
}

const char* bias_at(const Tensor& bias, int64_t i) {
  return bias.defined() ? bias.ptr<char>() + i * itemsize(bias.dtype) : nullptr;
}
int64_t row_bytes(const Tensor& t) { return t.stride(0) * itemsize(t.dtype); }

// ---- on a CPU ----------------------------------------------------------------------------------------------------------

// f(begin, end): rows of W, kStep of them at most.
template <class F>
void for_steps(int64_t n, F&& f) {
  parallel_for((n + kStep - 1) / kStep, 1, [&](int64_t first, int64_t last) {
    for (int64_t begin = first * kStep; begin < std::min(last * kStep, n); begin += kStep) {
      f(begin, std::min(begin + kStep, n));
    }
  });
}

void pack_panels(const Shape& s, const Tensor& x, uint32_t* out) {
  parallel_for(s.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      int4_kernels().pack_across(x.dtype, s.pairs, x.row(p * s.lanes), row_bytes(x),
                                 std::min(s.m - p * s.lanes, s.lanes), s.k, s.lanes, out + p * s.steps * s.lanes);
    }
  });
}

void few_rows(const Shape& s, const Tensor& x, const Int4Rows& w, const Tensor& bias, uint32_t* words,
              const Tensor& out) {
  const Int4Kernels& kernels = int4_kernels();
  for (int64_t i = 0; i < s.m; ++i) kernels.pack(x.dtype, s.pairs, x.row(i), s.k, words + i * s.row_words);
  for_steps(s.n, [&](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < s.m; first += kFewRows) {
      const int64_t rows = std::min<int64_t>(kFewRows, s.m - first);
      alignas(64) float y[kFewRows * kStep];
      kernels.few(s.pairs, w, begin, end, words + first * s.row_words, s.row_words, rows, y);
      for (int64_t i = 0; i < rows; ++i) {
        kernels.finish(y + i * kStep, end - begin, out.dtype, bias_at(bias, begin),
                       out.row(first + i) + begin * itemsize(out.dtype));
      }
    }
  });
}

// One row of x as two digits: half the work of bfloat16 and finer. False if x holds NaN or infinity.
bool one_row(const Shape& s, const Tensor& x, const Int4Rows& w, const Tensor& bias, const Int8Rows& digits,
             const Tensor& out) {
  if (!int8_kernels().pack_digits(w, x.dtype, x.data, digits)) return false;
  for_steps(s.n, [&](int64_t begin, int64_t end) {
    float y[kStep];
    int8_kernels().multiply_digits(w, begin, end, digits, y);
    int4_kernels().finish(y, end - begin, out.dtype, bias_at(bias, begin),
                          out.ptr<char>() + begin * itemsize(out.dtype));
  });
  return true;
}

void int8_rows(const Shape& s, const Tensor& x, const Int4Rows& w, const Tensor& bias, const Int8Space& space,
               int64_t slots, const Tensor& out) {
  parallel_for(s.m, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) int8_kernels().pack(w, x.dtype, x.row(i), i, space.x);
  });
  for_slots(slots, s.int8_panels(), [&](int64_t slot, int64_t first, int64_t last) {
    uint8_t* codes = space.codes + slot * Int8Space::codes_of(s);
    float* scales = space.scales + slot * Int8Space::scales_of(s);
    float* zeros = space.zeros + slot * Int8Space::scales_of(s);
    for (int64_t begin = first * kInt8Rows; begin < std::min(last * kInt8Rows, s.n); begin += kInt8Rows) {
      int8_kernels().decode(w, begin, codes, scales, zeros);
      for (int64_t top = 0; top < s.m; top += kFewRows) {
        const int64_t rows = std::min<int64_t>(kFewRows, s.m - top);
        alignas(64) float y[kFewRows * kInt8Rows];
        // The first rows that meet a panel fetch the next one.
        const uint8_t* soon = top == 0 ? w.codes + (begin + kInt8Rows) * w.codes_row : nullptr;
        int8_kernels().multiply(w, codes, scales, zeros, space.x, top, rows, soon, y);
        for (int64_t i = 0; i < rows; ++i) {
          int4_kernels().finish(y + i * kInt8Rows, std::min<int64_t>(kInt8Rows, s.n - begin), out.dtype,
                                bias_at(bias, begin), out.row(top + i) + begin * itemsize(out.dtype));
        }
      }
    }
  });
}

void many_rows(const Shape& s, const Tensor& x, const Int4Rows& w, const Tensor& bias, const ForwardSpace& space,
               int64_t slots, const Tensor& out) {
  const Int4Kernels& kernels = int4_kernels();
  pack_panels(s, x, space.x);
  for_slots(slots, s.row_blocks(), [&](int64_t slot, int64_t first, int64_t last) {
    uint32_t* decoded = space.w + slot * s.block_rows * s.row_words;
    alignas(64) float sums[kMaxBlock * kMaxLanes];
    if (s.k == 0) std::memset(sums, 0, sizeof sums);
    for (int64_t begin = first * s.block_rows; begin < std::min(last * s.block_rows, s.n); begin += s.block_rows) {
      const int64_t rows = std::min(s.block_rows, s.n - begin);
      for (int64_t r = 0; r < rows; ++r) kernels.decode(s.pairs, w, begin + r, decoded + r * s.row_words);
      for (int64_t p = 0; p < s.panels; ++p) {
        const int64_t used = std::min(s.m - p * s.lanes, s.lanes);
        const uint32_t* panel = space.x + p * s.steps * s.lanes;
        for (int64_t k = 0; k < s.steps; k += s.sum_steps) {
          fused_kernels().multiply(s.pairs, decoded + k, s.row_words, 1, rows, panel + k * s.lanes,
                                   std::min(s.sum_steps, s.steps - k), used, sums, s.lanes, k > 0);
        }
        kernels.finish_across(sums, s.lanes, rows, used, out.dtype, bias_at(bias, begin),
                              out.row(p * s.lanes) + begin * itemsize(out.dtype), row_bytes(out));
      }
    }
  });
}

void forward(const Tensor& x, const Int4Rows& w, const Tensor& bias, int64_t activation_bits, const Tensor& workspace,
             const Tensor& out) {
  const Shape s(x.size(0), w.n, w.k, x.dtype);
  // Eight bits are a permission, used where they are faster: not with a table, nor for few rows of bfloat16. One row of
  // bfloat16 needs no permission.
  const bool int8 = activation_bits == 8 && !(s.pairs && s.m <= kFineRows);
  if ((int8 || (s.pairs && s.digits())) && int8_kernels().there && !w.table) {
    const auto [space, slots] = take_space<Int8Space>(workspace, x, s, s.int8_panels());
    if (!s.digits()) return int8_rows(s, x, w, bias, space, slots, out);
    if (one_row(s, x, w, bias, space.x, out)) return;
  }
  const auto [space, slots] = take_space<ForwardSpace>(workspace, x, s, s.row_blocks());
  s.few() ? few_rows(s, x, w, bias, space.x, out) : many_rows(s, x, w, bias, space, slots, out);
}

void backward(const Shape& s, const Tensor& grad, const Int4Rows& w, const BackwardSpace& space, int64_t slots,
              bool direct, const Tensor& grad_x) {
  const Int4Kernels& kernels = int4_kernels();
  const uint32_t* words = direct ? grad.ptr<uint32_t>() : space.grad;
  const int64_t grad_row = direct ? row_bytes(grad) / 4 : BackwardSpace::grad_words(s);
  const int64_t lanes = fused_kernels().lanes, rows_of_step = s.pairs ? 2 : 1,
                panel_steps = kBackwardRows / rows_of_step;
  if (!direct) {
    parallel_for(s.m, 16, [&](int64_t begin, int64_t end) {
      fused_kernels().pack_rows(grad.dtype, s.pairs, grad.row(begin), row_bytes(grad), nullptr, end - begin, s.n,
                                space.grad + begin * grad_row);
    });
  }
  for_slots(slots, s.tiles(), [&](int64_t slot, int64_t first, int64_t last) {
    uint32_t* decoded = space.w + slot * kBackwardRows * int4::kBlock;
    float* sums = space.sums + slot * std::min(s.m, kBackwardSums) * int4::kBlock;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t block = tile % s.blocks, top = tile / s.blocks * kBackwardSums;
      const int64_t rows = std::min(kBackwardSums, s.m - top),
                    columns = std::min<int64_t>(int4::kBlock, s.k - block * int4::kBlock);
      if (s.n == 0) std::memset(sums, 0, rows * int4::kBlock * sizeof(float));
      for (int64_t begin = 0; begin < s.n; begin += kBackwardRows) {
        const int64_t count = std::min(kBackwardRows, s.n - begin), steps = (count + rows_of_step - 1) / rows_of_step;
        kernels.decode_along(s.pairs, w, begin, count, block, panel_steps, decoded);
        for (int64_t c = 0; c < columns; c += lanes) {
          fused_kernels().multiply(s.pairs, words + top * grad_row + begin / rows_of_step, grad_row, 1, rows,
                                   decoded + c * panel_steps, steps, std::min(lanes, columns - c), sums + c,
                                   int4::kBlock, begin > 0);
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        kernels.finish(sums + i * int4::kBlock, columns, grad_x.dtype, nullptr,
                       grad_x.row(top + i) + block * int4::kBlock * itemsize(grad_x.dtype));
      }
    }
  });
}

}  // namespace

bool int4_gemm_fits(Tensor x, Tensor codes, Tensor scales, Tensor table, bool backward) {
  return x.device == Device::CUDA ? cuda::int4_gemm_fits(x, codes, scales, table, backward) : true;
}

int64_t int4_gemm_bytes(Tensor x, Tensor codes, int64_t columns, bool backward, int64_t activation_bits,
                        int64_t threads) {
  if (x.device == Device::CUDA) return 0;
  const Shape s(x.size(0), codes.size(0), columns, x.dtype);
  Arena arena{nullptr}, of_int8{nullptr};
  if (backward) {
    BackwardSpace(arena, s, std::min(threads, s.tiles()), rows_are_words(x, s));
    return arena.used;
  }
  ForwardSpace(arena, s, std::min(threads, s.row_blocks()));
  if (activation_bits == 8 || s.digits()) Int8Space(of_int8, s, std::min(threads, s.int8_panels()));
  return std::max(arena.used, of_int8.used);
}

void int4_gemm(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size, Tensor bias,
               int64_t activation_bits, Tensor workspace, Tensor out) {
  expect(kOp, "x", x, kFloats, {kAny, kAny}, Layout::ContiguousRows);
  const int64_t m = x.size(0), k = x.size(1);
  expect_weight(codes, scales, zeros, table, k, group_size, x);
  const int64_t n = codes.size(0);
  expect_optional(kOp, "bias", bias, {x.dtype}, {n}, Layout::Contiguous, &x);
  expect(kOp, "out", out, {x.dtype}, {m, n}, Layout::ContiguousRows, &x);
  if (activation_bits != 0 && activation_bits != 8) {
    fail(kOp, "activation_bits", "0 or 8", std::to_string(activation_bits));
  }
  if (x.device == Device::CUDA) {
    if (activation_bits) fail(kOp, "activation_bits", "None on a GPU", "8", "int8 activations are for CPUs.");
    if (!cuda::int4_gemm_fits(x, codes, scales, table, false)) fail(kOp, "x", kFitting, describe(x));
    return cuda::int4_gemm(x, codes, scales, zeros, table, group_size, bias, out);
  }
  if (m == 0 || n == 0) return;
  forward(x, rows_of(codes, scales, zeros, table, k, group_size), bias, activation_bits, workspace, out);
}

void int4_gemm_backward(Tensor grad, Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size,
                        Tensor workspace, Tensor grad_x) {
  expect(kOp, "grad", grad, kFloats, {kAny, kAny}, Layout::ContiguousRows);
  const int64_t m = grad.size(0), n = grad.size(1);
  expect(kOp, "grad_x", grad_x, {grad.dtype}, {m, kAny}, Layout::ContiguousRows, &grad);
  const int64_t k = grad_x.size(1);
  expect_weight(codes, scales, zeros, table, k, group_size, grad);
  expect(kOp, "grad", grad, {grad.dtype}, {m, codes.size(0)}, Layout::ContiguousRows);
  if (grad.device == Device::CUDA) {
    if (!cuda::int4_gemm_fits(grad, codes, scales, table, true)) fail(kOp, "grad", kFitting, describe(grad));
    return cuda::int4_gemm_backward(grad, codes, scales, zeros, table, group_size, grad_x);
  }
  if (m == 0 || k == 0) return;
  const Int4Rows w = rows_of(codes, scales, zeros, table, k, group_size);
  const Shape s(m, n, k, grad.dtype);
  const bool direct = rows_are_words(grad, s);
  const auto [space, slots] = take_space<BackwardSpace>(workspace, grad, s, s.tiles(), direct);
  backward(s, grad, w, space, slots, direct, grad_x);
}

void int4_gemm_dequantize(Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size, Tensor out) {
  expect(kOp, "out", out, kFloats, {kAny, kAny}, Layout::ContiguousRows);
  const int64_t k = out.size(1);
  expect_weight(codes, scales, zeros, table, k, group_size, out);
  expect(kOp, "out", out, {out.dtype}, {codes.size(0), k}, Layout::ContiguousRows);
  if (out.device == Device::CUDA) {
    return cuda::int4_gemm_dequantize(codes, scales, zeros, table, group_size, out);
  }
  const Int4Rows w = rows_of(codes, scales, zeros, table, k, group_size);
  parallel_for(w.n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) int4_kernels().dequantize(w, i, out.dtype, out.row(i));
  });
}

}  // namespace fastpost
