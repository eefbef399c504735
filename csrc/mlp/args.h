// The MLP chain as the kernels see it. Symbols as in narrowdeep/ops/reference.py.
#pragma once

#include <cstdint>

#include "common/chain_args.h"

namespace narrowdeep {

struct MlpShape {
  int64_t batch, in, width, out;
  int64_t layers;   // hidden layers, depth - 2
  int64_t segment;  // layers between two saved states; 1: every state, as h; 0: none
  bool offset;
  double scale;
};

template <class T>
using MlpParams = ChainParams<T>;
template <class T>
using MlpForward = ChainForward<MlpShape, T>;
template <class T>
using MlpBackward = ChainBackward<MlpShape, T>;
template <class T>
using MlpJvp = ChainJvp<MlpShape, T>;
template <class T>
using MlpKernels = ChainKernels<MlpShape, T>;

}  // namespace narrowdeep
