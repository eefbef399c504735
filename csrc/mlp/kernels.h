// The MLP chain for one instruction set: forward, backward, jvp. Included by one translation unit per instruction set.
//
// Samples stand in vector lanes. A tile of at most four vectors goes through all layers, or all layers of a segment,
// before the next tile, so its activations stay in cache; threads share out the tiles.
#pragma once

#include "mlp/args.h"
#include "mlp/layer.h"
#include "mlp/narrow.h"

namespace narrowdeep {
namespace ND_ISA {

// How a batch is cut into tiles, and what every kernel needs to know about the network.
template <class T>
struct Net {
  MlpShape shape;
  MlpParams<const T> params;
  int vectors;      // of a tile: 1, 2 or 4
  int64_t samples;  // of a tile, vectors * lanes
  int64_t tiles;
  int64_t size;  // elements of one [width][samples] array
  Buffer keep_buffer;
  T* keep;  // (width): all ones where the identity part is 1, else 0

  Net(const MlpShape& s, const MlpParams<const T>& p, const Parallel& parallel)
      : shape(s), params(p), keep_buffer(s.width * int64_t(sizeof(T))), keep(keep_buffer.as<T>()) {
    const int64_t whole = ceil_div(s.batch, kLanes<T>);
    const int64_t share = ceil_div(whole, parallel.threads);
    vectors = share >= 3 ? 4 : share == 2 ? 2 : 1;
    samples = vectors * kLanes<T>;
    tiles = ceil_div(s.batch, samples);
    size = s.width * samples;
    for (int64_t i = 0; i < s.width; ++i)
      keep[i] = s.offset && (i < s.in || i >= s.width - s.out) ? all_ones<T>() : T(0);
  }
  int64_t valid(int64_t tile) const { return min_of(samples, shape.batch - tile * samples); }
  bool narrow() const { return shape.width >= kNarrowest && shape.width <= kWidestNarrow; }
};

// The state of one tile; every array [width][samples].
template <class T>
struct State {
  T *base, *moved, *floor, *a;
  static constexpr int kArrays = 4;
  State(T* memory, int64_t size) : base(memory), moved(base + size), floor(moved + size), a(floor + size) {}
};

template <class T>
inline void subtract(int64_t count, const T* a, const T* b, T* to) {
  for (int64_t s = 0; s < count; ++s) to[s] = a[s] - b[s];
}

// x (batch, features), samples [tile], transposed to [features][samples]; the last tile is filled up with its last
// sample, or with zeros.
template <class T>
inline void load_transposed(const Net<T>& net, int64_t tile, int64_t features, const T* x, bool fill_with_zero, T* to) {
  const int64_t valid = net.valid(tile);
  transpose(valid, features, x + tile * net.samples * features, features, to, net.samples);
  for (int64_t k = 0; k < features; ++k)
    for (int64_t s = valid; s < net.samples; ++s)
      to[k * net.samples + s] = fill_with_zero ? T(0) : to[k * net.samples + valid - 1];
}
template <class T>
inline void store_transposed(const Net<T>& net, int64_t tile, int64_t features, const T* from, T* to) {
  transpose(features, net.valid(tile), from, net.samples, to + tile * net.samples * features, features);
}

// base, from the transposed input.
template <class T>
inline void set_base(const Net<T>& net, const T* x, T* base) {
  const MlpShape& s = net.shape;
  const T scale = T(s.scale);
  for (int64_t i = 0; i < net.size; ++i) base[i] = T(0);
  if (!s.offset) return;
  for (int64_t i = 0; i < s.in * net.samples; ++i) {
    const T left = scale * x[i];
    base[i] = left < T(0) ? T(0) : left;
  }
  for (int64_t i = (s.width - s.out) * net.samples; i < net.size; ++i) base[i] = scale;
}

// The first layer: state 1 of a tile.
template <class T>
inline void first_layer(const Net<T>& net, const T* x, const State<T>& state) {
  const MlpShape& s = net.shape;
  set_base(net, x, state.base);
  for (int64_t i = 0; i < net.size; ++i) state.moved[i] = T(0);
  set_floor(net.size, state.base, state.moved, state.floor);
  const Affine<T> epilogue{net.params.first_bias, nullptr, 0, T(0), state.a, net.samples};
  multiply<T>(net.vectors, s.width, net.params.first_weight, s.in, 1, x, net.samples, s.in, epilogue);
  const T scale = T(s.scale);
  for (int64_t i = 0; i < net.size; ++i) {
    T z = state.a[i];
    if (s.offset && i < s.in * net.samples) {
      const T left = scale * x[i];
      if (left < T(0)) z = left + z;  // what the base left out of scale * x
    }
    state.a[i] = state.floor[i] > z ? state.floor[i] : z;
  }
}

template <class T, int N = kNarrowest>
inline void narrow_forward_any(const Net<T>& net, int64_t begin, int64_t end, const State<T>& state, T* states) {
  if constexpr (N <= kWidestNarrow) {
    if (net.shape.width != N) return narrow_forward_any<T, N + 1>(net, begin, end, state, states);
    const T *w = net.params.hidden_weight, *c = net.params.hidden_bias;
    if (net.shape.offset) {
      if (states) narrow_forward<T, N, true, true>(w, c, begin, end, net.vectors, net.keep, state.floor, state.a, states);
      else narrow_forward<T, N, true, false>(w, c, begin, end, net.vectors, net.keep, state.floor, state.a, states);
    } else {
      if (states) narrow_forward<T, N, false, true>(w, c, begin, end, net.vectors, net.keep, state.floor, state.a, states);
      else narrow_forward<T, N, false, false>(w, c, begin, end, net.vectors, net.keep, state.floor, state.a, states);
    }
  }
}

// Hidden layers [begin, end). With `states`, the state after layer l goes to states + (l - begin + 1) * size, and the
// one before `begin` to states. Without, `h` is two arrays of scratch.
template <class T>
inline void run_layers(const Net<T>& net, int64_t begin, int64_t end, const State<T>& state, T* states, T* h) {
  const MlpShape& s = net.shape;
  T* current = states ? states : h;
  subtract(net.size, state.a, state.floor, current);
  for (int64_t l = begin; l < end;) {
    const int64_t stop = s.offset ? next_move(l, end) : end;
    if (net.narrow()) {
      narrow_forward_any(net, l, stop, state, states ? states + (l - begin) * net.size : nullptr);
      if (states) current = states + (stop - begin) * net.size;
      l = stop;
    } else {
      for (; l < stop; ++l) {
        T* next = states ? current + net.size : current == h ? h + net.size : h;
        const T* const weight = net.params.hidden_weight + l * s.width * s.width;
        const HiddenForward<T> epilogue{net.params.hidden_bias + l * s.width, net.keep, state.floor, state.a, next, net.samples,
                                        l + 1 < s.layers ? weight + s.width * s.width : weight, s.width};
        multiply<T>(net.vectors, s.width, weight, s.width, 1, current, net.samples, s.width, epilogue);
        current = next;
      }
    }
    if (s.offset && moves_after(stop)) {
      move_state(s.width, net.samples, net.keep, state.base, state.moved, state.floor, state.a);
      if (states || !net.narrow()) subtract(net.size, state.a, state.floor, current);
    }
  }
}

// State number `index` of the saved ones, (moved, a) or h, in the layout (states, parts, width, batch).
template <class T>
inline void save_state(const Net<T>& net, int64_t tile, int64_t index, int parts, const T* first, const T* second, T* saved) {
  const int64_t batch = net.shape.batch, width = net.shape.width;
  T* to = saved + index * parts * width * batch + tile * net.samples;
  store_rows(width, net.samples, net.valid(tile), first, to, batch);
  if (parts == 2) store_rows(width, net.samples, net.valid(tile), second, to + width * batch, batch);
}
template <class T>
inline void load_state(const Net<T>& net, int64_t tile, int64_t index, int parts, const T* saved, T* first, T* second) {
  const int64_t batch = net.shape.batch, width = net.shape.width;
  const T* from = saved + index * parts * width * batch + tile * net.samples;
  load_rows(width, net.samples, net.valid(tile), from, batch, first);
  if (parts == 2) load_rows(width, net.samples, net.valid(tile), from + width * batch, batch, second);
}

// Layers a backward step takes at a time: the segment, or, when every state was saved, what fits in cache.
template <class T>
inline int64_t step_layers(const Net<T>& net) {
  if (net.shape.segment > 1) return net.shape.segment;
  const int64_t fitting = (int64_t(1) << 19) / (2 * net.size * int64_t(sizeof(T)));
  return max_of(4, min_of(64, fitting));
}

template <class T>
inline void mlp_forward(const MlpForward<T>& args, const Parallel& parallel) {
  const MlpShape& s = args.shape;
  const Net<T> net(s, args.params, parallel);
  const int64_t workers = min_of(parallel.threads, net.tiles);
  const int64_t step = s.segment == 0 ? max_of(1, s.layers) : s.segment == 1 ? kMovePeriod : s.segment;
  parallel_for(parallel, workers, [&](int64_t worker) {
    const int64_t states_size = s.segment == 1 ? (step + 1) * net.size : 0;
    const Buffer memory(int64_t(sizeof(T)) *
                        ((State<T>::kArrays + 2) * net.size + (s.in + s.out) * net.samples + states_size));
    T* const h = memory.as<T>();
    const State<T> state(h + 2 * net.size, net.size);
    T* const x = h + (2 + State<T>::kArrays) * net.size;
    T* const out = x + s.in * net.samples;
    T* const states = s.segment == 1 ? out + s.out * net.samples : nullptr;
    for (int64_t tile = worker; tile < net.tiles; tile += workers) {
      load_transposed(net, tile, s.in, args.x, false, x);
      first_layer(net, x, state);
      for (int64_t begin = 0; begin < max_of(1, s.layers); begin += step) {
        const int64_t end = min_of(begin + step, s.layers);
        if (s.segment > 1) {
          save_state(net, tile, begin / step, s.offset ? 2 : 1, s.offset ? state.moved : state.a, state.a, args.saved);
        }
        run_layers(net, begin, end, state, states, h);
        if (s.segment == 1) {
          for (int64_t l = begin; l < end; ++l) save_state(net, tile, l, 1, states + (l - begin) * net.size, states, args.saved);
        }
      }
      subtract(net.size, state.a, state.floor, h);
      if (s.segment == 1) save_state(net, tile, s.layers, 1, h, h, args.saved);
      const Affine<T> last{args.params.last_bias, nullptr, 0, T(0), out, net.samples};
      multiply<T>(net.vectors, s.out, args.params.last_weight, s.width, 1, h, net.samples, s.width, last);
      if (s.offset) {
        const int64_t right = (s.width - s.out) * net.samples;
        for (int64_t i = 0; i < s.out * net.samples; ++i) out[i] += state.moved[right + i] + state.a[right + i];
      }
      store_transposed(net, tile, s.out, out, args.out);
    }
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// What a backward keeps of one tile from its first step to its last.
template <class T>
struct Reverse {
  T *x, *r;               // transposed input and output gradient
  T *g, *moved, *h_last;  // [width][samples]
  static int64_t elements(const Net<T>& net) { return 3 * net.size + (net.shape.in + net.shape.out) * net.samples; }
  Reverse(const Net<T>& net, T* memory)
      : x(memory),
        r(x + net.shape.in * net.samples),
        g(r + net.shape.out * net.samples),
        moved(g + net.size),
        h_last(moved + net.size) {}
};

// h of the states before and after every layer of [begin, end), into `states`.
template <class T>
inline void restore_states(const Net<T>& net, int64_t tile, const T* saved, const T* x, int64_t begin, int64_t end,
                           const State<T>& state, T* states) {
  const MlpShape& s = net.shape;
  if (s.segment == 1) {
    for (int64_t l = begin; l <= end; ++l) load_state<T>(net, tile, l, 1, saved, states + (l - begin) * net.size, nullptr);
    return;
  }
  set_base(net, x, state.base);
  if (s.offset) {
    load_state(net, tile, begin / s.segment, 2, saved, state.moved, state.a);
  } else {
    for (int64_t i = 0; i < net.size; ++i) state.moved[i] = T(0);
    load_state<T>(net, tile, begin / s.segment, 1, saved, state.a, nullptr);
  }
  set_floor(net.size, state.base, state.moved, state.floor);
  run_layers<T>(net, begin, end, state, states, nullptr);
}

// root = R = [0; 0; r] in offset form, else 0; floor = -(R + moved).
template <class T>
inline void set_root(const Net<T>& net, const Reverse<T>& reverse, T* root, T* floor) {
  const int64_t right = (net.shape.width - net.shape.out) * net.samples;
  for (int64_t i = 0; i < net.size; ++i) root[i] = net.shape.offset && i >= right ? reverse.r[i - right] : T(0);
  set_floor(net.size, root, reverse.moved, floor);
}

// The last layer backwards: g at state L-1, given that state.
template <class T>
inline void start_reverse(const Net<T>& net, const Reverse<T>& reverse, const T* h_last, T* root, T* floor) {
  const MlpShape& s = net.shape;
  for (int64_t i = 0; i < net.size; ++i) {
    reverse.h_last[i] = h_last[i];
    reverse.moved[i] = T(0);
    reverse.g[i] = T(0);
  }
  set_root(net, reverse, root, floor);
  const HiddenBackward<T> epilogue{net.keep, floor, h_last, reverse.g, net.samples, nullptr, 0};
  multiply<T>(net.vectors, s.width, net.params.last_weight, 1, s.width, reverse.r, net.samples, s.out, epilogue);
}

template <class T, int N = kNarrowest>
inline void narrow_backward_any(const Net<T>& net, int64_t begin, int64_t end, const T* floor, T* g, const T* states, T* partial) {
  if constexpr (N <= kWidestNarrow) {
    if (net.shape.width != N) return narrow_backward_any<T, N + 1>(net, begin, end, floor, g, states, partial);
    const T* w = net.params.hidden_weight;
    if (net.shape.offset) narrow_backward<T, N, true>(w, begin, end, net.vectors, net.keep, floor, g, states, partial);
    else narrow_backward<T, N, false>(w, begin, end, net.vectors, net.keep, floor, g, states, partial);
  }
}

template <class T, int N = kNarrowest>
inline int64_t narrow_partial_size(int64_t width) {
  if constexpr (N <= kWidestNarrow) return width == N ? NarrowEntries<T, N>::kSize : narrow_partial_size<T, N + 1>(width);
  return 0;
}
template <class T, int N = kNarrowest>
inline int64_t narrow_position(int64_t width, int entry) {
  if constexpr (N <= kWidestNarrow) return width == N ? NarrowEntries<T, N>::position(entry) : narrow_position<T, N + 1>(width, entry);
  return 0;
}

// Where a worker's tiles leave the weight gradients of the hidden layers of a step. Narrow widths always use `partial`, in
// the order of NarrowEntries; others the layout of the gradients themselves.
template <class T>
struct HiddenGradients {
  T* weight;  // of the step's first layer
  T* bias;
  bool add;  // to what is there, or write over it

  HiddenGradients at(int64_t weights, int64_t biases) const { return {weight + weights, bias + biases, add}; }
};

// Layers [begin, end) backwards, their weight gradients (when `gradients.weight` is not null) taken from each while its G
// and h are in cache. `scratch`: for widths that are not narrow, room for G and for the transposed states.
template <class T>
inline void reverse_layers(const Net<T>& net, int64_t begin, int64_t end, int64_t valid, const Reverse<T>& reverse,
                           const T* root, T* floor, const T* states, const HiddenGradients<T>& gradients, T* scratch) {
  const MlpShape& s = net.shape;
  const int64_t partial_size = narrow_partial_size<T>(s.width);
  for (int64_t l = end; l > begin;) {
    const int64_t stop = s.offset ? max_of((l - 1) / kMovePeriod * kMovePeriod, begin) : begin;
    if (net.narrow()) {
      narrow_backward_any(net, stop, l, floor, reverse.g, states + (stop - begin) * net.size,
                          gradients.weight ? gradients.weight + (stop - begin) * partial_size : nullptr);
      l = stop;
    } else {
      while (l > stop) {
        --l;
        T* const full = scratch;
        const T* const h = states + (l - begin) * net.size;
        subtract(net.size, reverse.g, floor, full);
        const T* const weight = net.params.hidden_weight + l * s.width * s.width;
        const HiddenBackward<T> epilogue{net.keep, floor, h, reverse.g, net.samples, l > 0 ? weight - s.width * s.width : weight,
                                         s.width};
        multiply<T>(net.vectors, s.width, weight, 1, s.width, full, net.samples, s.width, epilogue);
        if (!gradients.weight) continue;
        const HiddenGradients<T> to = gradients.at((l - begin) * s.width * s.width, (l - begin) * s.width);
        weight_gradient<T>({full, h, 0, 0, s.width, s.width, to.weight, to.bias, to.add}, 0, s.width, net.samples, 1, valid,
                           scratch + net.size);
      }
    }
    if (s.offset && moves_after(l) && l > 0) {
      move_state(s.width, net.samples, net.keep, root, reverse.moved, floor, reverse.g);
    }
  }
}

template <class T>
class Backward {
 public:
  Backward(const MlpBackward<T>& arguments, const Parallel& pool)
      : args(arguments),
        parallel(pool),
        net(arguments.shape, arguments.params, pool),
        kept(net.tiles * Reverse<T>::elements(net) * int64_t(sizeof(T))),
        step(step_layers(net)),
        workers(min_of(pool.threads, net.tiles)) {}

  void run() {
    parallel_for(parallel, workers, [&](int64_t worker) {
      for (int64_t tile = worker; tile < net.tiles; tile += workers) {
        const Reverse<T> reverse = of(tile);
        load_transposed(net, tile, net.shape.in, args.x, false, reverse.x);
        load_transposed(net, tile, net.shape.out, args.grad_out, true, reverse.r);
      }
    });
    hidden();
    ends();
  }

 private:
  const MlpBackward<T>& args;
  const Parallel& parallel;
  const Net<T> net;
  const Buffer kept;
  const int64_t step, workers;

  Reverse<T> of(int64_t tile) const { return Reverse<T>(net, kept.as<T>() + tile * Reverse<T>::elements(net)); }

  // States of layers [begin, end) of a tile, the start of its backward if this is the last step, and its root and floor.
  void enter(int64_t tile, int64_t begin, int64_t end, const Reverse<T>& reverse, const State<T>& state, T* states) const {
    restore_states(net, tile, args.saved, reverse.x, begin, end, state, states);
    if (end == net.shape.layers) {
      start_reverse(net, reverse, states + (end - begin) * net.size, state.base, state.floor);
    } else {
      set_root(net, reverse, state.base, state.floor);  // the forward state is used up: its arrays serve the backward
    }
  }

  // G at state 1 takes the place of g.
  void leave(const Reverse<T>& reverse, const State<T>& state) const {
    subtract(net.size, reverse.g, state.floor, reverse.g);
  }

  // Elements of the hidden gradients of one layer as a worker holds them.
  int64_t partial_size() const {
    const int64_t width = net.shape.width;
    return net.narrow() ? narrow_partial_size<T>(width) : width * width + width;
  }

  // Every worker takes its tiles through some steps; then the partial sums of all workers are added up, in order. A step
  // is one segment; few steps go together where their gradients are large, many where each would be a wait for nothing.
  // Worker 0 of a width that is not narrow writes to the gradients themselves. (Partial sums for it as well were 30%
  // slower at width 75: what one core has written is dear to read on another.)
  void hidden() {
    const MlpShape& s = net.shape;
    const bool wanted = args.grads.first_weight != nullptr, narrow = net.narrow();
    const int64_t steps = max_of(1, ceil_div(s.layers, step)), longest = min_of(step, s.layers);
    const int64_t fitting = (int64_t(1) << 20) / (partial_size() * int64_t(sizeof(T)) * step);
    const int64_t together = min_of(steps, max_of(1, fitting));
    const int64_t layers = min_of(together * step, s.layers), weights = s.width * s.width;
    const int64_t partial_elements = wanted ? layers * partial_size() : 0;
    const int64_t direct = narrow ? 0 : 1;  // workers that need no partial sums
    const Buffer partials((workers - direct) * partial_elements * int64_t(sizeof(T)));
    for (int64_t last = steps; last > 0; last -= min_of(together, last)) {
      const int64_t first = last - min_of(together, last), first_layer = first * step;
      const int64_t count = min_of(last * step, s.layers) - first_layer;  // layers
      parallel_for(parallel, workers, [&](int64_t worker) {
        T* const partial = worker < direct ? nullptr : partials.as<T>() + (worker - direct) * partial_elements;
        if (narrow)
          for (int64_t i = 0; i < partial_elements; ++i) partial[i] = T(0);
        const int64_t scratch_size = narrow ? 0 : net.size + net.samples * padded_columns<T>(s.width);
        const Buffer memory(int64_t(sizeof(T)) * (net.size * (State<T>::kArrays + longest + 1) + scratch_size));
        const State<T> state(memory.as<T>(), net.size);
        T* const states = memory.as<T>() + State<T>::kArrays * net.size;
        T* const scratch = states + (longest + 1) * net.size;
        for (int64_t tile = worker; tile < net.tiles; tile += workers) {
          const Reverse<T> reverse = of(tile);
          for (int64_t i = last - 1; i >= first; --i) {
            const int64_t begin = i * step, end = min_of(begin + step, s.layers), layer = begin - first_layer;
            HiddenGradients<T> to{nullptr, nullptr, tile != worker};
            if (wanted && worker < direct) {
              to = HiddenGradients<T>{args.grads.hidden_weight, args.grads.hidden_bias, to.add}.at(begin * weights, begin * s.width);
            } else if (wanted) {
              to = narrow ? HiddenGradients<T>{partial + layer * partial_size(), nullptr, true}
                          : HiddenGradients<T>{partial, partial + layers * weights, to.add}.at(layer * weights, layer * s.width);
            }
            enter(tile, begin, end, reverse, state, states);
            reverse_layers(net, begin, end, net.valid(tile), reverse, state.base, state.floor, states, to, scratch);
          }
          if (first == 0) leave(reverse, state);
        }
      });
      if (!wanted) continue;
      // No more tasks than workers: sums that one core has made alone are best written there.
      const int64_t block = max_of(1, ceil_div(count, workers));  // layers a task
      parallel_for(parallel, ceil_div(count, block), [&](int64_t task) {
        const int64_t begin = task * block, end = min_of(begin + block, count);
        if (narrow) {
          add_narrow(partials.as<T>(), partial_elements, begin, end, first_layer);
        } else {
          for (int64_t worker = direct; worker < workers; ++worker) {
            const T* const from = partials.as<T>() + (worker - direct) * partial_elements;
            add(from + begin * weights, (end - begin) * weights, args.grads.hidden_weight + (first_layer + begin) * weights);
            add(from + layers * weights + begin * s.width, (end - begin) * s.width,
                args.grads.hidden_bias + (first_layer + begin) * s.width);
          }
        }
      });
    }
  }

  static void add(const T* from, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  }

  // Gradients of layers [begin, end), counted from `first_layer`, from all workers' partial sums.
  void add_narrow(const T* partials, int64_t partial_elements, int64_t begin, int64_t end, int64_t first_layer) const {
    const int64_t width = net.shape.width, weights = width * width, size = narrow_partial_size<T>(width);
    int64_t positions[kWidestNarrow * (kWidestNarrow + 1)];
    for (int64_t e = 0; e < weights + width; ++e) positions[e] = narrow_position<T>(width, int(e));
    constexpr int64_t kAhead = 16;  // layers: other workers' sums come from other cores
    T total[kWidestNarrow * (kWidestNarrow + 1) + kLanes<T>];
    for (int64_t l = begin; l < end; ++l) {
      for (int64_t i = 0; i < size; ++i) total[i] = partials[l * size + i];
      for (int64_t worker = 1; worker < workers; ++worker) {
        const T* const from = partials + worker * partial_elements + l * size;
        for (int64_t i = 0; i < size; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + kAhead * size + i);
        for (int64_t i = 0; i < size; ++i) total[i] += from[i];
      }
      T* const weight = args.grads.hidden_weight + (first_layer + l) * weights;
      T* const bias = args.grads.hidden_bias + (first_layer + l) * width;
      for (int64_t e = 0; e < weights; ++e) weight[e] = total[positions[e]];
      for (int64_t e = 0; e < width; ++e) bias[e] = total[positions[weights + e]];
    }
  }

  // The gradients of(layer) of `layers` layers from tiles [first, first + count), shared out by layers and rows.
  template <class Of>
  void weight_gradients(int64_t layers, int64_t rows, int64_t columns, int64_t first, int64_t count, const Of& of) const {
    if (layers == 0 || count == 0) return;
    // Enough blocks of rows to share out few layers, none so small that transposing h again costs more than 1/16.
    const int64_t blocks = max_of(1, min_of(rows / 64, ceil_div(4 * parallel.threads, layers)));
    const int64_t block_rows = ceil_div(rows, blocks), units = layers * blocks;
    const int64_t threads = min_of(parallel.threads, units);
    parallel_for(parallel, threads, [&](int64_t thread) {
      const Buffer scratch(int64_t(sizeof(T)) * count * net.samples * padded_columns<T>(columns));
      for (int64_t unit = thread; unit < units; unit += threads) {
        const int64_t begin = unit % blocks * block_rows, end = min_of(begin + block_rows, rows);
        weight_gradient(of(unit / blocks), begin, end, net.samples, count, net.valid(first + count - 1), scratch.as<T>());
      }
    });
  }

  // The first and the last layer, and the gradient of x.
  void ends() {
    const MlpShape& s = net.shape;
    if (args.grads.first_weight) {
      // A block of tiles at a time: the transposed states of all of them would take as much memory as the batch.
      const int64_t stride = Reverse<T>::elements(net);
      for (int64_t block = 0; block < net.tiles; block += workers) {
        const int64_t count = min_of(workers, net.tiles - block);
        const Reverse<T> reverse = of(block);
        weight_gradients(1, s.out, s.width, block, count, [&](int64_t) {
          return GradientOf<T>{reverse.r, reverse.h_last, stride, stride, s.out, s.width, args.grads.last_weight,
                               args.grads.last_bias, block > 0};
        });
        weight_gradients(1, s.width, s.in, block, count, [&](int64_t) {
          return GradientOf<T>{reverse.g, reverse.x, stride, stride, s.width, s.in, args.grads.first_weight,
                               args.grads.first_bias, block > 0};
        });
      }
    }
    if (!args.grad_x) return;
    parallel_for(parallel, workers, [&](int64_t worker) {
      const Buffer memory(int64_t(sizeof(T)) * s.in * net.samples);
      T* const grad_x = memory.as<T>();
      for (int64_t tile = worker; tile < net.tiles; tile += workers) {
        const Reverse<T> reverse = of(tile);
        const Affine<T> epilogue{nullptr, s.offset ? reverse.g : nullptr, s.in, T(s.scale), grad_x, net.samples};
        multiply<T>(net.vectors, s.in, args.params.first_weight, 1, s.in, reverse.g, net.samples, s.width, epilogue);
        store_transposed(net, tile, s.in, grad_x, args.grad_x);
      }
    });
  }
};

template <class T>
inline void mlp_backward(const MlpBackward<T>& args, const Parallel& parallel) {
  Backward<T>(args, parallel).run();
}

// ---- jvp ------------------------------------------------------------------------------------------------------------

// The tangent is a chain state of its own, T = (D + moved) + tau, D = [scale relu'(x) x_t; 0; 0].
template <class T>
inline void mlp_jvp(const MlpJvp<T>& args, const Parallel& parallel) {
  const MlpShape& s = args.shape;
  const Net<T> net(s, args.params, parallel);
  const int64_t workers = min_of(parallel.threads, net.tiles);
  const MlpParams<const T>&p = args.params, &dp = args.tangents;
  parallel_for(parallel, workers, [&](int64_t worker) {
    const Buffer memory(int64_t(sizeof(T)) * ((2 * State<T>::kArrays + 4) * net.size + (2 * s.in + s.out) * net.samples));
    const State<T> state(memory.as<T>(), net.size);
    const State<T> tangent(state.a + net.size, net.size);
    T* h = tangent.a + net.size;
    T* h_next = h + net.size;
    T* const full = h_next + net.size;
    T* const z = full + net.size;
    T* const x = z + net.size;
    T* const x_t = x + s.in * net.samples;
    T* const out = x_t + s.in * net.samples;
    const Affine<T> to_z{nullptr, nullptr, 0, T(0), z, net.samples};
    const Accumulate<T> onto_z{z, net.samples};
    const T scale = T(s.scale);
    // tau = z + bias, or what makes T 0 where h is 0
    const auto finish = [&](const T* bias, const T* now) {
      for (int64_t i = 0; i < s.width; ++i)
        for (int64_t at = i * net.samples; at < (i + 1) * net.samples; ++at) {
          const T value = bias ? z[at] + bias[i] : z[at];
          tangent.a[at] = now[at] <= T(0) ? tangent.floor[at] : value;
        }
    };
    for (int64_t tile = worker; tile < net.tiles; tile += workers) {
      load_transposed(net, tile, s.in, args.x, false, x);
      first_layer(net, x, state);
      subtract(net.size, state.a, state.floor, h);
      for (int64_t i = 0; i < net.size; ++i) tangent.base[i] = tangent.moved[i] = z[i] = T(0);
      if (args.x_tangent) {
        load_transposed(net, tile, s.in, args.x_tangent, false, x_t);
        multiply<T>(net.vectors, s.width, p.first_weight, s.in, 1, x_t, net.samples, s.in, to_z);
        for (int64_t i = 0; s.offset && i < s.in * net.samples; ++i) {
          if (x[i] <= T(0)) {
            z[i] += scale * x_t[i];
          } else {
            tangent.base[i] = scale * x_t[i];
          }
        }
      }
      if (dp.first_weight) multiply<T>(net.vectors, s.width, dp.first_weight, s.in, 1, x, net.samples, s.in, onto_z);
      set_floor(net.size, tangent.base, tangent.moved, tangent.floor);
      finish(dp.first_bias, h);
      for (int64_t l = 0; l < s.layers; ++l) {
        const int64_t weight = l * s.width * s.width, bias = l * s.width;
        subtract(net.size, tangent.a, tangent.floor, full);
        multiply<T>(net.vectors, s.width, p.hidden_weight + weight, s.width, 1, full, net.samples, s.width, to_z);
        if (dp.hidden_weight)
          multiply<T>(net.vectors, s.width, dp.hidden_weight + weight, s.width, 1, h, net.samples, s.width, onto_z);
        for (int64_t i = 0; i < s.width; ++i)
          if (net.keep[i] != T(0))
            for (int64_t at = i * net.samples; at < (i + 1) * net.samples; ++at) z[at] += tangent.a[at];
        const HiddenForward<T> layer{p.hidden_bias + bias, net.keep, state.floor, state.a, h_next, net.samples, nullptr, 0};
        multiply<T>(net.vectors, s.width, p.hidden_weight + weight, s.width, 1, h, net.samples, s.width, layer);
        T* const old = h;
        h = h_next;
        h_next = old;
        if (s.offset && moves_after(l + 1)) {
          move_state(s.width, net.samples, net.keep, state.base, state.moved, state.floor, state.a);
          subtract(net.size, state.a, state.floor, h);
        }
        finish(dp.hidden_bias ? dp.hidden_bias + bias : nullptr, h);
        if (s.offset && moves_after(l + 1)) {
          move_state(s.width, net.samples, net.keep, tangent.base, tangent.moved, tangent.floor, tangent.a);
        }
      }
      subtract(net.size, tangent.a, tangent.floor, full);
      const Affine<T> last{dp.last_bias, nullptr, 0, T(0), out, net.samples};
      multiply<T>(net.vectors, s.out, p.last_weight, s.width, 1, full, net.samples, s.width, last);
      if (dp.last_weight)
        multiply<T>(net.vectors, s.out, dp.last_weight, s.width, 1, h, net.samples, s.width, Accumulate<T>{out, net.samples});
      if (s.offset) {
        const int64_t right = (s.width - s.out) * net.samples;
        for (int64_t i = 0; i < s.out * net.samples; ++i) out[i] += tangent.moved[right + i] + tangent.a[right + i];
      }
      store_transposed(net, tile, s.out, out, args.out);
    }
  });
}

template <class T>
inline MlpKernels<T> mlp_kernels() {
  return MlpKernels<T>{&mlp_forward<T>, &mlp_backward<T>, &mlp_jvp<T>, nullptr, nullptr};
}

}  // namespace ND_ISA
}  // namespace narrowdeep
