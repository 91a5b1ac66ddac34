// SPDX-License-Identifier: Apache-2.0
// Lane l of every array is token l of a tile; loops over lanes become vector code. What both scorings share:
//
//   relative(z) = softmax: e^(z - shift), shift = max z;  sigmoid: σ(z)·e^(-shift), shift = min(max z, 0)
//
// whose sum over the row neither overflows nor vanishes. Then probability = relative / Σ relative, and normalised gates
// are the same over the chosen. An expert masked with -inf has relative 0.
#include "ops/moe_route_simd.h"

#include "core/simd.h"

namespace fastpost::FP_ISA {
namespace {

constexpr int64_t kW = kRouteLanes;

template <class Real>
union alignas(64) Lanes {
  typedef Real Vector __attribute__((vector_size(kW * sizeof(Real))));
  Vector all;  // arithmetic on it is vector code whatever the instruction set
  Real v[kW];
  Real& operator[](int64_t l) { return v[l]; }
  const Real& operator[](int64_t l) const { return v[l]; }
};

void exp_lanes(Lanes<float>& x) {
  for (int64_t l = 0; l < kW; l += F32::width) store(x.v + l, exp(load(x.v + l)));
}
void exp_lanes(Lanes<double>& x) {
  for (int64_t l = 0; l < kW; ++l) x[l] = __builtin_exp(x[l]);
}
inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

template <class T>
void widen(const T* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + F32::width <= n; i += F32::width) store(out + i, load(in + i));
  for (; i < n; ++i) out[i] = to_float(in[i]);
}
template <class T>
void narrow(const float* in, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + F32::width <= n; i += F32::width) store(out + i, load(in + i));
  for (; i < n; ++i) out[i] = from_float<T>(in[i]);
}

// to(i)[k] = from(k)[i] for four times four numbers: rows become columns a vector at a time.
constexpr int64_t kTurn = 4;
template <class Real, class From, class To>
void turn(From from, To to) {
  typedef Real Four __attribute__((vector_size(kTurn * sizeof(Real))));
  Four a[kTurn];
  for (int64_t i = 0; i < kTurn; ++i) __builtin_memcpy(&a[i], from(i), sizeof(Four));
  const Four p = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5), q = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5);
  const Four r = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7), s = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
  const Four turned[kTurn] = {__builtin_shufflevector(p, q, 0, 1, 4, 5), __builtin_shufflevector(p, q, 2, 3, 6, 7),
                              __builtin_shufflevector(r, s, 0, 1, 4, 5), __builtin_shufflevector(r, s, 2, 3, 6, 7)};
  for (int64_t i = 0; i < kTurn; ++i) __builtin_memcpy(to(i), &turned[i], sizeof(Four));
}

// Memory of one thread: pieces of the caller's scratch.
template <class Real>
struct Tile {
  using Row = Lanes<Real>;
  Row *z, *relative, *sum, *ranked;    // [experts]
  Row *best, *id, *chosen, *incoming;  // [top_k]
  Real* rows;                          // [kW, experts] as they lie in the logits
  int64_t e, k;

  Tile(void* scratch, int64_t experts, int64_t top_k) : e(experts), k(top_k) {
    Row* p = static_cast<Row*>(scratch);
    z = p;
    relative = z + e;
    sum = relative + e;
    ranked = sum + e;
    id = ranked + e;
    chosen = id + k;
    incoming = chosen + k;
    rows = (incoming + k)->v;
  }

  // n <= kW tokens from row `first` on; lanes without a token repeat the first.
  template <class T>
  void load(const RouteOptions& options, const RouteRows& in, int64_t first, int64_t n) {
    const T* source[kW];
    for (int64_t l = 0; l < kW; ++l) {
      source[l] = reinterpret_cast<const T*>(in.row(options.dtype, first + (l < n ? l : 0)));
    }
    const Real* row[kW];
    for (int64_t l = 0; l < kW; ++l) {
      if constexpr (sizeof(T) == 2) {
        widen(source[l], e, rows + l * e);
        row[l] = rows + l * e;
      } else {
        row[l] = source[l];
      }
    }
    for (int64_t j = 0; j < e; j += kTurn) {
      if (j + kTurn <= e) {
        for (int64_t l = 0; l < kW; l += kTurn) {
          turn<Real>([&](int64_t i) { return row[l + i] + j; }, [&](int64_t i) { return z[j + i].v + l; });
        }
      } else {
        for (int64_t i = j; i < e; ++i) {
          for (int64_t l = 0; l < kW; ++l) z[i][l] = row[l][i];
        }
      }
    }
  }

