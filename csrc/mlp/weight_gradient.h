// The gradient of one layer's weight and bias: sums over samples of G_i h_j and of G_i.
#pragma once

#include "common/gemm.h"

namespace narrowdeep {
namespace ND_ISA {

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
                              transposed + t * samples * padded + column, padded, t + 1 < tiles ? samples : last_valid,
                              acc);
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
  // A large one goes to memory in its own order, a few rows at a time.
  const int64_t together = large<T>(of.rows, of.columns) ? 12 : end - begin;
  for (int64_t row = begin; row < end; row += together) {
    const int64_t stop = min_of(row + together, end);
    for (int64_t j = 0; j < padded;) {
      const int64_t left = (padded - j) / kLanes<T>;
      if (left >= 4) {
        for_row_blocks<4>(row, stop, GradientRows<T, 4>{of, scratch, samples, tiles, last_valid, j});
        j += 4 * kLanes<T>;
      } else if (left >= 2) {
        for_row_blocks<2>(row, stop, GradientRows<T, 2>{of, scratch, samples, tiles, last_valid, j});
        j += 2 * kLanes<T>;
      } else {
        for_row_blocks<1>(row, stop, GradientRows<T, 1>{of, scratch, samples, tiles, last_valid, j});
        j += kLanes<T>;
      }
    }
  }
}

// The same of one tile of at most S samples, row by row: memory is written in its own order. `packed` is room for S
// (columns + lanes) elements; `columns` is at least the lanes.
template <class T, int S>
__attribute__((noinline)) void weight_gradient_few(const GradientOf<T>& of, int64_t valid, T* packed) {
  constexpr int lanes = kLanes<T>;
  const int64_t columns = of.columns, whole = columns / lanes * lanes, stride = whole + lanes;
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t c = 0; c < whole; ++c) packed[s * stride + c] = of.h[c * lanes + s];
    // The last vector of a row reaches back: over what is written again, or over what has been added.
    for (int64_t c = columns - lanes; c < columns; ++c)
      packed[s * stride + whole + c - (columns - lanes)] = of.add && c < whole ? T(0) : of.h[c * lanes + s];
  }
  for (int64_t row = 0; row < of.rows; ++row) {
    Vec<T> gradient[S];
    T bias = of.add ? of.bias[row] : T(0);
  ND_UNROLL for (int s = 0; s < S; ++s) {
      const T g = s < valid ? of.full[row * lanes + s] : T(0);
      gradient[s] = broadcast(g);
      bias += g;
    }
    of.bias[row] = bias;
    T* const to = of.weight + row * columns;
    const auto put = [&](int64_t at, int64_t c) {
      Vec<T> sum = gradient[0] * load(packed + c);
      ND_UNROLL for (int s = 1; s < S; ++s) sum = fma(gradient[s], load(packed + s * stride + c), sum);
      store(to + at, of.add ? load(to + at) + sum : sum);
    };
    for (int64_t c = 0; c < whole; c += lanes) put(c, c);
    if (whole < columns) put(columns - lanes, whole);
  }
}

}  // namespace ND_ISA
}  // namespace narrowdeep
