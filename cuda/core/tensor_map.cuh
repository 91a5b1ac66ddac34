// SPDX-License-Identifier: Apache-2.0
// Tensors as the copy engine (TMA) of compute capability 9.0 sees them. The driver makes the description; the core does not
// link the driver, so that it loads where there is none.
#pragma once

#include <cuda.h>

#include "cuda/core/launch.h"

namespace fastpost::cuda {

constexpr int kSwizzledRow = 64;  // elements of 16 bits in the 128 bytes that are swizzled together

// A tensor of kRank dimensions, the first with stride 1, in boxes of [.., box[1], kSwizzledRow]. Strides, in elements, are those
// of the other dimensions. What lies outside reads as zero.
template <int kRank>
CUtensorMap tensor_map(const Stream& stream, DType dtype, const void* data, const int64_t (&sizes)[kRank],
                       const int64_t (&strides)[kRank - 1], const int (&box)[kRank]) {
  static const auto encode = [&] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    stream.check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  CUtensorMap map;
  cuuint64_t size[kRank], bytes[kRank - 1];
  cuuint32_t boxes[kRank], one[kRank];
  for (int i = 0; i < kRank; ++i) {
    size[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    one[i] = 1;
    if (i > 0) bytes[i - 1] = static_cast<cuuint64_t>(strides[i - 1]) * 2;
  }
  const auto type = dtype == DType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult status = encode ? encode(&map, type, kRank, const_cast<void*>(data), size, bytes, boxes, one,
                                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
                                 : CUDA_ERROR_NOT_FOUND;
  stream.check(status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue);
  return map;
}

}  // namespace fastpost::cuda
