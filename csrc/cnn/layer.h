// One layer of the convolution chain: a correlation with an odd filter, zeros around the image. A tile is one vector of
// samples, stored [channel][position][lane].
#pragma once

#include "cnn/correlate.h"
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

  CnnLayer(const Tiles<T>& tiles, const ChainParams<const T>& params)
      : tiles_(tiles), shape_(tiles.shape), params_(params), taps_(tiles.shape.size * tiles.shape.size) {}

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

  int64_t gradient_scratch() const {
    return shape_.width * max_of(shape_.width, max_of(shape_.in, shape_.out)) * taps_ * kLanes<T>;
  }
  // Of the weight (rows, columns)[tap] and the bias of a layer; added to what is there, or written over it.
  void gradient(int64_t rows, int64_t columns, int64_t valid, const T* full, const T* h, T* weight, T* bias, bool add,
                T* scratch) const {
    weight_sums(rows, columns, shape_.size, shape_.plane, full, h, scratch);
    sum_samples(rows * columns * taps_, valid, scratch, weight, add);
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
  void forward_in_registers(int64_t, int64_t, const State<T>&, T*) const {}
  void backward_in_registers(int64_t, int64_t, const State<T>&, const T*, T*) const {}
  static constexpr int64_t packed_size() { return 0; }
  void unpack(const T*, int64_t, int64_t, int64_t, int64_t, T*, T*) const {}

 private:
  const Tiles<T>& tiles_;
  const ChainShape& shape_;
  const ChainParams<const T>& params_;
  const int64_t taps_;

  template <class Epilogue>
  void product(const T* weight, int64_t rows, int64_t columns, const T* h, const Epilogue& epilogue) const {
    correlate(forward_filter(weight, columns, shape_.size), columns, rows, shape_.plane, h, epilogue);
  }
  template <class Epilogue>
  void transposed(const T* weight, int64_t rows, int64_t columns, const T* full, const Epilogue& epilogue) const {
    correlate(transposed_filter(weight, columns, shape_.size), rows, columns, shape_.plane, full, epilogue);
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