  // Column l of from[experts] goes to rows[l].
  void turn_back(const Row* from) {
    for (int64_t j = 0; j < e; j += kTurn) {
      if (j + kTurn <= e) {
        for (int64_t l = 0; l < kW; l += kTurn) {
          turn<Real>([&](int64_t i) { return from[j + i].v + l; }, [&](int64_t i) { return rows + (l + i) * e + j; });
        }
      } else {
        for (int64_t i = j; i < e; ++i) {
          for (int64_t l = 0; l < kW; ++l) rows[l * e + i] = from[i][l];
        }
      }
    }
  }
};

template <class Real>
Lanes<Real> maximum(const Lanes<Real>* z, int64_t n) {
  Lanes<Real> m = z[0];
  for (int64_t j = 1; j < n; ++j) m.all = z[j].all > m.all ? z[j].all : m.all;
  return m;
}

template <class Real>
void split(const Lanes<Real>& z, Lanes<Real>& negative, Lanes<Real>& minus_absolute) {
  const typename Lanes<Real>::Vector zero = {};
  negative.all = z.all > zero ? zero : z.all;
  minus_absolute.all = z.all > zero ? -z.all : z.all;
}

// relative(z[j]) into out[j], and the sums.
template <class Real>
Lanes<Real> relative_scores(const Lanes<Real>* z, int64_t n, bool sigmoid, const Lanes<Real>& shift, Lanes<Real>* out) {
  Lanes<Real> sum = {};
  for (int64_t j = 0; j < n; ++j) {
    Lanes<Real> x, y;
    if (sigmoid) {
      split(z[j], x, y);
      x.all -= shift.all;
      exp_lanes(x);
      exp_lanes(y);
      x.all /= 1 + y.all;
    } else {
      x.all = z[j].all - shift.all;
      exp_lanes(x);
    }
    sum.all += x.all;
    out[j] = x;
  }
  return sum;
}

template <class Real>
Lanes<Real> shift_of(bool sigmoid, const Lanes<Real>& max) {
  const typename Lanes<Real>::Vector zero = {}, lowest = zero - static_cast<Real>(3e38f);
  Lanes<Real> shift = max;
  if (sigmoid) shift.all = max.all > zero ? zero : max.all;
  shift.all = shift.all < lowest ? lowest : shift.all;  // where all are masked: 0 for all, and no -inf + inf
  return shift;
}

// 1 / x, and 0 for 0.
template <class Real>
Lanes<Real> inverse(const Lanes<Real>& x) {
  const typename Lanes<Real>::Vector zero = {};
  Lanes<Real> y;
  y.all = x.all == zero ? zero : 1 / x.all;
  return y;
}

// The K best of ranked[0..e), best first; between equals the lower number. Each is put into the list behind all that are
// at least as good, and those after it move down, so equals keep their order. K is small: the list stays in registers.
template <int K>
void insert_all(const Lanes<float>* ranked, int64_t e, Lanes<float>* id) {
  for (int64_t l = 0; l < kW; l += F32::width) {
    F32 best[K], of[K];
    for (int i = 0; i < K; ++i) best[i] = of[i] = broadcast(__builtin_nanf(""));  // nothing is below: -inf goes before
    for (int64_t j = 0; j < e; ++j) {
      const F32 v = load(ranked[j].v + l), number = broadcast(static_cast<float>(j));
      Mask here = not_at_most(v, best[K - 1]);
      for (int i = K - 1; i > 0; --i) {
        const Mask above = not_at_most(v, best[i - 1]);
        best[i] = select(here, select(above, best[i - 1], v), best[i]);
        of[i] = select(here, select(above, of[i - 1], number), of[i]);
        here = above;
      }
      best[0] = select(here, v, best[0]);
      of[0] = select(here, number, of[0]);
    }
    for (int i = 0; i < K; ++i) store(id[i].v + l, of[i]);
  }
}

