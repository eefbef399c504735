// The derivative of the way back through a span (common/backward.h), for any family: how its results move with its input,
// its parameters and the gradient that it starts from. Masks of ReLUs are constants. With T a state's tangent and G' the
// tangent of G,
//
//   G'(l) = mask (W^T G'(l + 1) + W_t^T G(l + 1)),    tangent of the gradient of W = G' h^T + G T^T, of the bias G'.
//
// All tiles run forward first and keep state and tangent every `step` layers; what lies between is computed again.
#pragma once

#include "common/backward.h"

namespace narrowdeep {
namespace ND_ISA {

template <class Layer>
class ChainBackwardJvpRun {
  using T = typename Layer::Element;

 public:
  ChainBackwardJvpRun(const ChainBackwardJvp<T>& arguments, const Parallel& pool, const Part& part)
      : args(arguments),
        parallel(pool),
        tiles(arguments.shape, Layer::kMostVectors, pool.threads, part),
        s(tiles.shape),
        layer(tiles, arguments.params),
        packed(layer.in_registers()),
        size(tiles.size),
        workers(min_of(pool.threads, tiles.count)),
        // States and tangents of a step stay in the second-level cache, unless too many steps were kept then.
        step(max_of(root(s.layers), min_of(64, (int64_t(1) << 18) / (2 * size * int64_t(sizeof(T)))))),
        steps(max_of(1, ceil_div(s.layers, step))),
        longest(min_of(step, s.layers) + 1),
        room(max_of(size, s.in * tiles.row)) {}

  static int64_t root(int64_t layers) {
    int64_t root = 4;
    while (root * root < layers) ++root;
    return root;
  }

  void run() {
    const Buffer memory(tiles.count * kept_elements() * int64_t(sizeof(T)));
    kept = memory.as<T>();
    parallel_for(parallel, workers, [&](int64_t worker) {
      const Buffer room_memory(room_elements() * int64_t(sizeof(T)));
      const Room r = room_at(room_memory.as<T>());
      const Share share(tiles.count, workers, worker, Layer::kRunsOfTiles);
      for (int64_t i = 0; i < share.count; ++i) forward(share[i], r);
    });
    // Gradients of few layers at a time where they are large: every worker has sums of its own.
    const int64_t layer_size = (layer.hidden_weights() + s.width) * int64_t(sizeof(T));
    const int64_t together = min_of(steps, max_of(1, (int64_t(1) << 20) / (layer_size * step)));
    for (int64_t last = steps; last > 0; last -= min_of(together, last)) group(last - min_of(together, last), last);
  }

 private:
  const ChainBackwardJvp<T>& args;
  const Parallel& parallel;
  const Tiles<T> tiles;
  const ChainShape& s;
  const Layer layer;
  const bool packed;  // whether layers run in registers
  const int64_t size, workers;
  const int64_t step, steps, longest;  // layers of a step; steps; states of the longest one
  const int64_t room;                  // elements of a state or of the gradient of x
  T* kept = nullptr;

  // What is kept of a tile: ends, bases, both gradients on their way, and (hi, lo) of state and tangent a step.
  struct Kept {
    T *x, *x_t, *r, *r_t, *base, *base_t, *g, *g_t, *steps;
  };
  int64_t kept_elements() const { return 2 * (s.in + s.out) * tiles.row + (6 + 4 * steps) * size; }
  Kept kept_of(int64_t tile) const {
    T* const x = kept + tile * kept_elements();
    T *const x_t = x + s.in * tiles.row, *const r = x_t + s.in * tiles.row, *const r_t = r + s.out * tiles.row;
    T* const base = r_t + s.out * tiles.row;
    return {x, x_t, r, r_t, base, base + size, base + 2 * size, base + 4 * size, base + 6 * size};
  }

