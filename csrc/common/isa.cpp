#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace narrowdeep {

namespace {
constexpr Isa kBestFirst[] = {Isa::avx512, Isa::avx2, Isa::neon, Isa::scalar};
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::neon: return "neon";
    default: return "scalar";
  }
}

bool available(Isa isa) {
  switch (isa) {
    case Isa::scalar: return true;
#if defined(__x86_64__)
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
#elif defined(__aarch64__)
    case Isa::neon: return true;
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
  throw std::runtime_error(std::string("NARROWDEEP_ISA must be one of ") + names + " on this machine, got " + wanted);
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
