// One layer of the convolution chain: a correlation with an odd filter, zeros around the image. A tile is one vector of
// samples, stored [channel][position][lane]. Where samples do not fill the lanes a lane has a strip of an image: before a
// correlation each gets the rows of its neighbours that the filter sees.
#pragma once

#include "cnn/weight_gradient.h"
#include "common/epilogue.h"
#include "common/state.h"

namespace narrowdeep {
namespace ND_ISA {

template <class T>
class CnnLayer {
 public:
  using Element = T;
  static constexpr int64_t kMostVectors = 1;
  static constexpr bool kRunsOfTiles = true;
  static constexpr bool kEndsTogether = false;  // filters are small: each thread has sums of its own

  // All images alike, or those that fill every thread's lanes whole and the others in strips: what takes least time.
  template <class Body>
  static void parts(const ChainShape& s, int64_t threads, const Body& body) {
    const int64_t whole = s.batch - s.batch % (kLanes<T> * threads);
    const Cut all = fastest(s, s.batch, threads), rest = fastest(s, s.batch - whole, threads);
    if (whole == 0 || whole == s.batch || all.time <= time(s, whole, 1, threads) + rest.time)
      return body(Part{0, s.batch, all.strips});
    body(Part{0, whole, 1});
    body(Part{whole, s.batch, rest.strips});
  }

  CnnLayer(const Tiles<T>& tiles, const ChainParams<const T>& params)
      : tiles_(tiles),
        shape_(tiles.shape),
        params_(params),
        taps_(tiles.shape.size * tiles.shape.size),
        masks_(tiles.strips > 1 ? (tiles.plane.height + 2 * tiles.strips) * kLanes<T> * int64_t(sizeof(T)) : 0),
        away_(masks_.as<T>()),
        inside_(away_ + 2 * tiles.strips * kLanes<T>) {
    if (tiles.strips == 1) return;
    const auto mask = [](bool all) { return all ? all_ones<T>() : T(0); };
    for (int64_t s = 0; s < kLanes<T>; ++s) {
      for (int64_t away = 1; away <= tiles.strips; ++away) {
        T* const masks = away_ + 2 * (away - 1) * kLanes<T> + s;
        masks[0] = mask(s % tiles.strips >= away);
        masks[kLanes<T>] = mask(s % tiles.strips + away < tiles.strips);
      }
      for (int64_t y = 0; y < tiles.plane.height; ++y) inside_[y * kLanes<T> + s] = mask(y < tiles.rows_inside(s));
    }
  }

  // States that a backward holds at once; a longer segment is divided again, at the price of one recomputation more (a
  // quarter of the backward). So this is what still does well in the outer caches, and less only where a state is huge.
  int64_t most_states() const {
    constexpr int64_t kMostStates = 256, kLeastStates = 32, kStatesBytes = int64_t(16) << 20;
    return max_of(kLeastStates, min_of(kMostStates, kStatesBytes / (tiles_.size * int64_t(sizeof(T)))));
  }
  int64_t hidden_weights() const { return shape_.width * shape_.width * taps_; }
  int64_t first_weights() const { return shape_.width * shape_.in * taps_; }
  int64_t last_weights() const { return shape_.out * shape_.width * taps_; }

  // ---- forward
  void first(const T* x, const State<T>& state, T* h) const {
    product(params_.first_weight, shape_.width, shape_.in, x,
            StateEpilogue<T>{params_.first_bias, tiles_.every, state.floor, state.lo, h, tiles_.row, {}});
  }
  void step(int64_t l, const State<T>& state, const T* h, T* h_next) const {
    product(params_.hidden_weight + l * hidden_weights(), shape_.width, shape_.width, h,
            StateEpilogue<T>{
                params_.hidden_bias + l * shape_.width, tiles_.skip, state.floor, state.lo, h_next, tiles_.row, {}});
  }
  void last(const T* h, const State<T>& state, T* z) const {
    start_output(state, params_.last_bias, z);
    product(params_.last_weight, shape_.out, shape_.width, h, AddEpilogue<T>{z, tiles_.row});
  }

