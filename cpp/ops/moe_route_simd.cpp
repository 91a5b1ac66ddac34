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
constexpr int64_t kSortFrom = 17;  // top_k from which a sort of each row beats insertion into a list

template <class Real>
struct alignas(64) Lanes {
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
    best = ranked + e;
    id = best + k;
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
    if constexpr (sizeof(T) == 2) {
      for (int64_t l = 0; l < kW; ++l) widen(source[l], e, rows + l * e);
      for (int64_t j = 0; j < e; ++j) {
        for (int64_t l = 0; l < kW; ++l) z[j][l] = rows[l * e + j];
      }
    } else {
      for (int64_t j = 0; j < e; ++j) {
        for (int64_t l = 0; l < kW; ++l) z[j][l] = source[l][j];
      }
    }
  }
};

template <class Real>
Lanes<Real> maximum(const Lanes<Real>* z, int64_t n) {
  Lanes<Real> m = z[0];
  for (int64_t j = 1; j < n; ++j) {
    for (int64_t l = 0; l < kW; ++l) m[l] = z[j][l] > m[l] ? z[j][l] : m[l];
  }
  return m;
}

// relative(z[j]) into out[j], and the sums.
template <class Real>
Lanes<Real> relative_scores(const Lanes<Real>* z, int64_t n, bool sigmoid, const Lanes<Real>& shift, Lanes<Real>* out) {
  Lanes<Real> sum = {};
  for (int64_t j = 0; j < n; ++j) {
    Lanes<Real> x, y;
    if (sigmoid) {
      for (int64_t l = 0; l < kW; ++l) {
        x[l] = (z[j][l] > 0 ? 0 : z[j][l]) - shift[l];
        y[l] = z[j][l] > 0 ? -z[j][l] : z[j][l];
      }
      exp_lanes(x);
      exp_lanes(y);
      for (int64_t l = 0; l < kW; ++l) x[l] = x[l] / (1 + y[l]);
    } else {
      for (int64_t l = 0; l < kW; ++l) x[l] = z[j][l] - shift[l];
      exp_lanes(x);
    }
    for (int64_t l = 0; l < kW; ++l) sum[l] += x[l];
    out[j] = x;
  }
  return sum;
}

template <class Real>
Lanes<Real> shift_of(bool sigmoid, const Lanes<Real>& max) {
  Lanes<Real> shift;
  constexpr Real lowest = static_cast<Real>(-3e38f);  // where all are masked: 0 for all, and no -inf + inf
  for (int64_t l = 0; l < kW; ++l) {
    shift[l] = sigmoid && max[l] > 0 ? 0 : max[l];
    shift[l] = shift[l] < lowest ? lowest : shift[l];
  }
  return shift;
}

// 1 / x, and 0 for 0.
template <class Real>
Lanes<Real> inverse(const Lanes<Real>& x) {
  Lanes<Real> y;
  for (int64_t l = 0; l < kW; ++l) y[l] = x[l] == 0 ? 0 : 1 / x[l];
  return y;
}

// Expert `number` into the lists of best[0..filled], best first; between equals the lower number, which came first. Where
// one is inserted, all after it move down, so equals keep their order. A list starts as NaN, below which there is nothing:
// also -inf finds a place in it.
template <class Real>
void insert(const Lanes<Real>& v, Real number, Lanes<Real>* best, Lanes<Real>* id, int64_t filled) {
  for (int64_t i = filled; i > 0; --i) {
    for (int64_t l = 0; l < kW; ++l) {
      const bool here = !(v[l] <= best[i][l]), above = !(v[l] <= best[i - 1][l]);
      const Real value = above ? best[i - 1][l] : v[l], of = above ? id[i - 1][l] : number;
      best[i][l] = here ? value : best[i][l];
      id[i][l] = here ? of : id[i][l];
    }
  }
  for (int64_t l = 0; l < kW; ++l) {
    const bool here = !(v[l] <= best[0][l]);
    best[0][l] = here ? v[l] : best[0][l];
    id[0][l] = here ? number : id[0][l];
  }
}