// For longer lists: each row by itself, a heap of the best so far (its root is the worst of them), then sorted.
template <class Real>
struct Ranked {
  Real value;
  int32_t id;
  bool before(const Ranked& o) const { return value > o.value || (value == o.value && id < o.id); }
};
template <class Real>
void sift(Ranked<Real>* heap, int64_t n, int64_t i) {
  for (int64_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && heap[child].before(heap[child + 1])) ++child;
    if (!heap[i].before(heap[child])) return;
    const Ranked<Real> swapped = heap[i];
    heap[i] = heap[child];
    heap[child] = swapped;
  }
}
// relative softmax in tile.relative and its inverse sum; for sigmoid, whose relative follows, too.
template <class Real>
struct Scores {
  Lanes<Real> shift, inverse_sum, lse;

  // With keep_softmax, tile.sum gets the softmax relative to its own maximum, and softmax_inverse what divides it.
  Scores(Tile<Real>& tile, bool sigmoid, Lanes<Real>* softmax, Lanes<Real>& softmax_inverse) {
    const Lanes<Real> max = maximum(tile.z, tile.e);
    Lanes<Real> total = relative_scores(tile.z, tile.e, false, max, softmax);
    for (int64_t l = 0; l < kW; ++l) lse[l] = max[l] + log_of(total[l]);
    softmax_inverse = inverse(total);
    shift = max;
    inverse_sum = softmax_inverse;
    if (sigmoid) {
      shift = shift_of(true, max);
      inverse_sum = inverse(relative_scores(tile.z, tile.e, true, shift, tile.relative));
    }
  }
};

template <class Real>
void choose(Tile<Real>& tile, const Lanes<Real>* ranked) {
  const int64_t e = tile.e, k = tile.k;
  if constexpr (sizeof(Real) == 4) {
    switch (k) {
      case 1: return insert_all<1>(ranked, e, tile.id);
      case 2: return insert_all<2>(ranked, e, tile.id);
      case 3: return insert_all<3>(ranked, e, tile.id);
      case 4: return insert_all<4>(ranked, e, tile.id);
      case 5: return insert_all<5>(ranked, e, tile.id);
      case 6: return insert_all<6>(ranked, e, tile.id);
      case 7: return insert_all<7>(ranked, e, tile.id);
      case 8: return insert_all<8>(ranked, e, tile.id);
    }
  }
  auto* heap = reinterpret_cast<Ranked<Real>*>(tile.rows);
  for (int64_t l = 0; l < kW; ++l) {
    for (int64_t j = 0; j < k; ++j) heap[j] = {ranked[j][l], static_cast<int32_t>(j)};
    for (int64_t j = k / 2; j-- > 0;) sift(heap, k, j);
    for (int64_t j = k; j < e; ++j) {
      const Ranked<Real> next{ranked[j][l], static_cast<int32_t>(j)};
      if (!next.before(heap[0])) continue;
      heap[0] = next;
      sift(heap, k, 0);
    }
    for (int64_t n = k; n-- > 0;) {
      tile.id[n][l] = static_cast<Real>(heap[0].id);
      heap[0] = heap[n];
      sift(heap, n, 0);
    }
  }
}

