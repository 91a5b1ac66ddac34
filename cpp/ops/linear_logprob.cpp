// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "core/check.h"
#include "core/parallel.h"
#include "cuda/ops.h"
#include "ops.h"
#include "ops/token_logprob_simd.h"

namespace fastpost {
namespace {

enum StatsRow { kMax, kAtMax, kRest, kWeighted, kTarget, kStatsRows };

// What every tile function takes; returns the row count.
int64_t expect_tile(const char* op, const Tensor& logits, const Tensor& bias, const Tensor& target, float temperature,
                    float softcap) {
  expect(op, "logits", logits, kFloats, {kAny, kAny}, Layout::ContiguousRows);
  const int64_t n = logits.size(0);
  expect_optional(op, "bias", bias, {logits.dtype}, {logits.size(1)}, Layout::Contiguous, &logits);
  expect(op, "target", target, {DType::Int64}, {n}, Layout::Contiguous, &logits);
  expect_transform(op, temperature, softcap);
  return n;
}

// What the gradient of a tile needs per row, and where it goes.
void expect_gradient(const char* op, const Tensor& tile, const Tensor& logprob, const Tensor& lse,
                     const Tensor& entropy, const Tensor& grad_logprob, const Tensor& grad_entropy, DType dtype,
                     const Tensor& grad_logits) {
  const int64_t n = tile.size(0);
  expect(op, "logprob", logprob, {DType::Float32}, {n}, Layout::Contiguous, &tile);
  expect(op, "lse", lse, {DType::Float32}, {n}, Layout::Contiguous, &tile);
  expect(op, "grad_logprob", grad_logprob, {DType::Float32}, {n}, Layout::Contiguous, &tile);
  expect_optional(op, "grad_entropy", grad_entropy, {DType::Float32}, {n}, Layout::Contiguous, &tile);
  if (grad_entropy.defined()) expect(op, "entropy", entropy, {DType::Float32}, {n}, Layout::Contiguous, &tile);
  expect(op, "grad_logits", grad_logits, {dtype}, {n, tile.size(1)}, Layout::ContiguousRows, &tile);
}

// Position of a row's target inside the slice, or -1.
int64_t local_target(const Tensor& target, int64_t i, int64_t vocab_start, int64_t v) {
  const int64_t t = target.ptr<int64_t>()[i] - vocab_start;
  return t >= 0 && t < v ? t : -1;
}

}  // namespace

void linear_logprob_check(Tensor hidden, Tensor weight, Tensor bias, Tensor target, float temperature, float softcap,
                          int64_t ignore_index) {
  constexpr const char* op = "linear_logprob";
  expect(op, "hidden", hidden, kFloats, {kAny, kAny}, Layout::Strided);
  expect(op, "weight", weight, {hidden.dtype}, {kAny, hidden.size(1)}, Layout::Strided, &hidden);
  expect_optional(op, "bias", bias, {hidden.dtype}, {weight.size(0)}, Layout::Contiguous, &hidden);
  expect(op, "target", target, {DType::Int64}, {hidden.size(0)}, Layout::Contiguous, &hidden);
  expect_transform(op, temperature, softcap);
  if (target.device == Device::CPU) expect_targets(op, target, weight.size(0), ignore_index);
}

void linear_logprob_tile(Tensor logits, Tensor bias, Tensor target, int64_t vocab_start, float temperature,
                         float softcap, bool with_entropy, Tensor stats) {
  constexpr const char* op = "linear_logprob";
  const int64_t n = expect_tile(op, logits, bias, target, temperature, softcap), v = logits.size(1);
  expect(op, "stats", stats, {DType::Float32}, {kStatsRows, n}, Layout::Contiguous, &logits);
  if (logits.device == Device::CUDA) {
    return cuda::linear_logprob_tile(logits, bias, target, vocab_start, temperature, softcap, with_entropy, stats);
  }
  const LogitTransform transform{1.0f / temperature, softcap};
  const LogprobRowKernels& kernels = logprob_row_kernels();
  float* s = stats.ptr<float>();
  parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      RowStats row{s[kMax * n + i], s[kAtMax * n + i], s[kRest * n + i], s[kWeighted * n + i]};
      kernels.accumulate(logits.dtype, logits.row(i), bias.data, v, transform, with_entropy, &row);
      s[kMax * n + i] = row.max;
      s[kAtMax * n + i] = row.at_max;
      s[kRest * n + i] = row.rest;
      s[kWeighted * n + i] = row.weighted;
      const int64_t t = local_target(target, i, vocab_start, v);
      if (t >= 0) s[kTarget * n + i] = kernels.transform(logits.dtype, logits.row(i), bias.data, t, transform);
    }
  });
}

