// The way back through a span (common/chain.h), for any family. The states between two saved ones are computed again,
// inside the tile; weight gradients are summed a thread and then over threads, in a fixed order. More than 400 lines,
// because all of it shares what a worker keeps.
#pragma once

#include "common/chain.h"

namespace narrowdeep {
namespace ND_ISA {

// The gradients of one worker as one run of memory, in the order of ChainParams: those of `layers` hidden layers, and
// those of the ends where a worker sums them itself.
struct GradientSizes {
  int64_t sizes[6], total;

  template <class T>
  ChainParams<T> at(T* memory) const {
    T* parts[6];
    for (int i = 0; i < 6; memory += sizes[i++]) parts[i] = memory;
    return {parts[0], parts[1], parts[2], parts[3], parts[4], parts[5]};
  }
};

// `from` is added to `to`, or written there: their elements of share `share` of `shares`.
template <class T>
inline void sum_gradients(const GradientSizes& g, const ChainParams<T>& from, const ChainParams<T>& to, bool add,
                          int64_t share, int64_t shares) {
  const T* const source[6] = {from.first_weight, from.first_bias,  from.hidden_weight,
                              from.hidden_bias,  from.last_weight, from.last_bias};
  T* const target[6] = {to.first_weight, to.first_bias, to.hidden_weight, to.hidden_bias, to.last_weight, to.last_bias};
  for (int i = 0; i < 6; ++i) {
    const int64_t begin = g.sizes[i] * share / shares, count = g.sizes[i] * (share + 1) / shares - begin;
    if (add) {
      ND_ISA::add(count, source[i] + begin, target[i] + begin);
    } else {
      copy(count, source[i] + begin, target[i] + begin);
    }
  }
}

// The gradient that a tile begins with: r, that of the outputs, or all words of the last state's. Null is zero.
template <class T>
inline void load_gradient(const Tiles<T>& tiles, int64_t tile, const T* grad, T* r, T* hi, T* lo) {
  const ChainShape& s = tiles.shape;
  fill(tiles.size, T(0), hi);
  fill(tiles.size, T(0), lo);
  if (!grad) return fill(s.out * tiles.row, T(0), r);
  if (s.last) {
    load_outputs(tiles, tile, 1, s.out, grad, r);
  } else if (s.offset) {
    const int64_t row = tiles.image * s.batch;  // the same at every position
    load_outputs(tiles, tile, row, 1, grad + tiles.right() * row, r);
    restore(tiles, tile, true, grad + tiles.state(), State<T>(nullptr, hi, nullptr, lo));
  } else {
    return restore(tiles, tile, true, grad, State<T>(nullptr, hi, nullptr, lo));
  }
  // Every position has the same share in the mean. From the last, as they take the place of one position each.
  const T share = s.last ? T(tiles.image) : T(1);
  for (int64_t i = s.out; i-- > 0;)
    for (int64_t p = tiles.positions; p-- > 0;)
      for (int64_t e = 0; e < tiles.samples; ++e)
        r[i * tiles.row + p * tiles.samples + e] = r[i * tiles.samples + e] / share;
  clear_outside(tiles, s.out, r);
}

// base = R = [0; 0; r] of a gradient, and its floor.
template <class T>
inline void set_root(const Tiles<T>& tiles, const T* r, const State<T>& gradient) {
  fill(tiles.size, T(0), gradient.base);
  if (tiles.shape.offset) copy(tiles.shape.out * tiles.row, r, gradient.base + tiles.right() * tiles.row);
  gradient.set_floor(tiles.size);
}

template <class Layer>
class ChainBackwardRun {
  using T = typename Layer::Element;

 public:
  // The gradients of parameters of a part that is not the first are added to what is there.
  ChainBackwardRun(const ChainBackward<T>& arguments, const Parallel& pool, const Part& part)
      : args(arguments),
        parallel(pool),
        tiles(arguments.shape, Layer::kMostVectors, pool.threads, part),
        s(tiles.shape),
        layer(tiles, arguments.params),
        size(tiles.size),
        workers(min_of(pool.threads, tiles.count)),
        step(step_layers()),
        steps(max_of(1, ceil_div(s.layers, step))),
        together(steps_together()),
        longest(max_of(1, min_of(step, s.layers) + (s.last ? 1 : 0))),
        held(min_of(longest, layer.most_states())),
        pieces(held < longest ? ceil_div(longest, held) : 0),
        room(max_of(size, s.in * tiles.row)),
        kept_per_tile(together < steps || (Layer::kEndsTogether && args.need_params && (s.first || s.last))) {}

