/// The library's own thread pool: lazy, bounded by affinity mask and cgroup quota, alive after fork, inline when
/// nested.
///
/// Work is split by `grain` alone, never by the number of threads, and threads share outputs, never a reduction:
/// results have the same bits for any number of threads.
#pragma once

#include <cstdint>
#include <functional>

namespace polyvec {

/// f(begin, end, worker): handles rows [begin, end); `worker` < workers_for(...) names a slot of scratch memory.
using Body = std::function<void(std::int64_t begin, std::int64_t end, int worker)>;

/// Calls `body` on [0, n) in pieces of `grain` rows. The first exception of any thread is rethrown here.
/// Throws Interrupted within a fraction of a second when the interrupt hook says so. Pieces are begun in order and
/// those that were begun are finished first, so that the rows done by then are [0, some row).
void parallel_for(std::int64_t n, std::int64_t grain, int num_threads, const Body& body);

/// How many workers parallel_for will use at most for these arguments (>= 1): how much scratch to allocate.
int workers_for(std::int64_t n, std::int64_t grain, int num_threads);

/// Throws Interrupted when the user pressed Ctrl-C. Long serial loops call it now and then; within a body, on any
/// thread, where rows are of no use once parallel_for throws: this one is not finished then.
void check_interrupt();

int get_num_threads();
void set_num_threads(int n);  // 0: back to the default

/// CPUs that this process may use: affinity mask capped by the cgroup quota.
int available_cpus();

/// `hook` is called on the calling thread only, a few times a second, and returns true to stop the work.
void set_interrupt_hook(bool (*hook)());

}  // namespace polyvec
