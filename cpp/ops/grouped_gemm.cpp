// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>

#include "ops.h"

namespace fastpost {

void grouped_gemm(Tensor, Tensor, int64_t, Tensor, Tensor, Tensor, int64_t, Tensor, Tensor, Tensor) {
  throw std::runtime_error("[grouped_gemm] is being built");
}
void grouped_gemm_activation_backward(Tensor, Tensor, int64_t, Tensor, Tensor, Tensor, int64_t, Tensor, Tensor, Tensor,
                                      Tensor, Tensor) {
  throw std::runtime_error("[grouped_gemm] is being built");
}
void grouped_gemm_weight_gradient(Tensor, Tensor, int64_t, Tensor, Tensor, int64_t, Tensor, Tensor, Tensor, Tensor) {
  throw std::runtime_error("[grouped_gemm] is being built");
}
void grouped_gemm_activate(Tensor, int64_t, Tensor, Tensor, Tensor) {
  throw std::runtime_error("[grouped_gemm] is being built");
}
int64_t grouped_gemm_bytes(Tensor, int64_t, int64_t) { throw std::runtime_error("[grouped_gemm] is being built"); }

}  // namespace fastpost