  void run() {
    const Buffer kept_memory(kept_bytes()), sums(sums_bytes());
    kept = kept_memory.as<T>();
    for (int64_t last = steps; last > 0; last -= min_of(together, last))
      group(last - min_of(together, last), last, sums.as<T>());
    if constexpr (Layer::kEndsTogether)
      if (args.need_params) ends();
  }

  // What `run` takes beside its results, for plans: what is kept of the tiles all the way, and within a segment.
  BackwardCosts costs() const {
    const int64_t worker = room_elements() * int64_t(sizeof(T)) + layer.gradient_bytes();
    return {kept_bytes(), workers * worker + sums_bytes(), longest, held};
  }

 private:
  const ChainBackward<T>& args;
  const Parallel& parallel;
  const Tiles<T> tiles;
  const ChainShape& s;
  const Layer layer;
  const int64_t size, workers;
  const int64_t step, steps, together;  // layers of a step (a segment); steps; those that all tiles take together
  const int64_t longest, held, pieces;  // states of the longest step, those held at once, and in how many pieces
  const int64_t room;                   // elements of a state or of the gradient of x
  const bool kept_per_tile;
  T* kept = nullptr;

  // What a backward keeps of a tile from its first step to its last.
  struct Kept {
    T *x, *r, *lo, *hi, *h_last;
  };
  int64_t kept_elements() const { return (s.in + s.out) * tiles.row + (s.last && Layer::kEndsTogether ? 3 : 2) * size; }
  Kept kept_of(int64_t slot) const {
    T* const x = kept + slot * kept_elements();
    T* const r = x + s.in * tiles.row;
    T* const lo = r + s.out * tiles.row;
    return {x, r, lo, lo + size, lo + 2 * size};
  }

  int64_t kept_bytes() const { return (kept_per_tile ? tiles.count : workers) * kept_elements() * int64_t(sizeof(T)); }

  // What a worker needs beside: the state that runs again, R and the floor of the gradient, G before and after a layer.
  struct Room {
    State<T> state;
    T *base, *floor, *full, *full_next, *states, *inner, *scratch;
    State<T> gradient(const Kept& kept) const { return {base, kept.hi, floor, kept.lo}; }
  };
  int64_t scratch_elements() const {
    if (layer.in_registers()) return 0;
    const int64_t hidden = layer.gradient_scratch(s.width, s.width);
    if (Layer::kEndsTogether) return hidden;
    return max_of(hidden, max_of(layer.gradient_scratch(s.width, s.in), layer.gradient_scratch(s.out, s.width)));
  }
  int64_t room_elements() const {
    return (State<T>::kArrays + 2 + held + pieces * tiles.words()) * size + 2 * room + scratch_elements();
  }
  Room room_at(T* memory) const {
    const State<T> state(memory, size);
    T* const base = state.lo + size;
    T* const full = base + 2 * size;
    T* const states = full + 2 * room;
    T* const inner = states + held * size;
    return {state, base, base + size, full, full + room, states, inner, inner + pieces * tiles.words() * size};
  }

  // Layers a step takes: the segment, or, when every state was saved, what fits in cache.
  int64_t step_layers() const {
    if (s.segment > 1) return s.segment;
    return max_of(4, min_of(64, (int64_t(1) << 19) / (2 * size * int64_t(sizeof(T)))));
  }
  // Few steps go together where their gradients are large, many where each would be a wait for nothing.
  int64_t steps_together() const {
    if (!Layer::kEndsTogether) return steps;
    const int64_t layer_size = layer.packs() ? layer.packed_size() : layer.hidden_weights() + s.width;
    return min_of(steps, max_of(1, (int64_t(1) << 20) / (layer_size * int64_t(sizeof(T)) * step)));
  }
  // Gradients of the layers of a group, as many times as workers do not write them at once. A long sum one after another
  // loses digits: past `block` tiles a worker adds them up in blocks, apart from its total.
  GradientSizes group_sizes() const { return sizes(min_of(together * step, s.layers)); }
  int64_t block() const { return block_of(ceil_div(tiles.count, workers)); }
  bool blocked() const { return block() < ceil_div(tiles.count, workers); }
  int64_t sums_bytes() const {
    const int64_t copies = args.need_params ? workers - direct() + (blocked() ? workers : 0) : 0;
    return copies * group_sizes().total * int64_t(sizeof(T));
  }
  // Workers that write their sums to the gradients themselves. (Sums of its own for worker 0 as well were 30% slower at
  // width 75: what one core has written is dear to read on another.)
  int64_t direct() const { return layer.packs() ? 0 : 1; }