  // What a worker needs beside: words of four states, G and G' before and after a layer, values of a step.
  struct Room {
    T *words, *full, *full_next, *full_t, *full_t_next, *states, *tangents, *bias, *scratch;
  };
  int64_t scratch_elements() const {
    return max_of(layer.gradient_scratch(s.width, s.width),
                  max_of(layer.gradient_scratch(s.width, s.in), layer.gradient_scratch(s.out, s.width)));
  }
  int64_t room_elements() const {
    return 10 * size + 4 * room + 2 * longest * size + max_of(s.width, s.out) + scratch_elements();
  }
  Room room_at(T* words) const {
    T *const full = words + 10 * size, *const states = full + 4 * room, *const tangents = states + longest * size;
    T* const scratch = tangents + longest * size;
    return {words,  full, full + room, full + 2 * room, full + 3 * room, states, tangents, scratch + scratch_elements(),
            scratch};
  }
  State<T> state(const Kept& k, const Room& r) const { return {k.base, r.words, r.words + size, r.words + 2 * size}; }
  State<T> tangent(const Kept& k, const Room& r) const {
    return {k.base_t, r.words + 3 * size, r.words + 4 * size, r.words + 5 * size};
  }
  State<T> gradient(const Kept& k, const Room& r) const {
    return {r.words + 6 * size, k.g, r.words + 7 * size, k.g + size};
  }
  State<T> gradient_tangent(const Kept& k, const Room& r) const {
    return {r.words + 8 * size, k.g_t, r.words + 9 * size, k.g_t + size};
  }

  // States and tangents after layers [begin, end), each to `states` and `tangents`, behind those of state `begin`.
  void advance(int64_t begin, int64_t end, const Kept& k, const Room& r) const {
    T *h = r.states, *full = r.tangents, *none = nullptr, *none_t = nullptr;
    run_with_tangent(tiles, layer, begin, end, args.tangents, state(k, r), tangent(k, r), h, none, full, none_t);
  }

  void forward(int64_t tile, const Room& r) const {
    const Kept k = kept_of(tile);
    const State<T> h = state(k, r), t = tangent(k, r);
    enter(tiles, layer, tile, args.input, k.x, h, r.states);
    enter_tangent(tiles, layer, tile, args.input_tangent, args.tangents, k.x, k.x_t, r.states, t, r.tangents);
    for (int64_t n = 0; n < steps; ++n) {
      T* const to = k.steps + n * 4 * size;
      copy(size, h.hi, to);
      copy(size, h.lo, to + size);
      copy(size, t.hi, to + 2 * size);
      copy(size, t.lo, to + 3 * size);
      if (n + 1 == steps) break;
      advance(n * step, (n + 1) * step, k, r);
      copy(size, r.states + step * size, r.states);
      copy(size, r.tangents + step * size, r.tangents);
    }
    load_gradient(tiles, tile, args.grad, k.r, k.g, k.g + size);
    load_gradient(tiles, tile, args.grad_tangent, k.r_t, k.g_t, k.g_t + size);
  }

  GradientSizes sizes(int64_t begin, int64_t end) const {
    const bool first = s.first && begin == 0, last = s.last && end == s.layers;
    const int64_t weights = packed ? layer.packed_size() : layer.hidden_weights(), biases = packed ? 0 : s.width;
    GradientSizes g{{first ? layer.first_weights() : 0, first ? s.width : 0, (end - begin) * weights,
                     (end - begin) * biases, last ? layer.last_weights() : 0, last ? s.out : 0},
                    0};
    for (int64_t n : g.sizes) g.total += n;
    return g;
  }

