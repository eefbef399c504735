// The convolution chain as the kernels see it. Symbols as in narrowdeep/ops/reference.py.
#pragma once

#include <cstdint>

#include "common/chain_args.h"

namespace narrowdeep {

struct ConvShape {
  int64_t batch, in, width, out;  // width: channels of a hidden state
  int64_t size;                   // filters are size x size, odd
  int64_t image_height, image_width;
  int64_t layers;   // hidden layers, depth - 2; of an advance or retreat, those that it goes through
  int64_t segment;  // layers between two saved states; 1: every state, as h; 0: none
  bool offset;
  double scale;
  int64_t first = 1;  // number of the state before the first hidden layer
};

template <class T>
using ConvParams = ChainParams<T>;
template <class T>
using ConvForward = ChainForward<ConvShape, T>;
template <class T>
using ConvBackward = ChainBackward<ConvShape, T>;
template <class T>
using ConvAdvance = ChainAdvance<ConvShape, T>;
template <class T>
using ConvRetreat = ChainRetreat<ConvShape, T>;
template <class T>
using ConvJvp = ChainJvp<ConvShape, T>;
template <class T>
using ConvKernels = ChainKernels<ConvShape, T>;

}  // namespace narrowdeep
