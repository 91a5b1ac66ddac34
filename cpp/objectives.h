// SPDX-License-Identifier: Apache-2.0
// Every preference objective once: its loss and its derivative with respect to the summed log-prob of each sequence.
// Header only and free of torch, Python and containers, so CPU kernels (Real = double) and CUDA kernels share it.
//
// python/fastpost/objectives has the same objectives in plain torch with conventions, defaults and sources. Structs
// here have its names and its numeric fields in its order; FP_OBJECTIVES is its KINDS. Tests hold both equal.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FP_HOST_DEVICE __host__ __device__
#else
#define FP_HOST_DEVICE
#endif

namespace fastpost {

// One name per formula: the objective, then its loss_type where it has several.
// clang-format off
#define FP_OBJECTIVES(X)                                                                                    \
  X(sft)                                                                                                    \
  X(dpo_sigmoid) X(dpo_hinge) X(dpo_robust) X(dpo_exo_pair) X(dpo_nca_pair)                                 \
  X(dpo_bco_pair) X(dpo_sppo_hard) X(dpo_apo_zero) X(dpo_apo_down) X(dpo_discopop)                          \
  X(ipo_mean) X(ipo_sum) X(simpo_sigmoid) X(simpo_hinge) X(cpo_sigmoid) X(cpo_hinge)                        \
  X(orpo) X(kto) X(lndpo) X(inpo) X(rebel) X(refuel)                                                        \
  X(bco) X(xpo_sigmoid) X(xpo_ipo) X(alphapo) X(rdpo) X(dpop)
// clang-format on

#define FP_ENUMERATOR(name) name,
enum class Kind : int { FP_OBJECTIVES(FP_ENUMERATOR) count };
#undef FP_ENUMERATOR

struct Objective {
  static constexpr int kMaxParams = 4;
  Kind kind = Kind::sft;
  double params[kMaxParams] = {};  // the struct fields below, in order
};

// What a kind reads besides the log-probs, and whether sequences 2i, 2i+1 form a pair (chosen, rejected).
struct Needs {
  bool pairs, reference, previous, reward;
};

constexpr Needs needs(Kind kind) {
  switch (kind) {
    case Kind::sft: return {false, false, false, false};
    case Kind::kto: return {false, true, false, true};
    case Kind::simpo_sigmoid:
    case Kind::simpo_hinge:
    case Kind::cpo_sigmoid:
    case Kind::cpo_hinge:
    case Kind::alphapo:
    case Kind::orpo: return {true, false, false, false};
    case Kind::xpo_sigmoid:
    case Kind::xpo_ipo: return {true, true, false, true};
    case Kind::inpo: return {true, true, true, false};
    case Kind::rebel:
    case Kind::refuel: return {true, false, true, true};
    default: return {true, true, false, false};  // dpo_*, ipo_*, lndpo, bco, rdpo, dpop
  }
}

// True when the objective divides by the number of scored tokens, which an empty sequence does not have.
constexpr bool divides_by_length(const Objective& o) {
  switch (o.kind) {
    case Kind::ipo_mean:
    case Kind::simpo_sigmoid:
    case Kind::simpo_hinge:
    case Kind::alphapo:
    case Kind::orpo:
    case Kind::lndpo: return true;
    case Kind::cpo_sigmoid:
    case Kind::cpo_hinge: return o.params[2] != 0;                                                    // cpo_alpha
    default: return o.kind >= Kind::dpo_sigmoid && o.kind <= Kind::dpo_discopop && o.params[3] != 0;  // sft_weight
  }
}

template <class Real>
struct Sequence {
  Real logprob, length, reference = 0, previous = 0, reward = 0;