  // Steps [first, last) of all tiles, backwards; then the sums of all workers are added up. Those of layers in registers
  // are packed, others the first worker writes to the results.
  void group(int64_t first, int64_t last) const {
    const int64_t begin = first * step, end = min_of(last * step, s.layers), direct = packed ? 0 : 1;
    const GradientSizes g = sizes(begin, end);
    const Buffer memory(args.need_params ? (workers - direct) * g.total * int64_t(sizeof(T)) : 0);
    ChainParams<T> results = args.grads;
    if (args.need_params) {
      results.hidden_weight += begin * layer.hidden_weights();
      results.hidden_bias += begin * s.width;
    }
    const auto sums_of = [&](int64_t worker) {
      return worker < direct ? results : g.at(memory.as<T>() + (worker - direct) * g.total);
    };
    parallel_for(parallel, workers, [&](int64_t worker) {
      const Buffer room_memory(room_elements() * int64_t(sizeof(T)));
      const Room r = room_at(room_memory.as<T>());
      const ChainParams<T> sums = args.need_params ? sums_of(worker) : ChainParams<T>{};
      if (packed && args.need_params) fill(g.sizes[2], T(0), sums.hidden_weight);
      const Share share(tiles.count, workers, worker, Layer::kRunsOfTiles);
      const bool onto = tiles.begin > 0 && worker < direct;  // what earlier parts have written
      for (int64_t i = 0; i < share.count; ++i) {
        const bool add = i > 0 || onto;
        const Kept k = kept_of(share[i]);
        set_root(tiles, k.r, gradient(k, r));
        set_root(tiles, k.r_t, gradient_tangent(k, r));
        for (int64_t n = last; n-- > first;)
          back(share[i], n * step, min_of((n + 1) * step, s.layers), k, r, sums, begin, add);
        if (first == 0) leave(share[i], k, r, sums, add);
      }
    });
    if (!args.need_params) return;
    GradientSizes rest = g;
    if (packed) rest.sizes[2] = 0;
    const int64_t share = max_of(1, ceil_div(end - begin, workers));
    parallel_for(parallel, workers, [&](int64_t task) {
      for (int64_t worker = direct; worker < workers; ++worker)
        sum_gradients(rest, sums_of(worker), results, worker > 0, task, workers);
      if (packed && task * share < end - begin)
        layer.unpack(sums_of(0).hidden_weight, g.total, workers, task * share, min_of((task + 1) * share, end - begin),
                     results.hidden_weight, results.hidden_bias);
    });
  }

  // G' h^T + G T^T and the bias's G', of one layer.
  void gradients(int64_t rows, int64_t columns, int64_t tile, const T* full, const T* full_t, const T* h, const T* t,
                 T* weight, T* bias, bool add, const Room& r) const {
    layer.gradient(rows, columns, tiles.valid(tile), full_t, h, weight, bias, add, r.scratch);
    layer.gradient(rows, columns, tiles.valid(tile), full, t, weight, r.bias, true, r.scratch);
  }

  // G' behind a layer's weight (rows, columns) and the ReLU whose output is `h`.
  void back_tangent(const T* weight, const T* weight_t, int64_t rows, const T* full, const T* full_t, const T* h,
                    const State<T>& g_t, T* next) const {
    for (int64_t i = 0; i < s.width; ++i)
      if (tiles.skip[i] == T(0)) fill(tiles.row, T(0), g_t.lo + i * tiles.row);
    if (weight_t) layer.transposed(weight_t, rows, s.width, full, AddEpilogue<T>{g_t.lo, tiles.row});
    layer.transposed(weight, rows, s.width, full_t,
                     GradientEpilogue<T>{h, tiles.every, g_t.floor, g_t.lo, next, tiles.row, {}});
  }

  // Both gradients at state l, if the forward does so there.
  bool renormalise_both(int64_t l, const State<T>& g, const State<T>& g_t) const {
    if (!tiles.renormalises(l) || s.start + l == 0) return false;
    renormalise(tiles, g);
    renormalise(tiles, g_t);
    return true;
  }

