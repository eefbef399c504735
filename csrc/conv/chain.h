// The convolution chain: a tile of samples, one vector of them, goes through all layers before the next tile does, so
// that its states stay in the cache. The backward runs a segment again from its saved state inside the tile.
//
// States are numbered as in narrowdeep/ops/reference.py: state 1 follows the first layer, state L - 1 = layers + 1 is
// the last hidden one, and L stands for the output. An advance or a retreat goes through the hidden layers between states
// `first` and last_state alone. Hidden layer t - 1 - first leads to state t.
#pragma once

#include "common/state.h"
#include "conv/args.h"
#include "conv/correlate.h"

namespace narrowdeep {
namespace ND_ISA {

// States that the backward holds at once; a longer segment is divided again, at the price of one recomputation more (a
// quarter of the backward). So this is what still does well in the outer caches, and less only where a state is huge.
constexpr int64_t kMostStates = 256, kLeastStates = 32, kStatesBytes = int64_t(16) << 20;

// What every tile of one call shares.
template <class T>
struct ConvGeometry {
  ConvShape shape;
  Plane plane;
  int64_t positions, last_state, right;       // `right`: the first right channel
  int64_t row, state, hidden_size, boundary;  // elements of one channel, a state, a hidden weight, a saved state
  Buffer masks;
  T *keep, *everything, *keep_positions;  // masks of channels (the identity part of a layer; all), and of positions

