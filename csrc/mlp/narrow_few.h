// The narrow widths of narrow.h for few samples: lanes over the units of a sample or two. With lanes over samples a layer
// waits for N multiply-adds one after another; here for one, and for the additions of a sum over units, log2 N. And the
// gradient of a weight is a product, where lanes over samples have to be summed.
//
// Limit at width 4 in float32: a product (4 cycles), two shuffles and additions (8), what the unit was, the clip and the
// difference (8) wait for one another: 20 cycles a layer. Vectors of 32 bytes, where units fit them, also where there are longer
// ones: those were 28% slower with half of their lanes in use.
#pragma once

#include "common/state.h"
#include "mlp/narrow_tangent.h"

namespace narrowdeep {
namespace ND_ISA {

template <int BYTES>
struct IntegerOf {
  typedef int32_t type;
};
template <>
struct IntegerOf<8> {
  typedef int64_t type;
};

// A vector is kSamples groups of kUnits lanes, of which the first N count: unit i of sample s is lane s * kUnits + i.
template <class T, int N>
struct UnitLanes {
  static constexpr int kUnits = N <= 4 ? 4 : power_of_two_from(N);
  static constexpr int kSamples = kUnits * int(sizeof(T)) < 32 && kHas32Bytes ? 32 / (kUnits * int(sizeof(T))) : 1;
  static constexpr int kLanes = kUnits * kSamples;
  static constexpr int kBytes = kLanes * int(sizeof(T));
  static constexpr bool kFit = kBytes == kVectorBytes || (kBytes == 32 && kHas32Bytes);
  typedef typename MakeIndices<kLanes>::type All;
  typedef typename MakeIndices<kUnits>::type One;
  typedef T Lanes __attribute__((vector_size(kLanes * sizeof(T))));
  typedef T Units __attribute__((vector_size(kUnits * sizeof(T))));

  // N numbers of memory in every group; what follows them in memory is read and left out.
  static ND_INLINE Lanes row(const T* p) {
    Units x;
    __builtin_memcpy(&x, p, sizeof(x));
    if constexpr (N < kUnits) x = first_units(x, One());
    return repeated(x, All());
  }
  template <int... I>
  static ND_INLINE Units first_units(Units x, Indices<I...>) {
    typedef decltype(x > x) Mask;
    return (Units)((Mask)x & Mask{-(I < N)...});
  }
  template <int... I>
  static ND_INLINE Lanes repeated(Units x, Indices<I...>) {
    if constexpr (kSamples == 1) return x;
    if constexpr (kSamples > 1) return __builtin_shufflevector(x, x, (I % kUnits)...);
  }
  // x in the first lane of every group, 0 in the others.
  template <int... I>
  static ND_INLINE Lanes in_first(T x, Indices<I...>) {
    typedef decltype(Lanes{} > Lanes{}) Mask;
    return (Lanes)((Mask)(x - Lanes{}) & Mask{-(I % kUnits == 0)...});
  }
  static ND_INLINE Lanes keep(Lanes mask, Lanes x) {
    typedef decltype(x > x) Mask;
    return (Lanes)((Mask)mask & (Mask)x);
  }

  // Unit J of every group in all lanes of the group; and all of them.
  template <int J, int... I>
  static ND_INLINE Lanes unit(Lanes x, Indices<I...>) {
    return __builtin_shufflevector(x, x, (I / kUnits * kUnits + J)...);
  }
  template <int J = 0>
  static ND_INLINE void units(Lanes x, Lanes* to) {
    if constexpr (J < N) {
      to[J] = unit<J>(x, All());
      units<J + 1>(x, to);
    }
  }

  // Memory [unit][sample]: kSamples of a unit at once.
  typedef typename IntegerOf<kSamples* int(sizeof(T))>::type Run;
  typedef Run Runs __attribute__((vector_size(sizeof(Lanes))));
  static ND_INLINE Lanes load_units(const T* from, int64_t samples) {
    Runs x = {};
    ND_UNROLL for (int i = 0; i < N; ++i) {
      Run run;
      __builtin_memcpy(&run, from + i * samples, sizeof(run));
      x[i] = run;
    }
    return reordered<kSamples>((Lanes)x, All());
  }
  static ND_INLINE void store_units(T* to, int64_t samples, Lanes lanes) {
    const Runs x = (Runs)reordered<kUnits>(lanes, All());
    ND_UNROLL for (int i = 0; i < N; ++i) {
      const Run run = x[i];
      __builtin_memcpy(to + i * samples, &run, sizeof(run));
    }
  }
  // Lanes (a, b), b of BY, in the order (b, a).
  template <int BY, int... I>
  static ND_INLINE Lanes reordered(Lanes x, Indices<I...>) {
    return __builtin_shufflevector(x, x, (I % (kLanes / BY) * BY + I / (kLanes / BY))...);
  }

