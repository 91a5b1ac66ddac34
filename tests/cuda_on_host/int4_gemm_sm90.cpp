// SPDX-License-Identifier: Apache-2.0
// Stands in for cuda/ops/int4_gemm_sm90.cu, which needs the hardware's matrix instruction: the same product by loops.
#include "cuda/ops/int4_gemm.cuh"

namespace fastpost::cuda {

namespace {

float weight(const Int4Matrix& w, int64_t n, int64_t k) {
  const int group = static_cast<int>(k / 32 / w.group_units);
  const uint8_t* block = w.codes + n * w.codes_stride + k / int4::kBlock * int4::kBlockBytes;
  return int4::weight(int4::code_at(block, static_cast<int>(k % int4::kBlock)),
                      int4_scale(w, int4_scale_bits(w, n, group)), static_cast<int>(int4_zero(w, n, group)));
}

// out [i, j] = Σ_k x [i, k] · factor(j, k), which is rounded as the tensor cores need it.
template <class F>
void product(const Tensor& x, const Tensor& bias, const Tensor& out, F factor) {
  const auto go = [&]<class T>(T) {
    for (int64_t i = 0; i < x.size(0); ++i) {
      for (int64_t j = 0; j < out.size(1); ++j) {
        float sum = bias.defined() ? to_float(bias.ptr<T>()[j]) : 0.0f;
        for (int64_t k = 0; k < x.size(1); ++k) {
          sum += to_float(x.ptr<T>()[i * x.stride(0) + k]) * to_float(from_float<T>(factor(j, k)));
        }
        out.ptr<T>()[i * out.stride(0) + j] = from_float<T>(sum);
      }
    }
  };
  x.dtype == DType::BFloat16 ? go(bfloat16{}) : go(float16{});
}

}  // namespace

void multiply_tiles_sm90(const Stream&, const Tensor& x, const Int4Matrix& w, const Tensor& bias, const Tensor& out) {
  product(x, bias, out, [&](int64_t n, int64_t k) { return weight(w, n, k); });
}

void multiply_tiles_backward_sm90(const Stream&, const Tensor& grad, const Int4Matrix& w, const Tensor& grad_x) {
  product(grad, Tensor{}, grad_x, [&](int64_t k, int64_t n) { return weight(w, n, k); });
}

}  // namespace fastpost::cuda
