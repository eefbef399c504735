// The chain of any family for one instruction set: forward and jvp of a span (backward.h has its way back). A tile of
// samples goes through all layers before the next tile does, so that its states stay in the cache; threads share out the
// tiles. Symbols as in common/state.h.
//
// What one layer does is the business of a class Layer (mlp/layer.h, cnn/layer.h), made of Tiles and parameters:
//
//   T, kMostVectors, kRunsOfTiles   number type; vectors of a tile at most; whether a thread's tiles are a run, or strided
//   parts(shape, threads, body)     calls body(part) for the parts of a batch (common/state.h)
//   in_registers()                  whether `forward_in_registers`, `backward_in_registers` and the same with tangents run
//                                   many layers at once
//   renormalises()                  whether these two without tangents renormalise a state themselves
//   packs, packed_size, unpack      whether gradients of layers in registers are packed sums, their size, and how to read them
//   first, step, last               x to state 0; state l to l + 1; the last state to the outputs at every position
//   last_back, step_back, first_back, gradient        their transposes, and the gradient of a weight and its bias
//   first_tangent, step_tangent, last_tangent         their tangents
//   transposed, gradient_scratch                      a product with a weight's transpose; room that `gradient` takes
//   gradient_bytes()                                  most memory that one of these asks for by itself
#pragma once

#include "common/epilogue.h"
#include "common/state.h"

