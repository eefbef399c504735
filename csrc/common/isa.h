// Which build of the kernels runs: the best the processor has, or the one NARROWDEEP_ISA names (for tests).
#pragma once

namespace narrowdeep {

enum class Isa { kScalar, kAvx2, kAvx512, kNeon };

const char* name_of(Isa isa);
bool available(Isa isa);  // built for this architecture, and the processor has it

// Reads NARROWDEEP_ISA at every call. Throws std::invalid_argument when it names no available instruction set.
Isa selected_isa();

}  // namespace narrowdeep