  // ---- backward: `full` is the gradient of a layer's output, `h` the value of its input, `g` becomes the gradient there
  void last_back(const T* r, const T* h, const State<T>& g, T* full) const {
    transposed(params_.last_weight, shape_.out, shape_.width, r,
               GradientEpilogue<T>{h, tiles_.skip, g.floor, g.lo, full, tiles_.row, {}});
  }
  void step_back(int64_t l, const T* full, const T* h, const State<T>& g, T* full_next) const {
    transposed(params_.hidden_weight + l * hidden_weights(), shape_.width, shape_.width, full,
               GradientEpilogue<T>{h, tiles_.skip, g.floor, g.lo, full_next, tiles_.row, {}});
  }
  void first_back(const T* full, T* grad_x) const {
    for (int64_t e = 0; e < shape_.in * tiles_.row; ++e) grad_x[e] = shape_.offset ? T(shape_.scale) * full[e] : T(0);
    transposed(params_.first_weight, shape_.width, shape_.in, full, AddEpilogue<T>{grad_x, tiles_.row});
  }

  // W^T full, of a weight (rows, columns)[tap].
  template <class Epilogue>
  void transposed(const T* weight, int64_t rows, int64_t columns, const T* full, const Epilogue& epilogue) const {
    any_correlation(transposed_filter(weight, columns, shape_.size), rows, columns, full, epilogue);
  }

  int64_t gradient_bytes() const {
    const int64_t gradients =
        margins_bytes(max_of(shape_.width, shape_.in)) + cleared_bytes(max_of(shape_.width, shape_.out));
    return max_of(gradients, margins_bytes(shape_.out));  // `last_back`
  }
  int64_t gradient_scratch(int64_t rows, int64_t columns) const {
    return max_of(rows * columns * taps_ * kLanes<T>, products_scratch<T>(rows, columns, shape_.size, tiles_.plane));
  }
  // Of the weight (rows, columns)[tap] and the bias of a layer; added to what is there, or written over it.
  void gradient(int64_t rows, int64_t columns, int64_t valid, const T* full, const T* h, T* weight, T* bias, bool add,
                T* scratch) const {
    const Buffer margins(margins_bytes(columns)), cleared(cleared_bytes(rows));
    if (tiles_.padded()) full = with_margin(rows, full, 0, cleared.as<T>()).start;
    const auto weight_of = [&](const auto& in) {
      if (lanes_over_channels<T>(rows, tiles_.positions, valid))
        return weight_products(rows, columns, valid, shape_.size, tiles_.plane, full, in, weight, add, scratch);
      weight_sums(rows, columns, shape_.size, tiles_.plane, full, in, scratch);
      sum_samples(rows * columns * taps_, valid, scratch, weight, add);
    };
    if (needs_margins()) {
      weight_of(strip(columns, h, margins));
    } else {
      weight_of(Image<T>{h});
    }
    bias_sums(rows, tiles_.positions, full, scratch);
    sum_samples(rows, valid, scratch, bias, add);
  }

