// SPDX-License-Identifier: Apache-2.0
// A non-owning view of somebody else's tensor. Shape and strides point into the owner and live as long as the call.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace fastpost {

enum class Device : int8_t { CPU, CUDA, Other };

struct Tensor {
  void* data = nullptr;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // in elements; null means contiguous
  int ndim = -1;                     // -1: None was passed
  DType dtype = DType::Other;
  Device device = Device::CPU;
  int device_index = 0;
  void* stream = nullptr;         // the framework's current stream of a CUDA tensor
  const char* refused = nullptr;  // set when the object is no plain strided tensor; says what it is

  bool defined() const { return ndim >= 0; }
  int64_t size(int i) const { return shape[i]; }
  int64_t stride(int i) const {
    if (strides) return strides[i];
    int64_t s = 1;
    for (int k = ndim - 1; k > i; --k) s *= shape[k];
    return s;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  bool contiguous() const {
    if (numel() == 0) return true;  // whatever its strides say
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride(i) != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
  // First byte of row i of a matrix.
  char* row(int64_t i) const { return ptr<char>() + i * stride(0) * itemsize(dtype); }
};

}  // namespace fastpost
