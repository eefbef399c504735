// The empirical tangent kernels, compiled once for each instruction set.
#include "ntk/cnn_gram.h"
#include "ntk/mlp_gram.h"

namespace narrowdeep {

template <>
GramKernels<Mlp, float> entry_points<GramKernels<Mlp, float>, Isa::ND_ISA>() {
  return {ND_ISA::mlp_gram<float>};
}
template <>
GramKernels<Mlp, double> entry_points<GramKernels<Mlp, double>, Isa::ND_ISA>() {
  return {ND_ISA::mlp_gram<double>};
}
template <>
GramKernels<Cnn, float> entry_points<GramKernels<Cnn, float>, Isa::ND_ISA>() {
  return {ND_ISA::cnn_gram<float>};
}
template <>
GramKernels<Cnn, double> entry_points<GramKernels<Cnn, double>, Isa::ND_ISA>() {
  return {ND_ISA::cnn_gram<double>};
}

}  // namespace narrowdeep
