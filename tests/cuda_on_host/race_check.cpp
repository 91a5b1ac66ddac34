// SPDX-License-Identifier: Apache-2.0
// Runs every kernel under ThreadSanitizer, once as it is and once without its n-th __syncthreads for each n, and prints
// a line "KERNEL N RACES" for each run; N is -1 when nothing was left out.
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "cuda/ops.h"
#include "cuda_runtime.h"

namespace {

using fastpost::DType;
using fastpost::Tensor;
namespace cuda = fastpost::cuda;

constexpr int64_t kRows = 2, kColumns = 2500, kTokens = 700, kSequences = 2;
constexpr int64_t kMatrix[] = {kRows, kColumns}, kRow[] = {kRows}, kStats[] = {5, kRows}, kToken[] = {kTokens},
                  kSequence[] = {kSequences}, kBounds[] = {kSequences + 1}, kPair[] = {1}, kMetrics[] = {4},
                  kSums[] = {kSequences, 7}, kHidden[] = {kRows, 8}, kWeight[] = {300, 8}, kPartials[] = {4, 2, kRows},
                  kTileMax[] = {2, kRows}, kExponentials[] = {kRows, 300}, kMany[] = {2500};
// A router: more tokens than one block has, fewer experts than lanes.
constexpr int64_t kLogits[] = {70, 5}, kExperts[] = {5}, kChosen[] = {70, 2}, kOffset[] = {6}, kSlots[] = {140},
                  kSlotRows[] = {140, 24}, kTokenRows[] = {70, 24}, kSpace[] = {4096};

template <class T, int N>
Tensor view(std::vector<T>& data, const int64_t (&shape)[N], DType dtype) {
  Tensor t;
  t.data = data.data();
  t.shape = shape;
  t.ndim = N;
  t.dtype = dtype;
  return t;
}

struct Buffers {
  std::vector<uint16_t> logits = std::vector<uint16_t>(kRows * kColumns);
  std::vector<float> a = std::vector<float>(kTokens, 0.5f), b = a, c = a, d = a, e = a, f = a, g = a;
  std::vector<int64_t> target = std::vector<int64_t>(kTokens, 1234);
  std::vector<int32_t> bounds = {0, 300, 700}, length = {300, 400};
  Buffers() {
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<uint16_t>(0x3f80 + i % 97);  // bfloat16 near 1
  }
  Tensor matrix() { return view(logits, kMatrix, DType::BFloat16); }
  template <int N>
  Tensor floats(std::vector<float>& data, const int64_t (&shape)[N]) {
    return view(data, shape, DType::Float32);
  }
  template <int N>
  Tensor targets(const int64_t (&shape)[N]) {
    return view(target, shape, DType::Int64);
  }
};

void token_logprob(Buffers& x) {
  cuda::token_logprob(x.matrix(), x.targets(kRow), 1.0f, 30.0f, -100, x.floats(x.a, kRow), x.floats(x.b, kRow),
                      x.floats(x.c, kRow));
}
void token_logprob_backward(Buffers& x) {  // in place
  cuda::token_logprob_backward(x.matrix(), x.targets(kRow), 1.0f, 30.0f, -100, x.floats(x.a, kRow), x.floats(x.b, kRow),
                               x.floats(x.c, kRow), x.floats(x.d, kRow), x.floats(x.e, kRow), x.matrix());
}
void linear_logprob_tile(Buffers& x) {
  cuda::linear_logprob_tile(x.matrix(), Tensor{}, x.targets(kRow), 1000, 1.0f, 0.0f, true, x.floats(x.a, kStats));
}
void linear_logprob_finish(Buffers& x) {
  cuda::linear_logprob_finish(x.floats(x.a, kStats), x.floats(x.b, kRow), x.floats(x.c, kRow), x.floats(x.d, kRow));
}
void linear_logprob_tile_backward(Buffers& x) {
  cuda::linear_logprob_tile_backward(x.matrix(), Tensor{}, x.targets(kRow), 1000, 1.0f, 30.0f, x.floats(x.a, kRow),
                                     x.floats(x.b, kRow), x.floats(x.c, kRow), x.floats(x.d, kRow), x.floats(x.e, kRow),
                                     x.matrix());
}
void linear_logprob_forward(Buffers& x) {
  std::vector<uint16_t> weight(x.logits), exponentials(x.logits);
  cuda::linear_logprob_forward(view(x.logits, kHidden, DType::BFloat16), view(weight, kWeight, DType::BFloat16),
                               Tensor{}, x.targets(kRow), 1000, 1.0f, 30.0f, true,
                               view(exponentials, kExponentials, DType::Float16), x.floats(x.a, kPartials),
                               x.floats(x.b, kStats));
}
void linear_logprob_exponentials_backward(Buffers& x) {  // in place
  const Tensor tile = view(x.logits, kExponentials, DType::BFloat16);
  cuda::linear_logprob_exponentials_backward(
      view(x.logits, kExponentials, DType::Float16), x.floats(x.a, kTileMax), x.targets(kRow), 1000, 1.0f, 30.0f,
      x.floats(x.b, kRow), x.floats(x.c, kRow), x.floats(x.d, kRow), x.floats(x.e, kRow), x.floats(x.f, kRow), tile);
}
void linear_logprob_rows(Buffers&) {
  std::vector<int64_t> target(kMany[0], 1), rows(target), count(1);
  cuda::linear_logprob_rows(view(target, kMany, DType::Int64), -100, Tensor{}, Tensor{},
                            view(rows, kMany, DType::Int64), view(count, kPair, DType::Int64));
}
void preference_loss(Buffers& x) {
  const fastpost::Objective dpo{fastpost::Kind::dpo_sigmoid, {0.1}};
  std::vector<float> loss(1), losses(1);
  Tensor scalar = view(loss, kPair, DType::Float32);
  scalar.ndim = 0;
  cuda::preference_loss(x.floats(x.a, kToken), x.targets(kToken), view(x.bounds, kBounds, DType::Int32), -100, dpo,
                        x.floats(x.b, kSequence), Tensor{}, Tensor{}, Tensor{}, scalar,
                        view(losses, kPair, DType::Float32), x.floats(x.d, kSequence),
                        view(x.length, kSequence, DType::Int32), x.floats(x.e, kSequence), x.floats(x.f, kSequence));
}
void preference_loss_backward(Buffers& x) {
  std::vector<float> one(1, 1.0f);
  Tensor scalar = view(one, kPair, DType::Float32);
  scalar.ndim = 0;
  cuda::preference_loss_backward(x.targets(kToken), view(x.bounds, kBounds, DType::Int32), -100, fastpost::Kind::sft,
                                 view(x.length, kSequence, DType::Int32), x.floats(x.a, kSequence), scalar, Tensor{},
                                 x.floats(x.b, kSequence), x.floats(x.c, kToken));
}
void policy_loss(Buffers& x) {  // sequence level: two sums over the block
  const fastpost::PolicyObjective gspo{fastpost::PolicyKind::grpo, fastpost::RatioLevel::sequence, 0.2, 0.2, 0, 0.1, 1};
  std::vector<float> loss(1), count(1), metrics(4);
  std::vector<double> sums(7 * kSequences);
  Tensor of_loss = view(loss, kPair, DType::Float32), of_count = view(count, kPair, DType::Float32);
  of_loss.ndim = of_count.ndim = 0;
  cuda::policy_loss(x.floats(x.a, kToken), x.targets(kToken), view(x.bounds, kBounds, DType::Int32), -100, gspo,
                    x.floats(x.b, kSequence), x.floats(x.c, kToken), x.floats(x.d, kToken), Tensor{}, of_loss,
                    x.floats(x.e, kSequence), view(x.length, kSequence, DType::Int32), x.floats(x.f, kToken), of_count,
                    view(metrics, kMetrics, DType::Float32), view(sums, kSums, DType::Float64));
}
void policy_loss_backward(Buffers& x) {
  std::vector<float> one(1, 1.0f);
  Tensor scalar = view(one, kPair, DType::Float32);
  scalar.ndim = 0;
  cuda::policy_loss_backward(view(x.bounds, kBounds, DType::Int32), x.floats(x.a, kToken), scalar, scalar,
                             x.floats(x.b, kSequence), x.floats(x.c, kToken));
}

struct Router {
  std::vector<float> logits = std::vector<float>(70 * 5), grad_logits = logits, gate = std::vector<float>(140, 0.5f);
  std::vector<float> probability = std::vector<float>(5), losses = std::vector<float>(2);
  std::vector<float> tokens = std::vector<float>(70 * 24, 1.0f), rows = std::vector<float>(140 * 24, 1.0f), grad = rows;
  std::vector<int64_t> expert = std::vector<int64_t>(140);
  std::vector<int32_t> offset = {0, 28, 56, 84, 112, 140}, order = std::vector<int32_t>(140), place = order;
  std::vector<uint8_t> space = std::vector<uint8_t>(kSpace[0]);
  Router() {
    for (int i = 0; i < 140; ++i) expert[i] = i % 5, order[i] = place[i] = i;
  }
  Tensor view_logits() { return view(logits, kLogits, DType::Float32); }
  Tensor view_gate() { return view(gate, kChosen, DType::Float32); }
  Tensor view_expert() { return view(expert, kChosen, DType::Int64); }
  Tensor view_offset() { return view(offset, kOffset, DType::Int32); }
  Tensor view_order() { return view(order, kSlots, DType::Int32); }
  Tensor view_place() { return view(place, kChosen, DType::Int32); }
  Tensor view_space() { return view(space, kSpace, DType::UInt8); }
  Tensor view_tokens() { return view(tokens, kTokenRows, DType::Float32); }
  Tensor view_rows() { return view(rows, kSlotRows, DType::Float32); }
};
void moe_route(Buffers&) {
  Router x;
  cuda::moe_route(x.view_logits(), 2, false, true, 1.0f, Tensor{}, x.view_space(), x.view_expert(), x.view_gate(),
                  x.view_offset(), x.view_order(), x.view_place(), view(x.probability, kExperts, DType::Float32),
                  view(x.losses, kPair, DType::Float32));
}
void moe_route_backward(Buffers&) {
  Router x;
  cuda::moe_route_backward(x.view_logits(), true, true, 1.0f, x.view_expert(), x.view_offset(), x.view_gate(),
                           view(x.losses, kPair, DType::Float32), view(x.probability, kExperts, DType::Float32),
                           Tensor{}, view(x.grad_logits, kLogits, DType::Float32));
}
void moe_route_plan(Buffers&) {
  Router x;
  cuda::moe_route_plan(x.view_expert(), 5, x.view_space(), x.view_offset(), x.view_order(), x.view_place());
}
void moe_dispatch(Buffers&) {
  Router x;
  cuda::moe_dispatch(x.view_tokens(), x.view_offset(), x.view_order(), x.view_place(), x.view_rows());
}
void moe_dispatch_backward(Buffers&) {
  Router x;
  cuda::moe_dispatch_backward(x.view_rows(), x.view_place(), x.view_tokens());
}
void moe_combine(Buffers&) {
  Router x;
  cuda::moe_combine(x.view_rows(), x.view_place(), x.view_gate(), x.view_tokens());
}
void moe_combine_backward(Buffers&) {
  Router x;
  std::vector<float> grad_gate(140);
  cuda::moe_combine_backward(x.view_tokens(), x.view_rows(), x.view_place(), x.view_offset(), x.view_order(),
                             x.view_gate(), view(x.grad, kSlotRows, DType::Float32),
                             view(grad_gate, kChosen, DType::Float32));
}

// One expert with 40 rows, one tile, and as few columns as make a step.
struct Grouped {
  static constexpr int64_t kX[] = {40, 16}, kW[] = {1, 16, 16}, kOut[] = {40, 16}, kOffset[] = {2}, kOrder[] = {40};
  std::vector<float> x = std::vector<float>(40 * 16, 0.5f), weight = x, out = x;
  std::vector<uint16_t> x_half = std::vector<uint16_t>(40 * 16, 0x3f80), weight_half = x_half, out_half = x_half;
  std::vector<int32_t> offset = {0, 40}, order = std::vector<int32_t>(40, 3);
  Tensor offsets() { return view(offset, kOffset, DType::Int32); }
  Tensor orders() { return view(order, kOrder, DType::Int32); }
};
void grouped_gemm(Buffers&) {
  Grouped g;
  cuda::grouped_gemm(view(g.x, Grouped::kX, DType::Float32), g.orders(), 1, view(g.weight, Grouped::kW, DType::Float32),
                     g.offsets(), Tensor{}, 0, Tensor{}, Tensor{}, view(g.out, Grouped::kOut, DType::Float32));
}
void grouped_gemm_half(Buffers&) {
  Grouped g;
  cuda::grouped_gemm(view(g.x_half, Grouped::kX, DType::BFloat16), g.orders(), 1,
                     view(g.weight_half, Grouped::kW, DType::BFloat16), g.offsets(), Tensor{}, 0, Tensor{}, Tensor{},
                     view(g.out_half, Grouped::kOut, DType::BFloat16));
}
void grouped_gemm_weight_gradient(Buffers&) {
  Grouped g;
  cuda::grouped_gemm_weight_gradient(view(g.out_half, Grouped::kOut, DType::BFloat16), Tensor{}, 1,
                                     view(g.x_half, Grouped::kX, DType::BFloat16), g.orders(), 1, g.offsets(), Tensor{},
                                     view(g.weight_half, Grouped::kW, DType::BFloat16), Tensor{});
}

// The last token of 132, in two splits, or the last five: rows of two warps, and three steps of all positions where a step has
// 64, otherwise two of a window.
struct Paged {
  static constexpr int64_t kRows = 5, kPool[] = {1, 1, 9, 16, 8}, kPrompt[] = {kRows, 4, 8}, kToken[] = {1, 4, 8},
                           kNew[] = {kRows, 1, 8}, kNewToken[] = {1, 1, 8}, kTable[] = {1, 1, 9}, kSpace[] = {4096};
  std::vector<float> keys = std::vector<float>(9 * 16 * 8, 0.5f), values = keys, query = keys, out = keys, fresh = keys;
  std::vector<uint16_t> half_keys = std::vector<uint16_t>(9 * 16 * 8, 0x3f80), half_values = half_keys,
                        half_query = half_keys, half_out = half_keys, half_fresh = half_keys;
  std::vector<uint8_t> space = std::vector<uint8_t>(kSpace[0]);
  std::vector<int32_t> table = {0, 1, 2, 3, 4, 5, 6, 7, 8}, length = {132}, bounds = {0, kRows};
  template <class V>
  void run(bool prompt, DType dtype, V& q, V& k, V& v, V& n, V& o) {
    const auto rows = [&](V& data) { return prompt ? view(data, kPrompt, dtype) : view(data, kToken, dtype); };
    const Tensor fresh_rows = prompt ? view(n, kNew, dtype) : view(n, kNewToken, dtype);
    cuda::paged_attention(rows(q), view(k, kPool, dtype), view(v, kPool, dtype), view(table, kTable, DType::Int32),
                          Tensor{}, view(length, kPair, DType::Int32),
                          prompt ? view(bounds, kRow, DType::Int32) : Tensor{}, Tensor{}, Tensor{}, fresh_rows,
                          fresh_rows, Tensor{}, Tensor{}, 0.125, 0.0, prompt && dtype != DType::Float32 ? 0 : 40,
                          view(space, kSpace, DType::UInt8), rows(o), Tensor{});
  }
};
template <bool kPrompt>
void paged_attention(Buffers&) {
  Paged p;
  p.run(kPrompt, DType::Float32, p.query, p.keys, p.values, p.fresh, p.out);
}
template <bool kPrompt>
void paged_attention_half(Buffers&) {
  Paged p;
  p.run(kPrompt, DType::BFloat16, p.half_query, p.half_keys, p.half_values, p.half_fresh, p.half_out);
}
void kv_select(Buffers&) {  // among equal chunks, and all of them
  static constexpr int64_t kQuery[] = {1, 2, 16}, kLandmark[] = {1, 1, 70, 16}, kCount[] = {1}, kKept[] = {1, 1, 2},
                           kBytes[] = {4096}, kFew[] = {1, 1, 9}, kAll[] = {1, 1, 80};
  std::vector<float> query(2 * 16, 0.5f), landmark(70 * 16, 1.0f);
  std::vector<int32_t> count = {70}, kept = {3, 65}, resident(80, 5), chunks(80), slots(80);
  std::vector<uint8_t> fresh(80), space(kBytes[0]);
  for (int i = 0; i < 80; ++i) resident[i] = i / 2;
  const auto choose = [&](auto& shape) {
    cuda::kv_select(view(query, kQuery, DType::Float32), view(landmark, kLandmark, DType::Float32), Tensor{}, Tensor{},
                    view(count, kCount, DType::Int32), view(kept, kKept, DType::Int32), 0.25,
                    view(space, kBytes, DType::UInt8), view(resident, shape, DType::Int32),
                    view(chunks, shape, DType::Int32), view(slots, shape, DType::Int32),
                    view(fresh, shape, DType::UInt8));
  };
  choose(kFew);
  choose(kAll);
}

// Keys of 24 tokens, two key heads of 8, rank 8; chunks of 8. Half: bfloat16, by matrix instructions.
struct Factors {
  static constexpr int64_t kKeys[] = {1, 24, 16}, kGram[] = {1, 16, 16}, kDirections[] = {1, 16, 8}, kU[] = {1, 24, 8},
                           kScale[] = {1, 24}, kSpace[] = {1 << 18}, kHeads[] = {1, 2, 24, 8}, kChunks[] = {1, 2, 3},
                           kThrees[] = {1, 2, 3, 8}, kSixes[] = {1, 2, 6, 8}, kOfSixes[] = {1, 2, 6},
                           kSlots[] = {1, 2, 3}, kBasis[] = {1, 2, 8, 8}, kTable[] = {1, 24, 4},
                           kPool[] = {1, 2, 3, 8, 8};
  std::vector<float> keys = std::vector<float>(24 * 16, 0.5f), gram = keys, directions = keys, scale = keys,
                     basis = keys, table = keys, pool = std::vector<float>(2 * 3 * 64), values = pool;
  std::vector<uint16_t> half_keys = std::vector<uint16_t>(24 * 16, 0x3f80), half_pool = half_keys,
                        half_values = half_keys;
  std::vector<uint8_t> u = std::vector<uint8_t>(24 * 16, 3), space = std::vector<uint8_t>(kSpace[0]);
  std::vector<int32_t> chunks = {0, 1, 2, 0, 1, 2};

