// What Python cannot reach in parallel.hpp: bodies that throw, nest and count. tests/test_threads.py compiles and runs
// it.
#include "polyvec/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "polyvec/error.hpp"

namespace {

using namespace polyvec;

void check(bool ok, const char* what) {
    if (ok) return;
    std::printf("failed: %s\n", what);
    std::exit(1);
}

void every_row_is_visited_once() {
    for (const std::int64_t n : {0, 1, 2, 63, 64, 65, 1000})
        for (const std::int64_t grain : {1, 7, 64, 5000})
            for (const int threads : {0, 1, 2, 7}) {
                std::vector<std::atomic<int>> visits(static_cast<std::size_t>(n));
                const int workers = workers_for(n, grain, threads);
                parallel_for(n, grain, threads, [&](std::int64_t begin, std::int64_t end, int worker) {
                    check(begin < end && end - begin <= grain, "pieces have at most `grain` rows");
                    check(worker >= 0 && worker < workers, "worker is below workers_for()");
                    for (std::int64_t i = begin; i < end; ++i) ++visits[static_cast<std::size_t>(i)];
                });
                check(std::all_of(visits.begin(), visits.end(), [](const auto& v) { return v == 1; }),
                      "every row is visited once");
            }
}

void a_worker_s_exception_reaches_the_caller_and_the_pool_survives() {
    for (int repeat = 0; repeat < 20; ++repeat) {
        std::string caught;
        try {
            parallel_for(100, 1, 4, [](std::int64_t begin, std::int64_t, int) {
                if (begin >= 10) throw std::runtime_error("row " + std::to_string(begin));
            });
        } catch (const std::runtime_error& error) {
            caught = error.what();
        }
        check(caught.rfind("row ", 0) == 0, "the exception of a row arrives");
    }
    every_row_is_visited_once();
}

void nested_calls_run_on_their_worker() {
    std::atomic<int> rows{0};
    parallel_for(8, 1, 4, [&](std::int64_t, std::int64_t, int) {
        const auto self = std::this_thread::get_id();
        check(workers_for(100, 1, 4) == 1, "a nested call needs scratch for one worker");
        parallel_for(100, 3, 4, [&](std::int64_t begin, std::int64_t end, int worker) {
            check(worker == 0 && std::this_thread::get_id() == self, "a nested call stays on its thread");
            rows += static_cast<int>(end - begin);
        });
    });
    check(rows == 800, "nested calls do all their work");
}

void calls_from_several_threads_run_at_once() {
    std::vector<std::thread> callers;
    for (int i = 0; i < 6; ++i) callers.emplace_back([] { every_row_is_visited_once(); });
    for (std::thread& caller : callers) caller.join();
}

void the_interrupt_hook_stops_the_work_of_all_threads() {
    using namespace std::chrono_literals;
    set_interrupt_hook([] { return true; });
    for (const int threads : {1, 4}) {
        std::this_thread::sleep_for(60ms);  // the hook is asked a few times a second
        std::atomic<int> done{0};
        bool stopped = false;
        try {
            parallel_for(1 << 20, 1, threads, [&](std::int64_t, std::int64_t, int) {
                std::this_thread::sleep_for(1ms);
                ++done;
            });
        } catch (const Interrupted&) {
            stopped = true;
        }
        check(stopped && done < 4000, "the work stops soon");
    }
    for (const int threads : {1, 4}) {
        std::this_thread::sleep_for(60ms);
        std::atomic<int> stopped{0};
        try {
            parallel_for(4, 1, threads, [&](std::int64_t, std::int64_t, int) {
                try {
                    for (;;) check_interrupt();
                } catch (const Interrupted&) {
                    ++stopped;
                    throw;
                }
            });
        } catch (const Interrupted&) {
            check(stopped >= 1 && stopped <= threads, "a long body stops where it asks, on every thread");
        }
    }
    set_interrupt_hook(nullptr);
}

}  // namespace

int main() {
    every_row_is_visited_once();
    a_worker_s_exception_reaches_the_caller_and_the_pool_survives();
    nested_calls_run_on_their_worker();
    calls_from_several_threads_run_at_once();
    the_interrupt_hook_stops_the_work_of_all_threads();
}