// For long lists: each row by itself, a heap of the best so far (its root is the worst of them), then sorted.
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
  if (k < kSortFrom) {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t l = 0; l < kW; ++l) tile.best[i][l] = static_cast<Real>(__builtin_nan(""));
    }
    for (int64_t j = 0; j < e; ++j) {
      insert(ranked[j], static_cast<Real>(j), tile.best, tile.id, j < k ? j : k - 1);
    }
    return;
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
      for (int64_t l = 0; l < kW; ++l) tile.sum[j][l] += tile.relative[j][l] * share[l];
    }

    if (out.correction) {
      for (int64_t j = 0; j < e; ++j) {
        const Real c = out.correction[j];
        for (int64_t l = 0; l < kW; ++l) {
          const Real masked = tile.z[j][l], score = tile.relative[j][l] * factor[l] + c;
          tile.ranked[j][l] = masked < static_cast<Real>(-3.4e38f) ? masked : score;
        }
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
    Row dot = {};
    for (int64_t j = 0; j < e; ++j) {
      const Real c = static_cast<Real>(out.coefficient[j]);
      for (int64_t l = 0; l < kW; ++l) {
        tile.relative[j][l] *= scores.inverse_sum[l];  // probabilities from here on
        dot[l] += tile.relative[j][l] * c;
      }
    }

    // Row i of tile.incoming: what the gate of slot i sends to its own expert's w.
    const auto of_slot = [&](int64_t l, int64_t i) { return out.expert[(first + (l < n ? l : 0)) * k + i]; };
    if (out.grad_gate) {
      const Real* grad = static_cast<const Real*>(out.grad_gate) + first * k;
      for (int64_t i = 0; i < k; ++i) {
        const Row* of = o.normalize || o.sigmoid ? tile.z : tile.relative;
        for (int64_t l = 0; l < kW; ++l) {
          tile.incoming[i][l] = scale * (l < n ? grad[l * k + i] : 0);
          tile.chosen[i][l] = of[of_slot(l, i)][l];
        }
      }
      Row mean = {};
      if (o.normalize || o.sigmoid) {
        const Row shift = o.normalize ? shift_of(o.sigmoid, maximum(tile.chosen, k)) : Row{};
        const Row factor = inverse(relative_scores(tile.chosen, k, o.sigmoid, shift, tile.chosen));
        if (o.normalize) {
          for (int64_t i = 0; i < k; ++i) {
            for (int64_t l = 0; l < kW; ++l) {
              tile.chosen[i][l] *= factor[l];
              mean[l] += tile.chosen[i][l] * tile.incoming[i][l];
            }
          }
        }
      }
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t l = 0; l < kW; ++l) {
          tile.incoming[i][l] = tile.chosen[i][l] * (tile.incoming[i][l] - mean[l]);
          if (!o.normalize && !o.sigmoid) dot[l] += tile.incoming[i][l];
        }
      }
    }

    Row of_z;  // softmax: straight into the factor of P
    for (int64_t l = 0; l < kW; ++l) of_z[l] = twice_z * scores.lse[l];
    for (int64_t j = 0; j < e; ++j) {
      const Real c = static_cast<Real>(out.coefficient[j]);
      for (int64_t l = 0; l < kW; ++l) {
        tile.ranked[j][l] = tile.relative[j][l] * (c - dot[l] + (o.sigmoid ? 0 : of_z[l]));
      }
    }
    if (out.grad_gate) {
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t l = 0; l < n; ++l) tile.ranked[of_slot(l, i)][l] += tile.incoming[i][l];
      }
    }
    if (o.sigmoid) {
      for (int64_t j = 0; j < e; ++j) {
        Row x, y;  // 1 - σ(z) = e^(-max(z, 0)) / (1 + e^(-|z|)), which keeps what 1 - σ would lose
        for (int64_t l = 0; l < kW; ++l) {
          x[l] = tile.z[j][l] > 0 ? -tile.z[j][l] : 0;
          y[l] = tile.z[j][l] > 0 ? -tile.z[j][l] : tile.z[j][l];
        }
        exp_lanes(x);
        exp_lanes(y);
        for (int64_t l = 0; l < kW; ++l) {
          tile.ranked[j][l] = tile.ranked[j][l] * x[l] / (1 + y[l]) + tile.sum[j][l] * softmax_inverse[l] * of_z[l];
        }
      }
    }

    for (int64_t l = 0; l < n; ++l) {
      T* row = static_cast<T*>(out.grad_logits) + (first + l) * out.stride;
      if constexpr (sizeof(T) == 2) {
        for (int64_t j = 0; j < e; ++j) tile.rows[j] = tile.ranked[j][l];
        narrow(tile.rows, e, row);
      } else {
        for (int64_t j = 0; j < e; ++j) row[j] = tile.ranked[j][l];
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
