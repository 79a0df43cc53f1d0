// Asking for memory ahead of its use, for kernels and for walks of graphs.
#pragma once

namespace polyvec {

// Fetch the cache line of p for reading; p may lie outside any array. The volatile asm forms are needed: GCC 12 drops
// __builtin_prefetch in unrolled loops when it believes two of them redundant, and drops the calls of a function that
// does nothing else. Static: every level has a copy of its own.
[[gnu::always_inline]] static inline void prefetch(const void* p) noexcept {
#if defined(__x86_64__)
    asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p)));
#elif defined(__aarch64__)
    asm volatile("prfm pldl1keep, %a0" : : "p"(p));
#else
    __builtin_prefetch(p);
#endif
}

}  // namespace polyvec
