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

#include "gram/pairs.h"
#include "mlp/kernels.h"

namespace narrowdeep {
namespace ND_ISA {

template <class T>
class MlpGramSum {
 public:
  MlpGramSum(const MlpGram<T>& arguments, const Parallel& pool)
      : args(arguments),
        parallel(pool),
        net(with_segment(arguments.shape), arguments.params, pool),
        outputs(arguments.shape.out),
        step(net.shape.segment),
        held(min_of(step, net.shape.layers)),
        sums(args.pairs, outputs, net.samples, parallel),
        reverse_size(Reverse<T>::elements(net)),
        reverse_memory(net.tiles * outputs * reverse_size * int64_t(sizeof(T))),
        saved((net.shape.offset ? 2 : 1) * max_of(1, ceil_div(net.shape.layers, step)) * net.shape.width *
              net.shape.batch * int64_t(sizeof(T))),
        states(net.tiles * (held + 1) * net.size * int64_t(sizeof(T))),
        full(net.tiles * outputs * held * net.size * int64_t(sizeof(T))) {}

  void run() {
    forward();
    for (int64_t i = max_of(1, ceil_div(net.shape.layers, step)) - 1; i >= 0; --i) {
      const int64_t begin = i * step, end = min_of(begin + step, net.shape.layers);
      segment(begin, end);
      sums.add({states.as<T>(), (held + 1) * net.size, net.size, net.shape.width, full.as<T>(), outputs * held * net.size,
                held * net.size, net.size, net.shape.width, end - begin, trained(2), trained(3)});
    }
    const Reverse<T> first = reverse(0, 0);  // its arrays stand at the same place in every tile
    const int64_t tile = outputs * reverse_size;
    sums.add({first.x, tile, 0, net.shape.in, first.g, tile, reverse_size, 0, net.shape.width, 1, trained(0), trained(1)});
    sums.add({first.h_last, tile, 0, net.shape.width, first.r, tile, reverse_size, 0, outputs, 1, trained(4), trained(5)});
  }

 private:
  const MlpGram<T>& args;
  const Parallel& parallel;
  const Net<T> net;
  const int64_t outputs, step, held;  // held: layers of the longest segment
  const PairSums<T> sums;
  const int64_t reverse_size;
  const Buffer reverse_memory, saved, states, full;

  // As many layers as leave h and B of all samples in a few MiB.
  static MlpShape with_segment(MlpShape shape) {
    const int64_t layer = shape.width * (1 + shape.out) * max_of(1, shape.batch) * int64_t(sizeof(T));
    shape.segment = max_of(8, min_of(64, (int64_t(1) << 22) / layer));
    return shape;
  }
  bool trained(int parameter) const { return args.trainable >> parameter & 1; }
  Reverse<T> reverse(int64_t tile, int64_t output) const {
    return Reverse<T>(net, reverse_memory.as<T>() + (tile * outputs + output) * reverse_size);
  }

  void forward() {
    const Buffer out(net.shape.batch * outputs * int64_t(sizeof(T)));
    mlp_forward<T>({net.shape, args.params, args.x, out.as<T>(), saved.as<T>()}, parallel);
    parallel_for(parallel, net.tiles, [&](int64_t tile) {
      load_transposed(net, tile, net.shape.in, args.x, false, reverse(tile, 0).x);
      for (int64_t a = 0; a < outputs; ++a) {
        T* const r = reverse(tile, a).r;
        for (int64_t i = 0; i < outputs * net.samples; ++i) r[i] = i / net.samples == a ? T(1) : T(0);
      }
    });
  }

  // h and B of hidden layers [begin, end); at the end of the last segment also what the first and last layer need.
  void segment(int64_t begin, int64_t end) {
    parallel_for(parallel, net.tiles, [&](int64_t tile) {
      const Buffer memory(State<T>::kArrays * net.size * int64_t(sizeof(T)));
      const State<T> state(memory.as<T>(), net.size);
      T* const h = states.as<T>() + tile * (held + 1) * net.size;
      restore_states<T>(net, tile, saved.as<T>(), reverse(tile, 0).x, begin, end, state, h);
      T *const root = state.base, *const floor = state.floor;  // the forward state is used up
      for (int64_t a = 0; a < outputs; ++a) {
        const Reverse<T> back = reverse(tile, a);
        if (end == net.shape.layers) {
          start_reverse(net, back, h + (end - begin) * net.size, root, floor);
        } else {
          set_root(net, back, root, floor);
        }
        T* const b = full.as<T>() + (tile * outputs + a) * held * net.size;
        for (int64_t l = end; l-- > begin;) {
          T* const at = b + (l - begin) * net.size;
          subtract(net.size, back.g, floor, at);
          const HiddenBackward<T> epilogue{net.keep, floor, h + (l - begin) * net.size, back.g, net.samples};
          multiply<T>(net.vectors, net.shape.width, net.params.hidden_weight + l * net.shape.width * net.shape.width, 1,
                      net.shape.width, at, net.samples, net.shape.width, epilogue);
          if (net.shape.offset && moves_after(l) && l > 0) {
            move_state(net.shape.width, net.samples, net.keep, root, back.moved, floor, back.g);
          }
        }
        if (begin == 0) subtract(net.size, back.g, floor, back.g);  // B of the first layer
      }
    });
  }
};

template <class T>
inline void mlp_gram(const MlpGram<T>& args, const Parallel& parallel) {
  MlpGramSum<T>(args, parallel).run();
}

}  // namespace ND_ISA
}  // namespace narrowdeep