  // 1 / length. An empty sequence counts as length 1, so that its mean is 0 and nothing becomes NaN.
  FP_HOST_DEVICE Real per_token() const { return 1 / (length > 1 ? length : Real(1)); }
  FP_HOST_DEVICE Real mean() const { return logprob * per_token(); }
  FP_HOST_DEVICE Real ratio() const { return logprob - reference; }
};

// A loss and its derivatives with respect to the two log-prob sums. Objectives without pairs use `chosen` alone.
template <class Real>
struct PairLoss {
  Real value, chosen, rejected;
};

// f(z) and f'(z).
template <class Real>
struct Curve {
  Real value, slope;
};

// ---- numerics: accurate and finite for any finite z; NaN in, NaN out ----

template <class Real>
FP_HOST_DEVICE Real softplus(Real z) {  // log(1 + e^z) = -log sigmoid(-z)
  return (z > 0 ? z : Real(0)) + std::log1p(std::exp(-std::fabs(z)));
}

template <class Real>
FP_HOST_DEVICE Real sigmoid(Real z) {
  const Real e = std::exp(-std::fabs(z));
  return (z < 0 ? e : Real(1)) / (1 + e);
}

template <class Real>
FP_HOST_DEVICE Real sigmoid_slope(Real z) {
  return sigmoid(z) * sigmoid(-z);
}

template <class Real>
FP_HOST_DEVICE Real log1mexp(Real x) {  // log(1 - e^x) for x < 0; the branch at -ln 2 loses no digits on either side
  return x < Real(-0.6931471805599453) ? std::log1p(-std::exp(x)) : std::log(-std::expm1(x));
}

// ---- links: a loss as a function of a margin z ----

template <class Real>
struct LogSigmoid {
  Real epsilon;  // label smoothing
  FP_HOST_DEVICE Curve<Real> operator()(Real z) const {
    return {(1 - epsilon) * softplus(-z) + epsilon * softplus(z), epsilon * sigmoid(z) - (1 - epsilon) * sigmoid(-z)};
  }
};

template <class Real>
struct Hinge {
  FP_HOST_DEVICE Curve<Real> operator()(Real z) const {
    return z >= 1 ? Curve<Real>{Real(0), Real(0)} : Curve<Real>{1 - z, Real(-1)};
  }
};

template <class Real>
struct Robust {  // unbiased under labels flipped with probability epsilon
  Real epsilon;
  FP_HOST_DEVICE Curve<Real> operator()(Real z) const {
    const Real scale = 1 / (1 - 2 * epsilon);
    return {((1 - epsilon) * softplus(-z) - epsilon * softplus(z)) * scale,
            (-(1 - epsilon) * sigmoid(-z) - epsilon * sigmoid(z)) * scale};
  }
};

template <class Real>
struct ExoPair {  // KL( (sigmoid(z), sigmoid(-z)) || (1 - epsilon, epsilon) )
  Real epsilon;
  FP_HOST_DEVICE Curve<Real> operator()(Real z) const {
    const Real log_chosen = std::log1p(-epsilon), log_rejected = std::log(epsilon);
    return {sigmoid(z) * (-softplus(-z) - log_chosen) + sigmoid(-z) * (-softplus(z) - log_rejected),
            sigmoid_slope(z) * (z - log_chosen + log_rejected)};
  }
};

template <class Real>
struct Discopop {  // logistic and exponential loss, blended by m = sigmoid(z / tau)
  Real tau;
  FP_HOST_DEVICE Curve<Real> operator()(Real z) const {
    const Real m = sigmoid(z / tau), rest = sigmoid(-z / tau);
    const Real exponential = std::exp(-z - softplus(-z / tau));  // e^-z m, without e^-z overflowing
    return {softplus(-z) * rest + exponential,
            -sigmoid(-z) * rest - softplus(-z) * m * rest / tau + exponential * (rest / tau - 1)};
  }
};

template <class Real>
struct Square {
  FP_HOST_DEVICE Curve<Real> operator()(Real z) const { return {z * z, 2 * z}; }
};

// ---- from a function of one number to a function of the pair ----

// f(z) with dz/dlogprob of the chosen and of the rejected sequence.
template <class Real>
FP_HOST_DEVICE PairLoss<Real> chain(Curve<Real> f, Real chosen, Real rejected) {
  return {f.value, f.slope * chosen, f.slope * rejected};
}

// Adds weight * (length-averaged negative log-likelihood of the chosen sequence).
template <class Real>
FP_HOST_DEVICE PairLoss<Real> with_nll(PairLoss<Real> loss, Real weight, const Sequence<Real>& c) {
  return {loss.value - weight * c.mean(), loss.chosen - weight * c.per_token(), loss.rejected};
}

// ---- objectives ----

template <class Real>
struct SFT {
  FP_HOST_DEVICE PairLoss<Real> operator()(const Sequence<Real>& s) const { return {-s.logprob, Real(-1), Real(0)}; }
};

template <class Real>
struct DPO {
  Real beta, label_smoothing, discopop_tau, sft_weight;

