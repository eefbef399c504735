// ND_SELECT(family, Kernels): defines `template <class T> Kernels<T> family_kernels(Isa)`, which picks among the entry
// points `family_<isa>_float()` and `family_<isa>_double()` that the translation units of each instruction set define.
#pragma once

#include <stdexcept>

#include "common/isa.h"

#define ND_DECLARE_ISA(family, Kernels, isa) \
  Kernels<float> family##_##isa##_float();   \
  Kernels<double> family##_##isa##_double();

#if defined(__x86_64__)
#define ND_DECLARE_NATIVE(family, Kernels)   \
  ND_DECLARE_ISA(family, Kernels, avx2)      \
  ND_DECLARE_ISA(family, Kernels, avx512)
#define ND_NATIVE_CASES(family, type)                  \
  case Isa::kAvx2: return family##_avx2_##type();      \
  case Isa::kAvx512: return family##_avx512_##type();
#elif defined(__aarch64__)
#define ND_DECLARE_NATIVE(family, Kernels) ND_DECLARE_ISA(family, Kernels, neon)
#define ND_NATIVE_CASES(family, type) \
  case Isa::kNeon: return family##_neon_##type();
#else
#define ND_DECLARE_NATIVE(family, Kernels)
#define ND_NATIVE_CASES(family, type)
#endif

#define ND_SELECT_TYPE(family, Kernels, type)                                \
  template <>                                                                \
  Kernels<type> family##_kernels<type>(Isa isa) {                            \
    switch (isa) {                                                           \
      case Isa::kScalar: return family##_scalar_##type();                    \
      ND_NATIVE_CASES(family, type)                                          \
      default: throw std::logic_error("no kernels for this instruction set"); \
    }                                                                        \
  }

#define ND_SELECT(family, Kernels)              \
  ND_DECLARE_ISA(family, Kernels, scalar)       \
  ND_DECLARE_NATIVE(family, Kernels)            \
  ND_SELECT_TYPE(family, Kernels, float)        \
  ND_SELECT_TYPE(family, Kernels, double)

// In the translation unit of one instruction set, after its kernels: the entry points ND_SELECT picks among.
#define ND_ENTRY_POINTS_OF(family, Kernels, isa)                                        \
  namespace narrowdeep {                                                                \
  Kernels<float> family##_##isa##_float() { return isa::family##_kernels<float>(); }    \
  Kernels<double> family##_##isa##_double() { return isa::family##_kernels<double>(); } \
  }
#define ND_ENTRY_POINTS_EXPANDED(family, Kernels, isa) ND_ENTRY_POINTS_OF(family, Kernels, isa)
#define ND_ENTRY_POINTS(family, Kernels) ND_ENTRY_POINTS_EXPANDED(family, Kernels, ND_ISA)
