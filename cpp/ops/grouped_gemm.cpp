// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <string>

#include "core/check.h"
#include "core/parallel.h"
#include "cuda/ops.h"
#include "ops.h"
#include "ops/grouped_gemm_products.h"

namespace fastpost {
namespace {

constexpr const char* kOp = "grouped_gemm";

// ---- arguments -------------------------------------------------------------------------------------------------------

void expect_weight(const Tensor& weight, const Tensor& like) {
  expect(kOp, "weight", weight, {like.dtype}, {kAny, kAny, kAny}, Layout::Strided, &like);
  if (weight.numel() == 0 || weight.stride(2) == 1 || weight.stride(1) == 1) return;
  fail(kOp, "weight", "stride 1 along K, or along N (a transposed view)", describe(weight) + " with neither",
       "Call .contiguous().");
}

// Rows of a matrix and the order? that gathers them; how many grouped rows that makes.
int64_t expect_rows(const char* argument, const Tensor& x, const Tensor& order, int64_t top_k, int64_t columns,
                    const Tensor& like) {
  expect(kOp, argument, x, {like.dtype}, {kAny, columns}, Layout::ContiguousRows, &like);
  if (top_k < 1) fail(kOp, "top_k", "at least 1", std::to_string(top_k));
  if (!order.defined()) return x.size(0);
  expect(kOp, "order", order, {DType::Int32}, {kAny}, Layout::Contiguous, &x);
  if (x.device == Device::CPU) {
    const int64_t slots = x.size(0) * top_k;
    for (int64_t i = 0; i < order.size(0); ++i) {
      const int32_t slot = order.ptr<int32_t>()[i];
      if (slot < 0 || slot >= slots) {
        fail(kOp, "order", "slots in [0, " + std::to_string(slots) + ")",
             std::to_string(slot) + " at place " + std::to_string(i));
      }
    }
  }
  return order.size(0);
}

void expect_offset(const Tensor& offset, int64_t experts, int64_t rows, const Tensor& like) {
  expect(kOp, "offset", offset, {DType::Int32}, {experts + 1}, Layout::Contiguous, &like);
  if (like.device != Device::CPU) return;
  const int32_t* at = offset.ptr<int32_t>();
  bool fits = at[0] >= 0 && at[experts] <= rows;
  for (int64_t e = 0; e < experts; ++e) fits = fits && at[e] <= at[e + 1];
  if (!fits) {
    fail(kOp, "offset", "numbers that ascend from 0 or more to at most the rows, " + std::to_string(rows), "others",
         "Take it from the plan that made the order.");
  }
}

Activation expect_activation(int64_t activation, bool may_be_none) {
  if (activation < (may_be_none ? 0 : 1) || activation > 4) {
    fail(kOp, "activation", may_be_none ? "0 to 4" : "1 to 4", std::to_string(activation));
  }
  return static_cast<Activation>(activation);
}

GroupedRows rows_of(const Tensor& x, const Tensor& order, int64_t top_k) {
  return {x.ptr<char>(), x.stride(0) * itemsize(x.dtype), order.defined() ? order.ptr<int32_t>() : nullptr, top_k,
          x.dtype};
}

char* row_part(const Tensor& t, int64_t row, int64_t column) { return t.row(row) + column * itemsize(t.dtype); }

void zero_rows(const Tensor& t, int64_t first) {
  if (!t.defined()) return;
  for (int64_t r = first; r < t.size(0); ++r) std::memset(t.row(r), 0, t.size(1) * itemsize(t.dtype));
}

}  // namespace

int64_t grouped_gemm_bytes(Tensor weight, int64_t rows, int64_t threads) {
  expect(kOp, "weight", weight, kFloats, {kAny, kAny, kAny}, Layout::Strided);
  if (weight.device == Device::CUDA) return cuda::grouped_gemm_bytes(weight, rows);
  const int64_t e = weight.size(0), n = weight.size(1), k = weight.size(2);
  return product_bytes(weight.dtype, rows, e, n, k, threads);
}

void grouped_gemm(Tensor x, Tensor order, int64_t top_k, Tensor weight, Tensor offset, Tensor bias, int64_t activation,
                  Tensor workspace, Tensor pre, Tensor out) {
  expect(kOp, "x", x, kFloats, {kAny, kAny}, Layout::ContiguousRows);
  expect_weight(weight, x);
  const int64_t e = weight.size(0), n = weight.size(1), k = weight.size(2);
  const int64_t r = expect_rows("x", x, order, top_k, k, x);
  expect_offset(offset, e, r, x);
  expect_optional(kOp, "bias", bias, {x.dtype}, {e, n}, Layout::Contiguous, &x);
  const Activation act = expect_activation(activation, true);
  if (act != Activation::None && n % 2) fail(kOp, "weight", "an even N for a gated activation", describe(weight));
  expect_optional(kOp, "pre", pre, {x.dtype}, {r, n}, Layout::ContiguousRows, &x);
  expect(kOp, "out", out, {x.dtype}, {r, act == Activation::None ? n : n / 2}, Layout::ContiguousRows, &x);
  if (x.device == Device::CUDA) {
    return cuda::grouped_gemm(x, order, top_k, weight, offset, bias, activation, workspace, pre, out);
  }
  const Groups groups{offset.ptr<int32_t>(), e};
  zero_rows(out, groups.offset[e]);
  zero_rows(pre, groups.offset[e]);
  if (r == 0 || n == 0) return;
  const GroupedRows rows = rows_of(x, order, top_k);
  if (weight.stride(2) == 1) {
    return multiply_forward(rows, weight, groups, bias, act, workspace, pre, out);
  }
  // An activation needs columns that are far apart: it comes after the product here.
  const Tensor& product = act == Activation::None ? out : pre;
  if (!product.defined()) fail(kOp, "pre", "a tensor, where W is transposed and an activation follows", "None");
  multiply_transposed(rows, weight, groups, bias, workspace, product);
  if (act == Activation::None) return;
  const int64_t here = groups.first(0);
  parallel_for(groups.offset[e] - here, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = here + begin; i < here + end; ++i) {
      grouped_kernels().activation_backward(act, x.dtype, pre.row(i), row_part(pre, i, n / 2), nullptr, 1.0f, n / 2,
                                            out.row(i), nullptr, nullptr);
    }
  });
}

