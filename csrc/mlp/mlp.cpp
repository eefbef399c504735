#include "mlp/mlp.h"

#include "common/select.h"

namespace narrowdeep {
ND_SELECT(mlp, MlpKernels)
}
