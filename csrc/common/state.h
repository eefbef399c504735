// A chain state in three parts, h = (base + moved) + a, and its moves. The backward carries G = (R + moved) + g the
// same way. narrowdeep/ops/reference.py has the legend and says why.
//
// Arrays are [unit][sample] with the samples of one tile contiguous. `floor` is -(base + moved): the value at which `a`
// is clipped (h = a - floor is exactly 0 there).
#pragma once

#include "common/gemm.h"

namespace narrowdeep {
namespace ND_ISA {

constexpr int64_t kMovePeriod = 32;  // layers between two moves; MOVE_PERIOD in reference.py

// The first layer after `layer` (0-based hidden layer) before which no further move is due, at most `end`: layers
// [layer, next_move(layer, end)) run without a move, which then follows if `moves_after` says so.
ND_INLINE int64_t next_move(int64_t layer, int64_t end) { return min_of((layer / kMovePeriod + 1) * kMovePeriod, end); }
ND_INLINE bool moves_after(int64_t layer) { return layer % kMovePeriod == 0; }

// Adds `a` to `moved` exactly (two-sum, the rounding error stays in a). A unit at exactly 0 is put to moved = -base,
// a = 0, so that it stays there. Only for units that are kept; the others stay as they are.
template <class T>
inline void move_state(int64_t units, int64_t samples, const T* keep, const T* base, T* moved, T* floor, T* a) {
  for (int64_t i = 0; i < units; ++i) {
    if (keep[i] == T(0)) continue;
    for (int64_t s = i * samples; s < (i + 1) * samples; ++s) {
      const T old = moved[s], add = a[s];
      const T total = old + add, t = total - old;
      const T rest = (old - (total - t)) + (add - t);
      const bool dead = add == floor[s];
      moved[s] = dead ? -base[s] : total;
      a[s] = dead ? T(0) : rest;
      floor[s] = -(base[s] + moved[s]);
    }
  }
}

template <class T>
inline void set_floor(int64_t count, const T* base, const T* moved, T* floor) {
  for (int64_t s = 0; s < count; ++s) floor[s] = -(base[s] + moved[s]);
}

// Copies `valid` samples of `units` rows from [unit][stride] and fills the tile's other samples with the last valid one,
// whose values they then share: what they compute is thrown away, but never makes a NaN that the data did not.
template <class T>
inline void load_rows(int64_t units, int64_t samples, int64_t valid, const T* from, int64_t stride, T* to) {
  for (int64_t i = 0; i < units; ++i) {
    const T* row = from + i * stride;
    for (int64_t s = 0; s < valid; ++s) to[i * samples + s] = row[s];
    for (int64_t s = valid; s < samples; ++s) to[i * samples + s] = row[valid - 1];
  }
}

template <class T>
inline void store_rows(int64_t units, int64_t samples, int64_t valid, const T* from, T* to, int64_t stride) {
  for (int64_t i = 0; i < units; ++i)
    for (int64_t s = 0; s < valid; ++s) to[i * stride + s] = from[i * samples + s];
}

}  // namespace ND_ISA
}  // namespace narrowdeep
