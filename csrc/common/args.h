// Arguments of the kernels of a span: consecutive layers of a chain, with or without its first and its last layer. All
// tensors are contiguous, row-major; [tap] is nothing for the MLP, (size, size) for filters, [image] nothing or (height,
// width). The legend of symbols is in common/state.h.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/runtime.h"

namespace narrowdeep {

struct Plane {
  int64_t height, width;
};

struct ChainShape {
  int64_t batch;
  int64_t in;        // inputs of the network; 0 where a span in plain form does not know them
  int64_t width;     // units, or channels, of a hidden state
  int64_t out;       // outputs of the network
  int64_t layers;    // hidden layers of the span
  int64_t segment;   // layers between two saved states; 1: every state, as h; 0: none
  int64_t start;     // absolute number of the state before the first hidden layer
  bool first, last;  // whether the span has the network's first and last layer
  bool offset;
  double scale;
  int64_t size;  // filters are size x size, odd; 1 for the MLP
  Plane plane;   // of an image; 1 x 1 for the MLP
};

template <class T>
struct ChainParams {
  T *first_weight, *first_bias;    // (width, in)[tap], (width)
  T *hidden_weight, *hidden_bias;  // (layers, width, width)[tap], (layers, width)
  T *last_weight, *last_bias;      // (out, width)[tap], (out)
};

// A state is (3, width)[image](batch) in offset form, its rows base, hi, lo, and (1, width)[image](batch) in plain form.
// So is the gradient of a state, or its tangent.
template <class T>
struct ChainForward {
  ChainShape shape;
  ChainParams<const T> params;
  const T* input;  // x, (batch, in)[image], or a state
  T* output;       // (batch, out), or a state
  T* saved;        // (states, 2 or 1, width)[image](batch)
};

template <class T>
struct ChainBackward {
  ChainShape shape;
  ChainParams<const T> params;
  const T *grad, *input, *saved;  // grad: of the output
  T* grad_input;                  // null when not needed
  bool need_params;
  ChainParams<T> grads;  // not read unless need_params; all of it is written
};

template <class T>
struct ChainJvp {
  ChainShape shape;
  ChainParams<const T> params, tangents;  // a null tangent is zero
  const T *input, *input_tangent;
  T* output;
};

// The tangent of what ChainBackward gives, from those of all that it reads.
template <class T>
struct ChainBackwardJvp {
  ChainShape shape;
  ChainParams<const T> params, tangents;  // a null tangent is zero
  const T *grad, *grad_tangent, *input, *input_tangent;
  T* grad_input;  // null when not needed
  bool need_params;
  ChainParams<T> grads;  // not read unless need_params; all of it is written
};

// For plans: bytes that a backward takes beside its results, kept from its begin to its end and within a segment; and the
// states of its longest segment, and how many of them it holds at once (fewer: it runs the segment's layers once more).
struct BackwardCosts {
  int64_t kept, segment, longest, held;
};

// The entry points of one family and one instruction set.
struct Mlp {};
struct Cnn {};
template <class Family, class T>
struct ChainKernels {
  void (*forward)(const ChainForward<T>&, const Parallel&);
  void (*backward)(const ChainBackward<T>&, const Parallel&);
  void (*jvp)(const ChainJvp<T>&, const Parallel&);
  void (*backward_jvp)(const ChainBackwardJvp<T>&, const Parallel&);
  BackwardCosts (*backward_costs)(const ChainShape&, int64_t threads, bool need_params);
};

}  // namespace narrowdeep
