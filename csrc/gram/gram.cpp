#include "gram/gram.h"

#include "common/select.h"

namespace narrowdeep {
ND_SELECT(gram, GramKernels)
}
