/// The only file that asks what the CPU can do.
#include "polyvec/isa.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "polyvec/aligned.hpp"
#include "polyvec/error.hpp"
#include "tables.hpp"

namespace polyvec {

// Defined by kernels/kernels.cpp, once per level.
#if defined(__x86_64__)
namespace amx {
extern const Kernels table;
}
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
    bool timed = false;  // the level that one with wider registers has to beat: they are not faster on every CPU
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

/// Linux saves the matrices of a process that has asked for it, once and for good; no other system does. Signal
/// handlers on stacks of their own then need 11 KB there, and where one has less already, Linux refuses.
bool may_use_matrices() {
#if defined(__linux__)
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

bool supports_amx() {
    static const bool supported = [] {
        constexpr unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
        unsigned a, b, c, d;
        return supports_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & needed) == needed &&
               may_use_matrices();
    }();
    return supported;
}
#endif

// __builtin_cpu_supports also checks that the operating system saves the registers.
const Level levels[] = {
#if defined(__x86_64__)
    {amx::table, supports_amx},  // a row a line, best first
    {avx512_bf16::table, supports_avx512_bf16},
    {avx512::table, supports_avx512},
    {avx2::table, supports_avx2, true},
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

/// A product of a panel of queries with rows, as scan and MaxSim compute it, in the first-level cache.
class Trial {
public:
    explicit Trial(const Kernels& table)
        : scan_(*table.scan),
          panel_(aligned<float>(scan_.f32.panel_words(d) * scan_.panel_width)),
          rows_(aligned<float>(n * d)),
          out_(aligned<float>(n * scan_.panel_width)) {
        std::fill_n(panel_.get(), scan_.f32.panel_words(d) * scan_.panel_width, 1.0f);
        std::fill_n(rows_.get(), n * d, 1.0f);
    }

    /// Runs some tens of microseconds; keeps the shortest time of a product.
    void run() {
        using Clock = std::chrono::steady_clock;
        for (int repeat = 0; repeat < 20; ++repeat) {
            const auto start = Clock::now();
            scan_.f32.values({.panel = panel_.get(), .rows = rows_.get(), .n = n, .d = d}, out_.get());
            best_ = std::min(best_, std::chrono::duration<double>(Clock::now() - start).count());
        }
    }

    double seconds_a_query() const { return best_ / static_cast<double>(scan_.panel_width); }

private:
    static constexpr std::size_t n = 48, d = 64;
    const ScanKernels& scan_;
    Aligned<float> panel_, rows_, out_;  // as kernels read and write them
    double best_ = 1;
};

struct Choice {
    const Kernels& table;
    std::string how;
};

/// The best level, unless the timed one is clearly faster. Near that margin two runs may choose differently, so it is
/// wide: who needs the same bits everywhere names a level.
Choice choose() {
    constexpr double margin = 1.1;
    constexpr int rounds = 5;
    if (const char* forced = std::getenv("POLYVEC_ISA"); forced && *forced)
        return {find(forced, "POLYVEC_ISA"), "POLYVEC_ISA"};
    const Kernels& best = find(available_isas().front(), "");
    for (const Level& level : levels) {
        if (!level.timed || !level.supported() || &level.table == &best) continue;
        Trial wide(best), narrow(level.table);
        for (int round = 0; round < rounds; ++round) {  // in turn: what disturbs the machine disturbs both
            wide.run();
            narrow.run();
        }
        const double ratio = narrow.seconds_a_query() / wide.seconds_a_query();
        const double rounded = std::round(100 * ratio) / 100;
        return {ratio * margin < 1 ? level.table : best,
                concat("timed: ", best.isa, " is ", rounded, " times as fast as ", level.table.isa)};
    }
    return {best, "the best that this CPU has"};
}

const Choice& first_choice() {
    static const Choice choice = choose();
    return choice;
}

std::atomic<const Kernels*> active{nullptr};  // null before the first use

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

std::string isa_choice() {
    return first_choice().how;
}

void check_isa_variable() {
    if (const char* forced = std::getenv("POLYVEC_ISA"); forced && *forced) find(forced, "POLYVEC_ISA");
}

void force_isa(const std::string& name) {
    active = &find(name, "isa");
}

const Kernels& kernels() {
    const Kernels* table = active.load(std::memory_order_acquire);
    if (!table && active.compare_exchange_strong(table, &first_choice().table)) table = &first_choice().table;
    return *table;
}

}  // namespace polyvec
