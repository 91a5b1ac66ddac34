// SPDX-License-Identifier: Apache-2.0
// Element types and the one place where a run-time dtype becomes a C++ type.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastpost {

enum class DType : int8_t { Float32, Float64, BFloat16, Float16, Int64, Int32, UInt8, Int8, Bool, Other };

// 16-bit floats as storage. Arithmetic happens in float32; conversion lives in simd.h (host) and vec.cuh (device).
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

constexpr int64_t itemsize(DType t) {
  switch (t) {
    case DType::Float64:
    case DType::Int64: return 8;
    case DType::Float32:
    case DType::Int32: return 4;
    case DType::BFloat16:
    case DType::Float16: return 2;
    default: return 1;
  }
}

constexpr const char* name(DType t) {
  switch (t) {
    case DType::Float32: return "float32";
    case DType::Float64: return "float64";
    case DType::BFloat16: return "bfloat16";
    case DType::Float16: return "float16";
    case DType::Int64: return "int64";
    case DType::Int32: return "int32";
    case DType::UInt8: return "uint8";
    case DType::Int8: return "int8";
    case DType::Bool: return "bool";
    default: return "an unsupported dtype";
  }
}

// Calls f with a value of the C++ type behind t: visit_float(t, [&]<class T>(T) { ... }). Callers check the dtype
// first (check.h), so there is nothing to report here.
template <class F>
decltype(auto) visit_float(DType t, F&& f) {
  switch (t) {
    case DType::BFloat16: return f(bfloat16{});
    case DType::Float16: return f(float16{});
    default: return f(float{});
  }
}

}  // namespace fastpost
