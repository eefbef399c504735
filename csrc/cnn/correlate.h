// One convolution layer on a tile: as many images, or strips of them, as a vector has lanes, stored
// [channel][row][column][lane].
//
// Floor of a correlation: one FMA a vector for each pair of channels, position and filter tap inside the image (361 taps
// of 3x3 filters on a 7x7 image, not 441). Weights are broadcast; a block of O output channels by X positions of a row
// stays in registers, so that a tap costs O + X loads for O X FMAs.
#pragma once

#include "common/args.h"
#include "common/epilogue.h"
#include "common/gemm.h"

namespace narrowdeep {
namespace ND_ISA {

// weight[o][c][i][j] at start + o * out_stride + c * in_stride + (i * size + j) * tap_stride.
template <class T>
struct Filter {
  const T* start;
  int64_t out_stride, in_stride, tap_stride, size;
};

// The filter of a layer with `columns` input channels, contiguous (rows, columns, size, size).
template <class T>
ND_INLINE Filter<T> forward_filter(const T* weight, int64_t columns, int64_t size) {
  return {weight, columns * size * size, size * size, 1, size};
}

// Its transpose: rows and columns change places and the taps are read backwards.
template <class T>
ND_INLINE Filter<T> transposed_filter(const T* weight, int64_t columns, int64_t size) {
  return {weight + size * size - 1, size * size, columns * size * size, -1, size};
}

// What a correlation reads, [channel][row][column][lane]: an image, with nothing around it, or a strip of one, with as many
// rows above and below as the filter sees. (One type for both, with the rows as a number, was 2 to 9% slower on images.)
template <class T>
struct Image {
  const T* start;
  static constexpr int64_t margin() { return 0; }
  ND_INLINE int64_t positions(const Plane& plane) const { return plane.height * plane.width; }
  ND_INLINE const T* at(const Plane& plane, int64_t c, int64_t y, int64_t x) const {
    return start + ((c * plane.height + y) * plane.width + x) * kLanes<T>;
  }
};
template <class T>
struct Strip {
  const T* start;
  int64_t radius;
  ND_INLINE int64_t margin() const { return radius; }
  ND_INLINE int64_t positions(const Plane& plane) const { return (plane.height + 2 * radius) * plane.width; }
  ND_INLINE const T* at(const Plane& plane, int64_t c, int64_t y, int64_t x) const {
    return start + ((c * (plane.height + 2 * radius) + y + radius) * plane.width + x) * kLanes<T>;
  }
};

// Accumulators of a block, two operands and a spare must fit in the registers.
constexpr int kBlockColumns = 4;
constexpr int kBlockChannels = kRegisters == 32 ? 4 : 3;

// Size of the blocks when [0, count) is divided into the fewest of at most `most`; the last may be smaller.
ND_INLINE int64_t even_block(int64_t count, int64_t most) { return ceil_div(count, ceil_div(count, most)); }

// Output channels [o, o + O) at row y, columns [x, x + X): sums of every tap inside the image, then the epilogue:
// one of common/epilogue.h.
template <class T, int O, int X, class In, class Epilogue>
void correlate_block(const Filter<T>& filter, int64_t channels, const Plane& plane, const In& in, int64_t o, int64_t y,
                     int64_t x, const Epilogue& epilogue) {
  constexpr int lanes = kLanes<T>;
  const int64_t radius = filter.size / 2;
  const int64_t row_begin = max_of(0, radius - in.margin() - y);
  const int64_t row_end = min_of(filter.size, plane.height + radius + in.margin() - y);
  const int64_t tap_begin = max_of(0, radius - x - (X - 1)), tap_end = min_of(filter.size, plane.width + radius - x);
  Vec<T> sum[O][X];
  ND_UNROLL for (int a = 0; a < O; ++a) {
    ND_UNROLL for (int b = 0; b < X; ++b) sum[a][b] = Vec<T>{};
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = row_begin; i < row_end; ++i) {
      const T* weight = filter.start + o * filter.out_stride + c * filter.in_stride + i * filter.size * filter.tap_stride;
      const T* row = in.at(plane, c, y + i - radius, 0);
      for (int64_t j = tap_begin; j < tap_end; ++j) {
        Vec<T> w[O];
        ND_UNROLL for (int a = 0; a < O; ++a) w[a] = broadcast(weight[a * filter.out_stride + j * filter.tap_stride]);
        const int64_t from = x + j - radius;  // the column that the block's first position sees
        if (from >= 0 && from + X <= plane.width) {
          ND_UNROLL for (int b = 0; b < X; ++b) {
            const Vec<T> h = load(row + (from + b) * lanes);
            ND_UNROLL for (int a = 0; a < O; ++a) sum[a][b] = fma(w[a], h, sum[a][b]);
          }
        } else {
          ND_UNROLL for (int b = 0; b < X; ++b) {
            if (from + b < 0 || from + b >= plane.width) continue;
            const Vec<T> h = load(row + (from + b) * lanes);
            ND_UNROLL for (int a = 0; a < O; ++a) sum[a][b] = fma(w[a], h, sum[a][b]);
          }
        }
      }
    }
  }
  epilogue.template operator()<O, X>(o, (y * plane.width + x) * lanes, sum);
}

// The same for 3x3 filters, the taps of a row unrolled: only the block's first and last positions can see a column
// outside the image. A quarter faster at 3 channels, where blocks are so short that a mispredicted branch shows.
template <class T, int O, int X, class In, class Epilogue>
void correlate_block3(const Filter<T>& filter, int64_t channels, const Plane& plane, const In& in, int64_t o, int64_t y,
                      int64_t x, const Epilogue& epilogue) {
  constexpr int lanes = kLanes<T>;
  const bool cut = in.margin() == 0;
  const int64_t row_begin = cut && y == 0 ? 1 : 0, row_end = cut && y == plane.height - 1 ? 2 : 3;
  const bool at_left = x == 0, at_right = x + X == plane.width;
  Vec<T> sum[O][X];
  ND_UNROLL for (int a = 0; a < O; ++a) {
    ND_UNROLL for (int b = 0; b < X; ++b) sum[a][b] = Vec<T>{};
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = row_begin; i < row_end; ++i) {
      const T* weight =
          filter.start + o * filter.out_stride + c * filter.in_stride + i * 3 * filter.tap_stride;
      const T* row = in.at(plane, c, y + i - 1, x);
      ND_UNROLL for (int j = 0; j < 3; ++j) {
        Vec<T> w[O];
        ND_UNROLL for (int a = 0; a < O; ++a) w[a] = broadcast(weight[a * filter.out_stride + j * filter.tap_stride]);
        ND_UNROLL for (int b = 0; b < X; ++b) {
          if ((b + j == 0 && at_left) || (b + j == X + 1 && at_right)) continue;
          const Vec<T> h = load(row + (b + j - 1) * lanes);
          ND_UNROLL for (int a = 0; a < O; ++a) sum[a][b] = fma(w[a], h, sum[a][b]);
        }
      }
    }
  }
  epilogue.template operator()<O, X>(o, (y * plane.width + x) * lanes, sum);
}

