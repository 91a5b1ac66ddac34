// SPDX-License-Identifier: Apache-2.0
// Argument checks. Every message has four parts: [op] argument: expected X, got Y. What to do.
#pragma once

#include <initializer_list>
#include <string>

#include "core/tensor.h"

namespace fastpost {

constexpr int64_t kAny = -1;  // in a shape: any size

enum class Layout { Contiguous, ContiguousRows, Strided };  // ContiguousRows: last dimension has stride 1

constexpr std::initializer_list<DType> kFloats = {DType::Float32, DType::BFloat16, DType::Float16};

// Throws std::invalid_argument (ValueError in Python).
[[noreturn]] void fail(const char* op, const char* argument, const std::string& expected, const std::string& got,
                       const char* what_to_do = "");

std::string describe(const Tensor& t);  // "bfloat16 [8, 128] on cuda:0"

// One argument: a plain tensor of one of these dtypes, this shape and layout, on the same device as `like` if given.
void expect(const char* op, const char* argument, const Tensor& t, std::initializer_list<DType> dtypes,
            std::initializer_list<int64_t> shape, Layout layout = Layout::Contiguous, const Tensor* like = nullptr);

// The same for an argument that may be None.
inline void expect_optional(const char* op, const char* argument, const Tensor& t, std::initializer_list<DType> dtypes,
                            std::initializer_list<int64_t> shape, Layout layout = Layout::Contiguous,
                            const Tensor* like = nullptr) {
  if (t.defined()) expect(op, argument, t, dtypes, shape, layout, like);
}

// workspace: uint8, with at least so many bytes.
void expect_workspace(const char* op, const Tensor& workspace, int64_t bytes, const Tensor& like);

// Class indices in [0, classes) or ignore_index. Reads the data, so only for CPU tensors.
void expect_targets(const char* op, const Tensor& target, int64_t classes, int64_t ignore_index);

// Bounds of packed sequences [S + 1] int32: ascending from 0 to `tokens`. Reads the data, so only for CPU tensors.
void expect_segments(const char* op, const Tensor& cu_seqlens, int64_t tokens);

// temperature > 0; softcap >= 0, where 0 means off.
void expect_transform(const char* op, float temperature, float softcap);

}  // namespace fastpost
