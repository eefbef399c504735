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

#include "cnn/layer.h"
#include "common/chain.h"
#include "ntk/pairs.h"

namespace narrowdeep {
namespace ND_ISA {

template <class T>
class CnnGramSum {
 public:
  CnnGramSum(const ChainGram<T>& arguments, const Parallel& pool)
      : args(arguments),
        parallel(pool),
        tiles(with_segment(arguments.shape), CnnLayer<T>::kMostVectors, pool.threads,
              Part{0, arguments.shape.batch, 1}),
        s(tiles.shape),
        layer(tiles, arguments.params),
        size(tiles.size),
        outputs(s.out),
        slots(max_of(1, ceil_div(s.layers, s.segment))),
        held(min_of(s.segment, s.layers) + 1),
        jacobian_size(max_of(max_of(first().entries(), last().entries()), hidden().entries()) * kLanes<T>),
        group(max_of(
            1, min_of(kMostLayers, kGroupBytes / (tiles.count * outputs * jacobian_size * int64_t(sizeof(T)) + 1)))),
        back_size(s.out * tiles.row + State<T>::kArrays * size),
        sums(args.pairs, outputs, tiles.samples, parallel),
        saved(slots * tiles.words() * tiles.state() * int64_t(sizeof(T))),
        states(tiles.count * held * size * int64_t(sizeof(T))),
        gradients(tiles.count * outputs * back_size * int64_t(sizeof(T))),
        jacobians(tiles.count * outputs * group * jacobian_size * int64_t(sizeof(T))) {}

  void run() {
    const Buffer out(s.batch * outputs * int64_t(sizeof(T)));
    chain_forward<CnnLayer<T>>({s, args.params, args.x, out.as<T>(), saved.as<T>()}, parallel);
    for (int64_t slot = slots - 1; slot >= 0; --slot) {
      const int64_t begin = slot * s.segment, end = min_of(begin + s.segment, s.layers);
      restore_states(slot, begin, end);
      if (end == s.layers) layers(last(), begin, s.layers + 1, 1);
      for (int64_t t = end, count; t > begin; t -= count) {
        count = min_of(group, t - begin);
        layers(hidden(), begin, t, count);
      }
    }
    layers(first(), 0, 0, 1);
  }

 private:
  // The most layers of a group; what J of a group may take, so as to stay in the outer caches.
  static constexpr int64_t kMostLayers = 64, kGroupBytes = int64_t(1) << 20;

  // What the Jacobian of one layer holds: [row][channel][tap], then [row], of which only what is trained.
  struct Kind {
    int64_t rows, channels, taps;
    bool weight, bias;
    int64_t weights() const { return weight ? rows * channels * taps : 0; }
    int64_t entries() const { return weights() + (bias ? rows : 0); }
  };

  const ChainGram<T>& args;
  const Parallel& parallel;
  const Tiles<T> tiles;
  const ChainShape& s;
  const CnnLayer<T> layer;
  const int64_t size, outputs, slots, held, jacobian_size, group, back_size;  // held: states of the longest segment
  const PairSums<T> sums;
  const Buffer saved, states, gradients, jacobians;

  // As many layers in a segment as there are segments, about: the least memory for states.
  static ChainShape with_segment(ChainShape s) {
    s.segment = 2;
    while (s.segment * s.segment < 2 * s.layers) ++s.segment;
    return s;
  }

  Kind kind(int64_t rows, int64_t channels, int weight) const {
    const auto trained = [&](int parameter) { return bool(args.trainable >> parameter & 1); };
    return {rows, channels, s.size * s.size, trained(weight), trained(weight + 1)};
  }
  Kind first() const { return kind(s.width, s.in, 0); }
  Kind hidden() const { return kind(s.width, s.width, 2); }
  Kind last() const { return kind(s.out, s.width, 4); }

  // The states before hidden layers [begin, end) of every tile, and the last one, from the saved state `begin`.
  void restore_states(int64_t slot, int64_t begin, int64_t end) {
    parallel_for(parallel, tiles.count, [&](int64_t tile) {
      const Buffer memory((State<T>::kArrays * size + s.in * tiles.row) * int64_t(sizeof(T)));
      const State<T> state(memory.as<T>(), size);
      T* const x = state.lo + size;
      load_samples(tiles, tile, s.in * tiles.positions, false, args.x, x);
      set_base(tiles, x, state.base);
      restore(tiles, tile, false, saved.as<T>() + slot * tiles.words() * tiles.state(), state);
      state.set_floor(size);
      run_to(tiles, layer, begin, end == s.layers ? end : end - 1, state, states.as<T>() + tile * held * size);
    });
  }

  // Takes every gradient from state t down through `count` layers of one kind, and adds these layers; t is layers + 1 at
  // the output, and state `begin` is the first in `states`.
  void layers(const Kind& kind, int64_t begin, int64_t t, int64_t count) {
    parallel_for(parallel, tiles.count * outputs, [&](int64_t task) {
      const int64_t tile = task / outputs, positions = tiles.positions;
      T* const r = gradients.as<T>() + task * back_size;
      const State<T> g(r + s.out * tiles.row, size);
      const bool is_last = t > s.layers, is_first = t == 0;
      const Buffer memory((2 * size + (is_first ? s.in * tiles.row : 0)) * int64_t(sizeof(T)));
      T *full = memory.as<T>(), *next = full + size;
      T* const x = next + size;
      if (is_last) {  // df_a / dz: every position has the same share in the mean
        fill(s.out * tiles.row, T(0), r);
        fill(tiles.row, T(1) / T(positions), r + task % outputs * tiles.row);
        fill(State<T>::kArrays * size, T(0), g.base);
        if (s.offset) copy(s.out * tiles.row, r, g.base + tiles.right() * tiles.row);
        g.set_floor(size);
      } else {
        g.total(size, full);
      }
      if (is_first) load_samples(tiles, tile, s.in * positions, false, args.x, x);
      T* to = jacobians.as<T>() + task * group * jacobian_size;
      for (int64_t k = t; k > t - count; --k, to += jacobian_size) {
        const T* const h = is_first ? x : states.as<T>() + (tile * held + k - 1 - begin) * size;
        const T* const gradient = is_last ? r : full;
        if (kind.weight) weight_sums(kind.rows, kind.channels, s.size, s.plane, gradient, Image<T>{h}, to);
        if (kind.bias) bias_sums(kind.rows, positions, gradient, to + kind.weights() * kLanes<T>);
        if (is_first) continue;
        if (is_last) {
          layer.last_back(r, h, g, full);
          continue;
        }
        layer.step_back(k - 1, full, h, g, next);
        swap(full, next);
        if (tiles.renormalises(k - 1) && k > 1) {
          renormalise(tiles, g);
          g.total(size, full);
        }
      }
    });
    const T* const j = jacobians.as<T>();
    sums.add({j, 0, 0, 0, j, outputs * group * jacobian_size, group * jacobian_size, jacobian_size, kind.entries(),
              count, false, kind.entries() > 0});
  }
};

template <class T>
void cnn_gram(const ChainGram<T>& args, const Parallel& parallel) {
  CnnGramSum<T>(args, parallel).run();
}

}  // namespace ND_ISA
}  // namespace narrowdeep