  // ---- jvp
  void first_tangent(const T* x, const T* x_tangent, const ChainParams<const T>& tangents, const T* h,
                     const State<T>& tangent, T* full) const {
    fill(tiles_.size, T(0), tangent.base);
    fill(tiles_.size, T(0), tangent.hi);
    fill(tiles_.size, T(0), tangent.lo);
    if (x_tangent && shape_.offset)
      for (int64_t e = 0; e < shape_.in * tiles_.row; ++e)
        (x[e] <= T(0) ? tangent.lo : tangent.base)[e] = T(shape_.scale) * x_tangent[e];
    tangent.set_floor(tiles_.size);
    add_tangents(tangents.first_weight, tangents.first_bias, shape_.in, tiles_.every, x, tangent);
    const GradientEpilogue<T> epilogue{h, tiles_.every, tangent.floor, tangent.lo, full, tiles_.row, {}};
    if (x_tangent) {
      product(params_.first_weight, shape_.width, shape_.in, x_tangent, epilogue);
    } else {
      for (int64_t i = 0; i < shape_.width; ++i)
        for (int64_t p = 0; p < tiles_.positions; ++p) {
          Vec<T> nothing[1][1] = {};
          epilogue.template operator()<1, 1>(i, p * kLanes<T>, nothing);
        }
    }
  }
  void step_tangent(int64_t l, const ChainParams<const T>& tangents, const T* h, const T* h_next, const T* full,
                    const State<T>& tangent, T* full_next) const {
    const int64_t at = l * hidden_weights();
    add_tangents(tangents.hidden_weight ? tangents.hidden_weight + at : nullptr,
                 tangents.hidden_bias ? tangents.hidden_bias + l * shape_.width : nullptr, shape_.width, tiles_.skip, h,
                 tangent);
    product(params_.hidden_weight + at, shape_.width, shape_.width, full,
            GradientEpilogue<T>{h_next, tiles_.every, tangent.floor, tangent.lo, full_next, tiles_.row, {}});
  }
  void last_tangent(const ChainParams<const T>& tangents, const T* h, const T* full, const State<T>& tangent,
                    T* z) const {
    start_output(tangent, tangents.last_bias, z);
    const AddEpilogue<T> onto{z, tiles_.row};
    if (tangents.last_weight) product(tangents.last_weight, shape_.out, shape_.width, h, onto);
    product(params_.last_weight, shape_.out, shape_.width, full, onto);
  }

  // ---- many layers in registers: images never fit
  static constexpr bool in_registers() { return false; }
  static constexpr bool renormalises() { return false; }
  void forward_in_registers(int64_t, int64_t, const State<T>&, T*) const {}
  void backward_in_registers(int64_t, int64_t, const State<T>&, const T*, const ChainParams<T>&, int64_t) const {}
  void forward_tangent_in_registers(int64_t, int64_t, const ChainParams<const T>&, const State<T>&, const State<T>&, T*,
                                    T*) const {}
  void backward_tangent_in_registers(int64_t, int64_t, const ChainParams<const T>&, const State<T>&, const State<T>&,
                                     const T*, const T*, T*) const {}
  static constexpr bool packs() { return false; }
  static constexpr int64_t packed_size() { return 0; }
  void unpack(const T*, int64_t, int64_t, int64_t, int64_t, T*, T*) const {}

 private:
  // Of so many images in strips, in multiply-adds: of the rows that one thread goes through, and 3 for each vector of a
  // strip with its neighbours' rows, which is copied.
  static int64_t time(const ChainShape& s, int64_t images, int64_t strips, int64_t threads) {
    const int64_t products = s.width * s.size * s.size;  // of a number of a state
    const int64_t rows = ceil_div(s.plane.height, strips), tiles = ceil_div(images * strips, kLanes<T>);
    const int64_t copied = strips > 1 && s.size > 1 ? 3 * (rows + s.size - 1) : 0;
    return ceil_div(tiles, threads) * (rows * products + copied);
  }
  struct Cut {
    int64_t strips, time;
  };
  static Cut fastest(const ChainShape& s, int64_t images, int64_t threads) {
    Cut best{1, time(s, images, 1, threads)};
    for (int64_t strips = 2; strips <= kLanes<T>; strips *= 2) {
      const int64_t found = time(s, images, strips, threads);
      if (found < best.time) best = {strips, found};
    }
    return best;
  }

  const Tiles<T>& tiles_;
  const ChainShape& shape_;
  const ChainParams<const T>& params_;
  const int64_t taps_;
  const Buffer masks_;
  // Lanes that have a strip so many before, and behind, for 1, 2, ... strips; lanes inside the image, a row.
  T *const away_, *const inside_;

