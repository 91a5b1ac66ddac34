// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ops/int4_gemm_sm90.cu, which needs the hardware's matrix instruction: the same product by loops.
#include "cuda/ops/int4_gemm.cuh"

namespace fastpost::cuda {

void multiply_tiles_sm90(const Stream&, const Tensor& x, const Int4Matrix& w, const Tensor& bias, const Tensor& out) {
  const auto go = [&]<class T>(T) {
    for (int64_t i = 0; i < x.size(0); ++i) {
      for (int64_t n = 0; n < w.n; ++n) {
        float sum = 0;
        for (int64_t k = 0; k < w.k; ++k) {
          const int group = static_cast<int>(k / 32 / w.group_units);
          const uint8_t* block = w.codes + n * w.codes_stride + k / int4::kBlock * int4::kBlockBytes;
          const int code = int4::code_at(block, static_cast<int>(k % int4::kBlock));
          const float weight =
              int4::weight(code, int4_scale(w, int4_scale_bits(w, n, group)), static_cast<int>(int4_zero(w, n, group)));
          sum += to_float(x.ptr<T>()[i * x.stride(0) + k]) * to_float(from_float<T>(weight));
        }
        if (bias.defined()) sum += to_float(bias.ptr<T>()[n]);
        out.ptr<T>()[i * out.stride(0) + n] = from_float<T>(sum);
      }
    }
  };
  x.dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace fastpost::cuda
