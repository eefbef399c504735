// Multiply-adds in registers alone, compiled once for each instruction set: what no kernel can be faster than.
#include "common/vec.h"
#include "common/isa.h"
#include "peak/args.h"

namespace narrowdeep {
namespace ND_ISA {

// Length of the chains. Each of `Chains` vectors waits for its own last value only. Two units of latency 4 need 8 of
// them, four units 16; what is left of the registers holds the two operands.
template <class T, int Chains>
int64_t multiply_adds(int64_t rounds) {
  constexpr int kSteps = 16;  // a round: the loop itself must not count
  // x = x / 2 + 1 stays where it is from 2 on; the compiler must know neither the numbers nor that nobody reads them.
  volatile T half = T(0.5), one = T(1);
  const Vec<T> a = broadcast(T(half)), b = broadcast(T(one));
  Vec<T> x[Chains];
  ND_UNROLL for (int c = 0; c < Chains; ++c) x[c] = broadcast(T(c));
  for (int64_t round = 0; round < rounds; ++round) {
    ND_UNROLL for (int step = 0; step < kSteps; ++step) {
      ND_UNROLL for (int c = 0; c < Chains; ++c) x[c] = fma(a, x[c], b);
    }
  }
  Vec<T> total{};
  for (int c = 0; c < Chains; ++c) total = total + x[c];
  volatile T sink = total[0];
  (void)sink;
  return rounds * kSteps;
}

template <class T>
int64_t multiply_adds(int64_t rounds, bool independent) {
  constexpr int kChains = kVectorBytes == 16 ? 16 : 12;  // with 24 gcc spills in AVX-512
  return independent ? 2 * kChains * kLanes<T> * multiply_adds<T, kChains>(rounds) : multiply_adds<T, 1>(rounds);
}

}  // namespace ND_ISA

template <>
PeakKernels<float> entry_points<PeakKernels<float>, Isa::ND_ISA>() {
  return {ND_ISA::multiply_adds<float>};
}
template <>
PeakKernels<double> entry_points<PeakKernels<double>, Isa::ND_ISA>() {
  return {ND_ISA::multiply_adds<double>};
}

}  // namespace narrowdeep