  // Sums over the lanes of a group: of 2 W vectors to begin with, that of acc[k] in lane k. Halves of groups longer than 16
  // bytes change places as a whole; within 16 bytes a shuffle takes one cycle.
  template <int W = kUnits / 2>
  static ND_INLINE Lanes sums(const Lanes* acc) {
    constexpr int near = 16 / int(sizeof(T));
    constexpr bool far = 2 * W > near;
    constexpr int group = far ? 2 * W : near < kUnits ? near : kUnits;
    Lanes half[W];
    ND_UNROLL for (int k = 0; k < W; ++k) {
      const Lanes x = acc[far ? k : 2 * k], y = acc[far ? k + W : 2 * k + 1];
      half[k] = halves<W, 0, group>(x, y, All()) + halves<W, W, group>(x, y, All());
    }
    if constexpr (W == 1) return half[0];
    if constexpr (W > 1) return sums<W / 2>(half);
  }
  // Of every 2 W lanes the W from FROM on: those of x in the first half of each group, those of y in the second.
  template <int W, int FROM, int GROUP, int... I>
  static ND_INLINE Lanes halves(Lanes x, Lanes y, Indices<I...>) {
    return __builtin_shufflevector(x, y,
                                   (I % GROUP / (GROUP / 2) * kLanes + I / GROUP * GROUP +
                                    I % (GROUP / 2) / W * 2 * W + FROM + I % W)...);
  }
  // The sum over i of row i of a weight times each[i]: products in pairs, then a tree.
  static ND_INLINE Lanes combined(const Lanes* rows, const Lanes* each) {
    Lanes pairs[kUnits / 2] = {};
    ND_UNROLL for (int k = 0; k < N / 2; ++k)
      pairs[k] = fma(rows[2 * k + 1], each[2 * k + 1], rows[2 * k] * each[2 * k]);
    if (N % 2) pairs[N / 2] = rows[N - 1] * each[N - 1];
    ND_UNROLL for (int w = kUnits / 4; w > 0; w /= 2)
      ND_UNROLL for (int k = 0; k < w; ++k) pairs[k] = pairs[k] + pairs[k + w];
    return pairs[0];
  }
  // The sum over samples, N numbers.
  static ND_INLINE void store_sum(T* to, Lanes x) {
    static_assert(kSamples <= 2, "one addition");
    if constexpr (kSamples == 2) x = x + rotate_within<kUnits>(x, All());
    __builtin_memcpy(to, &x, N * sizeof(T));
  }
};

// How many vectors take a batch: 1, 2 or 4; or 0 where lanes over samples do.
template <class T, int N>
constexpr int kMostFewVectors = !UnitLanes<T, N>::kFit ? 0 : N <= 4 ? 4 : 2;
template <class T, int N>
ND_INLINE int few_vectors(int64_t batch) {
  for (int v = 1; v <= kMostFewVectors<T, N>; v *= 2)
    if (batch <= v * UnitLanes<T, N>::kSamples) return v;
  return 0;
}

// Weights of layers up to `end`. A row is read as kUnits numbers, past the last layer where N is less: hence a copy of it.
template <class T, int N>
struct WeightRows {
  static constexpr int kPast = UnitLanes<T, N>::kUnits - N;
  T last[N * N + kPast];
  const T* weight;
  int64_t end;
  WeightRows(const T* weights, int64_t end) : weight(weights), end(end) {
    for (int e = 0; kPast > 0 && e < N * N + kPast; ++e) last[e] = end > 0 && e < N * N ? weights[(end - 1) * N * N + e] : T(0);
  }
  ND_INLINE void load(int64_t l, typename UnitLanes<T, N>::Lanes* rows) const {
    const T* const w = kPast > 0 && l + 1 == end ? last : weight + l * N * N;
    ND_UNROLL for (int i = 0; i < N; ++i) rows[i] = UnitLanes<T, N>::row(w + i * N);
  }
};

// The words of a state or a gradient, of V vectors.
template <class T, int N, int V, bool OFFSET>
struct FewWords {
  typedef UnitLanes<T, N> Of;
  typedef typename Of::Lanes Lanes;
  Lanes base[V], hi[V], low[V], lo[V], kept;

