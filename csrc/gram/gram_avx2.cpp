// The empirical tangent kernel, compiled for one instruction set.
#define ND_ISA avx2
#include "common/select.h"
#include "gram/kernels.h"

ND_ENTRY_POINTS(gram, GramKernels)