void linear_logprob_finish(Tensor stats, Tensor logprob, Tensor lse, Tensor entropy) {
  constexpr const char* op = "linear_logprob";
  expect(op, "stats", stats, {DType::Float32}, {kStatsRows, kAny});
  const int64_t n = stats.size(1);
  expect(op, "logprob", logprob, {DType::Float32}, {n}, Layout::Contiguous, &stats);
  expect(op, "lse", lse, {DType::Float32}, {n}, Layout::Contiguous, &stats);
  expect_optional(op, "entropy", entropy, {DType::Float32}, {n}, Layout::Contiguous, &stats);
  if (stats.device == Device::CUDA) return cuda::linear_logprob_finish(stats, logprob, lse, entropy);
  const float* s = stats.ptr<float>();
  for (int64_t i = 0; i < n; ++i) {
    const RowStats row{s[kMax * n + i], s[kAtMax * n + i], s[kRest * n + i], s[kWeighted * n + i]};
    const RowResult result = finish_row(row, s[kTarget * n + i]);
    logprob.ptr<float>()[i] = result.logprob;
    lse.ptr<float>()[i] = result.lse;
    if (entropy.defined()) entropy.ptr<float>()[i] = result.entropy;
  }
}

void linear_logprob_tile_backward(Tensor logits, Tensor bias, Tensor target, int64_t vocab_start, float temperature,
                                  float softcap, Tensor logprob, Tensor lse, Tensor entropy, Tensor grad_logprob,
                                  Tensor grad_entropy, Tensor grad_logits) {
  constexpr const char* op = "linear_logprob_backward";
  const int64_t n = expect_tile(op, logits, bias, target, temperature, softcap), v = logits.size(1);
  expect_gradient(op, logits, logprob, lse, entropy, grad_logprob, grad_entropy, logits.dtype, grad_logits);
  if (logits.device == Device::CUDA) {
    return cuda::linear_logprob_tile_backward(logits, bias, target, vocab_start, temperature, softcap, logprob, lse,
                                              entropy, grad_logprob, grad_entropy, grad_logits);
  }
  const LogitTransform transform{1.0f / temperature, softcap};
  const LogprobRowKernels& kernels = logprob_row_kernels();
  parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float g = grad_logprob.ptr<float>()[i], h = grad_entropy.defined() ? grad_entropy.ptr<float>()[i] : 0.0f;
      if (g == 0 && h == 0) {
        std::memset(grad_logits.row(i), 0, v * itemsize(logits.dtype));
        continue;
      }
      kernels.gradient(logits.dtype, logits.row(i), bias.data, v, transform, local_target(target, i, vocab_start, v),
                       logprob.ptr<float>()[i], lse.ptr<float>()[i], h != 0 ? entropy.ptr<float>()[i] : 0.0f, g, h,
                       grad_logits.row(i));
    }
  });
}

void linear_logprob_rows(Tensor target, int64_t ignore_index, Tensor grad_logprob, Tensor grad_entropy, Tensor rows,
                         Tensor count) {
  constexpr const char* op = "linear_logprob";
  expect(op, "target", target, {DType::Int64}, {kAny});
  const int64_t n = target.size(0);
  expect_optional(op, "grad_logprob", grad_logprob, {DType::Float32}, {n}, Layout::Contiguous, &target);
  expect_optional(op, "grad_entropy", grad_entropy, {DType::Float32}, {n}, Layout::Contiguous, &target);
  expect(op, "rows", rows, {DType::Int64}, {n}, Layout::Contiguous, &target);
  expect(op, "count", count, {DType::Int64}, {1}, Layout::Contiguous, &target);
  if (target.device == Device::CUDA) {
    return cuda::linear_logprob_rows(target, ignore_index, grad_logprob, grad_entropy, rows, count);
  }
  const float *g = grad_logprob.ptr<float>(), *h = grad_entropy.ptr<float>();
  auto takes_part = [&](int64_t i) {
    if (target.ptr<int64_t>()[i] == ignore_index) return false;
    return (!g && !h) || (g && g[i] != 0) || (h && h[i] != 0);
  };
  int64_t* place = rows.ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    if (takes_part(i)) *place++ = i;
  }
  *count.ptr<int64_t>() = place - rows.ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    if (!takes_part(i)) *place++ = i;
  }
}