  ND_INLINE FewWords(const State<T>& from, int64_t samples, const T* skip) : kept(Of::row(skip)) {
    ND_UNROLL for (int v = 0; v < V; ++v) {
      const int64_t at = v * Of::kSamples;
      base[v] = OFFSET ? Of::load_units(from.base + at, samples) : Lanes{};
      hi[v] = OFFSET ? Of::load_units(from.hi + at, samples) : Lanes{};
      low[v] = OFFSET ? Of::load_units(from.floor + at, samples) : Lanes{};
      lo[v] = Of::load_units(from.lo + at, samples);
    }
  }
  ND_INLINE void store(const State<T>& to, int64_t samples) const {
    ND_UNROLL for (int v = 0; v < V; ++v) {
      const int64_t at = v * Of::kSamples;
      if (OFFSET) Of::store_units(to.hi + at, samples, hi[v]);
      if (OFFSET) Of::store_units(to.floor + at, samples, low[v]);
      Of::store_units(to.lo + at, samples, lo[v]);
    }
  }
  ND_INLINE Lanes total(int v) const { return OFFSET ? lo[v] - low[v] : lo[v]; }
  // lo after a layer that gives z, before it is clipped. lo comes in last: it is the one large term beside the small
  // increments.
  ND_INLINE Lanes after(int v, Lanes z) const { return OFFSET ? z + Of::keep(kept, lo[v]) : z; }
  // As `renormalise` of common/state.h, with its bits.
  ND_INLINE void renormalise() {
    typedef decltype(kept > kept) Mask;
    const Mask on = (Mask)kept;
    ND_UNROLL for (int v = 0; v < V; ++v) {
      const Lanes old = hi[v], more = lo[v], sum = old + more, t = sum - old;
      const Lanes rest = (old - (sum - t)) + (more - t);
      const Mask dead = more == low[v];
      hi[v] = on ? (dead ? -base[v] : sum) : old;
      lo[v] = on ? (dead ? Lanes{} : rest) : more;
      low[v] = on ? -(base[v] + hi[v]) : low[v];
    }
  }
};

// Hidden layers [begin, end), as narrow_forward and renormalised, for the first V * kSamples samples of arrays
// [unit][sample]. State l of the span is state start + l of the network.
template <class T, int N, int V, bool OFFSET, bool STORE>
__attribute__((noinline)) void narrow_few_forward(const T* weight, const T* bias, int64_t begin, int64_t end,
                                                  int64_t start, int64_t samples, const T* skip,
                                                  const State<T>& state, T* states) {
  typedef UnitLanes<T, N> Of;
  typedef typename Of::Lanes Lanes;
  const WeightRows<T, N> weights(weight, end);
  FewWords<T, N, V, OFFSET> of(state, samples, skip);
  Lanes h[V], rows[N];
  ND_UNROLL for (int v = 0; v < V; ++v) h[v] = of.total(v);
  for (int64_t l = begin; l < end; ++l) {
    weights.load(l, rows);
    ND_UNROLL for (int v = 0; v < V; ++v) {
      Lanes products[Of::kUnits] = {};
      ND_UNROLL for (int i = 0; i < N; ++i)
        products[i] = fma(rows[i], h[v], Of::in_first(bias[l * N + i], typename Of::All()));
      of.lo[v] = clip(of.after(v, Of::sums(products)), of.low[v]);
      h[v] = of.total(v);
    }
    if (OFFSET && (start + l + 1) % kRenormalisePeriod == 0) {
      of.renormalise();
      ND_UNROLL for (int v = 0; v < V; ++v) h[v] = of.total(v);
    }
    if (!STORE) continue;
    states += N * samples;
    ND_UNROLL for (int v = 0; v < V; ++v) Of::store_units(states + v * Of::kSamples, samples, h[v]);
  }
  of.store(state, samples);
}

// The same beside a tangent, as NarrowForwardTangent and without renormalisation: a state has the bits that it has without
// a tangent.
template <class T, int N, int V, bool OFFSET, bool WEIGHT_T>
__attribute__((noinline)) void narrow_few_forward_tangent(const NarrowTangents<T>& layers, int64_t begin, int64_t end,
                                                          int64_t samples, const T* skip, const State<T>& state,
                                                          const State<T>& tangent) {
  typedef UnitLanes<T, N> Of;
  typedef typename Of::Lanes Lanes;
  const typename Of::All all;
  const WeightRows<T, N> weights(layers.weight, end), weights_t(layers.weight_t, WEIGHT_T ? end : 0);
  FewWords<T, N, V, OFFSET> of(state, samples, skip), of_t(tangent, samples, skip);
  Lanes h[V], t[V], rows[N], rows_t[N];
  ND_UNROLL for (int v = 0; v < V; ++v) h[v] = of.total(v), t[v] = of_t.total(v);
  for (int64_t l = begin; l < end; ++l) {
    weights.load(l, rows);
    if (WEIGHT_T) weights_t.load(l, rows_t);
    ND_UNROLL for (int v = 0; v < V; ++v) {
      Lanes products[Of::kUnits] = {}, products_t[Of::kUnits] = {};
      ND_UNROLL for (int i = 0; i < N; ++i) {
        products[i] = fma(rows[i], h[v], Of::in_first(layers.bias[l * N + i], all));
        products_t[i] = rows[i] * t[v];
        if (WEIGHT_T) products_t[i] = fma(rows_t[i], h[v], products_t[i]);
        if (layers.bias_t) products_t[i] = products_t[i] + Of::in_first(layers.bias_t[l * N + i], all);
      }
      of.lo[v] = clip(of.after(v, Of::sums(products)), of.low[v]);
      h[v] = of.total(v);
      of_t.lo[v] = h[v] <= T(0) ? of_t.low[v] : of_t.after(v, Of::sums(products_t));
      t[v] = of_t.total(v);
    }
  }
  of.store(state, samples);
  of_t.store(tangent, samples);
}

// Layers [begin, end) backwards, as narrow_backward and renormalised. Gradients of layer l are written from weight_gradient +
// (l - begin) N N and bias_gradient + (l - begin) N on, unless these are null.
template <class T, int N, int V, bool OFFSET>
__attribute__((noinline)) void narrow_few_backward(const T* weight, int64_t begin, int64_t end, int64_t start,
                                                   int64_t samples, const T* skip, const State<T>& gradient,
                                                   const T* states, T* weight_gradient, T* bias_gradient) {
  typedef UnitLanes<T, N> Of;
  typedef typename Of::Lanes Lanes;
  const WeightRows<T, N> weights(weight, end);
  FewWords<T, N, V, OFFSET> of(gradient, samples, skip);
  Lanes rows[N];
  for (int64_t l = end - 1; l >= begin; --l) {
    weights.load(l, rows);
    Lanes products[N], full_sum;
    ND_UNROLL for (int v = 0; v < V; ++v) {
      const Lanes h = Of::load_units(states + (l - begin) * N * samples + v * Of::kSamples, samples);
      const Lanes full = of.total(v);
      Lanes each[N];
      Of::units(full, each);
      const Lanes next = Of::combined(rows, each);
      if (weight_gradient) {
        ND_UNROLL for (int i = 0; i < N; ++i) products[i] = v == 0 ? each[i] * h : fma(each[i], h, products[i]);
        full_sum = v == 0 ? full : full_sum + full;
      }
      of.lo[v] = h <= T(0) ? of.low[v] : of.after(v, next);
    }
    if (OFFSET && (start + l) % kRenormalisePeriod == 0 && start + l > 0) of.renormalise();
    if (!weight_gradient) continue;
    ND_UNROLL for (int i = 0; i < N; ++i) Of::store_sum(weight_gradient + ((l - begin) * N + i) * N, products[i]);
    Of::store_sum(bias_gradient + (l - begin) * N, full_sum);
  }
  of.store(gradient, samples);
}

}  // namespace ND_ISA
}  // namespace narrowdeep
