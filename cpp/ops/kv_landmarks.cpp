// SPDX-License-Identifier: Apache-2.0
// Memory-bound: keys are read once, in the order in which they lie in memory.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/parallel.h"
#include "cuda/ops.h"
#include "ops.h"
#include "ops/kv_landmarks_simd.h"
#include "ops/linear_logprob_fused_simd.h"

namespace fastpost {

void kv_landmarks(Tensor keys, Tensor length, int64_t chunk, Tensor landmark, Tensor scale, Tensor similarity) {
  constexpr const char* op = "kv_landmarks";
  expect(op, "keys", keys, kFloats, {kAny, kAny, kAny, kAny}, Layout::ContiguousRows);
  const int64_t b = keys.size(0), g = keys.size(1), s = keys.size(2), d = keys.size(3);
  if (chunk < 1) fail(op, "chunk", "at least 1", std::to_string(chunk));
  const int64_t chunks = s / chunk;
  expect_optional(op, "length", length, {DType::Int32}, {b}, Layout::Contiguous, &keys);
  if (scale.defined()) {
    expect(op, "landmark", landmark, {DType::Int8}, {b, g, chunks, d}, Layout::Contiguous, &keys);
    expect(op, "scale", scale, {DType::Float32}, {b, g, chunks}, Layout::Contiguous, &keys);
  } else {
    expect(op, "landmark", landmark, {keys.dtype, DType::Float32}, {b, g, chunks, d}, Layout::Contiguous, &keys);
  }
  expect(op, "similarity", similarity, {DType::Float32}, {b, g, chunks}, Layout::Contiguous, &keys);
  if (keys.device == Device::CUDA) return cuda::kv_landmarks(keys, length, chunk, landmark, scale, similarity);
  for (int64_t i = 0; length.defined() && i < b; ++i) {
    const int32_t n = length.ptr<int32_t>()[i];
    if (n < 0 || n > s) {
      fail(op, "length", "numbers in [0, " + std::to_string(s) + "] (the tokens of keys)", std::to_string(n));
    }
  }

  const int64_t size = itemsize(keys.dtype), row_bytes = keys.stride(2) * size;
  const bool heads_inside = keys.stride(1) < keys.stride(2);  // a view of [B, S, G, d], as transformers has them
  const int64_t grain = (64 << 10) / std::max<int64_t>(1, chunk * d * size) + 1;
  parallel_for(b * g * chunks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> mean(d);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t i = unit / (g * chunks), in = unit % (g * chunks);
      const int64_t head = heads_inside ? in % g : in / chunks, c = heads_inside ? in / g : in % chunks;
      const int64_t at = (i * g + head) * chunks + c;
      char* out = landmark.ptr<char>() + at * d * itemsize(landmark.dtype);
      if (length.defined() && (c + 1) * chunk > length.ptr<int32_t>()[i]) {
        std::memset(out, 0, d * itemsize(landmark.dtype));
        if (scale.defined()) scale.ptr<float>()[at] = 0;
        similarity.ptr<float>()[at] = 1;
        continue;
      }
      const char* first =
          keys.ptr<char>() + (i * keys.stride(0) + head * keys.stride(1) + c * chunk * keys.stride(2)) * size;
      similarity.ptr<float>()[at] = landmark_kernels().mean(keys.dtype, first, row_bytes, chunk, d, mean.data());
      if (scale.defined()) {
        scale.ptr<float>()[at] = landmark_kernels().quantize(mean.data(), d, reinterpret_cast<int8_t*>(out));
      } else {
        fused_kernels().convert(mean.data(), landmark.dtype, out, d);
      }
    }
  });
}

}  // namespace fastpost
