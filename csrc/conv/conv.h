// The convolution kernels of an instruction set, chosen at run time.
#pragma once

#include "common/isa.h"
#include "conv/args.h"

namespace narrowdeep {

template <class T>
ConvKernels<T> conv_kernels(Isa isa);

}  // namespace narrowdeep
