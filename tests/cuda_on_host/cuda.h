// SPDX-License-Identifier: Apache-2.0
// Found before the driver's cuda.h: descriptions of tensors for the copy engine, as cuda/core/tensor_map.cuh makes them.
#pragma once

#include <cstdint>

#include "cuda_runtime.h"

using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_NOT_FOUND = 500 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct CUtensorMap {
  const char* data;
  int rank;
  int64_t size[3], bytes[3], box[3];
};

// Refuses what the driver refuses.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                       const cuuint64_t* size, const cuuint64_t* bytes, const cuuint32_t* box,
                                       const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  *map = {static_cast<const char*>(data), static_cast<int>(rank), {1, 1, 1}, {2, 0, 0}, {1, 1, 1}};
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || rank > 3 || box[0] * 2 > 128) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (size[i] == 0 || size[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (i > 0 && (bytes[i - 1] == 0 || bytes[i - 1] % 16 != 0 || bytes[i - 1] >= uint64_t{1} << 40)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    map->size[i] = static_cast<int64_t>(size[i]);
    map->box[i] = static_cast<int64_t>(box[i]);
    if (i > 0) map->bytes[i] = static_cast<int64_t>(bytes[i - 1]);
  }
  return CUDA_SUCCESS;
}

enum { cudaEnableDefault = 0 };
struct cudaDriverEntryPointQueryResult {};
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, int,
                                                    cudaDriverEntryPointQueryResult*) {
  *found = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  return cudaSuccess;
}
