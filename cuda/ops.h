// SPDX-License-Identifier: Apache-2.0
// The same names as cpp/ops.h, for CUDA tensors whose arguments cpp/ops has already checked. Launches go to the stream
// that travels with the tensors. cuda/no_cuda.cpp stands in for all of them when CUDA is not built.
#pragma once

#include "core/tensor.h"

namespace fastpost::cuda {

// Target indices are not read back to be checked (that would stop the host): a row with one out of range gets NaN.
void token_logprob(Tensor logits, Tensor target, float temperature, float softcap, int64_t ignore_index,
                   Tensor logprob, Tensor lse, Tensor entropy);
void token_logprob_backward(Tensor logits, Tensor target, float temperature, float softcap, int64_t ignore_index,
                            Tensor lse, Tensor entropy, Tensor grad_logprob, Tensor grad_entropy, Tensor grad_logits);

void linear_logprob_tile(Tensor logits, Tensor bias, Tensor target, int64_t vocab_start, float temperature,
                         float softcap, bool with_entropy, Tensor stats);
void linear_logprob_finish(Tensor stats, Tensor logprob, Tensor lse, Tensor entropy);
void linear_logprob_tile_backward(Tensor logits, Tensor bias, Tensor target, int64_t vocab_start, float temperature,
                                  float softcap, Tensor lse, Tensor entropy, Tensor grad_logprob, Tensor grad_entropy,
                                  Tensor grad_logits);

}  // namespace fastpost::cuda
