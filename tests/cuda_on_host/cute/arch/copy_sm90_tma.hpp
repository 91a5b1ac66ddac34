// SPDX-License-Identifier: Apache-2.0
// The copy engine (TMA): boxes of tensors to shared memory, swizzled over 128 bytes; zeros where there is no tensor.
#pragma once

#include <cstring>

#include "cuda.h"
#include "cutlass/arch/barrier.h"

namespace cute {

namespace TMA {
enum class CacheHintSm90 : uint64_t { EVICT_NORMAL = 1 };
}

inline void copy_box(const CUtensorMap& map, uint64_t* barrier, void* shared, const int64_t (&first)[3]) {
  const uintptr_t start = cuda_on_host::shared_address(shared);
  if (start % 1024 != 0) cuda_on_host::fail("a swizzled box begins between multiples of 1024 bytes");
  uintptr_t at = 0;
  for (int64_t z = first[2]; z < first[2] + map.box[2]; ++z) {
    for (int64_t y = first[1]; y < first[1] + map.box[1]; ++y) {
      for (int64_t x = first[0]; x < first[0] + map.box[0]; ++x, at += 2) {
        const bool inside = x >= 0 && x < map.size[0] && y >= 0 && y < map.size[1] && z >= 0 && z < map.size[2];
        uint16_t value = 0;
        if (inside) memcpy(&value, map.data + x * map.bytes[0] + y * map.bytes[1] + z * map.bytes[2], 2);
        memcpy(static_cast<char*>(shared) + (at ^ (at >> 7 & 7) << 4), &value, 2);
      }
    }
  }
  cutlass::arch::ClusterTransactionBarrier::complete(barrier, static_cast<int>(at));
}

struct SM90_TMA_LOAD_2D {
  static void copy(const void* map, uint64_t* barrier, uint64_t, void* shared, int x, int y) {
    copy_box(*static_cast<const CUtensorMap*>(map), barrier, shared, {x, y, 0});
  }
};
struct SM90_TMA_LOAD_3D {
  static void copy(const void* map, uint64_t* barrier, uint64_t, void* shared, int x, int y, int z) {
    copy_box(*static_cast<const CUtensorMap*>(map), barrier, shared, {x, y, z});
  }
};

}  // namespace cute