void grouped_gemm_activation_backward(Tensor grad, Tensor order, int64_t top_k, Tensor weight, Tensor offset,
                                      Tensor pre, int64_t activation, Tensor gate, Tensor workspace, Tensor grad_pre,
                                      Tensor activated, Tensor grad_gate) {
  expect(kOp, "grad", grad, kFloats, {kAny, kAny}, Layout::ContiguousRows);
  expect_weight(weight, grad);
  const int64_t e = weight.size(0), n = weight.size(1), k = weight.size(2);
  const int64_t r = expect_rows("grad", grad, order, top_k, k, grad);
  expect_offset(offset, e, r, grad);
  const Activation act = expect_activation(activation, false);
  expect(kOp, "pre", pre, {grad.dtype}, {r, 2 * n}, Layout::ContiguousRows, &grad);
  expect_optional(kOp, "gate", gate, {DType::Float32}, {r}, Layout::Contiguous, &grad);
  if (gate.defined() && !order.defined()) fail(kOp, "order", "an order beside gate", "None");
  expect(kOp, "grad_pre", grad_pre, {grad.dtype}, {r, 2 * n}, Layout::ContiguousRows, &grad);
  expect_optional(kOp, "activated", activated, {grad.dtype}, {r, n}, Layout::ContiguousRows, &grad);
  expect_optional(kOp, "grad_gate", grad_gate, {DType::Float32}, {r}, Layout::Contiguous, &grad);
  if (grad.device == Device::CUDA) {
    return cuda::grouped_gemm_activation_backward(grad, order, top_k, weight, offset, pre, activation, gate, workspace,
                                                  grad_pre, activated, grad_gate);
  }
  if (weight.numel() && weight.stride(1) != 1) {
    fail(kOp, "weight", "stride 1 along N", describe(weight), "Pass the second product's weight transposed.");
  }
  const Groups groups{offset.ptr<int32_t>(), e};
  zero_rows(grad_pre, groups.offset[e]);
  zero_rows(activated, groups.offset[e]);
  if (grad_gate.defined() && r) std::memset(grad_gate.data, 0, r * sizeof(float));
  if (r == 0 || n == 0) return;
  multiply_activation_backward(rows_of(grad, order, top_k), weight, groups, pre, act, gate, workspace, grad_pre,
                               activated, grad_gate);
}

