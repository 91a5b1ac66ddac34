// SPDX-License-Identifier: Apache-2.0
// The contract of the core: every op in one page. Each function checks its arguments (throwing std::invalid_argument
// with a readable sentence), then runs on the device of its first tensor. Nothing here allocates: callers pass outputs.
//
// Float tensors are float32, bfloat16 or float16 unless stated; arithmetic and statistics are float32.
// A logit a becomes z = softcap(a + bias) / temperature, softcap(x) = c·tanh(x / c), off when c = 0. Tensors that may be
// absent (None in Python) are marked "?"; `ignored` rows are those with target == ignore_index.
#pragma once

#include <utility>
#include <vector>

#include "core/tensor.h"

namespace fastpost {

// ---- token_logprob: from logits that exist --------------------------------------------------------------------------

// logprob[i] = z[i, target[i]] - lse[i], lse[i] = log Σ_j e^z[i, j], entropy[i] = lse[i] - Σ_j p[i, j]·z[i, j].
// logits [N, V] with contiguous rows, target [N] int64; out: logprob [N], lse [N], entropy? [N], all float32.
// Ignored rows: logprob = 0, entropy = 0, lse = 0.
void token_logprob(Tensor logits, Tensor target, float temperature, float softcap, int64_t ignore_index, Tensor logprob,
                   Tensor lse, Tensor entropy);

// grad_logits = d(Σ_i grad_logprob[i]·logprob[i] + grad_entropy[i]·entropy[i]) / d logits, in the dtype of logits, which
// it may overwrite. Rows that are ignored or have zero gradients become zero without being read. logprob, lse and
// entropy are the forward's results; the target's own column is computed from logprob, so that 1 - p keeps its bits.
void token_logprob_backward(Tensor logits, Tensor target, float temperature, float softcap, int64_t ignore_index,
                            Tensor logprob, Tensor lse, Tensor entropy, Tensor grad_logprob, Tensor grad_entropy,
                            Tensor grad_logits);

// ---- linear_logprob: from logits that come a tile at a time ---------------------------------------------------------
// logits = hidden · weightᵀ never exists as a whole: the caller makes tiles [n, v] that hold rows of N and the vocabulary
// slice [vocab_start, vocab_start + v), with the framework's own GEMM, and these functions do everything between GEMMs.

// Checks the arguments of the whole op, so that a GEMM need not fail first: hidden [N, D] and weight [V, D] of one float
// dtype, any strides; bias? [V] of the same; target [N] int64 in [0, V) or ignore_index (values are read on CPU only).
void linear_logprob_check(Tensor hidden, Tensor weight, Tensor bias, Tensor target, float temperature, float softcap,
                          int64_t ignore_index);

// Folds one tile into stats [5, n] float32: m = max z, how many z equal m, Σ e^(z - m) over the others, Σ e^(z - m)·(z - m)
// if with_entropy, z of the target. (Apart, because 1 + rest loses the rest when p -> 1.) Start from {-inf, 0, 0, 0, 0}.
// bias? [v] is the slice's.
void linear_logprob_tile(Tensor logits, Tensor bias, Tensor target, int64_t vocab_start, float temperature,
                         float softcap, bool with_entropy, Tensor stats);

// stats -> logprob [n], lse [n], entropy? [n], float32.
void linear_logprob_finish(Tensor stats, Tensor logprob, Tensor lse, Tensor entropy);

// As token_logprob_backward, for one tile; grad_logits [n, v] may be the tile itself.
void linear_logprob_tile_backward(Tensor logits, Tensor bias, Tensor target, int64_t vocab_start, float temperature,
                                  float softcap, Tensor logprob, Tensor lse, Tensor entropy, Tensor grad_logprob,
                                  Tensor grad_entropy, Tensor grad_logits);

// Which rows take part: those not ignored and, if gradients are given, with a gradient that is not zero. rows [n] int64
// gets their indices in ascending order, then those of the other rows; count [1] int64 how many take part. target [n],
// grad_logprob? [n], grad_entropy? [n] float32. On a GPU nothing waits for the result.
void linear_logprob_rows(Tensor target, int64_t ignore_index, Tensor grad_logprob, Tensor grad_entropy, Tensor rows,
                         Tensor count);

// The same with the GEMM inside, so that logits never reach memory: CUDA, compute capability 9.0. Columns of one of its
// tiles, or 0 where it cannot run: it takes bfloat16, D a multiple of 8 and rows that start at multiples of 16 bytes.
int64_t linear_logprob_forward_columns(Tensor hidden, Tensor weight);

// linear_logprob_tile for the logits hidden · weightᵀ, which are float32 here. hidden [n, D], weight [v, D].
// exponentials? [n, v] float16, contiguous rows, gets 2^15·e^(z - m) with m the row's maximum in a tile of columns; out
// (workspace, too): partials [with_entropy ? 4 : 3, ⌈v / columns⌉, n] float32, whose first plane holds m.
void linear_logprob_forward(Tensor hidden, Tensor weight, Tensor bias, Tensor target, int64_t vocab_start,
                            float temperature, float softcap, bool with_entropy, Tensor exponentials, Tensor partials,
                            Tensor stats);

// linear_logprob_tile_backward from exponentials [n, v] and tile_max = partials[0] instead of logits; grad_logits
// [n, v] bfloat16 may lie in the same memory. No logit is made again, and p has the relative error of a float16 where p
// from bfloat16 logits has 8·|z| times that. vocab_start is that of the first column, which begins a tile.
void linear_logprob_exponentials_backward(Tensor exponentials, Tensor tile_max, Tensor target, int64_t vocab_start,
                                          float temperature, float softcap, Tensor logprob, Tensor lse, Tensor entropy,
                                          Tensor grad_logprob, Tensor grad_entropy, Tensor grad_logits);

// The same with the GEMM inside, for the CPU: logits never reach memory, and a row's result has the same bits whatever else
// is in the batch. rows? [n] int64 picks rows of hidden [N, D] and target [N]; all per-row results are [n]. bias? is float32.
// weight [V, D] has contiguous rows; workspaces are uint8.

// Whether this CPU is known to be faster so: bfloat16 with AVX512-BF16 (unless it has matrix units, AMX, which only
// torch's GEMM uses), other types with AVX-512 on AMD, where torch's float32 GEMM runs at two thirds of the peak.
bool linear_logprob_fused_preferred(Tensor weight);

// Bytes of workspace of the forward and of the backward (which gradients it makes, and whether it recomputes logits) on
// so many threads; ordered: with an `order`. With less, fewer work; with less than for one, the ops throw.
std::pair<int64_t, int64_t> linear_logprob_fused_bytes(Tensor weight, int64_t rows, bool hidden, bool weights,
                                                       bool recompute, int64_t threads, bool ordered);

// How many of the first `rows` rows can be kept in `budget` bytes, rounded up to whole panels, and the elements (of
// bfloat16 for bfloat16 weights, else float32) that this takes.
std::pair<int64_t, int64_t> linear_logprob_fused_kept(Tensor weight, int64_t rows, int64_t budget);

// The vocabulary is cut into so many blocks, and rows are padded to so many.
std::pair<int64_t, int64_t> linear_logprob_fused_tiles(Tensor weight, int64_t rows);

// hidden · weightᵀ -> stats [5, n] as linear_logprob_tile makes them. kept? holds e^(z - m) of the first kept_rows rows,
// m the maximum of a block of the vocabulary: the backward then makes no logits again. order? [V] int64, a permutation,
// is the order in which vocabulary entries are cut into blocks; target and bias are then in that order, too.
// log_masses? [blocks, padded rows] gets log Σ e^z of each block and row.
void linear_logprob_fused(Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor rows, float temperature,
                          float softcap, bool with_entropy, int64_t kept_rows, Tensor kept, Tensor order,
                          Tensor log_masses, Tensor workspace, Tensor stats);

// grad_hidden? [N, D] (rows that are not picked are left alone), grad_weight? [V, D] in the dtype of hidden, or with
// add_weight float32 and added to; grad_bias? [V] float32, in the order of entries. kept needs softcap = 0 and no
// grad_entropy; place? [n] int64 says which row of the forward each row is, when some have dropped out or moved.
// With the forward's log_masses, tiles are skipped whose probabilities a row can lose without losing more than
// skip_mass in all; dropped? [n + 1] gets what each row lost and the share of tiles that was computed.
void linear_logprob_fused_backward(Tensor hidden, Tensor weight, Tensor bias, Tensor target, Tensor rows,
                                   float temperature, float softcap, Tensor logprob, Tensor lse, Tensor entropy,
                                   Tensor grad_logprob, Tensor grad_entropy, int64_t kept_rows, Tensor kept,
                                   Tensor place, Tensor order, Tensor log_masses, float skip_mass, Tensor dropped,
                                   Tensor workspace, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias,
                                   bool add_weight);

// ---- preference_loss: from token log-probs to a loss ----------------------------------------------------------------

// Sums logprob over the scored tokens (target != ignore_index) of each packed sequence, then evaluates an objective of
// objectives.h (kind, params: core() in python/fastpost/objectives) and its derivative.
// logprob [T], target [T] int64, cu_seqlens [S + 1] int32; reference?, previous?, reward? [S], kl? [] as needs(kind) says;
// out: loss [] (mean over pairs, sequences or tokens; 0 if there are none), losses [S / 2] for pairs, else [S],
// logprob_sum [S], length [S] int32, rewards [S], derivative [S] = d losses / d logprob_sum.
// Floats are float32, or all float64 on the CPU. On a GPU the values of cu_seqlens are not checked but kept within [0, T],
// and an empty sequence has mean 0 where the CPU refuses it.
void preference_loss(Tensor logprob, Tensor target, Tensor cu_seqlens, int64_t ignore_index, int64_t kind,
                     const std::vector<double>& params, Tensor reference, Tensor previous, Tensor reward, Tensor kl,
                     Tensor loss, Tensor losses, Tensor logprob_sum, Tensor length, Tensor rewards, Tensor derivative);

// grad_logprob [T] from grad_loss? [], grad_losses? and grad_logprob_sum? in the shapes of the outputs; 0 where ignored.
void preference_loss_backward(Tensor target, Tensor cu_seqlens, int64_t ignore_index, int64_t kind, Tensor length,
                              Tensor derivative, Tensor grad_loss, Tensor grad_losses, Tensor grad_logprob_sum,
                              Tensor grad_logprob);

// ---- policy_loss: from token log-probs to a policy-gradient loss ------------------------------------------------------

// Σ_i losses[i] / count with losses[i] = Σ weight·(-surrogate(ratio, advantage) + beta·KL) over the scored tokens of
// packed sequence i, as policy_objectives.h says (kind, level, params: core() in python/fastpost/objectives/policy.py).
// logprob [T], target [T] int64, cu_seqlens [S + 1] int32, advantage [S] or [T] (if S = T: one per sequence), old? [T]
// (absent: logprob itself, so every ratio is 1), reference? [T] (needed with beta != 0), num_items? [] replaces count;
// out: loss [], losses [S], length [S] int32, derivative [T] = d losses / d logprob, exactly 0 where a token is ignored,
// clipped or has advantage 0, count [] (scored tokens or sequences, at least 1), metrics [4]: mean KL, shares clipped
// below and above, mean ratio; sums [S, 7] float64 is workspace. Floats are float32, or all float64 on the CPU; on a GPU
// cu_seqlens is treated as in preference_loss.
void policy_loss(Tensor logprob, Tensor target, Tensor cu_seqlens, int64_t ignore_index, int64_t kind, int64_t level,
                 const std::vector<double>& params, Tensor advantage, Tensor old, Tensor reference, Tensor num_items,
                 Tensor loss, Tensor losses, Tensor length, Tensor derivative, Tensor count, Tensor metrics,
                 Tensor sums);

// grad_logprob [T] from grad_loss? [] and grad_losses? [S].
void policy_loss_backward(Tensor cu_seqlens, Tensor derivative, Tensor count, Tensor grad_loss, Tensor grad_losses,
                          Tensor grad_logprob);

// ---- int4_gemm: a product with four-bit weights ------------------------------------------------------------------------
// cpp/int4.h says how W [N, K] lies in codes [N, 64·⌈K/128⌉] uint8 and scales [N, ⌈K/group_size⌉] (any float dtype), with
// zeros? (uint8, the shape of scales) or table? [16] float32. Rows of all of them are contiguous and may be apart, so that a
// slice of rows, or of columns from a multiple of 128 and group_size on, is a view.

// out [M, N] = x [M, K] · Wᵀ + bias? [N]: x, bias and out of one float dtype, sums in float32. Weights are rounded to that
// dtype at most once. activation_bits: 0, or 8 on a CPU: where that is faster, rows of x become int8 with a scale for each 32
// columns (W4A8).
// Workspace: uint8, as many bytes as int4_gemm_bytes says.
void int4_gemm(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size, Tensor bias,
               int64_t activation_bits, Tensor workspace, Tensor out);

// grad_x [M, K] = grad [M, N] · W, from the same bytes.
void int4_gemm_backward(Tensor grad, Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size,
                        Tensor workspace, Tensor grad_x);

// out [N, K] = W in a float dtype.
void int4_gemm_dequantize(Tensor codes, Tensor scales, Tensor zeros, Tensor table, int64_t group_size, Tensor out);

// Whether int4_gemm takes this x, or its backward this grad: always on a CPU. On a GPU what it does not take goes through
// int4_gemm_dequantize and the framework's GEMM, slab by slab.
bool int4_gemm_fits(Tensor x, Tensor codes, Tensor scales, Tensor table, bool backward);

// Workspace of int4_gemm for x [M, K], or of its backward for grad [M, N], on so many threads; none on a GPU.
int64_t int4_gemm_bytes(Tensor x, Tensor codes, int64_t columns, bool backward, int64_t activation_bits,
                        int64_t threads);

// ---- moe_route: which expert works on which token ----------------------------------------------------------------------
// T tokens choose K of E experts each: R = T·K slots, slot t·K + k. In grouped order rows are sorted by expert, then by
// slot. A plan is offset [E + 1] int32 (expert e has rows offset[e] to offset[e + 1]), order [R] int32 (row -> slot) and
// place [T, K] int32 (slot -> row). An expert numbered E stands for "nobody here": such slots have place -1 and come last.

// logits [T, E] float32, bfloat16, float16 or (CPU) float64, contiguous rows. score = softmax over E, or sigmoid; the
// top_k largest of score + correction? [E] float32 are chosen, between equals the lower number. gate = scale·score of the
// chosen, divided by their sum if normalize. out: expert [T, K] int64, the plan, and in float32 (float64): gate [T, K],
// probability [E] = mean over tokens of score (sigmoid: score / its sum), losses [2] = E·Σ_e (share of slots of e)·
// probability[e], and the mean of logsumexp(logits)². A logit of -inf has score 0 and is chosen last. On a CPU rows with
// NaN, +inf or only -inf are refused; on a GPU the token's gates, and all means, become NaN.
// E <= 1024; on a GPU top_k <= 64. workspace: uint8, as many bytes as moe_route_bytes says.
void moe_route(Tensor logits, int64_t top_k, bool sigmoid, bool normalize, float scale, Tensor correction,
               Tensor workspace, Tensor expert, Tensor gate, Tensor offset, Tensor order, Tensor place,
               Tensor probability, Tensor losses);

// grad_logits, in the dtype of logits, from the gradients of gate? [T, K], losses? [2] and probability? [E].
void moe_route_backward(Tensor logits, bool sigmoid, bool normalize, float scale, Tensor expert, Tensor offset,
                        Tensor grad_gate, Tensor grad_losses, Tensor grad_probability, Tensor workspace,
                        Tensor grad_logits);

// The plan of experts chosen elsewhere: expert [T, K] int64 or int32 in [0, experts] (checked on a CPU; on a GPU what is
// outside counts as nobody's).
void moe_route_plan(Tensor expert, int64_t experts, Tensor workspace, Tensor offset, Tensor order, Tensor place);

// Workspace of all three, on so many threads; expert as above.
int64_t moe_route_bytes(Tensor expert, int64_t experts, int64_t threads);

// ---- moe_dispatch: tokens in grouped order -------------------------------------------------------------------------------

// out [R, H] = x [T, H] or [T, K, H]: out[r] is the row of token order[r] / K, or of slot order[r]; 0 from offset[E] on.
// place says what T and K are.
void moe_dispatch(Tensor x, Tensor offset, Tensor order, Tensor place, Tensor out);

// grad_x [T, H] or [T, K, H] from grad_out [R, H], whose rows from offset[E] on are not read.
void moe_dispatch_backward(Tensor grad_out, Tensor place, Tensor grad_x);

// ---- moe_combine: back to tokens -----------------------------------------------------------------------------------------

// out [T, H] = Σ_k gate[t, k]·y[place[t, k]], summed in float32 in the order of k and rounded once; or out [T, K, H], its
// terms. y [R, H]; gate? [T, K] float32 (absent: 1); a place of -1 counts 0.
void moe_combine(Tensor y, Tensor place, Tensor gate, Tensor out);

// grad_y? [R, H] (rows from offset[E] on become 0) and grad_gate? [T, K] float32 from grad_out in the shape of out.
void moe_combine_backward(Tensor grad_out, Tensor y, Tensor place, Tensor offset, Tensor order, Tensor gate,
                          Tensor grad_y, Tensor grad_gate);

// ---- grouped_gemm: a matrix for each expert ------------------------------------------------------------------------------
// Rows r of a plan's grouped order; sums in float32. weight [E, N, K] has stride 1 along K, or along N (a transposed view),
// and experts and rows may be apart. x may lie in grouped order, or with order [R] int32 anywhere: row r is then
// x[order[r] / top_k]. x, weight, bias and outputs share a float dtype. Rows from offset[E] on become 0.
// offset may begin above 0, for some experts of a plan: rows before offset[0] are left as they are, so that calls for the
// first experts, the next, and so on give what one call for all does. Of grad_gate only their own slots are theirs.
// activation: 0 none, 1 swiglu, 2 geglu, 3 geglu with tanh, 4 reglu: act(first half of the columns) · second half.
// workspace: uint8, as many bytes as grouped_gemm_bytes says.

// out [R, N] = x · W_eᵀ + bias? [E, N]; with an activation out [R, N / 2], and pre? [R, N] gets what goes into it.
void grouped_gemm(Tensor x, Tensor order, int64_t top_k, Tensor weight, Tensor offset, Tensor bias, int64_t activation,
                  Tensor workspace, Tensor pre, Tensor out);

// The backward through a second product and the activation before it: with d = grad · W_eᵀ [R, I] (pass the second
// product's weight transposed) and a = activation(pre), grad_pre [R, 2I] = gate·d·da/dpre, activated? [R, I] = gate·a and
// grad_gate? [number of slots] float32 = Σ_i d·a, in the order of slots; gate? [slots] float32 is, too. grad as x above;
// order? is needed with gate. Slots that nobody has get grad_gate 0.
void grouped_gemm_activation_backward(Tensor grad, Tensor order, int64_t top_k, Tensor weight, Tensor offset,
                                      Tensor pre, int64_t activation, Tensor gate, Tensor workspace, Tensor grad_pre,
                                      Tensor activated, Tensor grad_gate);

// grad_weight [E, N, K] = Σ over an expert's rows of grad [.., N] ⊗ x [.., K], and grad_bias? [E, N] = Σ grad, each
// gathered by its own order?; 0 for experts without rows.
void grouped_gemm_weight_gradient(Tensor grad, Tensor grad_order, int64_t grad_top_k, Tensor x, Tensor order,
                                  int64_t top_k, Tensor offset, Tensor workspace, Tensor grad_weight, Tensor grad_bias);

// Elementwise, without a product: out? [R, I] = activation(pre [R, 2I]) and grad_pre? from grad_out? [R, I].
void grouped_gemm_activate(Tensor pre, int64_t activation, Tensor grad_out, Tensor out, Tensor grad_pre);

// Workspace of the first three for R rows, on so many threads.
int64_t grouped_gemm_bytes(Tensor weight, int64_t rows, int64_t threads);

// ---- kv_factorize: keys of few dimensions ----------------------------------------------------------------------------------
// Inference ops from here on: nothing is differentiable. Key and value caches: B rows (sequences), G key heads of d
// dimensions, S tokens, D = G·d.

// gram [B, D, D] float32 = Σ_s keys[b, s] ⊗ keys[b, s] over s < length[b]? int32 (absent: all S), both triangles, sums
// in float32. keys [B, S, D] with stride 1 along D. workspace: uint8, kv_factorize_bytes.
void kv_factorize_gram(Tensor keys, Tensor length, Tensor workspace, Tensor gram);

// u [B, S, r] = keys[b, s] · directions[b] [D, r] float32. u int8 comes with scale [B, S] float32, one a row: u·scale,
// scale = max|row| / 127, rounded half to even; else u has the dtype of keys or float32 and scale is None. Rows from
// length[b]? on become 0 (scale 0).
void kv_factorize_project(Tensor keys, Tensor length, Tensor directions, Tensor workspace, Tensor u, Tensor scale);

// Workspace of both, on so many threads.
int64_t kv_factorize_bytes(Tensor keys, int64_t rank, int64_t threads);

// ---- kv_landmarks: one key for a chunk ---------------------------------------------------------------------------------

// Chunks of `chunk` consecutive tokens of keys [B, G, S, d] (stride 1 along d), C = S / chunk whole ones. Of each:
// landmark [B, G, C, d] = the mean, int8 with scale [B, G, C] float32 (as in kv_factorize_project) or in the dtype of
// keys or float32 with scale None; similarity [B, G, C] float32 = the least cosine between a member and the mean.
// Chunks not wholly below length[b]? int32 get landmark 0, scale 0 and similarity 1.
void kv_landmarks(Tensor keys, Tensor length, int64_t chunk, Tensor landmark, Tensor scale, Tensor similarity);

// ---- kv_select: which chunks a query needs ------------------------------------------------------------------------------

// Row b with query [B, H, d] looks at the landmarks [P, G, C, d] (scale [P, G, C]? as above) of p = source[b]? int32
// (absent: b): p_h = softmax over candidates c of scaling·q_h·landmark_c; a key head's score of c is the largest p_h of
// its H / G query heads; the N of largest score are chosen, the lower chunk of two equal ones. Candidates are the chunks
// c < count[b] int32 that are not in kept [B, G, O]? int32 (-1: nothing).
// resident [B, G, N] int32 says which chunk lies in which slot (-1: none) and is brought up to date: a chunk that stays
// keeps its slot, new ones take the free slots, lower chunks lower slots. Per (b, g): chunks [B, G, N] int32 = the chosen
// in ascending order, then -1; slots [B, G, N] int32 = the slot of each (-1 after the last); fresh [B, G, N] uint8 =
// whether it was not resident before.
void kv_select(Tensor query, Tensor landmark, Tensor scale, Tensor source, Tensor count, Tensor kept, double scaling,
               Tensor workspace, Tensor resident, Tensor chunks, Tensor slots, Tensor fresh);
int64_t kv_select_bytes(Tensor query, Tensor landmark, int64_t threads);

// ---- kv_reconstruct: keys of chunks, out of their factors -----------------------------------------------------------------

// For each j with chunks[b, g, j] = c >= 0 and fresh[b, g, j]? uint8 nonzero (absent: all), and each i of the chunk's rows
// (token s = c·chunk + i, slot = slots[b, g, j]?, absent: j), with p = source[b]? (absent: b):
// keys[b, g, slot, i] = rotate(u[p, s] · basis[p, g], s), u [P, S, r] with scale [P, S]? as in kv_factorize, basis [P, G,
// r, d] float32 or bfloat16. rotate turns dimensions (k, k + w) for k < w by the angle whose cosine and sine are
// cos[s, k], sin[s, k] (cos, sin [1 or P, S', w] in float32 or bfloat16, 2w <= d, the others stay; None: no rotation).
// keys [B, G, M, chunk, d] float32, bfloat16 or float16, any strides but along the last two dimensions.
// With values [P, G, C, chunk, d] (on the CPU even when the rest is on a GPU, then pinned; any strides but along the last
// two), also value_pool[b, g, slot, i] = values[p, g, c, i], times value_scale[p, g, c, i]? float32 where values is int8.
void kv_reconstruct(Tensor u, Tensor scale, Tensor basis, Tensor cos, Tensor sin, Tensor source, Tensor chunks,
                    Tensor slots, Tensor fresh, Tensor values, Tensor value_scale, Tensor workspace, Tensor keys,
                    Tensor value_pool);
int64_t kv_reconstruct_bytes(Tensor u, Tensor basis, int64_t threads);

// ---- paged_attention: queries on keys and values in pages -------------------------------------------------------------------

// T query rows [T, H, d] of B sequences; those of b are cu_seqlens[b] to cu_seqlens[b + 1] (int32 [B + 1]; absent: T = B,
// one each). Row i of n sees the first length[b] - (n - 1 - i) positions (length int32 [B]), the last `window` of them
// if window > 0: out = softmax(scaling·q·k) · v, with softcap·tanh(·/softcap) before the softmax if softcap > 0.
// Query head h uses key head h / (H / G). Position x of sequence b lies in page t = key_table[b, g, x / page] int32
// [B, 1 or G, N], at keys[key_row[b]?, g, t, x mod page]; keys [R, G, P, page, d] and values [R', G, P', page, d] with
// any strides but along the last dimension; key_row? int32 [B] (absent: 0 where R = 1, else b); values the same with
// value_table? (absent: key_table) and value_row?. A page of -1 in either table is not there: its
// positions count but are not seen.
// new_keys?, new_values? [T, G, d] are written first, at the positions of their rows (length counts them).
// The softmax goes on where begun_out? [T, H, d] float32 and begun_lse? [T, H] float32 ended (-inf: nothing yet).
// out [T, H, d] in the dtype of query or float32; lse? [T, H] float32 = log Σ exp. A row that sees nothing: 0 and -inf.
// query, keys, values, new_keys and new_values share float32, bfloat16 or float16. workspace: uint8.
void paged_attention(Tensor query, Tensor keys, Tensor values, Tensor key_table, Tensor value_table, Tensor length,
                     Tensor cu_seqlens, Tensor key_row, Tensor value_row, Tensor new_keys, Tensor new_values,
                     Tensor begun_out, Tensor begun_lse, double scaling, double softcap, int64_t window,
                     Tensor workspace, Tensor out, Tensor lse);
int64_t paged_attention_bytes(Tensor query, Tensor keys, Tensor key_table, int64_t threads);

}  // namespace fastpost
