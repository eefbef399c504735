// One affine layer of any width, on a tile of samples: [unit][samples] arrays, `vectors` vectors of samples.
#pragma once

#include "common/state.h"

namespace narrowdeep {
namespace ND_ISA {

// Asks for row `row` of a weight that the next layer will read: its rows are too short for the processor to foresee, and
// the backward reads it by columns.
template <class T>
ND_INLINE void prefetch_row(const T* weight, int64_t columns, int64_t row) {
  for (int64_t c = 0; c < columns; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(weight + row * columns + c, 0, 2);
}

// h_out = relu(W h_in + c) with the state carried in parts: a = clip(keep a + W h + c, floor), h = a - floor.
template <class T>
struct HiddenForward {
  const T *bias, *keep, *floor;
  T *a, *h_out;
  int64_t samples;
  const T* next_weight;  // to be fetched meanwhile, (width, next_columns), or nothing
  int64_t next_columns;
  template <int R, int V>
  ND_INLINE void operator()(int64_t row, Vec<T> (*acc)[V]) const {
    for (int r = 0; r < R; ++r) {
      const int64_t i = row + r;
      prefetch_row(next_weight, next_columns, i);
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
  const T* next_weight;  // to be fetched meanwhile, (width, next_columns), or nothing
  int64_t next_columns;
  template <int R, int V>
  ND_INLINE void operator()(int64_t row, Vec<T> (*acc)[V]) const {
    for (int r = 0; r < R; ++r) {
      const int64_t j = row + r;
      prefetch_row(next_weight, next_columns, j);
      const Vec<T> mask = broadcast(keep[j]);
      for (int v = 0; v < V; ++v) {
        const int64_t at = j * samples + v * kLanes<T>;
        const Vec<T> next = acc[r][v] + keep_if(mask, load(g + at));
        store(g + at, where_le0(load(h + at), load(floor + at), next));
      }
    }
  }
};

// to = acc + bias + factor * from, `from` over the first `from_rows` rows only; both may be null.
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

// to += acc
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

// ---- weight gradients -----------------------------------------------------------------------------------------------

// What one layer's weight gradient is made of, from `tiles` tiles of samples: tile t has full + t * full_stride and
// h + t * h_stride, [rows][samples] and [columns][samples], of which valid(t) samples count.
template <class T>
struct GradientOf {
  const T *full, *h;
  int64_t full_stride, h_stride;
  int64_t rows, columns;
  T *weight, *bias;  // (rows, columns), (rows)
  bool add;          // to what they hold, or write over it
};

// `h` of one tile transposed to [sample][padded columns], a column of ones after the last: with it the bias's gradient
// is one more column of the weight's. The lanes then run over columns, and no sum over lanes is needed.
template <class T>
ND_INLINE int64_t padded_columns(int64_t columns) {
  return ceil_div(columns + 1, kLanes<T>) * kLanes<T>;
}
template <class T>
inline void transpose_with_ones(int64_t columns, int64_t samples, const T* h, T* to) {
  const int64_t padded = padded_columns<T>(columns);
  for (int64_t s = 0; s < samples; s += kLanes<T>)
    for (int64_t c = 0; c < padded; c += kLanes<T>) {
      Vec<T> block[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i)
        block[i] = c + i < columns ? load(h + (c + i) * samples + s) : broadcast(T(c + i == columns));
      transpose_step<T, kLanes<T> / 2>(block);
      for (int i = 0; i < kLanes<T>; ++i) store(to + (s + i) * padded + c, block[i]);
    }
}

// Columns [column, column + V vectors) of some rows, summed over all samples of all tiles.
template <class T, int V>
struct GradientRows {
  const GradientOf<T>& of;
  const T* transposed;
  int64_t samples, tiles, last_valid, column;
  template <int R>
  ND_INLINE void operator()(int64_t row) const {
    const int64_t padded = padded_columns<T>(of.columns);
    Vec<T> acc[R][V] = {};
    for (int64_t t = 0; t < tiles; ++t)
      multiply_block<T, R, V>(of.full + t * of.full_stride + row * samples, samples, 1,
                              transposed + t * samples * padded + column, padded, t + 1 < tiles ? samples : last_valid, acc);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        const int64_t j = column + v * kLanes<T>;
        T* const to = of.weight + (row + r) * of.columns + j;
        if (j + kLanes<T> <= of.columns) {
          store(to, of.add ? load(to) + acc[r][v] : acc[r][v]);
        } else {
          const int64_t count = of.columns - j;  // 0 where the vector begins with the column of ones
          T lanes[kLanes<T>];
          store(lanes, acc[r][v]);
          store_first(to, of.add ? load_first(to, count) + acc[r][v] : acc[r][v], count);
          of.bias[row + r] = of.add ? of.bias[row + r] + lanes[count] : lanes[count];
        }
      }
  }
};

// Rows [begin, end) of the weight's and the bias's gradient. All tiles but the last are full; `scratch` holds
// tiles * samples * padded_columns elements.
template <class T>
inline void weight_gradient(const GradientOf<T>& of, int64_t begin, int64_t end, int64_t samples, int64_t tiles,
                            int64_t last_valid, T* scratch) {
  const int64_t padded = padded_columns<T>(of.columns);
  for (int64_t t = 0; t < tiles; ++t)
    transpose_with_ones(of.columns, samples, of.h + t * of.h_stride, scratch + t * samples * padded);
  for (int64_t j = 0; j < padded;) {
    const int64_t left = (padded - j) / kLanes<T>;
    if (left >= 4) {
      for_row_blocks<4>(begin, end, GradientRows<T, 4>{of, scratch, samples, tiles, last_valid, j});
      j += 4 * kLanes<T>;
    } else if (left >= 2) {
      for_row_blocks<2>(begin, end, GradientRows<T, 2>{of, scratch, samples, tiles, last_valid, j});
      j += 2 * kLanes<T>;
    } else {
      for_row_blocks<1>(begin, end, GradientRows<T, 1>{of, scratch, samples, tiles, last_valid, j});
      j += kLanes<T>;
    }
  }
}

}  // namespace ND_ISA
}  // namespace narrowdeep