template <class T, class Real>
int64_t forward(const RouteOptions& o, const RouteRows& in, const RouteForward& out, void* scratch) {
  using Row = Lanes<Real>;
  Tile<Real> tile(scratch, o.experts, o.top_k);
  const int64_t e = o.experts, k = o.top_k;
  const Real scale = static_cast<Real>(o.scale);
  int64_t bad = -1;
  double z = 0;
  for (int64_t j = 0; j < e; ++j) tile.sum[j] = Row{};
  for (int64_t first = 0; first < in.tokens; first += kW) {
    const int64_t n = in.tokens - first < kW ? in.tokens - first : kW;
    tile.template load<T>(o, in, first, n);
    Row softmax_inverse;
    const Scores<Real> scores(tile, o.sigmoid, tile.relative, softmax_inverse);
    Row factor = scores.inverse_sum;  // of relative, for the score
    if (o.sigmoid) {
      factor = scores.shift;
      exp_lanes(factor);
    }
    for (int64_t l = 0; l < n; ++l) {
      if (bad < 0 && scores.lse[l] != scores.lse[l]) bad = first + l;
      z += static_cast<double>(scores.lse[l]) * static_cast<double>(scores.lse[l]);
    }
    Row share = scores.inverse_sum;
    for (int64_t l = n; l < kW; ++l) share[l] = 0;
    for (int64_t j = 0; j < e; ++j) {
      tile.sum[j].all += tile.relative[j].all * share.all;
    }

    if (out.correction) {
      for (int64_t j = 0; j < e; ++j) {
        const auto z = tile.z[j].all, score = tile.relative[j].all * factor.all + static_cast<Real>(out.correction[j]);
        tile.ranked[j].all = z < static_cast<Real>(-3.4e38f) ? z : score;
      }
    }
    choose(tile, out.correction ? tile.ranked : tile.z);
    for (int64_t i = 0; i < k; ++i) {
      const Row* of = o.normalize ? tile.z : tile.relative;
      for (int64_t l = 0; l < kW; ++l) tile.chosen[i][l] = of[static_cast<int64_t>(tile.id[i][l])][l];
    }
    if (o.normalize) {
      const Row shift = shift_of(o.sigmoid, maximum(tile.chosen, k));
      factor = inverse(relative_scores(tile.chosen, k, o.sigmoid, shift, tile.chosen));
    }
    Real* gate = static_cast<Real*>(out.gate) + first * k;
    int64_t* expert = out.expert + first * k;
    for (int64_t l = 0; l < n; ++l) {
      for (int64_t i = 0; i < k; ++i) {
        const int64_t id = static_cast<int64_t>(tile.id[i][l]);
        expert[l * k + i] = id;
        gate[l * k + i] = scale * tile.chosen[i][l] * factor[l];
        ++out.count[id];
      }
    }
  }
  for (int64_t j = 0; j < e; ++j) {
    double sum = 0;
    for (int64_t l = 0; l < kW; ++l) sum += tile.sum[j][l];
    out.probability[j] = sum;
  }
  *out.z = z;
  return bad;
}

