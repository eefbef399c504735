// The empirical tangent kernel of the MLP chain for one instruction set.
//
//   Theta(i, j)[a][b] = sum over affine layers of (<h_i, h_j> + 1) <B_i[a], B_j[b]>,   B = df/dz
//
// Layers are taken a segment at a time, from the last. In every segment, first each tile of samples runs forward from its
// saved state and backward once for every output, which leaves h and B of the segment's layers; then all pairs of
// samples sum over these layers. Nothing of the size of the parameters times the batch exists: only a segment of h and B.
//
// The floor, per pair of samples and layer: width FMAs for <h, h>, and out^2 (width + 1) for the rest.
#pragma once

#include "common/chain.h"
#include "mlp/layer.h"
#include "ntk/pairs.h"

namespace narrowdeep {
namespace ND_ISA {

template <class T>
class MlpGramSum {
 public:
  MlpGramSum(const ChainGram<T>& arguments, const Parallel& pool)
      : args(arguments),
        parallel(pool),
        tiles(with_segment(arguments.shape), MlpLayer<T>::kMostVectors, pool.threads,
              Part{0, arguments.shape.batch, 1}),
        s(tiles.shape),
        layer(tiles, arguments.params),
        size(tiles.size),
        outputs(s.out),
        held(min_of(s.segment, s.layers)),
        sums(args.pairs, outputs, tiles.samples, parallel),
        back_size(s.out * tiles.samples + 2 * size),
        tile_size(s.in * tiles.samples + size + outputs * back_size),
        kept(tiles.count * tile_size * int64_t(sizeof(T))),
        saved(tiles.words() * slots() * tiles.state() * int64_t(sizeof(T))),
        states(tiles.count * (held + 1) * size * int64_t(sizeof(T))),
        full(tiles.count * outputs * held * size * int64_t(sizeof(T))) {}

  void run() {
    forward();
    for (int64_t i = slots() - 1; i >= 0; --i) {
      const int64_t begin = i * s.segment, end = min_of(begin + s.segment, s.layers);
      segment(begin, end);
      sums.add({states.as<T>(), (held + 1) * size, size, s.width, full.as<T>(), outputs * held * size, held * size,
                size, s.width, end - begin, trained(2), trained(3)});
    }
    const Back first = back(0, 0);  // its arrays stand at the same place in every tile
    sums.add({x(0), tile_size, 0, s.in, first.lo, tile_size, back_size, 0, s.width, 1, trained(0), trained(1)});
    sums.add({h_last(0), tile_size, 0, s.width, first.r, tile_size, back_size, 0, outputs, 1, trained(4), trained(5)});
  }

 private:
  const ChainGram<T>& args;
  const Parallel& parallel;
  const Tiles<T> tiles;
  const ChainShape& s;
  const MlpLayer<T> layer;
  const int64_t size, outputs, held;  // held: layers of the longest segment
  const PairSums<T> sums;
  const int64_t back_size, tile_size;
  const Buffer kept, saved, states, full;

  // As many layers as leave h and B of all samples in a few MiB.
  static ChainShape with_segment(ChainShape shape) {
    const int64_t layer = shape.width * (1 + shape.out) * max_of(1, shape.batch) * int64_t(sizeof(T));
    shape.segment = max_of(8, min_of(64, (int64_t(1) << 22) / layer));
    return shape;
  }
  int64_t slots() const { return max_of(1, ceil_div(s.layers, s.segment)); }
  bool trained(int parameter) const { return args.trainable >> parameter & 1; }

  // What is kept of a tile: x, the last state, and for every output its gradient on the way back.
  T* x(int64_t tile) const { return kept.as<T>() + tile * tile_size; }
  T* h_last(int64_t tile) const { return x(tile) + s.in * tiles.samples; }
  struct Back {
    T *r, *lo, *hi;
  };
  Back back(int64_t tile, int64_t output) const {
    T* const r = h_last(tile) + size + output * back_size;
    return {r, r + outputs * tiles.samples, r + outputs * tiles.samples + size};
  }

  void forward() {
    const Buffer out(s.batch * outputs * int64_t(sizeof(T)));
    chain_forward<MlpLayer<T>>({s, args.params, args.x, out.as<T>(), saved.as<T>()}, parallel);
    parallel_for(parallel, tiles.count, [&](int64_t tile) {
      load_samples(tiles, tile, s.in, false, args.x, x(tile));
      for (int64_t a = 0; a < outputs; ++a) {
        const Back b = back(tile, a);
        for (int64_t i = 0; i < outputs * tiles.samples; ++i) b.r[i] = i / tiles.samples == a ? T(1) : T(0);
        fill(size, T(0), b.lo);
        fill(size, T(0), b.hi);
      }
    });
  }

  // h and B of hidden layers [begin, end); at the end of the last segment also what the first and last layer need.
  void segment(int64_t begin, int64_t end) {
    parallel_for(parallel, tiles.count, [&](int64_t tile) {
      const Buffer memory((State<T>::kArrays + 1) * size * int64_t(sizeof(T)));
      const State<T> state(memory.as<T>(), size);
      T* const spare = state.lo + size;
      T* const h = states.as<T>() + tile * (held + 1) * size;
      set_base(tiles, x(tile), state.base);
      restore(tiles, tile, false, saved.as<T>() + begin / s.segment * tiles.words() * tiles.state(), state);
      state.set_floor(size);
      run_to(tiles, layer, begin, end == s.layers ? end : end - 1, state, h);
      if (end == s.layers) copy(size, h + (end - begin) * size, h_last(tile));
      for (int64_t a = 0; a < outputs; ++a) {
        const Back b = back(tile, a);
        const State<T> g(state.base, b.hi, state.floor, b.lo);  // the forward state is used up
        fill(size, T(0), g.base);
        if (s.offset) copy(outputs * tiles.samples, b.r, g.base + tiles.right() * tiles.samples);
        g.set_floor(size);
        if (end == s.layers) layer.last_back(b.r, h_last(tile), g, spare);
        T* const to = full.as<T>() + (tile * outputs + a) * held * size;
        for (int64_t l = end; l-- > begin;) {
          T* const at = to + (l - begin) * size;
          g.total(size, at);
          layer.step_back(l, at, h + (l - begin) * size, g, spare);
          if (tiles.renormalises(l) && l > 0) renormalise(tiles, g);
        }
        if (begin == 0) g.total(size, b.lo);  // B of the first layer
      }
    });
  }
};

template <class T>
void mlp_gram(const ChainGram<T>& args, const Parallel& parallel) {
  MlpGramSum<T>(args, parallel).run();
}

}  // namespace ND_ISA
}  // namespace narrowdeep
