// Which build of the kernels runs: the best the processor has, or the one NARROWDEEP_ISA names (for tests).
#pragma once

namespace narrowdeep {

// Named as the namespaces of their kernels, ND_ISA.
enum class Isa { scalar, avx2, avx512, neon };

const char* name_of(Isa isa);
bool available(Isa isa);  // built for this architecture, and the processor has it

// Reads NARROWDEEP_ISA at every call. Throws std::runtime_error when it names no available instruction set.
Isa selected_isa();

// The entry points of one instruction set. Every kernels.cpp is compiled once for each, with -DND_ISA=<name>, and
// defines them for its own.
template <class Kernels, Isa isa>
Kernels entry_points();

template <class Kernels>
Kernels selected_kernels() {
  switch (selected_isa()) {
#if defined(__x86_64__)
    case Isa::avx512: return entry_points<Kernels, Isa::avx512>();
    case Isa::avx2: return entry_points<Kernels, Isa::avx2>();
#elif defined(__aarch64__)
    case Isa::neon: return entry_points<Kernels, Isa::neon>();
#endif
    default: return entry_points<Kernels, Isa::scalar>();
  }
}

}  // namespace narrowdeep
