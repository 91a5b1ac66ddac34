// SPDX-License-Identifier: Apache-2.0
// The same names as cpp/ops.h, for CUDA tensors whose arguments cpp/ops has already checked. Launches go to the stream
// that travels with the tensors. cuda/no_cuda.cpp stands in for all of them when CUDA is not built.
#pragma once

#include "core/tensor.h"
#include "objectives.h"
#include "policy_objectives.h"

namespace fastpost::cuda {

// Target indices are not read back to be checked (that would stop the host): a row with one out of range gets NaN.
void token_logprob(Tensor logits, Tensor target, float temperature, float softcap, int64_t ignore_index, Tensor logprob,
                   Tensor lse, Tensor entropy);
void token_logprob_backward(Tensor logits, Tensor target, float temperature, float softcap, int64_t ignore_index,
                            Tensor logprob, Tensor lse, Tensor entropy, Tensor grad_logprob, Tensor grad_entropy,
                            Tensor grad_logits);

void linear_logprob_tile(Tensor logits, Tensor bias, Tensor target, int64_t vocab_start, float temperature,
                         float softcap, bool with_entropy, Tensor stats);
void linear_logprob_finish(Tensor stats, Tensor logprob, Tensor lse, Tensor entropy);
void linear_logprob_tile_backward(Tensor logits, Tensor bias, Tensor target, int64_t vocab_start, float temperature,
                                  float softcap, Tensor logprob, Tensor lse, Tensor entropy, Tensor grad_logprob,
                                  Tensor grad_entropy, Tensor grad_logits);

// Columns of one tile, where linear_logprob_forward can run.
constexpr int kTileColumns = 256;
int64_t linear_logprob_forward_columns(Tensor hidden, Tensor weight);
void linear_logprob_forward(Tensor hidden, Tensor weight, Tensor bias, Tensor target, int64_t vocab_start,
                            float temperature, float softcap, bool with_entropy, Tensor exponentials, Tensor partials,
                            Tensor stats);
void linear_logprob_exponentials_backward(Tensor exponentials, Tensor tile_max, Tensor target, int64_t vocab_start,
                                          float temperature, float softcap, Tensor logprob, Tensor lse, Tensor entropy,
                                          Tensor grad_logprob, Tensor grad_entropy, Tensor grad_logits);
void linear_logprob_rows(Tensor target, int64_t ignore_index, Tensor grad_logprob, Tensor grad_entropy, Tensor rows,
                         Tensor count);

// float32 only. cu_seqlens is not read back either: kernels clamp it to [0, T].
void preference_loss(Tensor logprob, Tensor target, Tensor cu_seqlens, int64_t ignore_index, const Objective& objective,
                     Tensor reference, Tensor previous, Tensor reward, Tensor kl, Tensor loss, Tensor losses,
                     Tensor logprob_sum, Tensor length, Tensor rewards, Tensor derivative);
void preference_loss_backward(Tensor target, Tensor cu_seqlens, int64_t ignore_index, Kind kind, Tensor length,
                              Tensor derivative, Tensor grad_loss, Tensor grad_losses, Tensor grad_logprob_sum,
                              Tensor grad_logprob);

// float32 only (sums: float64); cu_seqlens as above.
void policy_loss(Tensor logprob, Tensor target, Tensor cu_seqlens, int64_t ignore_index,
                 const PolicyObjective& objective, Tensor advantage, Tensor old, Tensor reference, Tensor num_items,
                 Tensor loss, Tensor losses, Tensor length, Tensor derivative, Tensor count, Tensor metrics,
                 Tensor sums);
void policy_loss_backward(Tensor cu_seqlens, Tensor derivative, Tensor count, Tensor grad_loss, Tensor grad_losses,
                          Tensor grad_logprob);

// What int4_gemm_fits refuses goes through int4_gemm_dequantize and the framework's GEMM, slab by slab.
bool int4_gemm_fits(Tensor x, Tensor codes, Tensor scales, Tensor table, bool backward);
void int4_gemm(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size, Tensor bias,
               Tensor out);
void int4_gemm_backward(Tensor grad, Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size,
                        Tensor grad_x);
void int4_gemm_dequantize(Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size, Tensor out);

// Values of expert, offset, order and place are not read back either; kernels keep them within bounds.
int64_t moe_route_bytes(Tensor expert, int64_t experts);
void moe_route(Tensor logits, int64_t top_k, bool sigmoid, bool normalize, float scale, Tensor correction,
               Tensor workspace, Tensor expert, Tensor gate, Tensor offset, Tensor order, Tensor place,
               Tensor probability, Tensor losses);
void moe_route_backward(Tensor logits, bool sigmoid, bool normalize, float scale, Tensor expert, Tensor offset,
                        Tensor grad_gate, Tensor grad_losses, Tensor grad_probability, Tensor workspace,
                        Tensor grad_logits);
void moe_route_plan(Tensor expert, int64_t experts, Tensor workspace, Tensor offset, Tensor order, Tensor place);
void moe_dispatch(Tensor x, Tensor offset, Tensor order, Tensor place, Tensor out);
void moe_dispatch_backward(Tensor grad_out, Tensor place, Tensor grad_x);
void moe_combine(Tensor y, Tensor place, Tensor gate, Tensor out);
void moe_combine_backward(Tensor grad_out, Tensor y, Tensor place, Tensor offset, Tensor order, Tensor gate,
                          Tensor grad_y, Tensor grad_gate);

int64_t grouped_gemm_bytes(Tensor weight, int64_t rows);
void grouped_gemm(Tensor x, Tensor order, int64_t top_k, Tensor weight, Tensor offset, Tensor bias, int64_t activation,
                  Tensor workspace, Tensor pre, Tensor out);
void grouped_gemm_activation_backward(Tensor grad, Tensor order, int64_t top_k, Tensor weight, Tensor offset,
                                      Tensor pre, int64_t activation, Tensor gate, Tensor workspace, Tensor grad_pre,
                                      Tensor activated, Tensor grad_gate);
void grouped_gemm_weight_gradient(Tensor grad, Tensor grad_order, int64_t grad_top_k, Tensor x, Tensor order,
                                  int64_t top_k, Tensor offset, Tensor workspace, Tensor grad_weight, Tensor grad_bias);
void grouped_gemm_activate(Tensor pre, int64_t activation, Tensor grad_out, Tensor out, Tensor grad_pre);

// Values of tables, lengths, chunks, slots and sources are not read back; kernels keep them within bounds. Nothing waits for
// the host, and grids depend on shapes alone, so a CUDA graph may hold them.
void kv_factorize_gram(Tensor keys, Tensor length, Tensor workspace, Tensor gram);
void kv_factorize_project(Tensor keys, Tensor length, Tensor directions, Tensor workspace, Tensor u, Tensor scale);
int64_t kv_factorize_bytes(Tensor keys, int64_t rank);
void kv_landmarks(Tensor keys, Tensor length, int64_t chunk, Tensor landmark, Tensor scale, Tensor similarity);
void kv_select(Tensor query, Tensor landmark, Tensor scale, Tensor source, Tensor count, Tensor kept, double scaling,
               Tensor workspace, Tensor resident, Tensor chunks, Tensor slots, Tensor fresh);
int64_t kv_select_bytes(Tensor query, Tensor landmark);
void kv_reconstruct(Tensor u, Tensor scale, Tensor basis, Tensor cos, Tensor sin, Tensor source, Tensor chunks,
                    Tensor slots, Tensor fresh, Tensor values, Tensor value_scale, Tensor workspace, Tensor keys,
                    Tensor value_pool);
int64_t kv_reconstruct_bytes(Tensor u, Tensor basis);
void paged_attention(Tensor query, Tensor keys, Tensor values, Tensor key_table, Tensor value_table, Tensor length,
                     Tensor cu_seqlens, Tensor key_row, Tensor value_row, Tensor new_keys, Tensor new_values,
                     Tensor begun_out, Tensor begun_lse, double scaling, double softcap, int64_t window,
                     Tensor workspace, Tensor out, Tensor lse);
int64_t paged_attention_bytes(Tensor query, Tensor keys, Tensor key_table);

}  // namespace fastpost::cuda