  explicit ConvGeometry(const ConvShape& s)
      : shape(s),
        plane{s.image_height, s.image_width},
        positions(s.image_height * s.image_width),
        last_state(s.first + s.layers),
        right(s.width - s.out),
        row(positions * kLanes<T>),
        state(s.width * row),
        hidden_size(s.width * s.width * s.size * s.size),
        boundary(s.offset ? 2 * state : state),
        masks((2 + positions) * s.width * int64_t(sizeof(T))),
        keep(masks.as<T>()),
        everything(keep + s.width),
        keep_positions(everything + s.width) {
    for (int64_t i = 0; i < s.width; ++i) {
      everything[i] = all_ones<T>();
      keep[i] = s.offset && (i < s.in || i >= right) ? all_ones<T>() : T(0);
      for (int64_t p = 0; p < positions; ++p) keep_positions[i * positions + p] = keep[i];
    }
  }
};

template <class T>
inline void fill(int64_t count, T value, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// Images (sample, channel, position), `valid` of them, to [channel][position][lane]; other lanes as in load_rows.
template <class T>
inline void load_images(int64_t elements, int64_t valid, const T* from, T* to) {
  constexpr int lanes = kLanes<T>;
  transpose(valid, elements, from, elements, to, lanes);
  for (int64_t e = 0; e < elements; ++e)
    for (int64_t s = valid; s < lanes; ++s) to[e * lanes + s] = to[e * lanes + valid - 1];
}

// The three parts of a state (or of its gradient, or of its tangent) on one tile, in memory of its own or in `memory`.
template <class T>
class TileState {
 public:
  static constexpr int kArrays = 4;  // of geometry.state elements each

  explicit TileState(const ConvGeometry<T>& geometry, T* memory = nullptr)
      : geometry_(geometry),
        memory_(memory ? 0 : kArrays * geometry.state * int64_t(sizeof(T))),
        base(memory ? memory : memory_.template as<T>()),
        moved(base + geometry.state),
        floor(moved + geometry.state),
        rest(floor + geometry.state) {}

  void set_floor() { ND_ISA::set_floor(geometry_.state, base, moved, floor); }

  // The whole state, base + moved + rest.
  void total(T* to) const {
    for (int64_t e = 0; e < geometry_.state; ++e) to[e] = rest[e] - floor[e];
  }

  // What is due at state t; `whole` holds the state and is kept equal to base + moved + rest.
  void move(int64_t t, T* whole) {
    if (!geometry_.shape.offset || !moves_after(t - 1)) return;
    move_state(geometry_.shape.width * geometry_.positions, int64_t(kLanes<T>), geometry_.keep_positions, base, moved,
               floor, rest);
    total(whole);
  }

  // The saved form of the present state: moved and rest, or the state alone in plain form; rows of `stride` samples.
  void save(int64_t valid, T* to, int64_t stride) const {
    const int64_t units = geometry_.shape.width * geometry_.positions;
    if (geometry_.shape.offset) {
      store_rows(units, int64_t(kLanes<T>), valid, moved, to, stride);
      to += units * stride;
    }
    store_rows(units, int64_t(kLanes<T>), valid, rest, to, stride);
  }

  // The way back, with the whole state in `whole`.
  void restore(int64_t valid, const T* from, int64_t stride, T* whole) {
    const int64_t units = geometry_.shape.width * geometry_.positions;
    if (geometry_.shape.offset) {
      load_rows(units, int64_t(kLanes<T>), valid, from, stride, moved);
      from += units * stride;
    }
    load_rows(units, int64_t(kLanes<T>), valid, from, stride, rest);
    set_floor();
    total(whole);
  }

 private:
  const ConvGeometry<T>& geometry_;
  Buffer memory_;

 public:
  T *base, *moved, *floor, *rest;
};

// Runs one tile forward.
template <class T>
class TileForward {
 public:
  TileState<T> state;

  TileForward(const ConvGeometry<T>& geometry, const ConvParams<const T>& params)
      : state(geometry),
        geometry_(geometry),
        params_(params),
        images_(geometry.shape.in * geometry.row * int64_t(sizeof(T))) {}

  const T* images() const { return images_.template as<T>(); }

  // `x` points at the tile's first sample.
  void load(const T* x, int64_t valid) {
    const ConvShape& s = geometry_.shape;
    load_images(s.in * geometry_.positions, valid, x, images_.template as<T>());
    fill(geometry_.state, T(0), state.base);
    fill(geometry_.state, T(0), state.moved);
    if (s.offset) {
      for (int64_t e = 0; e < s.in * geometry_.row; ++e) {
        const T left = T(s.scale) * images()[e];
        state.base[e] = left < T(0) ? T(0) : left;
      }
      fill(s.out * geometry_.row, T(s.scale), state.base + geometry_.right * geometry_.row);
    }
  }

  // State 1 from the images.
  void first(T* h) {
    const ConvShape& s = geometry_.shape;
    fill(geometry_.state, T(0), state.moved);
    fill(geometry_.state, T(0), state.rest);
    if (s.offset)
      for (int64_t e = 0; e < s.in * geometry_.row; ++e) {
        const T left = T(s.scale) * images()[e];
        state.rest[e] = left < T(0) ? left : T(0);
      }
    state.set_floor();
    const StateEpilogue<T> epilogue{params_.first_bias, geometry_.everything, state.floor,
                                    state.rest,         h,                    geometry_.positions};
    correlate(forward_filter(params_.first_weight, s.in, s.size), s.in, s.width, geometry_.plane, images(), epilogue);
  }

  // State t from state t - 1.
  void step(int64_t t, const T* before, T* h) {
    const ConvShape& s = geometry_.shape;
    const int64_t layer = t - 1 - s.first;
    const StateEpilogue<T> epilogue{params_.hidden_bias + layer * s.width, geometry_.keep, state.floor,
                                    state.rest,                            h,              geometry_.positions};
    correlate(forward_filter(params_.hidden_weight + layer * geometry_.hidden_size, s.width, s.size), s.width, s.width,
              geometry_.plane, before, epilogue);
    state.move(t, h);
  }

 private:
  const ConvGeometry<T>& geometry_;
  const ConvParams<const T>& params_;
  Buffer images_;
};

// Runs of [0, count), as equal as can be: of tiles, one a thread, or of anything else.
struct Chunks {
  int64_t count, parts;
  Chunks(int64_t count, int64_t parts) : count(count), parts(min_of(count, parts)) {}
  int64_t begin(int64_t part) const { return part * count / parts; }
};

// mean over positions of the k images at z, to out (valid, k).
template <class T>
inline void pool(int64_t outputs, int64_t positions, int64_t valid, const T* z, T* out) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < outputs; ++i) {
    Vec<T> sum{};
    for (int64_t p = 0; p < positions; ++p) sum = sum + load(z + (i * positions + p) * lanes);
    for (int64_t s = 0; s < valid; ++s) out[s * outputs + i] = sum[s] / T(positions);
  }
}

// z = [rest and moved of the right channels] + bias, where the last layer's sums are then added.
template <class T>
inline void start_output(const ConvGeometry<T>& geometry, const TileState<T>& state, const T* bias, T* z) {
  const int64_t right = geometry.right * geometry.row;
  for (int64_t i = 0; i < geometry.shape.out; ++i)
    for (int64_t e = i * geometry.row; e < (i + 1) * geometry.row; ++e) {
      z[e] = bias ? bias[i] : T(0);
      if (geometry.shape.offset) z[e] = (state.moved[right + e] + state.rest[right + e]) + z[e];
    }
}

template <class T>
void conv_forward(const ConvForward<T>& args, const Parallel& parallel) {
  const ConvGeometry<T> geometry(args.shape);
  const ConvShape& s = args.shape;
  const Chunks chunks(ceil_div(s.batch, kLanes<T>), parallel.threads);
  parallel_for(parallel, chunks.parts, [&](int64_t chunk) {
    TileForward<T> forward(geometry, args.params);
    const Buffer memory((2 * geometry.state + s.out * geometry.row) * int64_t(sizeof(T)));
    T* const states = memory.as<T>();
    T* const z = states + 2 * geometry.state;
    for (int64_t tile = chunks.begin(chunk); tile < chunks.begin(chunk + 1); ++tile) {
      const int64_t sample = tile * kLanes<T>, valid = min_of(kLanes<T>, s.batch - sample);
      const int64_t units = s.width * geometry.positions;
      forward.load(args.x + sample * s.in * geometry.positions, valid);
      T *h = states, *next = states + geometry.state;
      for (int64_t t = 1; t <= geometry.last_state; ++t) {
        if (t == 1) {
          forward.first(next);
        } else {
          forward.step(t, h, next);
        }
        T* const swap = h;
        h = next;
        next = swap;
        if (s.segment == 1) {
          store_rows(units, int64_t(kLanes<T>), valid, h, args.saved + (t - 1) * units * s.batch + sample, s.batch);
        } else if (s.segment > 1 && (t - 1) % s.segment == 0 && (t == 1 || t < geometry.last_state)) {
          const int64_t slot = (t - 1) / s.segment, parts = s.offset ? 2 : 1;
          forward.state.save(valid, args.saved + slot * parts * units * s.batch + sample, s.batch);
        }
      }
      start_output(geometry, forward.state, args.params.last_bias, z);
      correlate(forward_filter(args.params.last_weight, s.width, s.size), s.width, s.out, geometry.plane,
                static_cast<const T*>(h), AddEpilogue<T>{z, geometry.positions});
      pool(s.out, geometry.positions, valid, z, args.out + sample * s.out);
    }
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------
// The gradient of one tile on its way down the chain, G = (R + moved) + g with respect to a pre-activation; `memory` as
// in TileState.
template <class T>
class TileGradient {
 public:
  TileGradient(const ConvGeometry<T>& geometry, const ConvParams<const T>& params, T* memory = nullptr)
      : geometry_(geometry),
        params_(params),
        state_(geometry, memory),
        memory_((2 * scratch_elements() + geometry.shape.out * geometry.row) * int64_t(sizeof(T))),
        full_(memory_.template as<T>()),
        next_(full_ + scratch_elements()),
        r(next_ + scratch_elements()) {}

  // At the output, whose gradient at every position is in `r`.
  void start() {
    const ConvGeometry<T>& g = geometry_;
    fill(g.state, T(0), state_.base);
    fill(g.state, T(0), state_.moved);
    fill(g.state, T(0), state_.rest);
    if (g.shape.offset)
      for (int64_t e = 0; e < g.shape.out * g.row; ++e) state_.base[g.right * g.row + e] = r[e];
    state_.set_floor();
  }
  // Where another TileGradient on the same memory stood, below the output.
  void resume() { state_.total(full_); }
  // After start(): below the output, from what save() wrote.
  void restore(int64_t valid, const T* from, int64_t stride) { state_.restore(valid, from, stride, full_); }
  void save(int64_t valid, T* to, int64_t stride) const { state_.save(valid, to, stride); }

  // G of hidden layers and of the first.
  T* full() const { return full_; }
  // Room for a state, or for the gradient of the images, which may have more channels in plain form.
  T* scratch() const { return next_; }

  // From the gradient of state t's pre-activation to that of state t - 1, which is `h`.
  void step(int64_t t, const T* h) {
    const ConvShape& s = geometry_.shape;
    const bool is_last = t == geometry_.last_state + 1;
    const T* const weight = is_last ? params_.last_weight : params_.hidden_weight + (t - 1 - s.first) * geometry_.hidden_size;
    const GradientEpilogue<T> epilogue{h, geometry_.keep, state_.floor, state_.rest, next_, geometry_.positions};
    correlate(transposed_filter(weight, s.width, s.size), is_last ? s.out : s.width, s.width, geometry_.plane,
              static_cast<const T*>(is_last ? r : full_), epilogue);
    T* const swap = full_;
    full_ = next_;
    next_ = swap;
    if (!is_last && t > 2) state_.move(t - 1, full_);
  }

 private:
  int64_t scratch_elements() const { return max_of(geometry_.state, geometry_.shape.in * geometry_.row); }

  const ConvGeometry<T>& geometry_;
  const ConvParams<const T>& params_;
  TileState<T> state_;
  Buffer memory_;
  T *full_, *next_;

 public:
  T* const r;  // [out][position][lane]
};

// What a backward reads and writes: that of a whole chain, or, where `state` is given, of the hidden layers that a
// retreat goes through.
template <class T>
struct BackwardData {
  const T *x, *grad_out, *saved;
  T* grad_x;                     // null when not needed
  const T *state, *grad_state;  // state `first`, and the gradient of the last one
  T* next;                       // the gradient of state `first`
};

// The backward of one chunk of tiles; something is saved (segment >= 1). `grads` gains the chunk's weight gradients.
template <class T>
class TileBackward {
 public:
  TileBackward(const ConvGeometry<T>& geometry, const ConvParams<const T>& params, const BackwardData<T>& data,
               const ConvParams<T>& grads)
      : geometry_(geometry),
        shape_(geometry.shape),
        params_(params),
        data_(data),
        grads_(grads),
        forward_(geometry, params),
        gradient_(geometry, params),
        states_wanted_(shape_.layers + (data.state ? 0 : 1)),
        held_(held_states()),
        inner_(inner_segments()),
        memory_(bytes()) {
    states_ = memory_.template as<T>();
    sums_ = states_ + held_ * geometry.state;
    inner_states_ = sums_ + sums_elements();
  }

  void run(int64_t tile) {
    sample_ = tile * kLanes<T>;
    valid_ = min_of(kLanes<T>, shape_.batch - sample_);
    forward_.load(data_.x + sample_ * shape_.in * geometry_.positions, valid_);
    load_gradient();
    const int64_t first = shape_.first, end = first + states_wanted_;
    // States first, first + segment, ... before the last one are saved.
    const int64_t slots = shape_.segment == 1 ? states_wanted_ : max_of(1, ceil_div(shape_.layers, shape_.segment));
    for (int64_t slot = slots - 1; slot >= 0; --slot)
      run_segment(first + slot * shape_.segment, slot == slots - 1 ? end : first + (slot + 1) * shape_.segment);
    if (data_.state) {
      gradient_.save(valid_, data_.next + sample_, shape_.batch);
    } else {
      finish();
    }
  }

 private:
  int64_t held_states() const {
    const int64_t fits = kStatesBytes / (geometry_.state * int64_t(sizeof(T)));
    const int64_t most = max_of(kLeastStates, min_of(kMostStates, fits));
    return shape_.segment == 1 ? 1 : min_of(most, longest());
  }
  // States from one saved state to the next, the first included; a chain's last segment may have one more.
  int64_t longest() const { return max_of(1, min_of(shape_.segment + (data_.state ? 0 : 1), states_wanted_)); }
  int64_t inner_segments() const { return held_ < longest() ? ceil_div(longest(), held_) : 0; }
  int64_t sums_elements() const {
    const int64_t channels = max_of(shape_.width, max_of(shape_.in, shape_.out));
    return shape_.width * channels * shape_.size * shape_.size * kLanes<T>;
  }
  int64_t bytes() const {
    return (held_ * geometry_.state + sums_elements() + inner_ * geometry_.boundary) * int64_t(sizeof(T));
  }

  // The constant image of the output gradient at each position.
  void load_gradient() {
    for (int64_t i = 0; i < shape_.out; ++i)
      for (int64_t s = 0; s < kLanes<T>; ++s) {
        const int64_t from = sample_ + min_of(s, valid_ - 1);
        const T r = data_.grad_out[from * shape_.out + i] / T(geometry_.positions);
        for (int64_t p = 0; p < geometry_.positions; ++p) gradient_.r[i * geometry_.row + p * kLanes<T> + s] = r;
      }
    gradient_.start();
    if (data_.state) gradient_.restore(valid_, data_.grad_state + sample_, shape_.batch);
  }

  // A state that was saved, into states_.
  void read(int64_t t) {
    int64_t slot = (t - shape_.first) / shape_.segment;
    const bool given = data_.state && slot == 0;
    if (data_.state) --slot;
    const int64_t units = shape_.width * geometry_.positions, row = units * shape_.batch;
    if (shape_.segment == 1 && !given) {
      load_rows(units, int64_t(kLanes<T>), valid_, data_.saved + slot * row + sample_, shape_.batch, states_);
    } else {
      const T* const from = given ? data_.state : data_.saved + slot * (shape_.offset ? 2 : 1) * row;
      forward_.state.restore(valid_, from + sample_, shape_.batch, states_);
    }
  }

  // States [begin, end) are computed (or read), and the gradient goes from state `end` to state `begin`.
  void run_segment(int64_t begin, int64_t end) {
    read(begin);
    if (end - begin <= held_) return run_held(begin, end);
    // Too long to hold: keep a state every `held_` layers, then hold one piece after the other, from the last.
    int64_t pieces = 0;
    for (int64_t t = begin; t < end; ++t) {
      T* const h = states_ + (t - begin) % 2 * geometry_.state;
      if (t > begin) forward_.step(t, states_ + (t - begin + 1) % 2 * geometry_.state, h);
      if ((t - begin) % held_ == 0) forward_.state.save(kLanes<T>, inner_states_ + pieces++ * geometry_.boundary, kLanes<T>);
    }
    while (pieces-- > 0) {
      const int64_t from = begin + pieces * held_;
      forward_.state.restore(kLanes<T>, inner_states_ + pieces * geometry_.boundary, kLanes<T>, states_);
      run_held(from, min_of(from + held_, end));
    }
  }

  // The same where the states fit; state `begin` is in states_.
  void run_held(int64_t begin, int64_t end) {
    for (int64_t t = begin + 1; t < end; ++t) {
      T* const h = states_ + (t - begin) * geometry_.state;
      forward_.step(t, h - geometry_.state, h);
    }
    for (int64_t t = end; t > begin; --t) back(t, states_ + (t - 1 - begin) * geometry_.state);
  }

  // From the gradient of state t's pre-activation to that of state t - 1, which is `h`, with layer t's weight gradient.
  void back(int64_t t, const T* h) {
    const int64_t layer = t - 1 - shape_.first;
    if (grads_.last_weight && t == geometry_.last_state + 1) {
      add_gradients(shape_.out, shape_.width, gradient_.r, h, grads_.last_weight, grads_.last_bias);
    } else if (grads_.hidden_weight) {
      add_gradients(shape_.width, shape_.width, gradient_.full(), h, grads_.hidden_weight + layer * geometry_.hidden_size,
                    grads_.hidden_bias + layer * shape_.width);
    }
    gradient_.step(t, h);
  }

  void add_gradients(int64_t rows, int64_t channels, const T* full, const T* h, T* weight, T* bias) {
    weight_sums(rows, channels, shape_.size, geometry_.plane, full, h, sums_);
    add_lanes(rows * channels * shape_.size * shape_.size, valid_, sums_, weight);
    bias_sums(rows, geometry_.positions, full, sums_);
    add_lanes(rows, valid_, sums_, bias);
  }

  // The first layer and the images, from the gradient of state 1's pre-activation.
  void finish() {
    const T* const full = gradient_.full();
    if (grads_.first_weight)
      add_gradients(shape_.width, shape_.in, full, forward_.images(), grads_.first_weight, grads_.first_bias);
    if (!data_.grad_x) return;
    const int64_t elements = shape_.in * geometry_.positions;
    T* const grad_x = gradient_.scratch();
    for (int64_t e = 0; e < shape_.in * geometry_.row; ++e) grad_x[e] = shape_.offset ? T(shape_.scale) * full[e] : T(0);
    correlate(transposed_filter(params_.first_weight, shape_.in, shape_.size), shape_.width, shape_.in,
              geometry_.plane, full, AddEpilogue<T>{grad_x, geometry_.positions});
    T* const to = data_.grad_x + sample_ * elements;
    transpose(elements, valid_, static_cast<const T*>(grad_x), int64_t(kLanes<T>), to, elements);
  }

  const ConvGeometry<T>& geometry_;
  const ConvShape& shape_;
  const ConvParams<const T>& params_;
  const BackwardData<T>& data_;
  const ConvParams<T> grads_;
  TileForward<T> forward_;
  TileGradient<T> gradient_;
  const int64_t states_wanted_, held_, inner_;
  Buffer memory_;
  T *states_, *sums_, *inner_states_;
  int64_t sample_, valid_;
};

// The gradients as one run of memory per chunk, in the order of ConvParams: all six, or the hidden layers' alone.
template <class T>
struct GradientSizes {
  int64_t sizes[6], total;
  GradientSizes(const ConvShape& s, bool all)
      : sizes{s.width * s.in * s.size * s.size, s.width, s.layers * s.width * s.width * s.size * s.size,
              s.layers * s.width, s.out * s.width * s.size * s.size, s.out},
        total(0) {
    if (!all) sizes[0] = sizes[1] = sizes[4] = sizes[5] = 0;
    for (int64_t size : sizes) total += size;
  }
  ConvParams<T> at(T* memory) const {
    T* parts[6];
    for (int i = 0; i < 6; memory += sizes[i++]) parts[i] = memory;
    return {parts[0], parts[1], parts[2], parts[3], parts[4], parts[5]};
  }
};

template <class T>
void run_backward(const ConvShape& shape, const ConvParams<const T>& params, const BackwardData<T>& data,
                  const ConvParams<T>& results, const Parallel& parallel) {
  const ConvGeometry<T> geometry(shape);
  const GradientSizes<T> gradients(shape, data.state == nullptr);
  const Chunks chunks(ceil_div(shape.batch, kLanes<T>), parallel.threads);
  const bool need_params = results.first_weight || results.hidden_weight;  // hidden_weight is null where it is empty
  // Chunk 0 adds into the result; the others have their own sums, added to it in the order of the chunks.
  const Buffer partial(need_params && chunks.parts > 1 ? (chunks.parts - 1) * gradients.total * int64_t(sizeof(T)) : 0);
  parallel_for(parallel, chunks.parts, [&](int64_t chunk) {
    ConvParams<T> grads = results;
    if (need_params && chunk > 0) {
      T* const memory = partial.as<T>() + (chunk - 1) * gradients.total;
      fill(gradients.total, T(0), memory);
      grads = gradients.at(memory);
    }
    TileBackward<T> backward(geometry, params, data, grads);
    for (int64_t tile = chunks.begin(chunk); tile < chunks.begin(chunk + 1); ++tile) backward.run(tile);
  });
  if (!need_params || chunks.parts < 2) return;
  T* const to[6] = {results.first_weight, results.first_bias,  results.hidden_weight,
                    results.hidden_bias,  results.last_weight, results.last_bias};
  const T* from = partial.as<T>();
  for (int i = 0; i < 6; from += gradients.sizes[i++]) {
    const Chunks shares(gradients.sizes[i], parallel.threads);
    parallel_for(parallel, shares.parts, [&](int64_t share) {
      for (int64_t chunk = 0; chunk < chunks.parts - 1; ++chunk)
        for (int64_t e = shares.begin(share); e < shares.begin(share + 1); ++e)
          to[i][e] += from[chunk * gradients.total + e];
    });
  }
}

template <class T>
void conv_backward(const ConvBackward<T>& args, const Parallel& parallel) {
  const BackwardData<T> data{args.x, args.grad_out, args.saved, args.grad_x, nullptr, nullptr, nullptr};
  run_backward(args.shape, args.params, data, args.grads, parallel);
}

// ---- parts of a chain -----------------------------------------------------------------------------------------------
template <class T>
ConvParams<const T> hidden_params(const T* weight, const T* bias) {
  return {nullptr, nullptr, weight, bias, nullptr, nullptr};
}

template <class T>
void conv_advance(const ConvAdvance<T>& args, const Parallel& parallel) {
  const ConvGeometry<T> geometry(args.shape);
  const ConvShape& s = args.shape;
  const ConvParams<const T> params = hidden_params(args.hidden_weight, args.hidden_bias);
  const Chunks chunks(ceil_div(s.batch, kLanes<T>), parallel.threads);
  parallel_for(parallel, chunks.parts, [&](int64_t chunk) {
    TileForward<T> forward(geometry, params);
    const Buffer memory(2 * geometry.state * int64_t(sizeof(T)));
    const int64_t units = s.width * geometry.positions, row = units * s.batch;
    for (int64_t tile = chunks.begin(chunk); tile < chunks.begin(chunk + 1); ++tile) {
      const int64_t sample = tile * kLanes<T>, valid = min_of(kLanes<T>, s.batch - sample);
      T *h = memory.as<T>(), *next = h + geometry.state;
      forward.load(args.x + sample * s.in * geometry.positions, valid);
      forward.state.restore(valid, args.state + sample, s.batch, h);
      for (int64_t t = s.first + 1; t <= geometry.last_state; ++t) {
        forward.step(t, h, next);
        T* const swap = h;
        h = next;
        next = swap;
        const int64_t done = t - s.first;
        if (s.segment == 0 || t == geometry.last_state || done % s.segment != 0) continue;
        const int64_t slot = done / s.segment - 1;
        if (s.segment == 1) {
          store_rows(units, int64_t(kLanes<T>), valid, h, args.saved + slot * row + sample, s.batch);
        } else {
          forward.state.save(valid, args.saved + slot * (s.offset ? 2 : 1) * row + sample, s.batch);
        }
      }
      forward.state.save(valid, args.next + sample, s.batch);
    }
  });
}

template <class T>
void conv_retreat(const ConvRetreat<T>& args, const Parallel& parallel) {
  const BackwardData<T> data{args.x, args.grad_out, args.saved, nullptr, args.state, args.grad_state, args.next};
  const ConvParams<T> grads{nullptr, nullptr, args.grad_hidden_weight, args.grad_hidden_bias, nullptr, nullptr};
  run_backward(args.shape, hidden_params(args.hidden_weight, args.hidden_bias), data, grads, parallel);
}

// ---- jvp ------------------------------------------------------------------------------------------------------------
// The tangent is carried in three parts as well, T = (D + moved) + tau, D = [scale relu'(x) x_t; 0; 0].
template <class T>
void conv_jvp(const ConvJvp<T>& args, const Parallel& parallel) {
  const ConvGeometry<T> geometry(args.shape);
  const ConvShape& s = args.shape;
  const Chunks chunks(ceil_div(s.batch, kLanes<T>), parallel.threads);
  parallel_for(parallel, chunks.parts, [&](int64_t chunk) {
    TileForward<T> forward(geometry, args.params);
    TileState<T> tangent(geometry);
    const int64_t input = s.in * geometry.row;
    const Buffer memory((4 * geometry.state + input + s.out * geometry.row) * int64_t(sizeof(T)));
    T* const states = memory.as<T>();
    T* full = states + 2 * geometry.state;
    T* next = full + geometry.state;
    T* const x_tangent = states + 4 * geometry.state;
    T* const z = x_tangent + input;
    // rest = mask(keep rest + W full + W_t h + b_t), next = the whole tangent.
    const auto layer = [&](const T* weight, const T* weight_t, const T* bias_t, int64_t channels, const T* keep,
                           const T* before_t, const T* before, const T* h) {
      for (int64_t i = 0; i < s.width; ++i)
        for (int64_t e = i * geometry.row; e < (i + 1) * geometry.row; ++e)
          tangent.rest[e] = (keep[i] == T(0) ? T(0) : tangent.rest[e]) + (bias_t ? bias_t[i] : T(0));
      if (weight_t)
        correlate(forward_filter(weight_t, channels, s.size), channels, s.width, geometry.plane, before,
                  AddEpilogue<T>{tangent.rest, geometry.positions});
      const GradientEpilogue<T> epilogue{h,           geometry.everything, tangent.floor,
                                         tangent.rest, next,               geometry.positions};
      correlate(forward_filter(weight, channels, s.size), channels, s.width, geometry.plane, before_t, epilogue);
      T* const swap = full;
      full = next;
      next = swap;
    };
    for (int64_t tile = chunks.begin(chunk); tile < chunks.begin(chunk + 1); ++tile) {
      const int64_t sample = tile * kLanes<T>, valid = min_of(kLanes<T>, s.batch - sample);
      const int64_t elements = s.in * geometry.positions;
      forward.load(args.x + sample * elements, valid);
      fill(geometry.state, T(0), tangent.base);
      fill(geometry.state, T(0), tangent.moved);
      fill(geometry.state, T(0), tangent.rest);
      fill(input, T(0), x_tangent);
      if (args.x_tangent) {
        load_images(elements, valid, args.x_tangent + sample * elements, x_tangent);
        if (s.offset)
          for (int64_t e = 0; e < input; ++e)
            (forward.images()[e] <= T(0) ? tangent.rest : tangent.base)[e] = T(s.scale) * x_tangent[e];
      }
      tangent.set_floor();
      T *h = states, *h_next = states + geometry.state;
      forward.first(h);
      layer(args.params.first_weight, args.tangents.first_weight, args.tangents.first_bias, s.in, geometry.everything,
            x_tangent, forward.images(), h);
      for (int64_t t = 2; t <= geometry.last_state; ++t) {
        forward.step(t, h, h_next);
        const int64_t at = (t - 2) * geometry.hidden_size;
        layer(args.params.hidden_weight + at, args.tangents.hidden_weight ? args.tangents.hidden_weight + at : nullptr,
              args.tangents.hidden_bias ? args.tangents.hidden_bias + (t - 2) * s.width : nullptr, s.width, geometry.keep,
              full, h, h_next);
        tangent.move(t, full);
        T* const swap = h;
        h = h_next;
        h_next = swap;
      }
      start_output(geometry, tangent, args.tangents.last_bias, z);
      const AddEpilogue<T> add{z, geometry.positions};
      if (args.tangents.last_weight)
        correlate(forward_filter(args.tangents.last_weight, s.width, s.size), s.width, s.out, geometry.plane,
                  static_cast<const T*>(h), add);
      correlate(forward_filter(args.params.last_weight, s.width, s.size), s.width, s.out, geometry.plane,
                static_cast<const T*>(full), add);
      pool(s.out, geometry.positions, valid, z, args.out + sample * s.out);
    }
  });
}

template <class T>
ConvKernels<T> conv_kernels() {
  return {conv_forward<T>, conv_backward<T>, conv_jvp<T>, conv_advance<T>, conv_retreat<T>};
}

}  // namespace ND_ISA
}  // namespace narrowdeep
