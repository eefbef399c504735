// One affine layer of any width, on a tile of samples: [unit][samples] arrays, `vectors` vectors of samples.
#pragma once

#include "common/state.h"

namespace narrowdeep {
namespace ND_ISA {

// h_out = relu(W h_in + c) with the state carried in parts: a = clip(keep a + W h + c, floor), h = a - floor.
template <class T>
struct HiddenForward {
  const T *bias, *keep, *floor;
  T *a, *h_out;
  int64_t samples;
  template <int R, int V>
  ND_INLINE void operator()(int64_t row, Vec<T> (*acc)[V]) const {
    for (int r = 0; r < R; ++r) {
      const int64_t i = row + r;
      const Vec<T> c = broadcast(bias[i]), mask = broadcast(keep[i]);
      for (int v = 0; v < V; ++v) {
        const int64_t at = i * samples + v * kLanes<T>;
        const Vec<T> low = load(floor + at);
        const Vec<T> rest = clip((acc[r][v] + c) + keep_if(mask, load(a + at)), low);
        store(a + at, rest);
        store(h_out + at, rest - low);
      }
    }
  }
};

// g = h <= 0 ? floor : keep g + W^T G, so that G = g - floor is 0 where the unit is off.
template <class T>
struct HiddenBackward {
  const T *keep, *floor, *h;
  T* g;
  int64_t samples;
  template <int R, int V>
  ND_INLINE void operator()(int64_t row, Vec<T> (*acc)[V]) const {
    for (int r = 0; r < R; ++r) {
      const int64_t j = row + r;
      const Vec<T> mask = broadcast(keep[j]);
      for (int v = 0; v < V; ++v) {
        const int64_t at = j * samples + v * kLanes<T>;
        const Vec<T> next = acc[r][v] + keep_if(mask, load(g + at));
        store(g + at, where_le0(load(h + at), load(floor + at), next));
      }
    }
  }
};

// to = scale * acc + factor * from (from over the first `from_rows` rows only) + bias; any of from and bias may be null.
template <class T>
struct Affine {
  const T* bias;
  const T* from;
  int64_t from_rows;
  T factor;
  T* to;
  int64_t samples;
  template <int R, int V>
  ND_INLINE void operator()(int64_t row, Vec<T> (*acc)[V]) const {
    for (int r = 0; r < R; ++r) {
      const int64_t i = row + r;
      for (int v = 0; v < V; ++v) {
        const int64_t at = i * samples + v * kLanes<T>;
        Vec<T> z = acc[r][v];
        if (bias) z = z + broadcast(bias[i]);
        if (from && i < from_rows) z = fma(broadcast(factor), load(from + at), z);
        store(to + at, z);
      }
    }
  }
};

// to += acc + bias
template <class T>
struct Accumulate {
  T* to;
  int64_t samples;
  template <int R, int V>
  ND_INLINE void operator()(int64_t row, Vec<T> (*acc)[V]) const {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        T* at = to + (row + r) * samples + v * kLanes<T>;
        store(at, load(at) + acc[r][v]);
      }
  }
};

// Weight gradients: one row of C is one row of the weight, its column number `columns` is the bias.
template <class T>
struct AddToGradient {
  T *weight, *bias;
  int64_t columns, first_column;
  template <int R, int V>
  ND_INLINE void operator()(int64_t row, Vec<T> (*acc)[V]) const {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        const int64_t j = first_column + v * kLanes<T>;
        T* to = weight + (row + r) * columns + j;
        if (j + kLanes<T> <= columns) {
          store(to, load(to) + acc[r][v]);
        } else {
          for (int lane = 0; lane < kLanes<T> && j + lane <= columns; ++lane) {
            if (j + lane < columns) {
              to[lane] += acc[r][v][lane];
            } else {
              bias[row + r] += acc[r][v][lane];
            }
          }
        }
      }
  }
};

template <class T>
ND_INLINE int64_t padded_columns(int64_t columns) {
  return ceil_div(columns + 1, kLanes<T>) * kLanes<T>;
}

// weight[i][j] += sum_s full[i][s] h[j][s] and bias[i] += sum_s full[i][s] over `valid` samples, rows [begin, end).
// `scratch` holds samples * padded_columns elements. Sums over samples would need a reduction over lanes for every
// weight; with h transposed the lanes run over columns and there is none.
template <class T>
inline void add_gradient(int64_t begin, int64_t end, int64_t columns, int64_t samples, int64_t valid, const T* full,
                         const T* h, T* weight, T* bias, T* scratch) {
  const int64_t padded = padded_columns<T>(columns);
  transpose(columns, valid, h, samples, scratch, padded);
  for (int64_t s = 0; s < valid; ++s) {
    scratch[s * padded + columns] = T(1);
    for (int64_t j = columns + 1; j < padded; ++j) scratch[s * padded + j] = T(0);
  }
  for (int64_t j = 0; j < padded;) {
    const AddToGradient<T> epilogue{weight, bias, columns, j};
    const int64_t left = (padded - j) / kLanes<T>;
    if (left >= 4) {
      multiply_rows<T, 4>(begin, end, full, samples, 1, scratch + j, padded, valid, epilogue);
      j += 4 * kLanes<T>;
    } else if (left >= 2) {
      multiply_rows<T, 2>(begin, end, full, samples, 1, scratch + j, padded, valid, epilogue);
      j += 2 * kLanes<T>;
    } else {
      multiply_rows<T, 1>(begin, end, full, samples, 1, scratch + j, padded, valid, epilogue);
      j += kLanes<T>;
    }
  }
}

}  // namespace ND_ISA
}  // namespace narrowdeep
