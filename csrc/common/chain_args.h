// Arguments of the chain kernels of one family; `Shape` is the family's MlpShape or ConvShape. Symbols as in
// narrowdeep/ops/reference.py. Tensors are contiguous, row-major; [tap] is nothing for the MLP, (size, size) for filters,
// [image] nothing or (image_height, image_width).
#pragma once

#include <cstdint>

#include "common/runtime.h"

namespace narrowdeep {

template <class T>
struct ChainParams {
  T *first_weight, *first_bias;    // (width, in)[tap], (width)
  T *hidden_weight, *hidden_bias;  // (layers, width, width)[tap], (layers, width)
  T *last_weight, *last_bias;      // (out, width)[tap], (out)
};

template <class Shape, class T>
struct ChainForward {
  Shape shape;
  ChainParams<const T> params;
  const T* x;  // (batch, in)[image]
  T* out;      // (batch, out)
  T* saved;    // (states, 2 or 1, width)[image](batch)
};

template <class Shape, class T>
struct ChainBackward {
  Shape shape;
  ChainParams<const T> params;
  const T *grad_out, *x, *saved;
  T* grad_x;            // null when not needed
  ChainParams<T> grads;  // all null when not needed; zeroed by the caller for a family that adds to them
};

// State `first` to state `first + layers`. A state is one row of what the forward saves: (2 or 1, width)[image](batch).
template <class Shape, class T>
struct ChainAdvance {
  Shape shape;
  const T *hidden_weight, *hidden_bias;
  const T *x, *state;
  T *next, *saved;  // saved: states after `first`, as the forward saves them
};

// The gradient of state `first + layers` to that of state `first`, which is `state`.
template <class Shape, class T>
struct ChainRetreat {
  Shape shape;
  const T *hidden_weight, *hidden_bias;
  const T *x, *grad_out, *grad_state, *state, *saved;
  T* next;                                    // the gradient of state `first`
  T *grad_hidden_weight, *grad_hidden_bias;  // both null when not needed; zeroed as those of ChainBackward
};

template <class Shape, class T>
struct ChainJvp {
  Shape shape;
  ChainParams<const T> params, tangents;  // a null tangent is zero
  const T *x, *x_tangent;
  T* out;
};

// The entry points of one instruction set.
template <class Shape, class T>
struct ChainKernels {
  void (*forward)(const ChainForward<Shape, T>&, const Parallel&);
  void (*backward)(const ChainBackward<Shape, T>&, const Parallel&);
  void (*jvp)(const ChainJvp<Shape, T>&, const Parallel&);
  void (*advance)(const ChainAdvance<Shape, T>&, const Parallel&);
  void (*retreat)(const ChainRetreat<Shape, T>&, const Parallel&);
};

}  // namespace narrowdeep
