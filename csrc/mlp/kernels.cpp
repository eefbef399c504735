// The MLP chain, compiled once for each instruction set.
#include "common/backward_jvp.h"
#include "mlp/layer.h"

namespace narrowdeep {

template <>
ChainKernels<Mlp, float> entry_points<ChainKernels<Mlp, float>, Isa::ND_ISA>() {
  using Layer = ND_ISA::MlpLayer<float>;
  return {ND_ISA::chain_forward<Layer>, ND_ISA::chain_backward<Layer>, ND_ISA::chain_jvp<Layer>,
          ND_ISA::chain_backward_jvp<Layer>, ND_ISA::chain_backward_costs<Layer>};
}
template <>
ChainKernels<Mlp, double> entry_points<ChainKernels<Mlp, double>, Isa::ND_ISA>() {
  using Layer = ND_ISA::MlpLayer<double>;
  return {ND_ISA::chain_forward<Layer>, ND_ISA::chain_backward<Layer>, ND_ISA::chain_jvp<Layer>,
          ND_ISA::chain_backward_jvp<Layer>, ND_ISA::chain_backward_costs<Layer>};
}

}  // namespace narrowdeep