int64_t linear_logprob_forward_columns(Tensor hidden, Tensor weight) {
  expect("linear_logprob", "hidden", hidden, kFloats, {kAny, kAny}, Layout::Strided);
  expect("linear_logprob", "weight", weight, kFloats, {kAny, hidden.size(1)}, Layout::Strided, &hidden);
  return hidden.device == Device::CUDA ? cuda::linear_logprob_forward_columns(hidden, weight) : 0;
}

void linear_logprob_forward(Tensor hidden, Tensor weight, Tensor bias, Tensor target, int64_t vocab_start,
                            float temperature, float softcap, bool with_entropy, Tensor exponentials, Tensor partials,
                            Tensor stats) {
  constexpr const char* op = "linear_logprob";
  expect(op, "hidden", hidden, {DType::BFloat16}, {kAny, kAny}, Layout::ContiguousRows);
  const int64_t n = hidden.size(0), d = hidden.size(1);
  expect(op, "weight", weight, {DType::BFloat16}, {kAny, d}, Layout::ContiguousRows, &hidden);
  const int64_t v = weight.size(0), columns = linear_logprob_forward_columns(hidden, weight);
  if (columns == 0) {
    fail(op, "hidden", "what linear_logprob_forward_columns accepts", describe(hidden),
         "Use linear_logprob_tile on logits made with a GEMM.");
  }
  expect_optional(op, "bias", bias, {DType::BFloat16}, {v}, Layout::Contiguous, &hidden);
  expect(op, "target", target, {DType::Int64}, {n}, Layout::Contiguous, &hidden);
  expect_transform(op, temperature, softcap);
  expect_optional(op, "exponentials", exponentials, {DType::Float16}, {n, v}, Layout::ContiguousRows, &hidden);
  expect(op, "partials", partials, {DType::Float32}, {with_entropy ? 4 : 3, (v + columns - 1) / columns, n},
         Layout::Contiguous, &hidden);
  expect(op, "stats", stats, {DType::Float32}, {kStatsRows, n}, Layout::Contiguous, &hidden);
  cuda::linear_logprob_forward(hidden, weight, bias, target, vocab_start, temperature, softcap, with_entropy,
                               exponentials, partials, stats);
}

void linear_logprob_exponentials_backward(Tensor exponentials, Tensor tile_max, Tensor target, int64_t vocab_start,
                                          float temperature, float softcap, Tensor logprob, Tensor lse, Tensor entropy,
                                          Tensor grad_logprob, Tensor grad_entropy, Tensor grad_logits) {
  constexpr const char* op = "linear_logprob_backward";
  expect(op, "exponentials", exponentials, {DType::Float16}, {kAny, kAny}, Layout::ContiguousRows);
  if (exponentials.device != Device::CUDA) {
    fail(op, "exponentials", "a CUDA tensor", describe(exponentials), "Only linear_logprob_forward makes them.");
  }
  const int64_t n = expect_tile(op, exponentials, Tensor{}, target, temperature, softcap);
  expect_gradient(op, exponentials, logprob, lse, entropy, grad_logprob, grad_entropy, DType::BFloat16, grad_logits);
  const int64_t tiles = (exponentials.size(1) + cuda::kTileColumns - 1) / cuda::kTileColumns;
  expect(op, "tile_max", tile_max, {DType::Float32}, {tiles, n}, Layout::ContiguousRows, &exponentials);
  cuda::linear_logprob_exponentials_backward(exponentials, tile_max, target, vocab_start, temperature, softcap, logprob,
                                             lse, entropy, grad_logprob, grad_entropy, grad_logits);
}

}  // namespace fastpost
