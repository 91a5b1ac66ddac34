// SPDX-License-Identifier: Apache-2.0
// Compiled instead of cuda/ops/*.cu when CUDA is off, so that callers need no #ifdef.
#include <stdexcept>
#include <string>

#include "cuda/ops.h"

namespace fastpost::cuda {
namespace {

[[noreturn]] void no_cuda(const char* op) {
  throw std::runtime_error(
      "[" + std::string(op) +
      "] got a CUDA tensor, but this fastpost was built without CUDA. Move the tensors to the CPU, or rebuild on "
      "a machine with nvcc: FASTPOST_CUDA=ON pip install .");
}

}  // namespace

void token_logprob(Tensor, Tensor, float, float, int64_t, Tensor, Tensor, Tensor) { no_cuda("token_logprob"); }
void token_logprob_backward(Tensor, Tensor, float, float, int64_t, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) {
  no_cuda("token_logprob");
}
void linear_logprob_tile(Tensor, Tensor, Tensor, int64_t, float, float, bool, Tensor) { no_cuda("linear_logprob"); }
void linear_logprob_finish(Tensor, Tensor, Tensor, Tensor) { no_cuda("linear_logprob"); }
void linear_logprob_tile_backward(Tensor, Tensor, Tensor, int64_t, float, float, Tensor, Tensor, Tensor, Tensor, Tensor,
                                  Tensor) {
  no_cuda("linear_logprob");
}
int64_t linear_logprob_forward_columns(Tensor, Tensor) { no_cuda("linear_logprob"); }
void linear_logprob_forward(Tensor, Tensor, Tensor, Tensor, int64_t, float, float, bool, Tensor, Tensor, Tensor) {
  no_cuda("linear_logprob");
}
void linear_logprob_exponentials_backward(Tensor, Tensor, Tensor, int64_t, float, float, Tensor, Tensor, Tensor, Tensor,
                                          Tensor, Tensor) {
  no_cuda("linear_logprob");
}
void linear_logprob_rows(Tensor, int64_t, Tensor, Tensor, Tensor, Tensor) { no_cuda("linear_logprob"); }

void preference_loss(Tensor, Tensor, Tensor, int64_t, const Objective&, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                     Tensor, Tensor, Tensor, Tensor) {
  no_cuda("preference_loss");
}
void preference_loss_backward(Tensor, Tensor, int64_t, Kind, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) {
  no_cuda("preference_loss");
}

void policy_loss(Tensor, Tensor, Tensor, int64_t, const PolicyObjective&, Tensor, Tensor, Tensor, Tensor, Tensor,
                 Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) {
  no_cuda("policy_loss");
}
void policy_loss_backward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) { no_cuda("policy_loss"); }

bool int4_gemm_fits(Tensor, Tensor, Tensor, Tensor, bool) { no_cuda("int4_gemm"); }
void int4_gemm(Tensor, Tensor, Tensor, Tensor, Tensor, int64_t, Tensor, Tensor) { no_cuda("int4_gemm"); }
void int4_gemm_backward(Tensor, Tensor, Tensor, Tensor, Tensor, int64_t, Tensor) { no_cuda("int4_gemm"); }
void int4_gemm_dequantize(Tensor, Tensor, Tensor, Tensor, int64_t, Tensor) { no_cuda("int4_gemm"); }

int64_t moe_route_bytes(Tensor, int64_t) { no_cuda("moe_route"); }
int64_t grouped_gemm_bytes(Tensor, int64_t) { no_cuda("grouped_gemm"); }
void moe_route(Tensor, int64_t, bool, bool, float, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
               Tensor) {
  no_cuda("moe_route");
}
void moe_route_backward(Tensor, bool, bool, float, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) {
  no_cuda("moe_route");
}
void moe_route_plan(Tensor, int64_t, Tensor, Tensor, Tensor, Tensor) { no_cuda("moe_route"); }
void moe_dispatch(Tensor, Tensor, Tensor, Tensor, Tensor) { no_cuda("moe_dispatch"); }
void moe_dispatch_backward(Tensor, Tensor, Tensor) { no_cuda("moe_dispatch"); }
void moe_combine(Tensor, Tensor, Tensor, Tensor) { no_cuda("moe_combine"); }
void moe_combine_backward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) { no_cuda("moe_combine"); }
void grouped_gemm(Tensor, Tensor, int64_t, Tensor, Tensor, Tensor, int64_t, Tensor, Tensor, Tensor) {
  no_cuda("grouped_gemm");
}
void grouped_gemm_activation_backward(Tensor, Tensor, int64_t, Tensor, Tensor, Tensor, int64_t, Tensor, Tensor, Tensor,
                                      Tensor, Tensor) {
  no_cuda("grouped_gemm");
}
void grouped_gemm_weight_gradient(Tensor, Tensor, int64_t, Tensor, Tensor, int64_t, Tensor, Tensor, Tensor, Tensor) {
  no_cuda("grouped_gemm");
}
void grouped_gemm_activate(Tensor, int64_t, Tensor, Tensor, Tensor) { no_cuda("grouped_gemm"); }

void kv_factorize_gram(Tensor, Tensor, Tensor, Tensor) { no_cuda("kv_factorize"); }
void kv_factorize_project(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) { no_cuda("kv_factorize"); }
int64_t kv_factorize_bytes(Tensor, int64_t) { no_cuda("kv_factorize"); }
void kv_landmarks(Tensor, Tensor, int64_t, Tensor, Tensor, Tensor) { no_cuda("kv_landmarks"); }
void kv_select(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, double, Tensor, Tensor, Tensor, Tensor, Tensor) {
  no_cuda("kv_select");
}
int64_t kv_select_bytes(Tensor, Tensor) { no_cuda("kv_select"); }
void kv_reconstruct(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                    Tensor, Tensor) {
  no_cuda("kv_reconstruct");
}
int64_t kv_reconstruct_bytes(Tensor, Tensor) { no_cuda("kv_reconstruct"); }
void paged_attention(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                     Tensor, double, double, int64_t, Tensor, Tensor, Tensor) {
  no_cuda("paged_attention");
}
int64_t paged_attention_bytes(Tensor, Tensor, Tensor) { no_cuda("paged_attention"); }

}  // namespace fastpost::cuda
