// The legend of symbols, for all of csrc (narrowdeep/ops/reference.py has the mathematics and says why):
//
//   base, hi, lo  a hidden state is kept as h = (base + hi) + lo. `base` is made of x, [scale relu(x); 0; scale], and 0
//                 in plain form; `hi` is what has been moved out of `lo`
//   renormalise   every kRenormalisePeriod layers `lo` is moved into `hi` by an exact two-sum. Where depends on the
//                 absolute number of a state alone, so results do not depend on how a chain is cut
//   floor         -(base + hi): the value at which `lo` is clipped. h = lo - floor is exactly 0 there
//   G = (R + hi) + lo   the gradient with respect to a pre-activation, R = [0; 0; r], r that of the output
//   T = (D + hi) + lo   a tangent, D = [scale relu'(x) x_t; 0; 0]
//   skip          the diagonal of the identity part of a hidden weight, as masks: all ones, or 0
//   state j       follows hidden layer j - 1, and state 0 the first layer. Here states are counted within their span:
//                 state j of it is the network's state start + j
//   tile          some vectors of samples that go through many layers together
//
// Arrays of a tile are [unit][sample], a unit being a channel at a position: [channel][position] for images. Where images
// do not fill the lanes an image is cut in strips of whole rows, a lane each: "sample" is a strip then. The rows past the
// image's last are computed like the others, and count nowhere.
#pragma once

#include "common/args.h"
#include "common/gemm.h"

namespace narrowdeep {
namespace ND_ISA {

constexpr int64_t kRenormalisePeriod = 32;  // RENORMALISE_PERIOD in reference.py

// Samples [begin, end) of a batch that are cut alike: each in so many strips, 1 where a sample has a lane to itself.
struct Part {
  int64_t begin, end, strips;
};

// What every tile of a part shares: how it is cut, sizes in elements, masks.
template <class T>
struct Tiles {
  ChainShape shape;
  int64_t begin, strips, lanes;  // the part's first sample; strips of each, which divide a vector's lanes; all of them
  Plane plane;                   // of a lane
  int64_t vectors, samples, count;  // of a tile, vectors * lanes; tiles
  int64_t positions, units;         // of a channel, of a state, in one lane
  int64_t image;                    // positions of a whole channel
  int64_t row, size;                // elements of a tile's channel, and of its state
  Buffer masks;
  T *skip, *every, *skip_units;  // (width) twice, (units)

  // Tiles of 1 to 4 vectors, at most `most`.
  Tiles(const ChainShape& s, int64_t most, int64_t threads, const Part& part)
      : shape(s),
        begin(part.begin),
        strips(part.strips),
        lanes(strips * (part.end - begin)),
        plane{ceil_div(s.plane.height, strips), s.plane.width},
        vectors(vectors_of(ceil_div(ceil_div(lanes, kLanes<T>), threads), most)),
        samples(vectors * kLanes<T>),
        count(ceil_div(lanes, samples)),
        positions(plane.height * plane.width),
        units(s.width * positions),
        image(s.plane.height * s.plane.width),
        row(positions * samples),
        size(s.width * row),
        masks((2 * s.width + units) * int64_t(sizeof(T))),
        skip(masks.as<T>()),
        every(skip + s.width),
        skip_units(every + s.width) {
    for (int64_t i = 0; i < s.width; ++i) {
      every[i] = all_ones<T>();
      skip[i] = s.offset && (i < in() || i >= right()) ? every[i] : T(0);
      for (int64_t p = 0; p < positions; ++p) skip_units[i * positions + p] = skip[i];
    }
  }

  // The number, at most `most`, that takes a thread's share of the vectors through in least time: a vector past the share
  // is lost, and a tile's own costs are about those of half a vector.
  static int64_t vectors_of(int64_t share, int64_t most) {
    int64_t best = 1, least = 3 * share;
    for (int64_t vectors = 2; vectors <= most; ++vectors) {
      const int64_t time = ceil_div(share, vectors) * (2 * vectors + 1);
      if (time <= least) best = vectors, least = time;
    }
    return best;
  }
  int64_t valid(int64_t tile) const { return min_of(samples, lanes - tile * samples); }
  // The first sample of a tile.
  int64_t first(int64_t tile) const { return begin + tile * samples / strips; }
  // Whether strips reach past the image, and the rows of one that do not.
  bool padded() const { return plane.height * strips > shape.plane.height; }
  int64_t rows_inside(int64_t sample) const {
    return max_of(0, min_of(plane.height, shape.plane.height - sample % strips * plane.height));
  }
  // Left units, and the first of the right ones, of the offset form.
  int64_t in() const { return shape.width - 1 - shape.out; }
  int64_t right() const { return shape.width - shape.out; }

