// The convolution chain, compiled for one instruction set.
#define ND_SCALAR
#define ND_ISA scalar
#include "common/select.h"
#include "conv/chain.h"

ND_ENTRY_POINTS(conv, ConvKernels)
