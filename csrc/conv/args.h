// The convolution chain as the kernels see it. Symbols as in narrowdeep/ops/reference.py.
#pragma once

#include <cstdint>

#include "common/runtime.h"

namespace narrowdeep {

struct ConvShape {
  int64_t batch, in, width, out;  // width: channels of a hidden state
  int64_t size;                   // filters are size x size, odd
  int64_t image_height, image_width;
  int64_t layers;   // hidden layers, depth - 2
  int64_t segment;  // layers between two saved states; 1: every state, as h; 0: none
  bool offset;
  double scale;
};

template <class T>
struct ConvParams {  // contiguous, row-major
  T *first_weight, *first_bias;    // (width, in, size, size), (width)
  T *hidden_weight, *hidden_bias;  // (layers, width, width, size, size), (layers, width)
  T *last_weight, *last_bias;      // (out, width, size, size), (out)
};

template <class T>
struct ConvForward {
  ConvShape shape;
  ConvParams<const T> params;
  const T* x;  // (batch, in, image_height, image_width)
  T* out;      // (batch, out)
  T* saved;    // (states, 2 or 1, width, image_height, image_width, batch)
};

template <class T>
struct ConvBackward {
  ConvShape shape;
  ConvParams<const T> params;
  const T *grad_out, *x, *saved;
  T* grad_x;            // null when not needed
  ConvParams<T> grads;  // all null when not needed, else zeroed by the caller
};

template <class T>
struct ConvJvp {
  ConvShape shape;
  ConvParams<const T> params, tangents;  // a null tangent is zero
  const T *x, *x_tangent;
  T* out;
};

// The entry points of one instruction set.
template <class T>
struct ConvKernels {
  void (*forward)(const ConvForward<T>&, const Parallel&);
  void (*backward)(const ConvBackward<T>&, const Parallel&);
  void (*jvp)(const ConvJvp<T>&, const Parallel&);
};

}  // namespace narrowdeep