  // Elements of the whole batch's state (one word of it), and rows of one saved state.
  int64_t state() const { return shape.width * image * shape.batch; }
  int64_t words() const { return shape.offset ? 2 : 1; }

  // Whether the state after `layers` hidden layers is renormalised, and where the next one after it is, at most `end`.
  bool renormalises(int64_t layers) const { return shape.offset && (shape.start + layers) % kRenormalisePeriod == 0; }
  int64_t next_renormalisation(int64_t layers, int64_t end) const {
    if (!shape.offset) return end;
    return min_of(layers + kRenormalisePeriod - (shape.start + layers) % kRenormalisePeriod, end);
  }
  // The last one before it, at least `begin`.
  int64_t last_renormalisation(int64_t layers, int64_t begin) const {
    if (!shape.offset) return begin;
    return max_of(layers - 1 - (shape.start + layers - 1) % kRenormalisePeriod, begin);
  }
};

// The words of a state, a gradient or a tangent on one tile; every array [unit][sample].
template <class T>
struct State {
  T *base, *hi, *floor, *lo;
  static constexpr int kArrays = 4;
  State(T* memory, int64_t size) : base(memory), hi(base + size), floor(hi + size), lo(floor + size) {}
  State(T* base, T* hi, T* floor, T* lo) : base(base), hi(hi), floor(floor), lo(lo) {}

