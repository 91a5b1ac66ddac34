// SPDX-License-Identifier: Apache-2.0
#include "core/check.h"
#include "core/parallel.h"
#include "cuda/ops.h"
#include "ops.h"
#include "ops/int4_gemm_simd.h"

namespace fastpost {
namespace {

constexpr const char* kOp = "int4_gemm";

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

void expect_workspace(const Tensor& workspace, int64_t bytes, const Tensor& like) {
  expect(kOp, "workspace", workspace, {DType::UInt8}, {kAny}, Layout::Contiguous, &like);
  if (workspace.size(0) < bytes) {
    fail(kOp, "workspace", "at least " + std::to_string(bytes) + " bytes", std::to_string(workspace.size(0)));
  }
}

}  // namespace

bool int4_gemm_fits(Tensor x, Tensor codes) { return x.device == Device::CUDA ? cuda::int4_gemm_fits(x, codes) : true; }

int64_t int4_gemm_bytes(Tensor x, Tensor codes, int64_t columns, bool backward, int64_t, int64_t threads) {
  if (x.device == Device::CUDA) return cuda::int4_gemm_bytes(x, codes);
  return backward ? (x.size(0) + 1) * columns * 4 : threads * columns * 4;
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
    return cuda::int4_gemm(x, codes, scales, zeros, table, group_size, bias, workspace, out);
  }
  const Int4Rows w = rows_of(codes, scales, zeros, table, k, group_size);
  expect_workspace(workspace, k * 4, x);
  const Int4Kernels& kernels = int4_kernels();
  float* row = workspace.ptr<float>();
  for (int64_t j = 0; j < n; ++j) {
    kernels.dequantize(w, j, DType::Float32, row);
    float b = 0;
    if (bias.defined()) kernels.add(1.0f, &b, 0, &b);
    for (int64_t i = 0; i < m; ++i) {
      float y = kernels.dot(x.dtype, x.row(i), row, k);
      if (bias.defined()) {
        float one = 1.0f;
        y += kernels.dot(bias.dtype, bias.ptr<char>() + j * itemsize(bias.dtype), &one, 1);
      }
      kernels.convert(&y, out.dtype, out.row(i) + j * itemsize(out.dtype), 1);
    }
  }
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
    fail(kOp, "grad", "a tensor on the CPU", describe(grad),
         "On a GPU, W is made slab by slab for the framework's GEMM.");
  }
  const Int4Rows w = rows_of(codes, scales, zeros, table, k, group_size);
  expect_workspace(workspace, (m + 1) * k * 4, grad);
  const Int4Kernels& kernels = int4_kernels();
  float *row = workspace.ptr<float>(), *sums = row + k;
  std::memset(sums, 0, m * k * 4);
  for (int64_t j = 0; j < n; ++j) {
    kernels.dequantize(w, j, DType::Float32, row);
    for (int64_t i = 0; i < m; ++i) {
      const float one = 1.0f;
      const float g = kernels.dot(grad.dtype, grad.row(i) + j * itemsize(grad.dtype), &one, 1);
      kernels.add(g, row, k, sums + i * k);
    }
  }
  for (int64_t i = 0; i < m; ++i) kernels.convert(sums + i * k, grad.dtype, grad_x.row(i), k);
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
