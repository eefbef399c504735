// The convolution chain, compiled for one instruction set.
#define ND_ISA avx512
#include "common/select.h"
#include "conv/chain.h"

ND_ENTRY_POINTS(conv, ConvKernels)
