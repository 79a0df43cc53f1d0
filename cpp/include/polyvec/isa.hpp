/// The instruction-set levels that were compiled in, which of them this CPU has, and which one is active.
#pragma once

#include <string>
#include <vector>

namespace polyvec {

/// Levels this CPU can run, best first.
std::vector<std::string> available_isas();

/// The level in use: the best one, unless POLYVEC_ISA or force_isa() says otherwise.
std::string active_isa();

/// Switches to a level by name; throws std::invalid_argument with the names when it is not available.
void force_isa(const std::string& name);

}  // namespace polyvec
