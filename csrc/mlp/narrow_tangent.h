// Tangents of the layers that fit in registers (narrow.h): beside a state on its way forward, and beside its gradient on
// the way back. Symbols as in common/state.h; a suffix _t is the tangent of what it follows. A null weight_t or bias_t is
// zero.
#pragma once

#include "mlp/narrow.h"

namespace narrowdeep {
namespace ND_ISA {

// Vectors of samples at once: both states, before and after, in registers.
template <int N>
constexpr int kTangentVectors = N * 12 <= kRegisters ? 2 : 1;

// Calls body.template operator()<V>(first sample) for all vectors of a tile.
template <int V, class Body>
ND_INLINE void for_vectors(int vectors, int64_t lanes, const Body& body) {
  int v = 0;
  for (; v + V <= vectors; v += V) body.template operator()<V>(v * lanes);
  if constexpr (V > 1)
    for (; v < vectors; ++v) body.template operator()<1>(v * lanes);
}

template <class T>
struct NarrowTangents {
  const T *weight, *bias, *weight_t, *bias_t;
};

// Words of a state and of its tangent, or of a gradient and its tangent.
template <class T>
struct NarrowWords {
  const T *floor, *floor_t;
  T *lo, *lo_t;
};

// Hidden layers [begin, end) without renormalisation; with `states`, the values after layer l go to (l + 1 - begin) * N *
// samples behind `states` and `tangents`.
template <class T, int N, bool OFFSET, bool WEIGHT_T>
struct NarrowForwardTangent {
  NarrowTangents<T> of;
  int64_t begin, end, samples;
  const T* skip;
  NarrowWords<T> words;
  T *states, *tangents;

  template <int V>
  ND_INLINE void operator()(int64_t at) const {
    constexpr int lanes = kLanes<T>;
    Vec<T> lo[N][V], h[N][V], lo_t[N][V], t[N][V];
    for (int i = 0; i < N; ++i)
      for (int v = 0; v < V; ++v) {
        const int64_t e = i * samples + at + v * lanes;
        lo[i][v] = load(words.lo + e);
        lo_t[i][v] = load(words.lo_t + e);
        h[i][v] = OFFSET ? lo[i][v] - load(words.floor + e) : lo[i][v];
        t[i][v] = OFFSET ? lo_t[i][v] - load(words.floor_t + e) : lo_t[i][v];
      }
    for (int64_t l = begin; l < end; ++l) {
      const T* const w = of.weight + l * N * N;
      const T* const w_t = WEIGHT_T ? of.weight_t + l * N * N : nullptr;
      Vec<T> z[N][V], z_t[N][V];
      for (int i = 0; i < N; ++i) {
        const Vec<T> start = broadcast(of.bias[l * N + i]);
        const Vec<T> start_t = of.bias_t ? broadcast(of.bias_t[l * N + i]) : Vec<T>{};
        for (int v = 0; v < V; ++v) z[i][v] = start, z_t[i][v] = start_t;
      }
      for (int k = 0; k < N; ++k)
        for (int i = 0; i < N; ++i) {
          const Vec<T> scalar = broadcast(w[i * N + k]);
          for (int v = 0; v < V; ++v) {
            z[i][v] = fma(scalar, h[k][v], z[i][v]);
            z_t[i][v] = fma(scalar, t[k][v], z_t[i][v]);
            if (WEIGHT_T) z_t[i][v] = fma(broadcast(w_t[i * N + k]), h[k][v], z_t[i][v]);
          }
        }
      for (int i = 0; i < N; ++i)
        for (int v = 0; v < V; ++v) {
          const int64_t e = i * samples + at + v * lanes;
          if (OFFSET) {
            const Vec<T> low = load(words.floor + e), low_t = load(words.floor_t + e), mask = broadcast(skip[i]);
            lo[i][v] = clip(z[i][v] + keep_if(mask, lo[i][v]), low);
            h[i][v] = lo[i][v] - low;
            lo_t[i][v] = where_le0(h[i][v], low_t, z_t[i][v] + keep_if(mask, lo_t[i][v]));
            t[i][v] = lo_t[i][v] - low_t;
          } else {
            h[i][v] = clip(z[i][v], Vec<T>{});
            t[i][v] = where_le0(h[i][v], Vec<T>{}, z_t[i][v]);
          }
          if (!states) continue;
          store(states + (l + 1 - begin) * N * samples + e, h[i][v]);
          store(tangents + (l + 1 - begin) * N * samples + e, t[i][v]);
        }
    }
    for (int i = 0; i < N; ++i)
      for (int v = 0; v < V; ++v) {
        const int64_t e = i * samples + at + v * lanes;
        store(words.lo + e, OFFSET ? lo[i][v] : h[i][v]);
        store(words.lo_t + e, OFFSET ? lo_t[i][v] : t[i][v]);
      }
  }
};

// Layers [begin, end) backwards without renormalisation, given the values of the states before each; G and its tangent of
// layer l go to `full` and `full_t` + (l - begin) * N * samples.
template <class T, int N, bool OFFSET, bool WEIGHT_T>
struct NarrowPropagateTangent {
  NarrowTangents<T> of;
  int64_t begin, end, samples;
  const T* skip;
  NarrowWords<T> words;
  const T* states;
  T *full, *full_t;