  GradientSizes sizes(int64_t layers) const {
    GradientSizes g{};
    if (layer.packs()) {
      g.sizes[2] = layers * layer.packed_size();
    } else {
      g.sizes[2] = layers * layer.hidden_weights();
      g.sizes[3] = layers * s.width;
    }
    if (!Layer::kEndsTogether && s.first) g.sizes[0] = layer.first_weights(), g.sizes[1] = s.width;
    if (!Layer::kEndsTogether && s.last) g.sizes[4] = layer.last_weights(), g.sizes[5] = s.out;
    for (int64_t n : g.sizes) g.total += n;
    return g;
  }

  // Every worker takes its tiles through steps [first, last), backwards; then the sums of all workers are added up.
  void group(int64_t first, int64_t last, T* memory) const {
    const int64_t stride = group_sizes().total, block = this->block();
    const bool blocked = this->blocked();
    const int64_t first_layer = first * step, layers = min_of(last * step, s.layers) - first_layer;
    const GradientSizes g = sizes(layers);
    const bool packed = layer.packs();
    const auto total_of = [&](int64_t worker) {
      ChainParams<T> results = args.grads;
      if (worker >= direct()) return g.at(memory + (worker - direct()) * stride);
      results.hidden_weight += first_layer * layer.hidden_weights();
      results.hidden_bias += first_layer * s.width;
      return results;
    };
    parallel_for(parallel, workers, [&](int64_t worker) {
      const Buffer room_memory(room_elements() * int64_t(sizeof(T)));
      const Room room = room_at(room_memory.as<T>());
      ChainParams<T> total{}, sums{};
      if (args.need_params) {
        total = total_of(worker);
        sums = blocked ? g.at(memory + (workers - direct() + worker) * stride) : total;
      }
      const bool onto = tiles.begin > 0 && worker < direct();  // what earlier parts have written
      const Share share(tiles.count, workers, worker, Layer::kRunsOfTiles);
      for (int64_t i = 0; i < share.count; ++i) {
        const int64_t tile = share[i];
        const Kept k = kept_of(kept_per_tile ? tile : worker);
        const bool add = i % block != 0 || (onto && !blocked);
        if (packed && args.need_params && !add) fill(g.total, T(0), sums.hidden_weight);
        if (last == steps) load(tile, k);
        set_bases(tile, k, room);
        for (int64_t n = last; n-- > first;)
          take_step(tile, n * step, min_of((n + 1) * step, s.layers), k, room, sums, first_layer, add);
        if (first == 0) leave(tile, k, room, sums, add);
        if (blocked && args.need_params && ((i + 1) % block == 0 || i + 1 == share.count))
          sum_gradients(g, sums, total, i >= block || onto, 0, 1);
      }
    });
    if (!args.need_params) return;
    // No more tasks than workers: sums that one core has made alone are best written there.
    if (packed) {
      const int64_t share = max_of(1, ceil_div(layers, workers));
      parallel_for(parallel, ceil_div(layers, share), [&](int64_t task) {
        layer.unpack(memory, stride, workers, task * share, min_of((task + 1) * share, layers),
                     args.grads.hidden_weight + first_layer * layer.hidden_weights(),
                     args.grads.hidden_bias + first_layer * s.width);
      });
    } else if (workers > 1) {
      parallel_for(parallel, workers, [&](int64_t task) {
        for (int64_t worker = 1; worker < workers; ++worker)
          sum_gradients(g, total_of(worker), total_of(0), true, task, workers);
      });
    }
  }

  void load(int64_t tile, const Kept& k) const {
    if (s.first) load_images(tiles, tile, s.in, false, args.input, k.x);
    load_gradient(tiles, tile, args.grad, k.r, k.hi, k.lo);
  }

