#include "conv/conv.h"

#include "common/select.h"

namespace narrowdeep {
ND_SELECT(conv, ConvKernels)
}