void grouped_gemm_weight_gradient(Tensor grad, Tensor grad_order, int64_t grad_top_k, Tensor x, Tensor order,
                                  int64_t top_k, Tensor offset, Tensor workspace, Tensor grad_weight,
                                  Tensor grad_bias) {
  expect(kOp, "grad_weight", grad_weight, kFloats, {kAny, kAny, kAny}, Layout::Contiguous);
  const int64_t e = grad_weight.size(0), n = grad_weight.size(1), k = grad_weight.size(2);
  const int64_t r = expect_rows("x", x, order, top_k, k, grad_weight);
  const int64_t grad_rows = expect_rows("grad", grad, grad_order, grad_top_k, n, grad_weight);
  if (grad_rows != r) fail(kOp, "grad", std::to_string(r) + " grouped rows, as x has", std::to_string(grad_rows));
  expect_offset(offset, e, r, grad_weight);
  expect_optional(kOp, "grad_bias", grad_bias, {grad_weight.dtype}, {e, n}, Layout::Contiguous, &grad_weight);
  if (grad_weight.device == Device::CUDA) {
    return cuda::grouped_gemm_weight_gradient(grad, grad_order, grad_top_k, x, order, top_k, offset, workspace,
                                              grad_weight, grad_bias);
  }
  const Groups groups{offset.ptr<int32_t>(), e};
  if (e == 0 || n == 0) return;
  multiply_outer(rows_of(grad, grad_order, grad_top_k), rows_of(x, order, top_k), r, groups, workspace, grad_weight,
                 grad_bias);
}

void grouped_gemm_activate(Tensor pre, int64_t activation, Tensor grad_out, Tensor out, Tensor grad_pre) {
  expect(kOp, "pre", pre, kFloats, {kAny, kAny}, Layout::ContiguousRows);
  const int64_t r = pre.size(0), n = pre.size(1) / 2;
  const Activation act = expect_activation(activation, false);
  if (pre.size(1) % 2) fail(kOp, "pre", "an even number of columns", describe(pre));
  expect_optional(kOp, "grad_out", grad_out, {pre.dtype}, {r, n}, Layout::ContiguousRows, &pre);
  expect_optional(kOp, "out", out, {pre.dtype}, {r, n}, Layout::ContiguousRows, &pre);
  expect_optional(kOp, "grad_pre", grad_pre, {pre.dtype}, {r, 2 * n}, Layout::ContiguousRows, &pre);
  if (grad_pre.defined() != grad_out.defined())
    fail(kOp, "grad_pre", "a tensor beside grad_out alone", "one of the two");
  if (pre.device == Device::CUDA) return cuda::grouped_gemm_activate(pre, activation, grad_out, out, grad_pre);
  parallel_for(r, 16, [&](int64_t begin, int64_t end) {
    constexpr int64_t kPiece = 512;
    float grad[kPiece];
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < n; c += kPiece) {
        const int64_t count = std::min(kPiece, n - c);
        if (grad_out.defined()) {
          const GroupedRows from{grad_out.row(i), 0, nullptr, 1, pre.dtype};
          grouped_kernels().pack_rows(false, from, 0, 1, c, c + count, 0, reinterpret_cast<uint32_t*>(grad));
        }
        grouped_kernels().activation_backward(act, pre.dtype, row_part(pre, i, c), row_part(pre, i, n + c),
                                              grad_out.defined() ? grad : nullptr, 1.0f, count,
                                              out.defined() ? row_part(out, i, c) : nullptr,
                                              grad_pre.defined() ? row_part(grad_pre, i, c) : nullptr,
                                              grad_pre.defined() ? row_part(grad_pre, i, n + c) : nullptr);
      }
    }
  });
}

}  // namespace fastpost