template <class T, int O, int X, class In, class Epilogue>
ND_INLINE void correlate_any(const Filter<T>& filter, int64_t channels, const Plane& plane, const In& in, int64_t o,
                             int64_t y, int64_t x, const Epilogue& epilogue) {
  if (filter.size == 3) return correlate_block3<T, O, X>(filter, channels, plane, in, o, y, x, epilogue);
  correlate_block<T, O, X>(filter, channels, plane, in, o, y, x, epilogue);
}

template <class T, int O, class In, class Epilogue>
ND_INLINE void correlate_columns(int64_t columns, const Filter<T>& filter, int64_t channels, const Plane& plane,
                                 const In& in, int64_t o, int64_t y, int64_t x, const Epilogue& epilogue) {
  static_assert(kBlockColumns == 4, "one case a number of columns");
  switch (columns) {
    case 1: return correlate_any<T, O, 1>(filter, channels, plane, in, o, y, x, epilogue);
    case 2: return correlate_any<T, O, 2>(filter, channels, plane, in, o, y, x, epilogue);
    case 3: return correlate_any<T, O, 3>(filter, channels, plane, in, o, y, x, epilogue);
    default: return correlate_any<T, O, 4>(filter, channels, plane, in, o, y, x, epilogue);
  }
}

// An epilogue for vectors that begin at `at` of a row.
template <class Epilogue>
struct From {
  const Epilogue& epilogue;
  int64_t at;
  template <int R, int V, class Sum>
  ND_INLINE void operator()(int64_t row, int64_t, Sum sum) const {
    epilogue.template operator()<R, V>(row, at, sum);
  }
};

// Filters of one tap: a matrix product whose columns are the positions of all rows.
template <class T, class Epilogue>
inline void correlate_one(const Filter<T>& filter, int64_t channels, int64_t out_channels, int64_t positions,
                          const T* in, const Epilogue& epilogue) {
  const int64_t stride = positions * kLanes<T>;
  for (int64_t p = 0; p < positions; p += kBlockColumns)
    multiply<T>(int(min_of(kBlockColumns, positions - p)), out_channels, filter.start, filter.out_stride,
                filter.in_stride, in + p * kLanes<T>, stride, channels, From<Epilogue>{epilogue, p * kLanes<T>});
}

// sum[o][y][x] = sum over c, i, j of weight[o][c][i][j] in[c][y + i - size / 2][x + j - size / 2], inside the image.
template <class T, class In, class Epilogue>
inline void correlate(const Filter<T>& filter, int64_t channels, int64_t out_channels, const Plane& plane, const In& in,
                      const Epilogue& epilogue) {
  const int64_t height = even_block(out_channels, kBlockChannels), width = even_block(plane.width, kBlockColumns);
  for (int64_t y = 0; y < plane.height; ++y)
    for (int64_t o = 0; o < out_channels; o += height)
      for (int64_t x = 0; x < plane.width; x += width) {
        const int64_t count = min_of(height, out_channels - o), wide = min_of(width, plane.width - x);
        if (count == 1) {
          correlate_columns<T, 1>(wide, filter, channels, plane, in, o, y, x, epilogue);
        } else if (count == 2) {
          correlate_columns<T, 2>(wide, filter, channels, plane, in, o, y, x, epilogue);
        } else if (count == 3) {
          correlate_columns<T, 3>(wide, filter, channels, plane, in, o, y, x, epilogue);
        } else if constexpr (kBlockChannels > 3) {
          correlate_columns<T, 4>(wide, filter, channels, plane, in, o, y, x, epilogue);
        }
      }
}

}  // namespace ND_ISA
}  // namespace narrowdeep
