// SPDX-License-Identifier: Apache-2.0
// Packed sequences whose bounds were not checked, because the host never sees them: nothing may lead outside [0, tokens].
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastpost::cuda {

__device__ inline int64_t clamped(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

struct Segment {
  int64_t begin, end;
};

__device__ inline Segment segment(const int32_t* cu_seqlens, int64_t i, int64_t tokens) {
  const int64_t begin = clamped(cu_seqlens[i], 0, tokens);
  return {begin, clamped(cu_seqlens[i + 1], begin, tokens)};
}

// The sequence that token t belongs to, or -1: the first whose end lies beyond it, if it has begun.
__device__ inline int64_t segment_of(const int32_t* cu_seqlens, int64_t sequences, int64_t t) {
  int64_t low = 0, high = sequences;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cu_seqlens[middle + 1] <= t) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < sequences && cu_seqlens[low] <= t ? low : -1;
}

}  // namespace fastpost::cuda
