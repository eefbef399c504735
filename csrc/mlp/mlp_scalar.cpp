// The MLP chain, compiled for one instruction set.
#define ND_SCALAR
#define ND_ISA scalar
#include "common/select.h"
#include "mlp/kernels.h"

ND_ENTRY_POINTS(mlp, MlpKernels)
