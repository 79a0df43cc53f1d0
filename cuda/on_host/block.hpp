/// The threads of a block, on one thread of a CPU: each runs until it waits for others or ends, then another goes on.
///
/// A thread gets a stack of its own only while it waits: those that never wait run one after the other on one stack.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

namespace on_host {

class Block {
public:
    static constexpr unsigned lanes = 32;

    static Block& current() {
        static thread_local Block block;
        return block;
    }

    /// Calls thread() n times, and begin(i) whenever the i-th starts or goes on. False: all that are left wait, for
    /// some that ended or that wait elsewhere.
    bool run(unsigned n, std::function<void()> thread, std::function<void(unsigned)> begin) {
        n_ = n, next_ = ended_ = 0;
        thread_ = std::move(thread), begin_ = std::move(begin);
        waits_.assign(n, {nullptr, 0});
        for (std::vector<Slot>& slots : slots_) slots.resize(n);
        turns_.assign(n, 0);
        current_ = &main_;
        switch_to(idle());
        if (ended_ == n_) return true;
        idle_.clear(), ready_.clear(), at_barrier_.clear(), stacks_.clear();
        return false;
    }

    /// Waits for all threads of the block that have not ended.
    void sync() {
        at_barrier_.push_back(current_);
        if (!release_barrier(current_)) wait();
    }

    /// Waits for the lanes of `mask`, which must all come here with the same mask.
    void sync_warp(unsigned mask) {
        const unsigned thread = current_->thread, first = thread - thread % lanes;
        if (n_ - first < lanes) mask &= (1u << (n_ - first)) - 1;
        waits_[thread] = {current_, mask};
        for (unsigned lane = 0; lane < lanes; ++lane)
            if (mask >> lane & 1 && waits_[first + lane].mask != mask) return wait();
        for (unsigned lane = 0; lane < lanes; ++lane) {
            if (!(mask >> lane & 1)) continue;
            waits_[first + lane].mask = 0;
            if (first + lane != thread) ready_.push_back(waits_[first + lane].stack);
        }
    }

    /// Calls read(values), a function of the lane, when all lanes of `mask` have given a value.
    template <class T, class F>
    auto exchange(unsigned mask, const T& value, F read) {
        static_assert(sizeof(T) <= sizeof(Slot));
        const unsigned thread = current_->thread, first = thread - thread % lanes;
        const unsigned live = n_ - first < lanes ? (1u << (n_ - first)) - 1 : ~0u;
        const bool whole = (mask & live) == live;  // then slots take turns: those of the last exchange are still read
        if (whole) turns_[thread] ^= 1;
        std::vector<Slot>& slots = slots_[whole ? turns_[thread] : 2];
        std::memcpy(slots[thread].data(), &value, sizeof value);
        sync_warp(mask);
        const auto result = read([&](unsigned lane) {
            T other = value;  // of a lane that does not exist
            if (first + lane < n_) std::memcpy(&other, slots[first + lane].data(), sizeof other);
            return other;
        });
        if (!whole) sync_warp(mask);  // all have read
        return result;
    }

    unsigned lane() const { return current_->thread % lanes; }

private:
    using Slot = std::array<std::byte, 64>;
    struct Stack {
        jmp_buf at;
        ucontext_t context;
        std::unique_ptr<char[]> memory;
        unsigned thread = 0;
        bool started = false;
    };
    struct Wait {
        Stack* stack;
        unsigned mask;  // 0: does not wait
    };

    [[gnu::noinline]] void switch_to(Stack& to) {
        Stack& from = *current_;
        current_ = &to;
        if (_setjmp(from.at) != 0) return;
        if (to.started) _longjmp(to.at, 1);
        to.started = true;
        setcontext(&to.context);
    }

    void wait() {
        if (!ready_.empty()) {
            switch_to(take(ready_));
        } else if (next_ < n_) {
            switch_to(idle());
        } else {
            switch_to(main_);  // for good
        }
        begin_(current_->thread);
    }

    bool release_barrier(Stack* last) {
        if (at_barrier_.empty() || at_barrier_.size() + ended_ < n_) return false;
        for (Stack* stack : at_barrier_)
            if (stack != last) ready_.push_back(stack);
        at_barrier_.clear();
        return true;
    }

    /// What a stack does all its life.
    static void live() {
        Block& block = current();
        for (;;) {
            while (block.next_ < block.n_) {
                block.begin_(block.current_->thread = block.next_++);
                block.thread_();
                ++block.ended_;
                block.release_barrier(nullptr);
            }
            block.idle_.push_back(block.current_);
            block.switch_to(block.ready_.empty() ? block.main_ : take(block.ready_));
        }
    }

    Stack& idle() {
        if (idle_.empty()) add_stack();
        return take(idle_);
    }

    [[gnu::noinline]] void add_stack() {
        constexpr std::size_t size = 1 << 16;
        Stack& stack = *stacks_.emplace_back(std::make_unique<Stack>());
        stack.memory = std::make_unique_for_overwrite<char[]>(size);
        getcontext(&stack.context);
        stack.context.uc_stack.ss_sp = stack.memory.get();
        stack.context.uc_stack.ss_size = size;
        makecontext(&stack.context, live, 0);
        idle_.push_back(&stack);
    }

    static Stack& take(std::deque<Stack*>& stacks) {
        Stack& first = *stacks.front();
        stacks.pop_front();
        return first;
    }

    unsigned n_ = 0, next_ = 0, ended_ = 0;
    std::function<void()> thread_;
    std::function<void(unsigned)> begin_;
    std::vector<std::unique_ptr<Stack>> stacks_;
    std::deque<Stack*> idle_, ready_, at_barrier_;
    std::vector<Wait> waits_;                 // of each thread
    std::array<std::vector<Slot>, 3> slots_;  // what it gives to its warp: in two turns, and to a part of the warp
    std::vector<unsigned> turns_;
    Stack main_{.at = {}, .context = {}, .memory = nullptr, .thread = 0, .started = true};
    Stack* current_ = &main_;
};

}  // namespace on_host
