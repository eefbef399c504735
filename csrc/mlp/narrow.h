// Widths whose layers fit in registers: everything of one layer unrolled, activations never leave the core.
//
// Floor at width 4 in float32 on AVX-512: a layer is 16 FMAs a vector of 16 samples forward, 48 backward (run again,
// propagate, weight gradient); sums over lanes add about 45 operations a layer for a whole tile.
#pragma once

#include "common/vec.h"

namespace narrowdeep {
namespace ND_ISA {

// Past 10 some registers spill, and it is still faster. Without vectors there are no registers to speak of, and with
// sanitizers each width takes long to compile: to 5 they are of two of the sizes of narrow_few.h.
#if defined(__SANITIZE_ADDRESS__)
constexpr int kNarrowest = 2, kWidestNarrow = 5;
#else
constexpr int kNarrowest = 2, kWidestNarrow = kVectorBytes ? 12 : 8;
#endif
constexpr int kTileVectors = 4;  // vectors in a tile at most

// Hidden layers [begin, end) for V vectors of samples, without renormalisation. Arrays start at the first of the V vectors.
// With STORE, the state after layer l goes to states + (l - begin + 1) * N * samples.
template <class T, int N, int V, bool OFFSET, bool STORE>
inline void narrow_forward_block(const T* weight, const T* bias, int64_t begin, int64_t end, int64_t samples,
                                 const T* skip, const T* floor, T* lo_memory, T* states) {
  constexpr int lanes = kLanes<T>;
  Vec<T> lo[N][V], h[N][V];
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < V; ++v) {
      lo[i][v] = load(lo_memory + i * samples + v * lanes);
      h[i][v] = OFFSET ? lo[i][v] - load(floor + i * samples + v * lanes) : lo[i][v];
    }
  for (int64_t l = begin; l < end; ++l) {
    const T* w = weight + l * N * N;
    const T* c = bias + l * N;
    Vec<T> z[N][V];
    for (int i = 0; i < N; ++i) {
      const Vec<T> start = broadcast(c[i]);
      for (int v = 0; v < V; ++v) z[i][v] = start;
    }
    for (int k = 0; k < N; ++k)
      for (int i = 0; i < N; ++i) {
        const Vec<T> scalar = broadcast(w[i * N + k]);
        for (int v = 0; v < V; ++v) z[i][v] = fma(scalar, h[k][v], z[i][v]);
      }
    if (STORE) states += N * samples;
    for (int i = 0; i < N; ++i)
      for (int v = 0; v < V; ++v) {
        if (OFFSET) {
          const Vec<T> low = load(floor + i * samples + v * lanes);
          // lo comes in last: it is the one large term beside the small increments
          lo[i][v] = clip(z[i][v] + keep_if(broadcast(skip[i]), lo[i][v]), low);
          h[i][v] = lo[i][v] - low;
        } else {
          h[i][v] = clip(z[i][v], Vec<T>{});
        }
        if (STORE) store(states + i * samples + v * lanes, h[i][v]);
      }
  }
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < V; ++v) store(lo_memory + i * samples + v * lanes, OFFSET ? lo[i][v] : h[i][v]);
}

template <class T, int N, bool OFFSET, bool STORE>
inline void narrow_forward(const T* weight, const T* bias, int64_t begin, int64_t end, int vectors, const T* skip,
                           const T* floor, T* lo, T* states) {
  constexpr int V = N * 6 <= kRegisters ? 2 : 1;
  const int64_t samples = vectors * kLanes<T>;
  int v = 0;
  for (; v + V <= vectors; v += V) {
    const int64_t at = v * kLanes<T>;
    narrow_forward_block<T, N, V, OFFSET, STORE>(weight, bias, begin, end, samples, skip, floor + at, lo + at,
                                                 STORE ? states + at : nullptr);
  }
  if constexpr (V > 1)
    for (; v < vectors; ++v) {
      const int64_t at = v * kLanes<T>;
      narrow_forward_block<T, N, 1, OFFSET, STORE>(weight, bias, begin, end, samples, skip, floor + at, lo + at,
                                                   STORE ? states + at : nullptr);
    }
}

// ---- weight gradients: sums over samples of G_i h_j and G_i ---------------------------------------------------------
// Entries of one layer: (i, j) at i * N + j, then the biases. They are summed in groups of a vector's lanes; the last
// group may be smaller and is padded to a power of two.
constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }

template <class T, int N>
struct NarrowEntries {
  static constexpr int kCount = N * N + N;
  static constexpr int kGroups = (kCount + kLanes<T> - 1) / kLanes<T>;
  static constexpr int kSize = kGroups * kLanes<T>;  // elements of `partial` a layer
  // Where the sum of an entry stands in `partial`.
  static ND_INLINE int position(int entry) {
    const int group = entry / kLanes<T>, rest = entry % kLanes<T>;
    const int members = kCount - group * kLanes<T>;
    const int padded = members >= kLanes<T> ? kLanes<T> : power_of_two_from(members);
    return group * kLanes<T> + rest * (kLanes<T> / padded);
  }
};

