// The convolution chain, compiled once for each instruction set.
#include "common/backward_jvp.h"
#include "cnn/layer.h"

namespace narrowdeep {

template <>
ChainKernels<Cnn, float> entry_points<ChainKernels<Cnn, float>, Isa::ND_ISA>() {
  using Layer = ND_ISA::CnnLayer<float>;
  return {ND_ISA::chain_forward<Layer>, ND_ISA::chain_backward<Layer>, ND_ISA::chain_jvp<Layer>,
          ND_ISA::chain_backward_jvp<Layer>, ND_ISA::chain_backward_costs<Layer>};
}
template <>
ChainKernels<Cnn, double> entry_points<ChainKernels<Cnn, double>, Isa::ND_ISA>() {
  using Layer = ND_ISA::CnnLayer<double>;
  return {ND_ISA::chain_forward<Layer>, ND_ISA::chain_backward<Layer>, ND_ISA::chain_jvp<Layer>,
          ND_ISA::chain_backward_jvp<Layer>, ND_ISA::chain_backward_costs<Layer>};
}

}  // namespace narrowdeep