  // What stays the same on the way: base = R = [0; 0; r] of the gradient and its floor, and the base of the states.
  void set_bases(int64_t tile, const Kept& k, const Room& room) const {
    set_root(tiles, k.r, room.gradient(k));
    if (s.first) {
      set_base(tiles, k.x, room.state.base);
    } else {
      load_base(tiles, tile, false, args.input, room.state);
    }
  }

  // State j into room.state, whose base is there, without its total.
  void read(int64_t tile, int64_t j, const Room& room) const {
    const bool given = !s.first && j == 0;
    const T* const from = given ? args.input + (tiles.words() - 1) * tiles.state()
                                : args.saved + saved_row(tiles, j) * tiles.words() * tiles.state();
    restore(tiles, tile, false, from, room.state);
    room.state.set_floor(size);
  }

  // Hidden layers [begin, end) backwards, and before them the last layer if it follows.
  void take_step(int64_t tile, int64_t begin, int64_t end, const Kept& k, const Room& room, const ChainParams<T>& sums,
                 int64_t first_layer, bool add) const {
    const int64_t stop = end + (s.last && end == s.layers ? 1 : 0);  // states [begin, stop) are needed
    const auto back = [&](int64_t from, int64_t to) {
      if (to > s.layers) last_back(tile, k, room, room.states + (s.layers - from) * size, sums, add);
      reverse(tile, from, min_of(to, end), k, room, sums, first_layer, add);
    };
    if (stop == begin) return;
    if (s.segment == 1) {
      for (int64_t j = begin; j < stop; ++j) {
        T* const h = room.states + (j - begin) * size;
        if (!s.first && j == 0) {
          read(tile, j, room);
          room.state.total(size, h);
        } else {
          load_word(tiles, tile, false, args.saved + saved_row(tiles, j) * tiles.state(), h);
        }
      }
      return back(begin, stop);
    }
    read(tile, begin, room);
    if (stop - begin <= held) {
      run_to(tiles, layer, begin, stop - 1, room.state, room.states);
      return back(begin, stop);
    }
    // Too long to hold: keep a state every `held` layers, then hold one piece after the other, from the last.
    const int64_t count = ceil_div(stop - begin, held);
    T *h = room.states, *spare = room.states + size;
    room.state.total(size, h);
    for (int64_t piece = 0; piece < count; ++piece) {
      T* const inner = room.inner + piece * tiles.words() * size;
      copy(size, room.state.lo, inner);
      if (s.offset) copy(size, room.state.hi, inner + size);
      if (piece + 1 < count)
        ND_ISA::run(tiles, layer, begin + piece * held, begin + (piece + 1) * held, room.state, h, spare);
    }
    for (int64_t piece = count; piece-- > 0;) {
      const int64_t from = begin + piece * held, to = min_of(from + held, stop);
      const T* const inner = room.inner + piece * tiles.words() * size;
      copy(size, inner, room.state.lo);
      if (s.offset) copy(size, inner + size, room.state.hi);
      room.state.set_floor(size);
      run_to(tiles, layer, from, to - 1, room.state, room.states);
      back(from, to);
    }
  }

  // The last layer, from r, given the last state.
  void last_back(int64_t tile, const Kept& k, const Room& room, const T* h, const ChainParams<T>& sums,
                 bool add) const {
    if (Layer::kEndsTogether) {
      if (args.need_params) copy(size, h, k.h_last);
    } else if (args.need_params) {
      layer.gradient(s.out, s.width, tiles.valid(tile), k.r, h, sums.last_weight, sums.last_bias, add, room.scratch);
    }
    layer.last_back(k.r, h, room.gradient(k), room.full);
  }

