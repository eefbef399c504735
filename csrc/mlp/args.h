// The MLP chain as the kernels see it. Symbols as in narrowdeep/ops/mlp/reference.py.
#pragma once

#include <cstdint>

#include "common/runtime.h"

namespace narrowdeep {

struct MlpShape {
  int64_t batch, in, width, out;
  int64_t layers;   // hidden layers, depth - 2
  int64_t segment;  // layers between two saved states; 1: every state, as h; 0: none
  bool offset;
  double scale;
};

template <class T>
struct MlpParams {  // contiguous, row-major
  T *first_weight, *first_bias;    // (width, in), (width)
  T *hidden_weight, *hidden_bias;  // (layers, width, width), (layers, width)
  T *last_weight, *last_bias;      // (out, width), (out)
};

template <class T>
struct MlpForward {
  MlpShape shape;
  MlpParams<const T> params;
  const T* x;  // (batch, in)
  T* out;      // (batch, out)
  T* saved;    // (states, 2 or 1, width, batch)
};

template <class T>
struct MlpBackward {
  MlpShape shape;
  MlpParams<const T> params;
  const T *grad_out, *x, *saved;
  T* grad_x;           // null when not needed
  MlpParams<T> grads;  // all null when not needed, else zeroed by the caller
};

template <class T>
struct MlpJvp {
  MlpShape shape;
  MlpParams<const T> params, tangents;  // a null tangent is zero
  const T *x, *x_tangent;
  T* out;
};

// The entry points of one instruction set.
template <class T>
struct MlpKernels {
  void (*forward)(const MlpForward<T>&, const Parallel&);
  void (*backward)(const MlpBackward<T>&, const Parallel&);
  void (*jvp)(const MlpJvp<T>&, const Parallel&);
};

}  // namespace narrowdeep