// TWO: full2_i h2_j as well, but not in the bias's sums.
template <class T, int N, int GROUP, bool TWO = false>
ND_INLINE void narrow_reduce_groups(const T* full, const T* h, int vectors, T* partial, const T* full2 = nullptr,
                                    const T* h2 = nullptr) {
  typedef NarrowEntries<T, N> E;
  if constexpr (GROUP < E::kGroups) {
    constexpr int lanes = kLanes<T>;
    constexpr int first = GROUP * lanes;
    constexpr int members = E::kCount - first < lanes ? E::kCount - first : lanes;
    constexpr int padded = power_of_two_from(members);
    const int64_t samples = vectors * lanes;
    Vec<T> acc[padded];
    for (int e = 0; e < padded; ++e) acc[e] = Vec<T>{};
    for (int v = 0; v < vectors; ++v)
      for (int e = 0; e < members; ++e) {
        const int entry = first + e;
        if (entry < N * N) {
          acc[e] =
              fma(load(full + (entry / N) * samples + v * lanes), load(h + (entry % N) * samples + v * lanes), acc[e]);
          if (TWO)
            acc[e] = fma(load(full2 + (entry / N) * samples + v * lanes), load(h2 + (entry % N) * samples + v * lanes),
                         acc[e]);
        } else {
          acc[e] = acc[e] + load(full + (entry - N * N) * samples + v * lanes);
        }
      }
    T* to = partial + GROUP * lanes;
    store(to, load(to) + sum_lanes<T, padded>(acc));
    narrow_reduce_groups<T, N, GROUP + 1, TWO>(full, h, vectors, partial, full2, h2);
  }
}

// Layers [begin, end) backwards for V vectors of samples, without renormalisation; G of layer l goes to full + (l - begin) * N *
// samples. `states` holds h of every state of the block, the first being the input of layer `begin`.
template <class T, int N, int V, bool OFFSET>
inline void narrow_propagate(const T* weight, int64_t begin, int64_t end, int64_t samples, const T* skip,
                             const T* floor, T* g_memory, const T* states, T* full) {
  constexpr int lanes = kLanes<T>;
  Vec<T> g[N][V], low[N][V];
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < V; ++v) {
      g[i][v] = load(g_memory + i * samples + v * lanes);
      low[i][v] = OFFSET ? load(floor + i * samples + v * lanes) : Vec<T>{};
    }
  for (int64_t l = end - 1; l >= begin; --l) {
    const T* w = weight + l * N * N;
    const T* h = states + (l - begin) * N * samples;
    T* const to = full + (l - begin) * N * samples;
    Vec<T> next[N][V];
    for (int i = 0; i < N; ++i) {
      Vec<T> whole[V];
      for (int v = 0; v < V; ++v) {
        whole[v] = OFFSET ? g[i][v] - low[i][v] : g[i][v];
        store(to + i * samples + v * lanes, whole[v]);
      }
      for (int j = 0; j < N; ++j) {
        const Vec<T> scalar = broadcast(w[i * N + j]);
        for (int v = 0; v < V; ++v) next[j][v] = i == 0 ? scalar * whole[v] : fma(scalar, whole[v], next[j][v]);
      }
    }
    for (int j = 0; j < N; ++j)
      for (int v = 0; v < V; ++v) {
        if (OFFSET) next[j][v] = next[j][v] + keep_if(broadcast(skip[j]), g[j][v]);
        g[j][v] = where_le0(load(h + j * samples + v * lanes), low[j][v], next[j][v]);
      }
  }
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < V; ++v) store(g_memory + i * samples + v * lanes, g[i][v]);
}

// The same for a tile. `partial`, when not null, gains the weight gradients of layer l at (l - begin) * kSize.
template <class T, int N, bool OFFSET>
inline void narrow_backward(const T* weight, int64_t begin, int64_t end, int vectors, const T* skip, const T* floor,
                            T* g, const T* states, T* partial) {
  constexpr int V = N * 6 <= kRegisters ? 2 : 1;
  constexpr int64_t kLayers = 8;  // G of so many layers fits in the first-level cache beside their h
  const int64_t samples = vectors * kLanes<T>;
  alignas(64) T full[kLayers * N * kTileVectors * kLanes<T>];
  for (int64_t stop = end; stop > begin; stop -= kLayers) {
    const int64_t start = max_of(stop - kLayers, begin);
    const T* const h = states + (start - begin) * N * samples;
    int v = 0;
    for (; v + V <= vectors; v += V) {
      const int64_t at = v * kLanes<T>;
      narrow_propagate<T, N, V, OFFSET>(weight, start, stop, samples, skip, floor + at, g + at, h + at, full + at);
    }
    if constexpr (V > 1)
      for (; v < vectors; ++v) {
        const int64_t at = v * kLanes<T>;
        narrow_propagate<T, N, 1, OFFSET>(weight, start, stop, samples, skip, floor + at, g + at, h + at, full + at);
      }
    if (!partial) continue;
    for (int64_t l = start; l < stop; ++l) {
      const int64_t at = (l - start) * N * samples;
      narrow_reduce_groups<T, N, 0>(full + at, h + at, vectors, partial + (l - begin) * NarrowEntries<T, N>::kSize);
    }
  }
}

}  // namespace ND_ISA
}  // namespace narrowdeep
