// The empirical tangent kernel of the convolution chain for one instruction set.
//
//   Theta(i, j)[a][b] = sum over layers of <J_i[a], J_j[b]>,   J = df / d(the layer's filters and biases)
//
// Filters are small: a layer's J is formed for every sample and output, as in the backward, and all pairs of samples sum
// over its entries. Layers are taken a segment at a time, from the last: each tile of samples runs forward from its saved
// state, then every output of it goes backward through a group of layers and leaves their J. Nothing of the size of the
// parameters times the batch exists: only the states of a segment and the J of a group.
//
// The floor, per pair of samples and layer: out^2 FMAs for each of its parameters.
#pragma once

#include "conv/chain.h"
#include "gram/pairs.h"

namespace narrowdeep {
namespace ND_ISA {

template <class T>
class ConvGramSum {
 public:
  ConvGramSum(const ConvGram<T>& arguments, const Parallel& pool)
      : args(arguments),
        parallel(pool),
        geometry(with_segment(arguments.shape)),
        shape(geometry.shape),
        outputs(shape.out),
        tiles(ceil_div(shape.batch, kLanes<T>)),
        slots(max_of(1, ceil_div(shape.layers, shape.segment))),
        held(min_of(shape.segment + 1, geometry.last_state)),
        jacobian_size(max_of(max_of(first().entries(), last().entries()), hidden().entries()) * kLanes<T>),
        group(max_of(1, min_of(kMostLayers, kGroupBytes / (tiles * outputs * jacobian_size * int64_t(sizeof(T)) + 1)))),
        sums(args.pairs, outputs, kLanes<T>, parallel),
        saved(slots * (shape.offset ? 2 : 1) * units() * shape.batch * int64_t(sizeof(T))),
        states(tiles * held * geometry.state * int64_t(sizeof(T))),
        gradients(tiles * outputs * TileState<T>::kArrays * geometry.state * int64_t(sizeof(T))),
        jacobians(tiles * outputs * group * jacobian_size * int64_t(sizeof(T))) {}

  void run() {
    const Buffer out(shape.batch * outputs * int64_t(sizeof(T)));
    conv_forward<T>({shape, args.params, args.x, out.as<T>(), saved.as<T>()}, parallel);
    for (int64_t slot = slots - 1; slot >= 0; --slot) {
      const int64_t begin = 1 + slot * shape.segment;
      int64_t t = slot == slots - 1 ? geometry.last_state + 1 : begin + shape.segment;
      restore(slot, begin, t);
      if (slot == slots - 1) layers(last(), begin, t--, 1);
      for (int64_t count; t > begin; t -= count) {
        count = min_of(group, t - begin);
        layers(hidden(), begin, t, count);
      }
    }
    layers(first(), 0, 1, 1);
  }

 private:
  // The most layers of a group; what J of a group may take, so as to stay in the outer caches.
  static constexpr int64_t kMostLayers = 64, kGroupBytes = int64_t(1) << 20;

  // What the Jacobian of one layer holds: [row][channel][tap], then [row], of which only what is trained.
  struct Layer {
    int64_t rows, channels, taps;
    bool weight, bias;
    int64_t weights() const { return weight ? rows * channels * taps : 0; }
    int64_t entries() const { return weights() + (bias ? rows : 0); }
  };

  const ConvGram<T>& args;
  const Parallel& parallel;
  const ConvGeometry<T> geometry;
  const ConvShape& shape;
  const int64_t outputs, tiles, slots, held, jacobian_size, group;  // held: states of the longest segment
  const PairSums<T> sums;
  const Buffer saved, states, gradients, jacobians;

  // As many layers in a segment as there are segments, about: the least memory for states.
  static ConvShape with_segment(ConvShape s) {
    s.segment = 2;
    while (s.segment * s.segment < 2 * s.layers) ++s.segment;
    return s;
  }
  int64_t units() const { return shape.width * geometry.positions; }
  int64_t valid(int64_t tile) const { return min_of(kLanes<T>, shape.batch - tile * kLanes<T>); }
  const T* images(int64_t tile) const { return args.x + tile * kLanes<T> * shape.in * geometry.positions; }

  Layer layer(int64_t rows, int64_t channels, int weight) const {
    const auto trained = [&](int parameter) { return bool(args.trainable >> parameter & 1); };
    return {rows, channels, shape.size * shape.size, trained(weight), trained(weight + 1)};
  }
  Layer first() const { return layer(shape.width, shape.in, 0); }
  Layer hidden() const { return layer(shape.width, shape.width, 2); }
  Layer last() const { return layer(shape.out, shape.width, 4); }

  // States [begin, end) of every tile, from the saved state `begin`.
  void restore(int64_t slot, int64_t begin, int64_t end) {
    parallel_for(parallel, tiles, [&](int64_t tile) {
      TileForward<T> forward(geometry, args.params);
      forward.load(images(tile), valid(tile));
      T* h = states.as<T>() + tile * held * geometry.state;
      const int64_t at = slot * (shape.offset ? 2 : 1) * units() * shape.batch + tile * kLanes<T>;
      forward.state.restore(valid(tile), saved.as<T>() + at, shape.batch, h);
      for (int64_t t = begin + 1; t < end; ++t, h += geometry.state) forward.step(t, h, h + geometry.state);
    });
  }

  // Takes every gradient from state t's pre-activation down through `count` layers of one kind, and adds these layers.
  // State `begin` is the first in `states`.
  void layers(const Layer& kind, int64_t begin, int64_t t, int64_t count) {
    parallel_for(parallel, tiles * outputs, [&](int64_t task) {
      const int64_t tile = task / outputs;
      TileGradient<T> gradient(geometry, args.params,
                               gradients.as<T>() + task * TileState<T>::kArrays * geometry.state);
      const bool is_last = t == geometry.last_state + 1;
      if (is_last) {  // df_a / dz: every position has the same share in the mean
        fill(outputs * geometry.row, T(0), gradient.r);
        fill(geometry.row, T(1) / T(geometry.positions), gradient.r + task % outputs * geometry.row);
        gradient.start();
      } else {
        gradient.resume();
      }
      const Buffer input(t == 1 ? shape.in * geometry.row * int64_t(sizeof(T)) : 0);
      if (t == 1) load_images(shape.in * geometry.positions, valid(tile), images(tile), input.as<T>());
      T* to = jacobians.as<T>() + task * group * jacobian_size;
      for (int64_t k = t; k > t - count; --k, to += jacobian_size) {
        const T* const h = k == 1 ? input.as<T>() : states.as<T>() + (tile * held + k - 1 - begin) * geometry.state;
        const T* const full = is_last ? gradient.r : gradient.full();
        if (kind.weight) weight_sums(kind.rows, kind.channels, shape.size, geometry.plane, full, h, to);
        if (kind.bias) bias_sums(kind.rows, geometry.positions, full, to + kind.weights() * kLanes<T>);
        if (k > 1) gradient.step(k, h);
      }
    });
    const T* const j = jacobians.as<T>();
    sums.add({j, 0, 0, 0, j, outputs * group * jacobian_size, group * jacobian_size, jacobian_size, kind.entries(), count,
              false, kind.entries() > 0});
  }
};

template <class T>
inline void conv_gram(const ConvGram<T>& args, const Parallel& parallel) {
  ConvGramSum<T>(args, parallel).run();
}

}  // namespace ND_ISA
}  // namespace narrowdeep
