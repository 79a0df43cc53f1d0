#include "polyvec/parallel.hpp"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "polyvec/error.hpp"

namespace polyvec {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto interrupt_interval = std::chrono::milliseconds(50);

std::atomic<bool (*)()> interrupt_hook{nullptr};
thread_local Clock::time_point last_check{};

struct Job;
thread_local Job* current_job = nullptr;  // whose body this thread is inside
thread_local bool asks = false;  // whether it called parallel_for for that job: it alone may ask for interrupts

bool interrupted() {
    const auto hook = interrupt_hook.load(std::memory_order_relaxed);
    const auto now = Clock::now();
    if (!hook || now - last_check < interrupt_interval) return false;
    last_check = now;
    return hook();
}

/// One call of parallel_for: threads take pieces until none is left.
struct Job {
    const Body& body;
    const std::int64_t n, grain;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> stop{false};
    std::mutex error_mutex;
    std::exception_ptr error;

    Job(const Body& body, std::int64_t n, std::int64_t grain) : body(body), n(n), grain(grain) {}

    void keep(std::exception_ptr e) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::move(e);
        stop = true;
    }

    /// `caller`: this is the thread that called parallel_for, the only one that may ask for interrupts.
    void work(int worker, bool caller) {
        current_job = this;
        asks = caller;
        try {
            while (!stop.load(std::memory_order_relaxed)) {
                const std::int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
                if (begin >= n) break;
                body(begin, std::min(begin + grain, n), worker);
                if (caller && interrupted()) throw Interrupted();
            }
        } catch (...) {
            keep(std::current_exception());
        }
        current_job = nullptr;
    }
};

class Pool {
public:
    /// Runs `job` on this thread and on workers - 1 others; returns false when another call is using the pool.
    bool run(Job& job, int workers) {
        const std::unique_lock busy(busy_, std::try_to_lock);
        if (!busy) return false;
        grow(workers - 1);
        {
            const std::lock_guard lock(mutex_);
            job_ = &job;
            helpers_ = running_ = workers - 1;
            ++generation_;
        }
        wake_.notify_all();
        job.work(0, true);
        std::unique_lock lock(mutex_);
        while (!done_.wait_for(lock, interrupt_interval, [&] { return running_ == 0; })) {
            lock.unlock();
            try {
                if (interrupted()) job.keep(std::make_exception_ptr(Interrupted()));
            } catch (...) {
                job.keep(std::current_exception());
            }
            lock.lock();
        }
        job_ = nullptr;
        return true;
    }

private:
    void grow(int helpers) {
        while (static_cast<int>(threads_) < helpers) {
            const int index = static_cast<int>(threads_);
            std::thread([this, index] { serve(index); }).detach();
            ++threads_;
        }
    }

    void serve(int index) {
        std::uint64_t seen = 0;
        for (;;) {
            Job* job = nullptr;
            {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return generation_ != seen; });
                seen = generation_;
                if (index >= helpers_) continue;
                job = job_;
            }
            job->work(index + 1, false);
            const std::lock_guard lock(mutex_);
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_;   // held by the call that uses the pool
    std::mutex mutex_;  // guards the members below
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int helpers_ = 0, running_ = 0;
    std::uint64_t generation_ = 0;
    int threads_ = 0;  // only touched under busy_
};

// Created on first use and never destroyed: its threads may outlive static destructors. A forked child has none of
// the parent's threads, so it forgets the parent's pool and makes its own.
std::atomic<Pool*> pool{nullptr};

Pool& get_pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
        pool = nullptr;
        current_job = nullptr;
    });
    (void)registered;
    Pool* current = pool.load();
    if (!current) {
        Pool* fresh = new Pool;
        if (pool.compare_exchange_strong(current, fresh)) return *fresh;
        delete fresh;
    }
    return *current;
}

int cgroup_limit() {
    const auto word_of = [](const char* path, int index) {  // no iostreams: see error.hpp
        char words[2][32] = {};
        if (std::FILE* file = std::fopen(path, "r")) {
            if (std::fscanf(file, "%31s %31s", words[0], words[1]) < 1) words[0][0] = 0;
            std::fclose(file);
        }
        return std::atof(words[index]);  // "max" and "-1" mean no limit
    };
    double us = word_of("/sys/fs/cgroup/cpu.max", 0), period = word_of("/sys/fs/cgroup/cpu.max", 1);
    if (period == 0) {
        us = word_of("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", 0);
        period = word_of("/sys/fs/cgroup/cpu/cpu.cfs_period_us", 0);
    }
    return us > 0 && period > 0 ? std::max(1, static_cast<int>(us / period + 0.5)) : 0;
}

/// A positive integer at the start of the variable (OMP_NUM_THREADS may be a list), 0 when there is none.
int from_environment(const char* name) {
    const char* text = std::getenv(name);
    return text ? std::max(0, std::atoi(text)) : 0;
}

int default_num_threads() {
    if (const char* text = std::getenv("POLYVEC_NUM_THREADS"); text && *text) {
        const int n = from_environment("POLYVEC_NUM_THREADS");
        if (n < 1) throw std::invalid_argument(concat("POLYVEC_NUM_THREADS must be a positive integer, got ", text));
        return n;
    }
    const int omp = from_environment("OMP_NUM_THREADS");  // joblib sets it in its workers
    return omp > 0 ? omp : available_cpus();
}

std::atomic<int> num_threads_setting{0};

}  // namespace

int available_cpus() {
    int cpus = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
    cpu_set_t mask;
    if (sched_getaffinity(0, sizeof mask, &mask) == 0) cpus = std::max(1, CPU_COUNT(&mask));
#endif
    const int limit = cgroup_limit();
    return limit > 0 ? std::min(cpus, limit) : cpus;
}

int get_num_threads() {
    static const int fallback = default_num_threads();
    const int n = num_threads_setting.load(std::memory_order_relaxed);
    return n > 0 ? n : fallback;
}

void set_num_threads(int n) {
    num_threads_setting = std::max(0, n);
}

void set_interrupt_hook(bool (*hook)()) {
    interrupt_hook = hook;
}

void check_interrupt() {
    const bool others_stopped = current_job && current_job->stop.load(std::memory_order_relaxed);
    if (others_stopped || ((!current_job || asks) && interrupted())) throw Interrupted();
}

int workers_for(std::int64_t n, std::int64_t grain, int num_threads) {
    if (current_job) return 1;
    const std::int64_t pieces = (n + grain - 1) / grain;
    const std::int64_t threads = num_threads > 0 ? num_threads : get_num_threads();
    return static_cast<int>(std::clamp<std::int64_t>(std::min(pieces, threads), 1, 1024));
}

void parallel_for(std::int64_t n, std::int64_t grain, int num_threads, const Body& body) {
    if (n <= 0) return;
    grain = std::max<std::int64_t>(1, grain);
    if (current_job) {  // already on a worker: no further split, no interrupt checks
        for (std::int64_t begin = 0; begin < n; begin += grain) body(begin, std::min(begin + grain, n), 0);
        return;
    }
    Job job(body, n, grain);
    const int workers = workers_for(n, grain, num_threads);
    if (workers == 1 || !get_pool().run(job, workers)) job.work(0, true);
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace polyvec
