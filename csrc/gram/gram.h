// The tangent kernels of an instruction set, chosen at run time.
#pragma once

#include "common/isa.h"
#include "gram/args.h"

namespace narrowdeep {

template <class T>
GramKernels<T> gram_kernels(Isa isa);

}  // namespace narrowdeep