  template <class Link>
  FP_HOST_DEVICE PairLoss<Real> margin(Link link, const Sequence<Real>& c, const Sequence<Real>& r) const {
    return with_nll(chain(link(beta * (c.ratio() - r.ratio())), beta, -beta), sft_weight, c);
  }
  FP_HOST_DEVICE PairLoss<Real> nca_pair(const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Real x = beta * c.ratio(), y = beta * r.ratio();
    return with_nll<Real>({softplus(-x) + softplus(x) / 2 + softplus(y) / 2, beta * (sigmoid(x) / 2 - sigmoid(-x)),
                           beta * sigmoid(y) / 2},
                          sft_weight, c);
  }
  FP_HOST_DEVICE PairLoss<Real> bco_pair(const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Real x = beta * c.ratio(), y = beta * r.ratio();
    return with_nll<Real>({softplus(-x) + softplus(y), -beta * sigmoid(-x), beta * sigmoid(y)}, sft_weight, c);
  }
  FP_HOST_DEVICE PairLoss<Real> sppo_hard(const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Real x = c.ratio() - 1 / (2 * beta), y = r.ratio() + 1 / (2 * beta);
    return with_nll<Real>({x * x + y * y, 2 * x, 2 * y}, sft_weight, c);
  }
  FP_HOST_DEVICE PairLoss<Real> apo_zero(const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Real x = beta * c.ratio(), y = beta * r.ratio();
    return with_nll<Real>({sigmoid(-x) + sigmoid(y), -beta * sigmoid_slope(x), beta * sigmoid_slope(y)}, sft_weight, c);
  }
  FP_HOST_DEVICE PairLoss<Real> apo_down(const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Real x = beta * c.ratio(), z = beta * (c.ratio() - r.ratio());
    return with_nll<Real>(
        {sigmoid(x) + sigmoid(-z), beta * (sigmoid_slope(x) - sigmoid_slope(z)), beta * sigmoid_slope(z)}, sft_weight,
        c);
  }
};

template <class Real>
struct IPO {
  Real beta;
  FP_HOST_DEVICE PairLoss<Real> mean(const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Real h = c.ratio() * c.per_token() - r.ratio() * r.per_token();
    return chain(Square<Real>{}(h - 1 / (2 * beta)), c.per_token(), -r.per_token());
  }
  FP_HOST_DEVICE PairLoss<Real> sum(const Sequence<Real>& c, const Sequence<Real>& r) const {
    return chain(Square<Real>{}(c.ratio() - r.ratio() - 1 / (2 * beta)), Real(1), Real(-1));
  }
};

template <class Real>
struct SimPO {
  Real beta, gamma_beta_ratio, label_smoothing, sft_weight;
  template <class Link>
  FP_HOST_DEVICE PairLoss<Real> margin(Link link, const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Real z = beta * (c.mean() - r.mean() - gamma_beta_ratio);
    return with_nll(chain(link(z), beta * c.per_token(), -beta * r.per_token()), sft_weight, c);
  }
};

template <class Real>
struct CPO {
  Real beta, label_smoothing, cpo_alpha;
  template <class Link>
  FP_HOST_DEVICE PairLoss<Real> margin(Link link, const Sequence<Real>& c, const Sequence<Real>& r) const {
    return with_nll(chain(link(beta * (c.logprob - r.logprob)), beta, -beta), cpo_alpha, c);
  }
};

template <class Real>
struct ORPO {
  Real beta;
  // log(p / (1 - p)) for p = e^mean. Means above -1e-6, where p is 1 up to float32 rounding and the odds are infinite,
  // count as -1e-6 in value and slope. (A slope of 0 there would leave a rejected sequence with p = 1 untouched.)
  FP_HOST_DEVICE static Curve<Real> log_odds(Real mean) {
    const Real m = mean > Real(-1e-6) ? Real(-1e-6) : mean;
    return {m - log1mexp(m), -1 / std::expm1(m)};
  }
  FP_HOST_DEVICE PairLoss<Real> operator()(const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Curve<Real> x = log_odds(c.mean()), y = log_odds(r.mean());
    const Curve<Real> f = LogSigmoid<Real>{0}(x.value - y.value);
    return with_nll(chain<Real>({beta * f.value, beta * f.slope}, x.slope * c.per_token(), -y.slope * r.per_token()),
                    Real(1), c);
  }
};

template <class Real>
struct KTO {
  Real beta, desirable_weight, undesirable_weight;
  FP_HOST_DEVICE PairLoss<Real> operator()(const Sequence<Real>& s, Real kl) const {
    const Real sign = s.reward > 0 ? Real(1) : Real(-1);
    const Real weight = s.reward > 0 ? desirable_weight : undesirable_weight;
    const Real z = sign * beta * (s.ratio() - (kl < 0 ? Real(0) : kl));
    return {weight * sigmoid(-z), -weight * sign * beta * sigmoid_slope(z), Real(0)};
  }
};

template <class Real>
struct LNDPO {
  Real beta;
  FP_HOST_DEVICE PairLoss<Real> operator()(const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Real x = beta * c.per_token(), y = beta * r.per_token();
    return chain(LogSigmoid<Real>{0}(x * c.ratio() - y * r.ratio()), x, -y);
  }
};

template <class Real>
struct INPO {
  Real eta, ratio;
  FP_HOST_DEVICE PairLoss<Real> operator()(const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Real h =
        (c.logprob - r.logprob) - ratio * (c.reference - r.reference) - (1 - ratio) * (c.previous - r.previous);
    return chain(Square<Real>{}(h - 1 / (2 * eta)), Real(1), Real(-1));
  }
};

// REFUEL is the same function of the log-probs of one turn.
template <class Real>
struct REBEL {
  Real eta;
  FP_HOST_DEVICE PairLoss<Real> operator()(const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Real a = (c.logprob - c.previous) - (r.logprob - r.previous);
    return chain(Square<Real>{}(a - eta * (c.reward - r.reward)), Real(1), Real(-1));
  }
};

template <class Real>
struct BCO {
  Real beta;
  FP_HOST_DEVICE PairLoss<Real> operator()(const Sequence<Real>& c, const Sequence<Real>& r, Real delta) const {
    const Real x = beta * c.ratio() - delta, y = beta * r.ratio() - delta;
    return {softplus(-x) + softplus(y), -beta * sigmoid(-x), beta * sigmoid(y)};
  }
};

template <class Real>
struct XPO {
  Real beta, alpha;
  // Adds alpha * (log-prob of the replies that the reference wrote).
  FP_HOST_DEVICE PairLoss<Real> with_optimism(PairLoss<Real> loss, const Sequence<Real>& c,
                                              const Sequence<Real>& r) const {
    const Real x = c.reward > 0 ? alpha : Real(0), y = r.reward > 0 ? alpha : Real(0);
    return {loss.value + x * c.logprob + y * r.logprob, loss.chosen + x, loss.rejected + y};
  }
  FP_HOST_DEVICE PairLoss<Real> sigmoid(const Sequence<Real>& c, const Sequence<Real>& r) const {
    return with_optimism(chain(LogSigmoid<Real>{0}(beta * (c.ratio() - r.ratio())), beta, -beta), c, r);
  }
  FP_HOST_DEVICE PairLoss<Real> ipo(const Sequence<Real>& c, const Sequence<Real>& r) const {
    return with_optimism(IPO<Real>{beta}.sum(c, r), c, r);
  }
};

template <class Real>
struct AlphaPO {
  Real beta, alpha, gamma_beta_ratio, label_smoothing;
  // (1 - p^-alpha) / alpha for p = e^mean. Exponents above 40 count as 40 in value and slope, as in ORPO.
  FP_HOST_DEVICE Curve<Real> bent(Real mean) const {
    if (alpha == 0) return {mean, Real(1)};
    const Real x = -alpha * mean > 40 ? Real(40) : -alpha * mean;
    return {-std::expm1(x) / alpha, std::exp(x)};
  }
  FP_HOST_DEVICE PairLoss<Real> operator()(const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Curve<Real> x = bent(c.mean()), y = bent(r.mean());
    return chain(LogSigmoid<Real>{label_smoothing}(beta * (x.value - y.value - gamma_beta_ratio)),
                 beta * x.slope * c.per_token(), -beta * y.slope * r.per_token());
  }
};

template <class Real>
struct RDPO {
  Real beta, alpha, label_smoothing;
  FP_HOST_DEVICE PairLoss<Real> operator()(const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Real z = beta * (c.ratio() - r.ratio()) + alpha * (c.length - r.length);
    return chain(LogSigmoid<Real>{label_smoothing}(z), beta, -beta);
  }
};

template <class Real>
struct DPOP {
  Real beta, penalty, label_smoothing;
  FP_HOST_DEVICE PairLoss<Real> operator()(const Sequence<Real>& c, const Sequence<Real>& r) const {
    const Real slope = c.ratio() < 0 ? 1 + penalty : Real(1);
    const Real z = beta * (slope * c.ratio() - r.ratio());
    return chain(LogSigmoid<Real>{label_smoothing}(z), beta * slope, -beta);
  }
};

// ---- the two entry points ----

// The loss of the pair (c, r), or of the sequence c alone where needs(kind).pairs is false (r is then not read).
// kl: the batch estimate that KTO subtracts (negative values count as 0), or BCO's delta.
template <class Real>
FP_HOST_DEVICE PairLoss<Real> evaluate(const Objective& o, const Sequence<Real>& c, const Sequence<Real>& r, Real kl) {
  const Real p0 = Real(o.params[0]), p1 = Real(o.params[1]), p2 = Real(o.params[2]), p3 = Real(o.params[3]);
  const DPO<Real> dpo{p0, p1, p2, p3};
  const SimPO<Real> simpo{p0, p1, p2, p3};
  const CPO<Real> cpo{p0, p1, p2};
  switch (o.kind) {
    case Kind::dpo_sigmoid: return dpo.margin(LogSigmoid<Real>{dpo.label_smoothing}, c, r);
    case Kind::dpo_hinge: return dpo.margin(Hinge<Real>{}, c, r);
    case Kind::dpo_robust: return dpo.margin(Robust<Real>{dpo.label_smoothing}, c, r);
    case Kind::dpo_exo_pair: return dpo.margin(ExoPair<Real>{dpo.label_smoothing}, c, r);
    case Kind::dpo_nca_pair: return dpo.nca_pair(c, r);
    case Kind::dpo_bco_pair: return dpo.bco_pair(c, r);
    case Kind::dpo_sppo_hard: return dpo.sppo_hard(c, r);
    case Kind::dpo_apo_zero: return dpo.apo_zero(c, r);
    case Kind::dpo_apo_down: return dpo.apo_down(c, r);
    case Kind::dpo_discopop: return dpo.margin(Discopop<Real>{dpo.discopop_tau}, c, r);
    case Kind::ipo_mean: return IPO<Real>{p0}.mean(c, r);
    case Kind::ipo_sum: return IPO<Real>{p0}.sum(c, r);
    case Kind::simpo_sigmoid: return simpo.margin(LogSigmoid<Real>{simpo.label_smoothing}, c, r);
    case Kind::simpo_hinge: return simpo.margin(Hinge<Real>{}, c, r);
    case Kind::cpo_sigmoid: return cpo.margin(LogSigmoid<Real>{cpo.label_smoothing}, c, r);
    case Kind::cpo_hinge: return cpo.margin(Hinge<Real>{}, c, r);
    case Kind::orpo: return ORPO<Real>{p0}(c, r);
    case Kind::kto: return KTO<Real>{p0, p1, p2}(c, kl);
    case Kind::lndpo: return LNDPO<Real>{p0}(c, r);
    case Kind::inpo: return INPO<Real>{p0, p1}(c, r);
    case Kind::rebel:
    case Kind::refuel: return REBEL<Real>{p0}(c, r);
    case Kind::bco: return BCO<Real>{p0}(c, r, kl);
    case Kind::xpo_sigmoid: return XPO<Real>{p0, p1}.sigmoid(c, r);
    case Kind::xpo_ipo: return XPO<Real>{p0, p1}.ipo(c, r);
    case Kind::alphapo: return AlphaPO<Real>{p0, p1, p2, p3}(c, r);
    case Kind::rdpo: return RDPO<Real>{p0, p1, p2}(c, r);
    case Kind::dpop: return DPOP<Real>{p0, p1, p2}(c, r);
    default: return SFT<Real>{}(c);
  }
}

// The reward that the objective implies for one sequence, for the metrics rewards/chosen, rewards/margins, ...
template <class Real>
FP_HOST_DEVICE Real implicit_reward(const Objective& o, const Sequence<Real>& s) {
  const Real scale = Real(o.params[0]);  // beta or eta
  switch (o.kind) {
    case Kind::sft: return s.logprob;
    case Kind::simpo_sigmoid:
    case Kind::simpo_hinge:
    case Kind::orpo: return scale * s.mean();
    case Kind::cpo_sigmoid:
    case Kind::cpo_hinge: return scale * s.logprob;
    case Kind::alphapo: {
      const AlphaPO<Real> alphapo{scale, Real(o.params[1]), Real(o.params[2]), Real(o.params[3])};
      return scale * alphapo.bent(s.mean()).value;
    }
    case Kind::rebel:
    case Kind::refuel: return (s.logprob - s.previous) / scale;
    default: return scale * s.ratio();
  }
}

}  // namespace fastpost