namespace narrowdeep {
namespace ND_ISA {

// The tiles of one worker: every `workers`-th, or a run.
struct Share {
  int64_t first, stride, count;
  Share(int64_t tiles, int64_t workers, int64_t worker, bool run)
      : first(run ? worker * tiles / workers : worker),
        stride(run ? 1 : workers),
        count(run ? (worker + 1) * tiles / workers - first : ceil_div(tiles - worker, workers)) {}
  int64_t operator[](int64_t i) const { return first + i * stride; }
};

// base = [scale relu(x); 0; scale], from x as [feature][sample].
template <class T>
inline void set_base(const Tiles<T>& tiles, const T* x, T* base) {
  fill(tiles.size, T(0), base);
  if (!tiles.shape.offset) return;
  const T scale = T(tiles.shape.scale);
  for (int64_t e = 0; e < tiles.shape.in * tiles.row; ++e) {
    const T left = scale * x[e];
    base[e] = left < T(0) ? T(0) : left;
  }
  fill(tiles.shape.out * tiles.row, scale, base + tiles.right() * tiles.row);
}

// State 0 of a tile, `h` its value. A span with the first layer leaves x, as [feature][sample], in `x`.
template <class Layer, class T>
inline void enter(const Tiles<T>& tiles, const Layer& layer, int64_t tile, const T* input, T* x, const State<T>& state,
                  T* h) {
  if (tiles.shape.first) {
    load_images(tiles, tile, tiles.shape.in, false, input, x);
    set_base(tiles, x, state.base);
    fill(tiles.size, T(0), state.hi);
    fill(tiles.size, T(0), state.lo);
    for (int64_t e = 0; tiles.shape.offset && e < tiles.shape.in * tiles.row; ++e) {
      const T left = T(tiles.shape.scale) * x[e];
      state.lo[e] = left < T(0) ? left : T(0);  // what the base left out
    }
    state.set_floor(tiles.size);
    layer.first(x, state, h);
  } else {
    load_state(tiles, tile, false, input, state);
    state.set_floor(tiles.size);
    state.total(tiles.size, h);
  }
}

// Hidden layers [begin, end). `h` holds the value of state `begin`. Values of the following ones go to h + size, h + 2
// size, ... if there is no `spare`; with one they change places with it, and `h` ends where the last one is: except for
// layers in registers, which leave both alone.
template <class Layer, class T>
inline void run(const Tiles<T>& tiles, const Layer& layer, int64_t begin, int64_t end, const State<T>& state, T*& h,
                T*& spare) {
  while (begin < end) {
    const int64_t stop = layer.renormalises() ? end : tiles.next_renormalisation(begin, end);
    if (layer.in_registers()) {
      layer.forward_in_registers(begin, stop, state, spare ? nullptr : h);
      if (!spare) h += (stop - begin) * tiles.size;
    } else {
      for (int64_t l = begin; l < stop; ++l) {
        T* const next = spare ? spare : h + tiles.size;
        layer.step(l, state, h, next);
        if (spare) spare = h;
        h = next;
      }
    }
    if (!layer.renormalises() && tiles.renormalises(stop)) {
      renormalise(tiles, state);
      if (!spare || !layer.in_registers()) state.total(tiles.size, h);
    }
    begin = stop;
  }
}
// The same from a state whose value is not at hand, every value to `states`.
template <class Layer, class T>
inline void run_to(const Tiles<T>& tiles, const Layer& layer, int64_t begin, int64_t end, const State<T>& state,
                   T* states) {
  T* spare = nullptr;
  state.total(tiles.size, states);
  run(tiles, layer, begin, end, state, states, spare);
}

// mean over positions of the outputs at z, [output][position][sample], to (batch, out).
template <class T>
inline void store_outputs(const Tiles<T>& tiles, int64_t tile, T* z, T* to) {
  const int64_t positions = tiles.positions, samples = tiles.samples;
  if (tiles.strips > 1) {  // the same sums in the same order, from lane to lane
    for (int64_t s = 0; s < tiles.valid(tile); s += tiles.strips)
      for (int64_t i = 0; i < tiles.shape.out; ++i) {
        T total = T(0);
        for (int64_t begin = 0; begin < tiles.image; begin += 64) {
          T sum = T(0);
          for (int64_t p = begin; p < min_of(begin + 64, tiles.image); ++p)
            sum += z[i * tiles.row + p % tiles.positions * samples + s + p / tiles.positions];
          total += sum;
        }
        to[(tiles.first(tile) + s / tiles.strips) * tiles.shape.out + i] = total / T(tiles.image);
      }
    return;
  }
  if (positions > 1) {
    for (int64_t i = 0; i < tiles.shape.out; ++i)
      for (int64_t s = 0; s < samples; s += kLanes<T>) {
        const T* const from = z + i * tiles.row + s;
        Vec<T> total{};
        for (int64_t begin = 0; begin < positions; begin += 64) {
          Vec<T> sum{};
          for (int64_t p = begin; p < min_of(begin + 64, positions); ++p) sum = sum + load(from + p * samples);
          total = total + sum;
        }
        store(z + i * samples + s, total / broadcast(T(positions)));
      }
  }
  store_samples(tiles, tile, tiles.shape.out, z, to);
}

// Row of `saved` that holds state j, with `every` state or every segment-th saved: the input of a span that starts at a
// state is not saved again.
template <class T>
inline int64_t saved_row(const Tiles<T>& tiles, int64_t j) {
  const int64_t row = tiles.shape.segment == 1 ? j : j / tiles.shape.segment;
  return tiles.shape.first ? row : row - 1;
}

template <class Layer, class T>
inline void forward_part(const ChainForward<T>& args, const Parallel& parallel, const Part& part) {
  const Tiles<T> tiles(args.shape, Layer::kMostVectors, parallel.threads, part);
  const Layer layer(tiles, args.params);
  const ChainShape& s = tiles.shape;
  const int64_t workers = min_of(parallel.threads, tiles.count), size = tiles.size;
  // Where every state is saved, layers in registers write so many before they are stored.
  const int64_t several = s.segment == 1 && layer.in_registers() ? kRenormalisePeriod : 1;
  const int64_t step = s.segment == 0 ? max_of(1, s.layers) : s.segment == 1 ? several : s.segment;
  parallel_for(parallel, workers, [&](int64_t worker) {
    const Buffer memory(int64_t(sizeof(T)) * ((State<T>::kArrays + several + 1) * size + (s.in + s.out) * tiles.row));
    const State<T> state(memory.as<T>(), size);
    T* const states = state.lo + size;
    T* const x = states + (several + 1) * size;
    T* const z = x + s.in * tiles.row;
    const auto store_value = [&](int64_t tile, int64_t j, const T* h) {
      if (s.first || j > 0) store_word(tiles, tile, h, args.saved + saved_row(tiles, j) * tiles.state());
    };
    const Share share(tiles.count, workers, worker, Layer::kRunsOfTiles);
    for (int64_t i = 0; i < share.count; ++i) {
      const int64_t tile = share[i];
      T *h = states, *spare = states + size;
      enter(tiles, layer, tile, args.input, x, state, h);
      for (int64_t begin = 0; begin < max_of(1, s.layers); begin += step) {
        const int64_t end = min_of(begin + step, s.layers);
        if (s.segment > 1 && (s.first || begin > 0))  // else it is the input itself
          save(tiles, tile, state, args.saved + saved_row(tiles, begin) * tiles.words() * tiles.state());
        if (several > 1) {
          run_to(tiles, layer, begin, end, state, states);
          for (int64_t j = begin; j < end; ++j) store_value(tile, j, states + (j - begin) * size);
        } else {
          if (s.segment == 1 && begin < end) store_value(tile, begin, h);
          run(tiles, layer, begin, end, state, h, spare);
        }
      }
      if (s.last) {
        if (layer.in_registers()) state.total(size, h);
        if (s.segment == 1) store_value(tile, s.layers, h);
        layer.last(h, state, z);
        store_outputs(tiles, tile, z, args.output);
      } else {
        store_state(tiles, tile, state, args.output);
      }
    }
  });
}

template <class Layer, class T = typename Layer::Element>
void chain_forward(const ChainForward<T>& args, const Parallel& parallel) {
  Layer::parts(args.shape, parallel.threads, [&](const Part& part) { forward_part<Layer>(args, parallel, part); });
}

// Tangent of state 0 of a tile, `full` its value, `h` that of the state. A null tangent is zero, also in `x_tangent`.
template <class Layer, class T>
inline void enter_tangent(const Tiles<T>& tiles, const Layer& layer, int64_t tile, const T* input_tangent,
                          const ChainParams<const T>& tangents, const T* x, T* x_tangent, const T* h,
                          const State<T>& tangent, T* full) {
  if (tiles.shape.first) {
    if (input_tangent) {
      load_images(tiles, tile, tiles.shape.in, false, input_tangent, x_tangent);
    } else {
      fill(tiles.shape.in * tiles.row, T(0), x_tangent);
    }
    layer.first_tangent(x, input_tangent ? x_tangent : nullptr, tangents, h, tangent, full);
    return;
  }
  if (input_tangent) {
    load_state(tiles, tile, false, input_tangent, tangent);
  } else {
    fill(tiles.size, T(0), tangent.base);
    fill(tiles.size, T(0), tangent.hi);
    fill(tiles.size, T(0), tangent.lo);
  }
  tangent.set_floor(tiles.size);
  tangent.total(tiles.size, full);
}

// `run` of a state and its tangent, whose value is `full`.
template <class Layer, class T>
inline void run_with_tangent(const Tiles<T>& tiles, const Layer& layer, int64_t begin, int64_t end,
                             const ChainParams<const T>& tangents, const State<T>& state, const State<T>& tangent,
                             T*& h, T*& spare, T*& full, T*& full_spare) {
  while (begin < end) {
    const int64_t stop = tiles.next_renormalisation(begin, end);
    const bool due = tiles.renormalises(stop), registers = layer.in_registers();
    if (registers) {
      layer.forward_tangent_in_registers(begin, stop, tangents, state, tangent, spare ? nullptr : h,
                                         spare ? nullptr : full);
      if (!spare) h += (stop - begin) * tiles.size, full += (stop - begin) * tiles.size;
    }
    for (int64_t l = begin; l < stop && !registers; ++l) {
      T *const next = spare ? spare : h + tiles.size, *const full_next = spare ? full_spare : full + tiles.size;
      layer.step(l, state, h, next);
      layer.step_tangent(l, tangents, h, next, full, tangent, full_next);
      if (spare) spare = h, full_spare = full;
      h = next, full = full_next;
    }
    if (due) {
      renormalise(tiles, state);
      renormalise(tiles, tangent);
      if (!spare || !registers) {
        state.total(tiles.size, h);
        tangent.total(tiles.size, full);
      }
    }
    begin = stop;
  }
}

template <class Layer, class T>
inline void jvp_part(const ChainJvp<T>& args, const Parallel& parallel, const Part& part) {
  const Tiles<T> tiles(args.shape, Layer::kMostVectors, parallel.threads, part);
  const Layer layer(tiles, args.params);
  const ChainShape& s = tiles.shape;
  const int64_t workers = min_of(parallel.threads, tiles.count), size = tiles.size;
  parallel_for(parallel, workers, [&](int64_t worker) {
    const int64_t rows = 2 * s.in + s.out;
    const Buffer memory(int64_t(sizeof(T)) * ((2 * State<T>::kArrays + 4) * size + rows * tiles.row));
    const State<T> state(memory.as<T>(), size), tangent(state.lo + size, size);
    T* h = tangent.lo + size;
    T* h_next = h + size;
    T* full = h_next + size;
    T* full_next = full + size;
    T* const x = tangent.lo + 5 * size;
    T* const x_tangent = x + s.in * tiles.row;
    T* const z = x_tangent + s.in * tiles.row;
    const Share share(tiles.count, workers, worker, Layer::kRunsOfTiles);
    for (int64_t i = 0; i < share.count; ++i) {
      const int64_t tile = share[i];
      enter(tiles, layer, tile, args.input, x, state, h);
      enter_tangent(tiles, layer, tile, args.input_tangent, args.tangents, x, x_tangent, h, tangent, full);
      run_with_tangent(tiles, layer, 0, s.layers, args.tangents, state, tangent, h, h_next, full, full_next);
      if (layer.in_registers()) {
        state.total(size, h);
        tangent.total(size, full);
      }
      if (s.last) {
        layer.last_tangent(args.tangents, h, full, tangent, z);
        store_outputs(tiles, tile, z, args.output);
      } else {
        store_state(tiles, tile, tangent, args.output);
      }
    }
  });
}

template <class Layer, class T = typename Layer::Element>
void chain_jvp(const ChainJvp<T>& args, const Parallel& parallel) {
  Layer::parts(args.shape, parallel.threads, [&](const Part& part) { jvp_part<Layer>(args, parallel, part); });
}

}  // namespace ND_ISA
}  // namespace narrowdeep
