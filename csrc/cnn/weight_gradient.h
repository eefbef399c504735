// The gradient of one convolution's weight and bias on a tile: sums over samples and positions of G h and of G.
#pragma once

#include "cnn/correlate.h"
#include "common/state.h"

namespace narrowdeep {
namespace ND_ISA {

// ---- lanes over output channels -------------------------------------------------------------------------------------
// G is transposed to [position][sample][padded channel], some positions of a row at a time, and a number of h multiplies a
// vector of it. No sum over lanes is needed, and lanes without a sample cost nothing.
constexpr int64_t kTerms = 256;  // of a sum one after another: a longer one loses digits

template <class T>
ND_INLINE int64_t padded_channels(int64_t channels) {
  return ceil_div(channels, kLanes<T>) * kLanes<T>;
}

// Whether this is faster than lanes over samples, whose sum over lanes takes as long as 4 positions, measured; where the
// channels are one vector, too few sums are on their way at once, and it takes a tenth longer.
template <class T>
ND_INLINE bool lanes_over_channels(int64_t rows, int64_t positions, int64_t valid) {
  const int64_t padded = padded_channels<T>(rows), tenths = padded > kLanes<T> ? 10 : 11;
  return tenths * positions * valid * padded < 10 * (positions + 4) * rows * kLanes<T>;
}

// Blocks of positions, of kTerms terms at most and within a row; and how many of them one after another are summed before
// they are added to a total: all, where there are few.
struct Blocks {
  int64_t positions, count, together;
  bool have_totals() const { return together < count; }
};
template <class T>
ND_INLINE Blocks blocks_of(const Plane& plane) {
  const int64_t positions = min_of(kTerms / kLanes<T>, plane.width);
  const int64_t count = plane.height * ceil_div(plane.width, positions);
  return {positions, count, count <= kTerms ? count : block_of(count)};
}

// Elements of its scratch.
template <class T>
ND_INLINE int64_t products_scratch(int64_t rows, int64_t channels, int64_t size, const Plane& plane) {
  const Blocks blocks = blocks_of<T>(plane);
  const int64_t sums = channels * size * size * (blocks.have_totals() ? 2 : 1);
  return (sums + blocks.positions * kLanes<T>)*padded_channels<T>(rows);
}

// Channels of h in a block for V vectors of G. Its channels stand apart by the size of an image, often a power of two, and
// share few sets of the cache: 16 of them at 16x16 positions took twice as long as 4.
template <int V>
constexpr int kTapChannels = V > 1 || kRegisters == 32 ? 4 : 8;

// One tap: `positions` of a row of h, `stored` elements a channel, times as many of G; added to sums, `taps` rows apart.
template <class T, int V>
struct TapRows {
  const T *h, *full;
  int64_t stored, padded, positions, valid, taps;
  T* sums;
  template <int R>
  ND_INLINE void operator()(int64_t channel) const {
    constexpr int lanes = kLanes<T>;
    const T* const from = h + channel * stored;
    Vec<T> acc[R][V] = {};
    if (valid == lanes) {
      multiply_block<T, R, V>(from, stored, 1, full, padded, positions * lanes, acc);
    } else {
      for (int64_t p = 0; p < positions; ++p)
        multiply_block<T, R, V>(from + p * lanes, stored, 1, full + p * lanes * padded, padded, valid, acc);
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        T* const to = sums + (channel + r) * taps * padded + v * lanes;
        store(to, load(to) + acc[r][v]);
      }
  }
};

// Positions [x, x + count) of row y of G, to [position][sample][padded channel].
template <class T>
inline void transpose_row(int64_t rows, const Plane& plane, const T* full, int64_t y, int64_t x, int64_t count, T* to) {
  constexpr int lanes = kLanes<T>;
  const int64_t padded = padded_channels<T>(rows), positions = plane.height * plane.width;
  for (int64_t p = 0; p < count; ++p)
    for (int64_t o = 0; o < padded; o += lanes) {
      Vec<T> block[lanes];
      for (int i = 0; i < lanes; ++i)
        block[i] = o + i < rows ? load(full + ((o + i) * positions + y * plane.width + x + p) * lanes) : Vec<T>{};
      transpose_step<T, lanes / 2>(block);
      for (int i = 0; i < lanes; ++i) store(to + (p * lanes + i) * padded + o, block[i]);
    }
}

// weight[o][c][tap] = (or += with `add`) the sums of the first `valid` samples.
template <class T, class In>
inline void weight_products(int64_t rows, int64_t channels, int64_t valid, int64_t size, const Plane& plane,
                            const T* full, const In& h, T* weight, bool add, T* scratch) {
  constexpr int lanes = kLanes<T>;
  const int64_t padded = padded_channels<T>(rows), radius = size / 2, taps = size * size, entries = channels * taps;
  const int64_t stored = h.positions(plane) * lanes;
  const Blocks blocks = blocks_of<T>(plane);
  T *const sums = scratch, *const transposed = sums + entries * padded;  // [channel][tap][padded channel of G]
  T* const totals = transposed + blocks.positions * lanes * padded;
  fill(entries * padded, T(0), sums);
  int64_t done = 0;
  for (int64_t y = 0; y < plane.height; ++y)
    for (int64_t x = 0; x < plane.width; x += blocks.positions) {
      if (done > 0 && done % blocks.together == 0) {
        if (done > blocks.together) ND_ISA::add(entries * padded, totals, sums);
        copy(entries * padded, sums, totals);
        fill(entries * padded, T(0), sums);
      }
      ++done;
      const int64_t count = min_of(blocks.positions, plane.width - x);
      transpose_row(rows, plane, full, y, x, count, transposed);
      const int64_t row_begin = max_of(0, radius - h.margin() - y);
      const int64_t row_end = min_of(size, plane.height + radius + h.margin() - y);
      for (int64_t i = row_begin; i < row_end; ++i)
        for (int64_t j = 0; j < size; ++j) {
          const int64_t begin = max_of(x, radius - j), end = min_of(x + count, plane.width + radius - j);
          if (begin >= end) continue;
          const T* const right = h.at(plane, 0, y + i - radius, begin + j - radius);
          const T* const left = transposed + (begin - x) * lanes * padded;
          T* const to = sums + (i * size + j) * padded;
          int64_t o = 0;
          for (; o + 2 * lanes <= padded; o += 2 * lanes)
            for_row_blocks<2, kTapChannels<2>>(
                0, channels, TapRows<T, 2>{right, left + o, stored, padded, end - begin, valid, taps, to + o});
          if (o < padded)
            for_row_blocks<1, kTapChannels<1>>(
                0, channels, TapRows<T, 1>{right, left + o, stored, padded, end - begin, valid, taps, to + o});
        }
    }
  if (blocks.have_totals()) ND_ISA::add(entries * padded, totals, sums);
  for (int64_t o = 0; o < padded; o += lanes)
    for (int64_t e = 0; e < entries; e += lanes) {
      Vec<T> block[lanes];
      for (int i = 0; i < lanes; ++i) block[i] = e + i < entries ? load(sums + (e + i) * padded + o) : Vec<T>{};
      transpose_step<T, lanes / 2>(block);
      const int64_t count = min_of(lanes, entries - e);
      for (int64_t i = 0; i < min_of(lanes, rows - o); ++i) {
        T* const to = weight + (o + i) * entries + e;
        if (count == lanes) {
          store(to, add ? load(to) + block[i] : block[i]);
        } else {
          store_first(to, add ? load_first(to, count) + block[i] : block[i], count);
        }
      }
    }
}

// ---- lanes over samples ---------------------------------------------------------------------------------------------
// sums[o][c][tap] (a vector each) = sum over positions of full[o][y][x] h[c][y + i - size / 2][x + j - size / 2].
// One tap at a time: its positions inside the image are a rectangle. Rows of it are summed in blocks of about kPositions:
// a long sum one after another loses digits.
constexpr int64_t kPositions = 64;
template <class T, int O, int C, class In>
void weight_sums_block(int64_t o, int64_t c, int64_t channels, int64_t size, const Plane& plane, const T* full,
                       const In& h, T* sums) {
  constexpr int lanes = kLanes<T>;
  const int64_t radius = size / 2, positions = plane.height * plane.width, stored = h.positions(plane);
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j) {
      const int64_t y_begin = max_of(0, radius - h.margin() - i);
      const int64_t y_end = min_of(plane.height, plane.height + radius + h.margin() - i);
      const int64_t x_begin = max_of(0, radius - j), x_end = min_of(plane.width, plane.width + radius - j);
      Vec<T> sum[O][C];
  ND_UNROLL for (int a = 0; a < O; ++a) {
        ND_UNROLL for (int b = 0; b < C; ++b) sum[a][b] = Vec<T>{};
      }
      const auto put = [&](bool add) {
        ND_UNROLL for (int a = 0; a < O; ++a) {
          ND_UNROLL for (int b = 0; b < C; ++b) {
            T* const to = sums + (((o + a) * channels + c + b) * size * size + i * size + j) * lanes;
            store(to, add ? load(to) + sum[a][b] : sum[a][b]);
          }
        }
      };
      const int64_t block = max_of(1, kPositions / plane.width);  // rows
      int64_t block_end = y_begin + block;
      for (int64_t y = y_begin; y < y_end; ++y) {
        if (y == block_end) {
          put(y > y_begin + block);
          block_end += block;
          ND_UNROLL for (int a = 0; a < O; ++a) {
            ND_UNROLL for (int b = 0; b < C; ++b) sum[a][b] = Vec<T>{};
          }
        }
        const T* left = full + (o * positions + y * plane.width) * lanes;
        const T* right = h.at(plane, c, y + i - radius, j - radius);
        for (int64_t x = x_begin; x < x_end; ++x) {
          Vec<T> column[C];
          ND_UNROLL for (int b = 0; b < C; ++b) column[b] = load(right + (b * stored + x) * lanes);
          ND_UNROLL for (int a = 0; a < O; ++a) {
            const Vec<T> gradient = load(left + (a * positions + x) * lanes);
            ND_UNROLL for (int b = 0; b < C; ++b) sum[a][b] = fma(gradient, column[b], sum[a][b]);
          }
        }
      }
      put(block_end > y_begin + block);
    }
}

template <class T, int O, class In>
ND_INLINE void weight_sums_columns(int64_t count, int64_t o, int64_t c, int64_t channels, int64_t size,
                                   const Plane& plane, const T* full, const In& h, T* sums) {
  switch (count) {
    case 1: return weight_sums_block<T, O, 1>(o, c, channels, size, plane, full, h, sums);
    case 2: return weight_sums_block<T, O, 2>(o, c, channels, size, plane, full, h, sums);
    case 3: return weight_sums_block<T, O, 3>(o, c, channels, size, plane, full, h, sums);
    default:
      if constexpr (kBlockChannels > 3) weight_sums_block<T, O, 4>(o, c, channels, size, plane, full, h, sums);
  }
}

template <class T, class In>
inline void weight_sums(int64_t rows, int64_t channels, int64_t size, const Plane& plane, const T* full,
                        const In& h, T* sums) {
  const int64_t height = even_block(rows, kBlockChannels), width = even_block(channels, kBlockChannels);
  for (int64_t o = 0; o < rows; o += height)
    for (int64_t c = 0; c < channels; c += width) {
      const int64_t count = min_of(height, rows - o), wide = min_of(width, channels - c);
      if (count == 1) {
        weight_sums_columns<T, 1>(wide, o, c, channels, size, plane, full, h, sums);
      } else if (count == 2) {
        weight_sums_columns<T, 2>(wide, o, c, channels, size, plane, full, h, sums);
      } else if (count == 3) {
        weight_sums_columns<T, 3>(wide, o, c, channels, size, plane, full, h, sums);
      } else if constexpr (kBlockChannels > 3) {
        weight_sums_columns<T, 4>(wide, o, c, channels, size, plane, full, h, sums);
      }
    }
}

// sums[channel] (a vector each) = sum over positions of full[channel].
template <class T>
inline void bias_sums(int64_t rows, int64_t positions, const T* full, T* sums) {
  constexpr int lanes = kLanes<T>;
  for (int64_t o = 0; o < rows; ++o) {
    const T* row = full + o * positions * lanes;
    Vec<T> total{};
    for (int64_t begin = 0; begin < positions; begin += kPositions) {
      const int64_t end = min_of(begin + kPositions, positions);
      Vec<T> even{}, odd{};
      int64_t p = begin;
      for (; p + 2 <= end; p += 2) {
        even = even + load(row + p * lanes);
        odd = odd + load(row + (p + 1) * lanes);
      }
      if (p < end) even = even + load(row + p * lanes);
      total = begin == 0 ? even + odd : total + (even + odd);
    }
    store(sums + o * lanes, total);
  }
}

// grad[e] = (or += with `add`) the sum of the first `valid` lanes of sums[e], for `count` entries.
template <class T>
inline void sum_samples(int64_t count, int64_t valid, const T* sums, T* grad, bool add) {
  constexpr int lanes = kLanes<T>;
  alignas(64) T mask_memory[lanes], tail[lanes];
  for (int64_t s = 0; s < lanes; ++s) mask_memory[s] = s < valid ? all_ones<T>() : T(0);
  const Vec<T> mask = load(mask_memory);
  for (int64_t e = 0; e < count; e += lanes) {
    Vec<T> group[lanes];
    ND_UNROLL for (int k = 0; k < lanes; ++k) {
      group[k] = e + k < count ? keep_if(mask, load(sums + (e + k) * lanes)) : Vec<T>{};
    }
    const Vec<T> total = sum_lanes<T, lanes>(group);
    if (e + lanes <= count) {
      store(grad + e, add ? load(grad + e) + total : total);
    } else {
      store(tail, total);
      for (int64_t k = 0; e + k < count; ++k) grad[e + k] = add ? grad[e + k] + tail[k] : tail[k];
    }
  }
}

}  // namespace ND_ISA
}  // namespace narrowdeep
