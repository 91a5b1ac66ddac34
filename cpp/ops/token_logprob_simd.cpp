// SPDX-License-Identifier: Apache-2.0
#include "ops/token_logprob_simd.h"

#include "core/simd.h"

namespace fastpost::FP_ISA {
namespace {

// Two passes over a block that stays in L1, a maximum and one exp per logit, beat one pass that rescales its sum at
// every vector (two exps per logit).
constexpr int64_t kBlock = 2048;
constexpr float kInfinity = __builtin_inff();

template <class T>
struct Row {
  const T* logits;
  const T* bias;
  LogitTransform t;

  F32 raw(int64_t j) const { return bias ? load(logits + j) + load(bias + j) : load(logits + j); }
  F32 raw_tail(int64_t j, int64_t n) const {
    return bias ? load_tail(logits + j, n, -kInfinity) + load_tail(bias + j, n, 0.0f)
                : load_tail(logits + j, n, -kInfinity);
  }
  template <bool Softcap>
  F32 transformed(F32 a) const {
    if constexpr (Softcap) a = broadcast(t.softcap) * tanh(a * broadcast(1.0f / t.softcap));
    return a * broadcast(t.inverse_temperature);
  }
};

template <class T, bool Softcap, bool Entropy>
void accumulate_row(const Row<T>& row, int64_t v, RowStats* stats) {
  constexpr int w = F32::width;
  RowStats s = *stats;
  float z_block[kBlock];
  for (int64_t begin = 0; begin < v; begin += kBlock) {
    const int64_t n = v - begin < kBlock ? v - begin : kBlock;
    const int64_t full = n / w * w;
    F32 m0 = broadcast(-kInfinity), m1 = m0;
    int64_t j = 0;
    for (; j + 2 * w <= full; j += 2 * w) {
      const F32 a = row.template transformed<Softcap>(row.raw(begin + j));
      const F32 b = row.template transformed<Softcap>(row.raw(begin + j + w));
      store(z_block + j, a);
      store(z_block + j + w, b);
      m0 = max(m0, a);
      m1 = max(m1, b);
    }
    for (; j < full; j += w) {
      const F32 a = row.template transformed<Softcap>(row.raw(begin + j));
      store(z_block + j, a);
      m0 = max(m0, a);
    }
    int64_t padded = full;
    if (full < n) {
      // The padding of the last register must not count. A softcap would turn its -inf into -softcap, so set it after.
      store(z_block + full, row.template transformed<Softcap>(row.raw_tail(begin + full, n - full)));
      for (int64_t k = n; k < full + w; ++k) z_block[k] = -kInfinity;
      m0 = max(m0, load(z_block + full));
      padded += w;
    }
    const float block_max = max_lane(max(m0, m1));
    if (block_max == -kInfinity) continue;  // every logit so far in this block is -inf: nothing to add
    const float m = s.max > block_max ? s.max : block_max;
    const F32 shift = broadcast(m);
    F32 rest0 = broadcast(0.0f), rest1 = rest0, ones = rest0, weighted = rest0;
    for (j = 0; j + 2 * w <= padded; j += 2 * w) {
      const F32 a = load(z_block + j) - shift, b = load(z_block + j + w) - shift;
      const F32 ea = exp(a), eb = exp(b), at_a = one_where_zero(a), at_b = one_where_zero(b);
      ones = ones + (at_a + at_b);
      rest0 = rest0 + (ea - at_a);  // exp(0) is exactly 1
      rest1 = rest1 + (eb - at_b);
      if constexpr (Entropy) {
        weighted = fma(ea, max(broadcast(kExpUnderflow), a), weighted);
        weighted = fma(eb, max(broadcast(kExpUnderflow), b), weighted);
      }
    }
    for (; j < padded; j += w) {
      const F32 a = load(z_block + j) - shift, ea = exp(a), at_a = one_where_zero(a);
      ones = ones + at_a;
      rest0 = rest0 + (ea - at_a);
      if constexpr (Entropy) weighted = fma(ea, max(broadcast(kExpUnderflow), a), weighted);
    }
    if (s.at_max != 0.0f && s.max != m) {  // the maximum rose: what was at it joins the rest
      float rescale[w];
      store(rescale, exp(broadcast(s.max - m)));
      const float all = s.at_max + s.rest;
      s.weighted = rescale[0] * (s.weighted + all * (s.max - m));
      s.rest = rescale[0] * all;
      s.at_max = 0.0f;
    }
    s.max = m;
    s.at_max += sum(ones);
    s.rest += sum(rest0 + rest1);
    if constexpr (Entropy) s.weighted += sum(weighted);
  }
  *stats = s;
}

// d(g·logp + h·H)/dz = g·(1[target] - p) - h·p·(log p + H)
template <class T, bool Softcap, bool Entropy>
void gradient_row(const Row<T>& row, int64_t v, int64_t target, float logprob, float lse, float entropy, float g,
                  float h, T* out) {
  constexpr int w = F32::width;
  const F32 minus_g = broadcast(-g), minus_h = broadcast(-h), shift = broadcast(lse), ent = broadcast(entropy);
  const F32 scale = broadcast(row.t.inverse_temperature);

  // d/d(logit) without the 1[target]; p_minus_one replaces p where given.
  const auto derivative = [&](F32 a) {
    F32 capped = a, slope = scale;
    if constexpr (Softcap) {
      const F32 unit = tanh(a * broadcast(1.0f / row.t.softcap));
      capped = broadcast(row.t.softcap) * unit;
      slope = scale * fma(broadcast(-1.0f) * unit, unit, broadcast(1.0f));
    }
    const F32 logp = fma(capped, scale, broadcast(0.0f) - shift);
    const F32 p = exp(logp);
    F32 coefficient = minus_g;
    if constexpr (Entropy) coefficient = fma(minus_h, max(broadcast(kExpUnderflow), logp) + ent, coefficient);
    return p * coefficient * slope;
  };

  // The target's column on its own, before out is written (it may be the same buffer as logits): there 1 - p cancels
  // when p is near 1, and -expm1(log p) does not.
  float at_target = 0;
  if (target >= 0) {
    at_target = row.t.inverse_temperature *
                (g * -__builtin_expm1f(logprob) -
                 (Entropy ? h * __builtin_expf(logprob) * (__builtin_fmaxf(kExpUnderflow, logprob) + entropy) : 0.0f));
    if constexpr (Softcap) {
      const float a = to_float(row.logits[target]) + (row.bias ? to_float(row.bias[target]) : 0.0f);
      const float unit = __builtin_tanhf(a / row.t.softcap);
      at_target *= 1.0f - unit * unit;
    }
  }
  int64_t j = 0;
  for (; j + w <= v; j += w) store(out + j, derivative(row.raw(j)));
  if (j < v) store_tail(out + j, derivative(row.raw_tail(j, v - j)), v - j);
  if (target >= 0) out[target] = from_float<T>(at_target);
}

// Run-time options to template arguments.
template <bool Value>
struct Flag {
  static constexpr bool value = Value;
};
template <class F>
void with_flags(bool softcap, bool entropy, F&& f) {
  if (softcap) {
    entropy ? f(Flag<true>{}, Flag<true>{}) : f(Flag<true>{}, Flag<false>{});
  } else {
    entropy ? f(Flag<false>{}, Flag<true>{}) : f(Flag<false>{}, Flag<false>{});
  }
}

void accumulate(DType dtype, const void* logits, const void* bias, int64_t v, const LogitTransform& t,
                bool with_entropy, RowStats* stats) {
  visit_float(dtype, [&]<class T>(T) {
    const Row<T> row{static_cast<const T*>(logits), static_cast<const T*>(bias), t};
    with_flags(t.softcap != 0, with_entropy, [&](auto softcap, auto entropy) {
      accumulate_row<T, decltype(softcap)::value, decltype(entropy)::value>(row, v, stats);
    });
  });
}

float transform(DType dtype, const void* logits, const void* bias, int64_t index, const LogitTransform& t) {
  return visit_float(dtype, [&]<class T>(T) {
    const Row<T> row{static_cast<const T*>(logits), static_cast<const T*>(bias), t};
    const F32 a = broadcast(to_float(row.logits[index]) + (bias ? to_float(row.bias[index]) : 0.0f));
    float lanes[F32::width];
    store(lanes, t.softcap != 0 ? row.template transformed<true>(a) : row.template transformed<false>(a));
    return lanes[0];
  });
}

void gradient(DType dtype, const void* logits, const void* bias, int64_t v, const LogitTransform& t, int64_t target,
              float logprob, float lse, float entropy, float g, float h, void* out) {
  visit_float(dtype, [&]<class T>(T) {
    const Row<T> row{static_cast<const T*>(logits), static_cast<const T*>(bias), t};
    with_flags(t.softcap != 0, h != 0, [&](auto softcap, auto with_entropy) {
      gradient_row<T, decltype(softcap)::value, decltype(with_entropy)::value>(row, v, target, logprob, lse, entropy, g,
                                                                               h, static_cast<T*>(out));
    });
  });
}

constexpr LogprobRowKernels kKernels = {accumulate, transform, gradient};

}  // namespace

const LogprobRowKernels* logprob_row_kernels() { return &kKernels; }

}  // namespace fastpost::FP_ISA
