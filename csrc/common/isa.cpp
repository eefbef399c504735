#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace narrowdeep {

namespace {
constexpr Isa kBestFirst[] = {Isa::kAvx512, Isa::kAvx2, Isa::kNeon, Isa::kScalar};
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    case Isa::kNeon: return "neon";
    default: return "scalar";
  }
}

bool available(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return true;
#if defined(__x86_64__)
    case Isa::kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
#elif defined(__aarch64__)
    case Isa::kNeon: return true;
#endif
    default: return false;
  }
}

Isa selected_isa() {
  const char* wanted = std::getenv("NARROWDEEP_ISA");
  std::string names;
  for (Isa isa : kBestFirst) {
    if (!available(isa)) continue;
    if (!wanted || !*wanted || std::strcmp(wanted, name_of(isa)) == 0) return isa;
    names += std::string(names.empty() ? "" : ", ") + name_of(isa);
  }
  throw std::invalid_argument(std::string("NARROWDEEP_ISA must be one of ") + names + " on this machine, got " + wanted);
}

}  // namespace narrowdeep

// For narrowdeep.ops.backends(), through ctypes: no tensor is involved.
extern "C" __attribute__((visibility("default"))) const char* narrowdeep_available_isas() {
  static const std::string names = [] {
    std::string list;
    for (narrowdeep::Isa isa : narrowdeep::kBestFirst)
      if (narrowdeep::available(isa)) list += std::string(list.empty() ? "" : " ") + narrowdeep::name_of(isa);
    return list;
  }();
  return names.c_str();
}