  // `from` with `margin` rows more above and below: those of the strips there, 0 at the ends of an image and past them.
  Strip<T> with_margin(int64_t channels, const T* from, int64_t margin, T* to) const {
    const int64_t line = tiles_.plane.width * kLanes<T>, rows = tiles_.plane.height,
                  channel = (rows + 2 * margin) * line;
    for (int64_t c = 0; c < channels; ++c, from += rows * line) {
      T* const start = to + c * channel + margin * line;
      for (int64_t y = 0; y < rows; ++y) {
        const Vec<T> inside = load(inside_ + y * kLanes<T>);
        for (int64_t e = y * line; e < (y + 1) * line; e += kLanes<T>)
          store(start + e, keep_if(inside, load(from + e)));
      }
      for (int64_t m = 0; m < margin; ++m) {
        const int64_t y = m % rows, away = min_of(m / rows + 1, tiles_.strips);
        const T* const mask = away_ + 2 * (away - 1) * kLanes<T>;
        copy_row<1>(away, start + (rows - 1 - y) * line, load(mask), start - (m + 1) * line);
        copy_row<-1>(away, start + y * line, load(mask + kLanes<T>), start + (rows + m) * line);
      }
    }
    return {to, margin};
  }
  // A row of the strips that are `away` lanes before (BY = 1) or behind, of those lanes that have one.
  template <int BY>
  ND_INLINE void copy_row(int64_t away, const T* from, Vec<T> mask, T* to) const {
    for (int64_t e = 0; e < tiles_.plane.width * kLanes<T>; e += kLanes<T>) {
      Vec<T> row = load(from + e);
      for (int64_t i = 0; i < away; ++i) row = from_lane<T, BY>(row);
      store(to + e, keep_if(mask, row));
    }
  }
  // One tap sees no neighbours, but what a strip has past the image must not reach a sum: 0 times infinity is NaN.
  bool needs_margins() const { return tiles_.strips > 1 && (taps_ > 1 || tiles_.padded()); }
  int64_t margins_bytes(int64_t channels) const {
    if (!needs_margins()) return 0;
    return channels * (tiles_.plane.height + 2 * (shape_.size / 2)) * tiles_.plane.width * kLanes<T> *
           int64_t(sizeof(T));
  }
  int64_t cleared_bytes(int64_t channels) const {
    return tiles_.padded() ? channels * tiles_.row * int64_t(sizeof(T)) : 0;
  }
  Strip<T> strip(int64_t channels, const T* h, const Buffer& margins) const {
    return with_margin(channels, h, shape_.size / 2, margins.as<T>());
  }

  template <class Epilogue>
  void product(const T* weight, int64_t rows, int64_t columns, const T* h, const Epilogue& epilogue) const {
    any_correlation(forward_filter(weight, columns, shape_.size), columns, rows, h, epilogue);
  }
  template <class Epilogue>
  void any_correlation(const Filter<T>& filter, int64_t channels, int64_t out_channels, const T* from,
                       const Epilogue& epilogue) const {
    if (taps_ == 1) return correlate_one(filter, channels, out_channels, tiles_.positions, from, epilogue);
    if (tiles_.strips == 1) return correlate(filter, channels, out_channels, tiles_.plane, Image<T>{from}, epilogue);
    const Buffer margins(margins_bytes(channels));
    correlate(filter, channels, out_channels, tiles_.plane, strip(channels, from, margins), epilogue);
  }
  // z = what the identity part of the last layer passes on, without the base, and the bias; the sums are added to it.
  void start_output(const State<T>& state, const T* bias, T* z) const {
    const int64_t right = tiles_.right() * tiles_.row;
    for (int64_t i = 0; i < shape_.out; ++i)
      for (int64_t e = i * tiles_.row; e < (i + 1) * tiles_.row; ++e) {
        z[e] = bias ? bias[i] : T(0);
        if (shape_.offset) z[e] = (state.hi[right + e] + state.lo[right + e]) + z[e];
      }
  }
  // lo = skip lo + bias_t + W_t h
  void add_tangents(const T* weight, const T* bias, int64_t columns, const T* skip, const T* h,
                    const State<T>& tangent) const {
    for (int64_t i = 0; i < shape_.width; ++i)
      for (int64_t e = i * tiles_.row; e < (i + 1) * tiles_.row; ++e)
        tangent.lo[e] = (skip[i] == T(0) ? T(0) : tangent.lo[e]) + (bias ? bias[i] : T(0));
    if (weight) product(weight, shape_.width, columns, h, AddEpilogue<T>{tangent.lo, tiles_.row});
  }
};

}  // namespace ND_ISA
}  // namespace narrowdeep
