/// The instruction-set levels that were compiled in, which of them this CPU has, and which one is active.
#pragma once

#include <string>
#include <vector>

namespace polyvec {

/// Levels this CPU can run, best first.
std::vector<std::string> available_isas();

/// The level in use: what POLYVEC_ISA or force_isa() names; else the best one, unless AVX2 is more than a tenth faster
/// in a test of a millisecond at the first use. It never changes by itself afterwards.
std::string active_isa();

/// How the level was chosen that is in use without force_isa().
std::string isa_choice();

/// Throws std::invalid_argument when POLYVEC_ISA names a level that is not available.
void check_isa_variable();

/// Switches to a level by name; throws std::invalid_argument with the names when it is not available.
void force_isa(const std::string& name);

}  // namespace polyvec
