/// The only file that asks what the CPU can do.
#include "polyvec/isa.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "tables.hpp"

namespace polyvec {

// Defined by kernels/kernels.cpp, once per level.
#if defined(__x86_64__)
namespace avx512_bf16 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace base {
extern const Kernels table;
}
#else
namespace neon {
extern const Kernels table;
}
#endif

namespace {

struct Level {
    const Kernels& table;
    bool (*supported)();
};

#if defined(__x86_64__)
// By features, as Clang before 18 does not know x86-64-v3 and -v4: a CPU with these has the rest of the level.
bool supports_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
}

bool supports_avx512() {
    return supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

bool supports_avx512_bf16() {
    return supports_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vpopcntdq");
}
#endif

// Best first. __builtin_cpu_supports also checks that the operating system saves the registers.
const Level levels[] = {
#if defined(__x86_64__)
    {avx512_bf16::table, supports_avx512_bf16},
    {avx512::table, supports_avx512},
    {avx2::table, supports_avx2},
    {base::table, [] { return true; }},
#else
    {neon::table, [] { return true; }},
#endif
};

const Kernels& find(const std::string& name, const char* who) {
    for (const Level& level : levels)
        if (name == level.table.isa && level.supported()) return level.table;
    std::string message = std::string(who) + " must be one of ";
    for (const std::string& available : available_isas()) message += available + ", ";
    message.resize(message.size() - 2);
    throw std::invalid_argument(message + ", got " + name);
}

const Kernels& choose() {
    if (const char* forced = std::getenv("POLYVEC_ISA"); forced && *forced) return find(forced, "POLYVEC_ISA");
    return find(available_isas().front(), "");
}

std::atomic<const Kernels*>& active() {
    static std::atomic<const Kernels*> table{&choose()};
    return table;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Level& level : levels)
        if (level.supported()) names.push_back(level.table.isa);
    return names;
}

std::string active_isa() {
    return kernels().isa;
}

void force_isa(const std::string& name) {
    active() = &find(name, "isa");
}

const Kernels& kernels() {
    return *active().load(std::memory_order_acquire);
}

}  // namespace polyvec