  // Hidden layers [begin, end), given the states before each.
  void reverse(int64_t tile, int64_t begin, int64_t end, const Kept& k, const Room& room, const ChainParams<T>& sums,
               int64_t first_layer, bool add) const {
    const State<T> g = room.gradient(k);
    T *full = room.full, *full_next = room.full_next;
    while (end > begin) {
      const int64_t stop = layer.renormalises() ? begin : tiles.last_renormalisation(end, begin);
      const T* const states = room.states + (stop - begin) * size;
      if (layer.in_registers()) {
        layer.backward_in_registers(stop, end, g, states, sums, stop - first_layer);
      } else {
        g.total(size, full);
        for (int64_t l = end; l-- > stop;) {
          const T* const h = states + (l - stop) * size;
          if (args.need_params)
            layer.gradient(s.width, s.width, tiles.valid(tile), full, h,
                           sums.hidden_weight + (l - first_layer) * layer.hidden_weights(),
                           sums.hidden_bias + (l - first_layer) * s.width, add, room.scratch);
          layer.step_back(l, full, h, g, full_next);
          swap(full, full_next);
        }
      }
      end = stop;
      if (!layer.renormalises() && tiles.renormalises(end) && s.start + end > 0) renormalise(tiles, g);
    }
  }

  // The gradient of state 0 goes out, or through the first layer.
  void leave(int64_t tile, const Kept& k, const Room& room, const ChainParams<T>& sums, bool add) const {
    const State<T> g = room.gradient(k);
    if (!s.first) {
      if (args.grad_input) store_state(tiles, tile, g, args.grad_input);
      return;
    }
    T* const full = Layer::kEndsTogether ? k.lo : room.full;
    g.total(size, full);
    if (args.need_params && !Layer::kEndsTogether)
      layer.gradient(s.width, s.in, tiles.valid(tile), full, k.x, sums.first_weight, sums.first_bias, add,
                     room.scratch);
    if (!args.grad_input) return;
    layer.first_back(full, room.full_next);
    store_images(tiles, tile, s.in, room.full_next, args.grad_input);
  }

  // The gradients of the first and the last layer, where all threads make them together: some tiles at a time, as the
  // transposed states of all of them would take as much memory as the batch, and these sums in blocks again.
  void ends() const {
    constexpr int64_t kMostTiles = 8;
    const int64_t count = min_of(workers, kMostTiles), blocks = ceil_div(tiles.count, count), block = block_of(blocks);
    const int64_t first = s.width * (s.in + 1), last = s.out * (s.width + 1);
    const Buffer memory(block < blocks ? max_of(s.first ? first : 0, s.last ? last : 0) * int64_t(sizeof(T)) : 0);
    const auto sum_of = [&](int64_t rows, int64_t columns, T* weight, T* bias, const auto& full, const auto& h) {
      for (int64_t begin = 0; begin < blocks; begin += block) {
        T* const to = begin == 0 ? weight : memory.as<T>();
        T* const to_bias = begin == 0 ? bias : to + rows * columns;
        for (int64_t b = begin; b < min_of(begin + block, blocks); ++b) {
          const Kept k = kept_of(b * count);
          layer.gradient_over_tiles(parallel, b * count, min_of(count, tiles.count - b * count), kept_elements(),
                                    {full(k), h(k), 0, 0, rows, columns, to, to_bias, b > begin});
        }
        if (begin == 0) continue;
        ND_ISA::add(rows * columns, to, weight);
        ND_ISA::add(rows, to_bias, bias);
      }
    };
    if (s.last)
      sum_of(
          s.out, s.width, args.grads.last_weight, args.grads.last_bias, [](const Kept& k) { return k.r; },
          [](const Kept& k) { return k.h_last; });
    if (s.first)
      sum_of(
          s.width, s.in, args.grads.first_weight, args.grads.first_bias, [](const Kept& k) { return k.lo; },
          [](const Kept& k) { return k.x; });
  }
};

template <class Layer, class T = typename Layer::Element>
BackwardCosts chain_backward_costs(const ChainShape& shape, int64_t threads, bool need_params) {
  const ChainBackward<T> args{shape, {}, nullptr, nullptr, nullptr, nullptr, need_params, {}};
  const Parallel parallel{threads, nullptr};
  BackwardCosts most{};  // parts come one after another
  Layer::parts(shape, threads, [&](const Part& part) {
    const BackwardCosts of = ChainBackwardRun<Layer>(args, parallel, part).costs();
    if (of.kept + of.segment >= most.kept + most.segment) most = of;
  });
  return most;
}

template <class Layer, class T = typename Layer::Element>
void chain_backward(const ChainBackward<T>& args, const Parallel& parallel) {
  Layer::parts(args.shape, parallel.threads,
               [&](const Part& part) { ChainBackwardRun<Layer>(args, parallel, part).run(); });
}

}  // namespace ND_ISA
}  // namespace narrowdeep
