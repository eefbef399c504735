// What happens to the sums of a layer, W h or W^T G, while they are in registers: a block of R rows by V vectors. Arrays
// are [row][position][samples]: `stride` elements a row, and the block's first vector of a row at `at` elements in it.
// `skip` is a mask a row, `floor` as in common/state.h.
#pragma once

#include "common/vec.h"

namespace narrowdeep {
namespace ND_ISA {

// Asks for row `row` of a weight that the next layer will read: its rows are too short for the processor to foresee, and
// the backward reads it by columns.
template <class T>
struct NextWeight {
  const T* weight;
  int64_t columns;  // 0: there is nothing to ask for
  ND_INLINE void prefetch(int64_t row) const {
    for (int64_t c = 0; c < columns; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(weight + row * columns + c, 0, 2);
  }
};

// lo = clip(skip lo + (sum + bias), floor), h = lo - floor.
template <class T>
struct StateEpilogue {
  const T *bias, *skip, *floor;
  T *lo, *h;
  int64_t stride;
  NextWeight<T> next;
  template <int R, int V>
  ND_INLINE void operator()(int64_t row, int64_t at, Vec<T> (*sum)[V]) const {
    ND_UNROLL for (int r = 0; r < R; ++r) {
      next.prefetch(row + r);
      const Vec<T> start = broadcast(bias[row + r]), mask = broadcast(skip[row + r]);
      const int64_t from = (row + r) * stride + at;
      ND_UNROLL for (int v = 0; v < V; ++v) {
        const Vec<T> low = load(floor + from + v * kLanes<T>);
        // lo comes in last: it is the one large term beside the small increments
        const Vec<T> rest = clip(keep_if(mask, load(lo + from + v * kLanes<T>)) + (sum[r][v] + start), low);
        store(lo + from + v * kLanes<T>, rest);
        store(h + from + v * kLanes<T>, rest - low);
      }
    }
  }
};

// lo = h <= 0 ? floor : skip lo + sum, full = lo - floor, which is 0 where the unit is off.
template <class T>
struct GradientEpilogue {
  const T *h, *skip, *floor;
  T *lo, *full;
  int64_t stride;
  NextWeight<T> next;
  template <int R, int V>
  ND_INLINE void operator()(int64_t row, int64_t at, Vec<T> (*sum)[V]) const {
    ND_UNROLL for (int r = 0; r < R; ++r) {
      next.prefetch(row + r);
      const Vec<T> mask = broadcast(skip[row + r]);
      const int64_t from = (row + r) * stride + at;
      ND_UNROLL for (int v = 0; v < V; ++v) {
        const Vec<T> low = load(floor + from + v * kLanes<T>);
        const Vec<T> kept = keep_if(mask, load(lo + from + v * kLanes<T>)) + sum[r][v];
        const Vec<T> rest = where_le0(load(h + from + v * kLanes<T>), low, kept);
        store(lo + from + v * kLanes<T>, rest);
        store(full + from + v * kLanes<T>, rest - low);
      }
    }
  }
};

// to = sum + bias, or sum where there is none.
template <class T>
struct WriteEpilogue {
  const T* bias;
  T* to;
  int64_t stride;
  template <int R, int V>
  ND_INLINE void operator()(int64_t row, int64_t at, Vec<T> (*sum)[V]) const {
    ND_UNROLL for (int r = 0; r < R; ++r) {
      const int64_t from = (row + r) * stride + at;
      ND_UNROLL for (int v = 0; v < V; ++v) {
        store(to + from + v * kLanes<T>, bias ? sum[r][v] + broadcast(bias[row + r]) : sum[r][v]);
      }
    }
  }
};

// to += sum
template <class T>
struct AddEpilogue {
  T* to;
  int64_t stride;
  template <int R, int V>
  ND_INLINE void operator()(int64_t row, int64_t at, Vec<T> (*sum)[V]) const {
    ND_UNROLL for (int r = 0; r < R; ++r) {
      const int64_t from = (row + r) * stride + at;
      ND_UNROLL for (int v = 0; v < V; ++v) {
        T* const here = to + from + v * kLanes<T>;
        store(here, load(here) + sum[r][v]);
      }
    }
  }
};

}  // namespace ND_ISA
}  // namespace narrowdeep
