// The MLP chain, compiled for one instruction set.
#define ND_ISA avx512
#include "common/select.h"
#include "mlp/kernels.h"

ND_ENTRY_POINTS(mlp, MlpKernels)