  // Hidden layers [begin, end) backwards, and before them the last layer if it follows.
  void back(int64_t tile, int64_t begin, int64_t end, const Kept& k, const Room& r, const ChainParams<T>& sums,
            int64_t first_layer, bool add) const {
    const State<T> h = state(k, r), t = tangent(k, r), g = gradient(k, r), g_t = gradient_tangent(k, r);
    const T* const from = k.steps + begin / step * 4 * size;
    copy(size, from, h.hi);
    copy(size, from + size, h.lo);
    copy(size, from + 2 * size, t.hi);
    copy(size, from + 3 * size, t.lo);
    h.set_floor(size);
    t.set_floor(size);
    h.total(size, r.states);
    t.total(size, r.tangents);
    const bool ends = s.last && end == s.layers;
    advance(begin, ends ? end : max_of(begin, end - 1), k, r);
    T *full = r.full, *full_next = r.full_next, *full_t = r.full_t, *full_t_next = r.full_t_next;
    if (ends) {
      const T *const last = r.states + (end - begin) * size, *const last_t = r.tangents + (end - begin) * size;
      if (args.need_params)
        gradients(s.out, s.width, tile, k.r, k.r_t, last, last_t, sums.last_weight, sums.last_bias, add, r);
      layer.last_back(k.r, last, g, full);
      back_tangent(args.params.last_weight, args.tangents.last_weight, s.out, k.r, k.r_t, last, g_t, full_t);
    }
    if (packed) {
      while (end > begin) {
        const int64_t stop = tiles.last_renormalisation(end, begin), at = (stop - begin) * size;
        T* const partial = args.need_params ? sums.hidden_weight + (stop - first_layer) * layer.packed_size() : nullptr;
        layer.backward_tangent_in_registers(stop, end, args.tangents, g, g_t, r.states + at, r.tangents + at, partial);
        end = stop;
        renormalise_both(end, g, g_t);
      }
      return;
    }
    g.total(size, full);
    g_t.total(size, full_t);
    for (int64_t l = end; l-- > begin;) {
      const int64_t at = l * layer.hidden_weights();
      const T* const value = r.states + (l - begin) * size;
      if (args.need_params)
        gradients(s.width, s.width, tile, full, full_t, value, r.tangents + (l - begin) * size,
                  sums.hidden_weight + (l - first_layer) * layer.hidden_weights(),
                  sums.hidden_bias + (l - first_layer) * s.width, add, r);
      back_tangent(args.params.hidden_weight + at,
                   args.tangents.hidden_weight ? args.tangents.hidden_weight + at : nullptr, s.width, full, full_t,
                   value, g_t, full_t_next);
      layer.step_back(l, full, value, g, full_next);
      swap(full, full_next);
      swap(full_t, full_t_next);
      if (!renormalise_both(l, g, g_t)) continue;
      g.total(size, full);
      g_t.total(size, full_t);
    }
  }

  // The tangent of the gradient of state 0 goes out, or through the first layer.
  void leave(int64_t tile, const Kept& k, const Room& r, const ChainParams<T>& sums, bool add) const {
    const State<T> g = gradient(k, r), g_t = gradient_tangent(k, r);
    if (!s.first) {
      if (args.grad_input) store_state(tiles, tile, g_t, args.grad_input);
      return;
    }
    g.total(size, r.full);
    g_t.total(size, r.full_t);
    if (args.need_params)
      gradients(s.width, s.in, tile, r.full, r.full_t, k.x, k.x_t, sums.first_weight, sums.first_bias, add, r);
    if (!args.grad_input) return;
    layer.first_back(r.full_t, r.full_t_next);
    if (args.tangents.first_weight)
      layer.transposed(args.tangents.first_weight, s.width, s.in, r.full, AddEpilogue<T>{r.full_t_next, tiles.row});
    store_images(tiles, tile, s.in, r.full_t_next, args.grad_input);
  }
};

template <class Layer, class T = typename Layer::Element>
void chain_backward_jvp(const ChainBackwardJvp<T>& args, const Parallel& parallel) {
  Layer::parts(args.shape, parallel.threads,
               [&](const Part& part) { ChainBackwardJvpRun<Layer>(args, parallel, part).run(); });
}

}  // namespace ND_ISA
}  // namespace narrowdeep