  void set_floor(int64_t size) const {
    for (int64_t e = 0; e < size; ++e) floor[e] = -(base[e] + hi[e]);
  }
  // The whole value.
  void total(int64_t size, T* to) const {
    for (int64_t e = 0; e < size; ++e) to[e] = lo[e] - floor[e];
  }
};

template <class T>
inline void fill(int64_t count, T value, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}
template <class T>
inline void copy(int64_t count, const T* from, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}
template <class T>
inline void add(int64_t count, const T* from, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// A long sum one after another loses digits: it is made of sums of so many terms, which depends on their number alone.
constexpr int64_t kBlock = 32;
ND_INLINE int64_t block_of(int64_t terms) {
  int64_t block = kBlock;
  while (block * block < terms) ++block;
  return min_of(block, max_of(1, terms));
}

template <class T>
ND_INLINE void swap(T*& a, T*& b) {
  T* const c = a;
  a = b;
  b = c;
}

// Adds `lo` to `hi` exactly (two-sum, the rounding error stays in lo). A unit at exactly 0 is put to hi = -base, lo = 0,
// so that it stays there. Only units with an identity part; the others stay as they are.
template <class T>
inline void renormalise(const Tiles<T>& tiles, const State<T>& state) {
  for (int64_t i = 0; i < tiles.units; ++i) {
    if (tiles.skip_units[i] == T(0)) continue;
    for (int64_t s = i * tiles.samples; s < (i + 1) * tiles.samples; ++s) {
      const T old = state.hi[s], more = state.lo[s];
      const T sum = old + more, t = sum - old;
      const T rest = (old - (sum - t)) + (more - t);
      const bool dead = more == state.floor[s];
      state.hi[s] = dead ? -state.base[s] : sum;
      state.lo[s] = dead ? T(0) : rest;
      state.floor[s] = -(state.base[s] + state.hi[s]);
    }
  }
}

// ---- between tensors and tiles --------------------------------------------------------------------------------------
// The last tile is filled up with its last sample: what the lanes past the batch compute is thrown away, but never makes a
// NaN that the data did not. Gradients are filled up with zeros, so that these lanes add nothing to sums over samples.

// Calls body(i, unit, b) for every element i of a tile's array that is of an image: its channel and position, and which.
template <class T, class Body>
inline void for_strips(const Tiles<T>& tiles, int64_t tile, int64_t channels, const Body& body) {
  const int64_t width = tiles.plane.width;
  for (int64_t s = 0; s < tiles.valid(tile); ++s) {
    const int64_t top = s % tiles.strips * tiles.plane.height, b = tiles.first(tile) + s / tiles.strips;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < tiles.rows_inside(s) * width; ++p)
        body((c * tiles.positions + p) * tiles.samples + s, c * tiles.image + top * width + p, b);
  }
}
// 0 in the rows past the image.
template <class T>
inline void clear_outside(const Tiles<T>& tiles, int64_t channels, T* to) {
  if (!tiles.padded()) return;
  for (int64_t s = 0; s < tiles.samples; ++s)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = tiles.rows_inside(s) * tiles.plane.width; p < tiles.positions; ++p)
        to[(c * tiles.positions + p) * tiles.samples + s] = T(0);
}

// Samples of (batch, features), to [feature][sample], and back.
template <class T>
inline void load_samples(const Tiles<T>& tiles, int64_t tile, int64_t features, bool zeros, const T* from, T* to) {
  const int64_t valid = tiles.valid(tile), samples = tiles.samples;
  transpose(valid, features, from + tiles.first(tile) * features, features, to, samples);
  for (int64_t k = 0; k < features; ++k)
    for (int64_t s = valid; s < samples; ++s) to[k * samples + s] = zeros ? T(0) : to[k * samples + valid - 1];
}
template <class T>
inline void store_samples(const Tiles<T>& tiles, int64_t tile, int64_t features, const T* from, T* to) {
  transpose(features, tiles.valid(tile), from, tiles.samples, to + tiles.first(tile) * features, features);
}

// In a word of a state the images of a strip stand side by side, N of them a tile; in a tile they are strips apart: lane
// b * strips + k has what stands at k * N + b. Whole tiles are copied run by run, and then their lanes put in order.
template <int STRIPS, class V, int... I>
ND_INLINE V interleaved(V x, Indices<I...>) {
  return __builtin_shufflevector(x, x, (I % STRIPS * (int(sizeof...(I)) / STRIPS) + I / STRIPS)...);
}
// Calls body(position, element of the word, element of the row) for the runs of channel c of a tile.
template <class T, int N, class Body>
ND_INLINE void for_runs(const Tiles<T>& tiles, int64_t tile, int64_t c, const Body& body) {
  const int64_t first = tiles.first(tile);
  for (int64_t k = 0; k < kLanes<T> / N; ++k)
    for (int64_t p = 0; p < tiles.rows_inside(k) * tiles.plane.width; ++p)
      body((c * tiles.image + k * tiles.positions + p) * tiles.shape.batch + first, p * kLanes<T> + k * N);
}
template <class T, int N>
inline void load_runs(const Tiles<T>& tiles, int64_t tile, const T* from, T* to) {
  typename MakeIndices<kLanes<T>>::type all;
  for (int64_t c = 0; c < tiles.shape.width; ++c, to += tiles.row) {
    if (tiles.padded()) fill(tiles.row, T(0), to);
    for_runs<T, N>(tiles, tile, c, [&](int64_t at, int64_t e) { __builtin_memcpy(to + e, from + at, N * sizeof(T)); });
    for (int64_t e = 0; e < tiles.row; e += kLanes<T>)
      ND_ISA::store(to + e, interleaved<kLanes<T> / N>(ND_ISA::load(to + e), all));
  }
}
template <class T, int N>
inline void store_runs(const Tiles<T>& tiles, int64_t tile, const T* from, T* to) {
  typename MakeIndices<kLanes<T>>::type all;
  const Buffer row(tiles.row * int64_t(sizeof(T)));
  for (int64_t c = 0; c < tiles.shape.width; ++c, from += tiles.row) {
    for (int64_t e = 0; e < tiles.row; e += kLanes<T>)
      ND_ISA::store(row.as<T>() + e, interleaved<N>(ND_ISA::load(from + e), all));
    for_runs<T, N>(tiles, tile, c,
                   [&](int64_t at, int64_t e) { __builtin_memcpy(to + at, row.as<T>() + e, N * sizeof(T)); });
  }
}
// body(a Constant of the images of a tile), if it is whole and they are at least four; returns whether it is so.
template <class T, int N = kLanes<T> / 2, class Body>
ND_INLINE bool with_runs(const Tiles<T>& tiles, int64_t tile, const Body& body) {
  if constexpr (N < 4) {  // shorter runs take longer than one element after another
    return false;
  } else {
    if (tiles.strips * N != kLanes<T>) return with_runs<T, N / 2>(tiles, tile, body);
    if (tiles.valid(tile) < tiles.samples) return false;
    body(Constant<N>());
    return true;
  }
}

// Images of (batch, channels, height, width), and back.
template <class T>
inline void load_images(const Tiles<T>& tiles, int64_t tile, int64_t channels, bool zeros, const T* from, T* to) {
  if (tiles.strips == 1) return load_samples(tiles, tile, channels * tiles.positions, zeros, from, to);
  fill(channels * tiles.row, T(0), to);
  for_strips(tiles, tile, channels,
             [&](int64_t i, int64_t unit, int64_t b) { to[i] = from[b * channels * tiles.image + unit]; });
}
template <class T>
inline void store_images(const Tiles<T>& tiles, int64_t tile, int64_t channels, const T* from, T* to) {
  if (tiles.strips == 1) return store_samples(tiles, tile, channels * tiles.positions, from, to);
  for_strips(tiles, tile, channels,
             [&](int64_t i, int64_t unit, int64_t b) { to[b * channels * tiles.image + unit] = from[i]; });
}

// A number of each output, from[i * row + b * column] of sample b, to all its lanes; lanes past the batch get 0.
template <class T>
inline void load_outputs(const Tiles<T>& tiles, int64_t tile, int64_t row, int64_t column, const T* from, T* to) {
  const int64_t valid = tiles.valid(tile), samples = tiles.samples;
  for (int64_t i = 0; i < tiles.shape.out; ++i)
    for (int64_t s = 0; s < samples; ++s)
      to[i * samples + s] = s < valid ? from[i * row + (tiles.first(tile) + s / tiles.strips) * column] : T(0);
}

// One word of a state, (units, batch).
template <class T>
inline void load_word(const Tiles<T>& tiles, int64_t tile, bool zeros, const T* from, T* to) {
  if (tiles.strips > 1) {
    if (with_runs(tiles, tile, [&](auto n) { load_runs<T, decltype(n)::value>(tiles, tile, from, to); })) return;
    fill(tiles.size, T(0), to);
    return for_strips(tiles, tile, tiles.shape.width,
                      [&](int64_t i, int64_t unit, int64_t b) { to[i] = from[unit * tiles.shape.batch + b]; });
  }
  const int64_t valid = tiles.valid(tile), samples = tiles.samples;
  for (int64_t i = 0; i < tiles.units; ++i) {
    const T* const row = from + i * tiles.shape.batch + tiles.first(tile);
    if (valid == samples) {
      for (int64_t s = 0; s < samples; s += kLanes<T>) ND_ISA::store(to + i * samples + s, ND_ISA::load(row + s));
      continue;
    }
    for (int64_t s = 0; s < valid; ++s) to[i * samples + s] = row[s];
    for (int64_t s = valid; s < samples; ++s) to[i * samples + s] = zeros ? T(0) : row[valid - 1];
  }
}
template <class T>
inline void store_word(const Tiles<T>& tiles, int64_t tile, const T* from, T* to) {
  if (tiles.strips > 1) {
    if (with_runs(tiles, tile, [&](auto n) { store_runs<T, decltype(n)::value>(tiles, tile, from, to); })) return;
    return for_strips(tiles, tile, tiles.shape.width,
                      [&](int64_t i, int64_t unit, int64_t b) { to[unit * tiles.shape.batch + b] = from[i]; });
  }
  const int64_t valid = tiles.valid(tile), samples = tiles.samples;
  for (int64_t i = 0; i < tiles.units; ++i) {
    T* const row = to + i * tiles.shape.batch + tiles.first(tile);
    if (valid == samples) {
      for (int64_t s = 0; s < samples; s += kLanes<T>) ND_ISA::store(row + s, ND_ISA::load(from + i * samples + s));
      continue;
    }
    for (int64_t s = 0; s < valid; ++s) row[s] = from[i * samples + s];
  }
}

// hi and lo of a saved state, or lo alone in plain form.
template <class T>
inline void save(const Tiles<T>& tiles, int64_t tile, const State<T>& state, T* to) {
  if (tiles.shape.offset) {
    store_word(tiles, tile, state.hi, to);
    to += tiles.state();
  }
  store_word(tiles, tile, state.lo, to);
}
template <class T>
inline void restore(const Tiles<T>& tiles, int64_t tile, bool zeros, const T* from, const State<T>& state) {
  if (tiles.shape.offset) {
    load_word(tiles, tile, zeros, from, state.hi);
    from += tiles.state();
  } else {
    fill(tiles.size, T(0), state.hi);
  }
  load_word(tiles, tile, zeros, from, state.lo);
}

// All words of a state at the border of a span; its floor is left to the caller.
template <class T>
inline void store_state(const Tiles<T>& tiles, int64_t tile, const State<T>& state, T* to) {
  if (tiles.shape.offset) {
    store_word(tiles, tile, state.base, to);
    to += tiles.state();
  }
  save(tiles, tile, state, to);
}
template <class T>
inline void load_base(const Tiles<T>& tiles, int64_t tile, bool zeros, const T* from, const State<T>& state) {
  if (tiles.shape.offset) {
    load_word(tiles, tile, zeros, from, state.base);
  } else {
    fill(tiles.size, T(0), state.base);
  }
}
template <class T>
inline void load_state(const Tiles<T>& tiles, int64_t tile, bool zeros, const T* from, const State<T>& state) {
  load_base(tiles, tile, zeros, from, state);
  restore(tiles, tile, zeros, tiles.shape.offset ? from + tiles.state() : from, state);
}

}  // namespace ND_ISA
}  // namespace narrowdeep
