// The rate of multiply-adds that benchmarks are measured against.
#pragma once

#include <cstdint>

namespace narrowdeep {

template <class T>
struct PeakKernels {
  // Multiply-adds in registers, so many rounds of them: on as many independent vectors as keep the units busy, and returns
  // the floating-point operations, a multiply-add as two; or on one vector, and returns how many waited for one another.
  int64_t (*multiply_adds)(int64_t rounds, bool independent);
};

}  // namespace narrowdeep
