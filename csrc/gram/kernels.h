// The entry points of one instruction set. Included by one translation unit per instruction set.
#pragma once

#include "gram/conv_gram.h"
#include "gram/mlp_gram.h"

namespace narrowdeep {
namespace ND_ISA {

template <class T>
inline GramKernels<T> gram_kernels() {
  return {mlp_gram<T>, conv_gram<T>};
}

}  // namespace ND_ISA
}  // namespace narrowdeep