  template <int V>
  ND_INLINE void operator()(int64_t at) const {
    constexpr int lanes = kLanes<T>;
    Vec<T> g[N][V], g_t[N][V];
    for (int i = 0; i < N; ++i)
      for (int v = 0; v < V; ++v) {
        g[i][v] = load(words.lo + i * samples + at + v * lanes);
        g_t[i][v] = load(words.lo_t + i * samples + at + v * lanes);
      }
    for (int64_t l = end - 1; l >= begin; --l) {
      const int64_t layer = (l - begin) * N * samples;
      const T* const w = of.weight + l * N * N;
      const T* const w_t = WEIGHT_T ? of.weight_t + l * N * N : nullptr;
      Vec<T> next[N][V] = {}, next_t[N][V] = {};
      for (int i = 0; i < N; ++i) {
        Vec<T> whole[V], whole_t[V];
        for (int v = 0; v < V; ++v) {
          const int64_t e = i * samples + at + v * lanes;
          whole[v] = OFFSET ? g[i][v] - load(words.floor + e) : g[i][v];
          whole_t[v] = OFFSET ? g_t[i][v] - load(words.floor_t + e) : g_t[i][v];
          store(full + layer + e, whole[v]);
          store(full_t + layer + e, whole_t[v]);
        }
        for (int j = 0; j < N; ++j) {
          const Vec<T> scalar = broadcast(w[i * N + j]);
          for (int v = 0; v < V; ++v) {
            next[j][v] = fma(scalar, whole[v], next[j][v]);
            next_t[j][v] = fma(scalar, whole_t[v], next_t[j][v]);
            if (WEIGHT_T) next_t[j][v] = fma(broadcast(w_t[i * N + j]), whole[v], next_t[j][v]);
          }
        }
      }
      for (int j = 0; j < N; ++j)
        for (int v = 0; v < V; ++v) {
          const int64_t e = j * samples + at + v * lanes;
          const Vec<T> h = load(states + layer + e), mask = broadcast(skip[j]);
          const Vec<T> low = OFFSET ? load(words.floor + e) : Vec<T>{};
          const Vec<T> low_t = OFFSET ? load(words.floor_t + e) : Vec<T>{};
          if (OFFSET) next[j][v] = next[j][v] + keep_if(mask, g[j][v]);
          if (OFFSET) next_t[j][v] = next_t[j][v] + keep_if(mask, g_t[j][v]);
          g[j][v] = where_le0(h, low, next[j][v]);
          g_t[j][v] = where_le0(h, low_t, next_t[j][v]);
        }
    }
    for (int i = 0; i < N; ++i)
      for (int v = 0; v < V; ++v) {
        store(words.lo + i * samples + at + v * lanes, g[i][v]);
        store(words.lo_t + i * samples + at + v * lanes, g_t[i][v]);
      }
  }
};

// The same for a tile. `partial`, when not null, gains the tangents of the weight gradients of layer l at (l - begin) *
// kSize: sums over samples of G'_i h_j + G_i T_j and of G'_i.
template <class T, int N, bool OFFSET, bool WEIGHT_T>
inline void narrow_backward_tangent(const NarrowTangents<T>& of, int64_t begin, int64_t end, int vectors, const T* skip,
                                    const NarrowWords<T>& words, const T* states, const T* tangents, T* partial) {
  constexpr int64_t kLayers = 8;  // G and G' of so many layers fit in the first-level cache beside their h and T
  const int64_t samples = vectors * kLanes<T>;
  constexpr int64_t most = kLayers * N * kTileVectors * kLanes<T>;
  alignas(64) T full[most], full_t[most];
  for (int64_t stop = end; stop > begin; stop -= kLayers) {
    const int64_t start = max_of(stop - kLayers, begin), at = (start - begin) * N * samples;
    for_vectors<kTangentVectors<N>>(vectors, kLanes<T>,
                                    NarrowPropagateTangent<T, N, OFFSET, WEIGHT_T>{of, start, stop, samples, skip,
                                                                                   words, states + at, full, full_t});
    if (!partial) continue;
    for (int64_t l = start; l < stop; ++l) {
      const int64_t local = (l - start) * N * samples, layer = (l - begin) * N * samples;
      narrow_reduce_groups<T, N, 0, true>(full_t + local, states + layer, vectors,
                                          partial + (l - begin) * NarrowEntries<T, N>::kSize, full + local,
                                          tangents + layer);
    }
  }
}

}  // namespace ND_ISA
}  // namespace narrowdeep
