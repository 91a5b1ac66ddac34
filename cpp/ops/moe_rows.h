// SPDX-License-Identifier: Apache-2.0
// Rows of tokens [T, H] and of slots [T, K, H], which moe_dispatch and moe_combine carry to grouped order and back.
#pragma once

#include <algorithm>

#include "core/check.h"

namespace fastpost {

constexpr std::initializer_list<DType> kMoeFloats = {DType::Float32, DType::BFloat16, DType::Float16, DType::Float64};

constexpr DType wide(DType t) { return t == DType::Float64 ? DType::Float64 : DType::Float32; }

inline void expect_rows(const char* op, const char* name, const Tensor& x, std::initializer_list<DType> dtypes,
                        int64_t t, int64_t k, int64_t h, const Tensor* like = nullptr) {
  if (x.ndim == 3) {
    expect(op, name, x, dtypes, {t, k, h}, Layout::ContiguousRows, like);
  } else {
    expect(op, name, x, dtypes, {t, h}, Layout::ContiguousRows, like);
  }
}

// GPUs have no kernels for float64, which is there to check gradients.
inline void expect_narrow_on_gpu(const char* op, const char* name, const Tensor& x) {
  if (x.device == Device::CUDA) expect_rows(op, name, x, kFloats, kAny, kAny, kAny);
}

// The row of token t, or of its slot k.
inline char* token_row(const Tensor& x, int64_t t, int64_t k) {
  return x.ptr<char>() + (t * x.stride(0) + (x.ndim == 3 ? k * x.stride(1) : 0)) * itemsize(x.dtype);
}

// Rows that a thread should get at least.
inline int64_t row_grain(int64_t row_bytes) { return (64 << 10) / std::max<int64_t>(row_bytes, 1) + 1; }

// The row of x [R, H] that a slot has in grouped order; null for nobody's.
struct RowsOfSlots {
  const Tensor& x;
  const Tensor& place;
  char* operator[](int64_t slot) const {
    const int64_t r = place.ptr<int32_t>()[slot];
    return r < 0 || r >= x.size(0) ? nullptr : x.row(r);
  }
};

// offset[E]: the rows that somebody has.
inline int64_t present_rows(const char* op, const Tensor& offset, int64_t rows) {
  const int64_t present = offset.ptr<int32_t>()[offset.size(0) - 1];
  if (present < 0 || present > rows) {
    fail(op, "offset", "at most " + std::to_string(rows) + " rows (the slots) at its end", std::to_string(present));
  }
  return present;
}

}  // namespace fastpost
