// The MLP kernels of an instruction set, chosen at run time.
#pragma once

#include "common/isa.h"
#include "mlp/args.h"

namespace narrowdeep {

template <class T>
MlpKernels<T> mlp_kernels(Isa isa);

}  // namespace narrowdeep