// With w = log score (softmax: the logit): dw = P·(c - Σ P·c) for c = d loss / d probability; through normalised gates
// scale·q·(g - Σ q·g); through others scale·g·d score / dw. Then dz = dw (sigmoid: dw·(1 - σ)), and 2·lse·softmax of
// the z loss.
template <class T, class Real>
void backward(const RouteOptions& o, const RouteRows& in, const RouteBackward& out, void* scratch) {
  using Row = Lanes<Real>;
  Tile<Real> tile(scratch, o.experts, o.top_k);
  const int64_t e = o.experts, k = o.top_k;
  const Real scale = static_cast<Real>(o.scale), twice_z = static_cast<Real>(2 * out.z);
  for (int64_t first = 0; first < in.tokens; first += kW) {
    const int64_t n = in.tokens - first < kW ? in.tokens - first : kW;
    tile.template load<T>(o, in, first, n);
    Row softmax_inverse;
    const Scores<Real> scores(tile, o.sigmoid, o.sigmoid ? tile.sum : tile.relative, softmax_inverse);
    for (int64_t j = 0; j < e; ++j) {
      tile.relative[j].all *= scores.inverse_sum.all;  // probabilities from here on
      tile.ranked[j].all = (Row{}).all + static_cast<Real>(out.coefficient[j]);
    }

    // What the gate of slot i sends to its own expert's w, in tile.incoming[i]. Softmax without normalisation: what it
    // sends to the probability, before Σ P·c is taken off, so that where P is 1 exactly nothing is left.
    const bool to_probability = !o.normalize && !o.sigmoid;
    const auto of_slot = [&](int64_t l, int64_t i) { return out.expert[(first + (l < n ? l : 0)) * k + i]; };
    const auto scatter = [&] {
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t l = 0; l < n; ++l) tile.ranked[of_slot(l, i)][l] += tile.incoming[i][l];
      }
    };
    if (out.grad_gate) {
      const Real* grad = static_cast<const Real*>(out.grad_gate) + first * k;
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t l = 0; l < kW; ++l) {
          tile.incoming[i][l] = scale * (l < n ? grad[l * k + i] : 0);
          tile.chosen[i][l] = tile.z[of_slot(l, i)][l];
        }
      }
      if (to_probability) {
        scatter();
      } else {
        const Row shift = o.normalize ? shift_of(o.sigmoid, maximum(tile.chosen, k)) : Row{};
        Row factor = inverse(relative_scores(tile.chosen, k, o.sigmoid, shift, tile.chosen)), mean = {};
        if (!o.normalize) factor.all = mean.all + 1;
        for (int64_t i = 0; i < k; ++i) {
          tile.chosen[i].all *= factor.all;
          mean.all += tile.chosen[i].all * tile.incoming[i].all;
        }
        if (!o.normalize) mean = Row{};
        for (int64_t i = 0; i < k; ++i) {
          tile.incoming[i].all = tile.chosen[i].all * (tile.incoming[i].all - mean.all);
        }
      }
    }

    Row dot = {}, of_z;
    of_z.all = twice_z * scores.lse.all;
    for (int64_t j = 0; j < e; ++j) dot.all += tile.relative[j].all * tile.ranked[j].all;
    for (int64_t j = 0; j < e; ++j) {
      const auto through = tile.ranked[j].all - dot.all;
      tile.ranked[j].all = tile.relative[j].all * (o.sigmoid ? through : through + of_z.all);
    }
    if (out.grad_gate && !to_probability) scatter();
    if (o.sigmoid) {
      for (int64_t j = 0; j < e; ++j) {
        Row x, y;  // 1 - σ(z) = e^(-max(z, 0)) / (1 + e^(-|z|)), which keeps what 1 - σ would lose
        const typename Row::Vector zero = {};
        split(tile.z[j], x, y);
        x.all = tile.z[j].all > zero ? -tile.z[j].all : zero;
        exp_lanes(x);
        exp_lanes(y);
        tile.ranked[j].all =
            tile.ranked[j].all * x.all / (1 + y.all) + tile.sum[j].all * softmax_inverse.all * of_z.all;
      }
    }

    tile.turn_back(tile.ranked);
    for (int64_t l = 0; l < n; ++l) {
      T* row = static_cast<T*>(out.grad_logits) + (first + l) * out.stride;
      if constexpr (sizeof(T) == 2) {
        narrow(tile.rows + l * e, e, row);
      } else {
        __builtin_memcpy(row, tile.rows + l * e, e * sizeof(T));
      }
    }
  }
}

template <class F>
auto visit(DType t, F&& f) {
  if (t == DType::Float64) return f(double{}, double{});
  return visit_float(t, [&]<class T>(T x) { return f(x, float{}); });
}

int64_t forward_any(const RouteOptions& o, const RouteRows& in, const RouteForward& out, void* scratch) {
  return visit(o.dtype, [&]<class T, class Real>(T, Real) { return forward<T, Real>(o, in, out, scratch); });
}
void backward_any(const RouteOptions& o, const RouteRows& in, const RouteBackward& out, void* scratch) {
  visit(o.dtype, [&]<class T, class Real>(T, Real) { backward<T, Real>(o, in, out, scratch); });
}

constexpr RouteKernels kKernels = {forward_any, backward_any};

}  // namespace

const RouteKernels* route_kernels() { return &kKernels; }

}  // namespace fastpost::FP_ISA