  Tensor floats(std::vector<float>& data, auto& shape) { return view(data, shape, DType::Float32); }
  Tensor halves(std::vector<uint16_t>& data, auto& shape) { return view(data, shape, DType::BFloat16); }
  Tensor view_u(auto& shape) { return view(u, shape, DType::Int8); }
  Tensor view_space() { return view(space, kSpace, DType::UInt8); }
  void gram_of(Tensor k) { cuda::kv_factorize_gram(k, Tensor{}, view_space(), floats(gram, kGram)); }
  void project(Tensor k) {
    cuda::kv_factorize_project(k, Tensor{}, floats(directions, kDirections), view_space(), view_u(kU),
                               floats(scale, kScale));
  }
  void reconstruct(Tensor v, Tensor keys_out, Tensor pool_out) {
    cuda::kv_reconstruct(view_u(kU), floats(scale, kScale), floats(basis, kBasis), floats(table, kTable),
                         floats(table, kTable), Tensor{}, view(chunks, kSlots, DType::Int32), Tensor{}, Tensor{}, v,
                         Tensor{}, Tensor{}, keys_out, pool_out);
  }
};
void kv_factorize_gram(Buffers&) {
  Factors f;
  f.gram_of(f.floats(f.keys, Factors::kKeys));
}
void kv_factorize_gram_half(Buffers&) {
  Factors f;
  f.gram_of(f.halves(f.half_keys, Factors::kKeys));
}
void kv_factorize_project(Buffers&) {
  Factors f;
  f.project(f.floats(f.keys, Factors::kKeys));
}
void kv_factorize_project_half(Buffers&) {
  Factors f;
  f.project(f.halves(f.half_keys, Factors::kKeys));
}
void kv_landmarks(Buffers&) {  // by either kernel
  Factors f;
  cuda::kv_landmarks(f.halves(f.half_keys, Factors::kHeads), Tensor{}, 8, f.view_u(Factors::kThrees),
                     f.floats(f.scale, Factors::kChunks), f.floats(f.gram, Factors::kChunks));
  cuda::kv_landmarks(f.halves(f.half_keys, Factors::kHeads), Tensor{}, 4, f.view_u(Factors::kSixes),
                     f.floats(f.scale, Factors::kOfSixes), f.floats(f.gram, Factors::kOfSixes));
}
void kv_reconstruct(Buffers&) {
  Factors f;
  f.reconstruct(f.floats(f.values, Factors::kPool), f.floats(f.pool, Factors::kPool), f.floats(f.gram, Factors::kPool));
}
void kv_reconstruct_half(Buffers&) {
  Factors f;
  f.reconstruct(f.halves(f.half_values, Factors::kPool), f.halves(f.half_pool, Factors::kPool),
                f.halves(f.half_keys, Factors::kPool));
}

struct Entry {
  const char* name;
  void (*run)(Buffers&);
};
constexpr Entry kEntries[] = {
    {"token_logprob", token_logprob},
    {"token_logprob_backward", token_logprob_backward},
    {"linear_logprob_tile", linear_logprob_tile},
    {"linear_logprob_finish", linear_logprob_finish},
    {"linear_logprob_tile_backward", linear_logprob_tile_backward},
    {"linear_logprob_forward", linear_logprob_forward},
    {"linear_logprob_exponentials_backward", linear_logprob_exponentials_backward},
    {"linear_logprob_rows", linear_logprob_rows},
    {"preference_loss", preference_loss},
    {"preference_loss_backward", preference_loss_backward},
    {"policy_loss", policy_loss},
    {"policy_loss_backward", policy_loss_backward},
    {"moe_route", moe_route},
    {"moe_route_backward", moe_route_backward},
    {"moe_route_plan", moe_route_plan},
    {"moe_dispatch", moe_dispatch},
    {"moe_dispatch_backward", moe_dispatch_backward},
    {"moe_combine", moe_combine},
    {"moe_combine_backward", moe_combine_backward},
    {"grouped_gemm", grouped_gemm},
    {"grouped_gemm_half", grouped_gemm_half},
    {"grouped_gemm_weight_gradient", grouped_gemm_weight_gradient},
    {"paged_attention", paged_attention<false>},
    {"paged_attention_prompt", paged_attention<true>},
    {"paged_attention_half", paged_attention_half<false>},
    {"paged_attention_half_prompt", paged_attention_half<true>},
    {"kv_select", kv_select},
    {"kv_factorize_gram", kv_factorize_gram},
    {"kv_factorize_gram_half", kv_factorize_gram_half},
    {"kv_factorize_project", kv_factorize_project},
    {"kv_factorize_project_half", kv_factorize_project_half},
    {"kv_landmarks", kv_landmarks},
    {"kv_reconstruct", kv_reconstruct},
    {"kv_reconstruct_half", kv_reconstruct_half},
};

int races = 0;

}  // namespace

// The sanitizer's hook; not instrumented, or it would report itself from within a report.
extern "C" __attribute__((no_sanitize("thread"))) void __tsan_on_report(void*) { ++races; }

int main() {
  for (const Entry& entry : kEntries) {
    for (int skipped = -1; skipped < cuda_on_host::most_barriers(); ++skipped) {
      cuda_on_host::skip_barrier(skipped);
      races = 0;
      Buffers buffers;
      try {
        entry.run(buffers);
      } catch (const std::runtime_error&) {  // threads went different ways: a barrier was missed, indeed
        if (skipped < 0) throw;
        ++races;
      }
      std::printf("%s %d %d\n", entry.name, skipped, races);
    }
    cuda_on_host::forget_barriers();
  }
}
