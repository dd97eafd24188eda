#include "pool.h"

#include <cstring>

namespace fastserve {

namespace {

constexpr int SPINS = 1000;  // some 10 to 50 microseconds
constexpr int PATIENCE = 200;  // before a task is done again

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) : held_(threads) {
    for (int thread = 1; thread < threads; thread++) {
        helpers_.emplace_back([this, thread] { help(thread); });
    }
}

Pool::~Pool() {
    ending_ = true;
    phase_.fetch_add(1);
    phase_.notify_all();
    for (auto& helper : helpers_) helper.join();
}

void Pool::run(int count) {
    // (After 65,536 phases numbers come again: no task is late for so long, see `settle`.)
    const uint64_t phase = (next_.load(std::memory_order_relaxed) >> PHASE_SHIFT) + 1;
    done_.store(0, std::memory_order_relaxed);
    next_.store(phase << PHASE_SHIFT | static_cast<uint64_t>(count) << COUNT_BITS,
                std::memory_order_release);
    phase_.fetch_add(1);
    phase_.notify_all();
    work(0);
    const int patience = copied_ != 0 ? PATIENCE : SPINS;
    for (int spins = 0; done_.load(std::memory_order_acquire) < count;) {
        if (++spins < patience) {
            relax();
        } else if (copied_ != 0 && back_up(next_.load() >> PHASE_SHIFT)) {
            spins = 0;
        } else {
            // A helper lost its core in the middle of a task: it can have this one.
            const int done = done_.load(std::memory_order_acquire);
            if (done < count) done_.wait(done, std::memory_order_acquire);
        }
    }
}

// Does a task of this race again that a helper is not through with. False: there is none.
bool Pool::back_up(uint64_t phase) {
    for (Held& held : held_) {
        const uint64_t task = held.task.load(std::memory_order_acquire);
        if (task >> PHASE_SHIFT != phase || task <= LATE) continue;
        Claim claim(held.task, task, LATE);
        call_(task_, static_cast<int>(task & COUNT_MASK), 0, claim);
        if (claim.first_) done_.fetch_add(1);
        return true;
    }
    return false;
}

void Pool::settle() {
    for (Held& held : held_) {
        for (int spins = 0; held.task.load(std::memory_order_acquire) == LATE;) {
            if (++spins < SPINS) {
                relax();
            } else {
                held.task.wait(LATE, std::memory_order_acquire);
            }
        }
    }
}

// Tasks, until there are none.
void Pool::work(int thread) {
    for (;;) {
        const uint64_t taken = next_.fetch_add(1, std::memory_order_acq_rel);
        const auto index = static_cast<int>(taken & COUNT_MASK);
        const auto count = static_cast<int>(taken >> COUNT_BITS & COUNT_MASK);
        if (index >= count) return;
        if (perform(index, thread, taken) && done_.fetch_add(1) + 1 == count) done_.notify_one();
    }
}

// False: the caller had the results before.
bool Pool::perform(int index, int thread, uint64_t taken) {
    if (copied_ == 0 || thread == 0) {
        Claim sure;
        call_(task_, index, thread, sure);
        return true;
    }
    // From here on the phase may end: the original of the task ends with it.
    alignas(64) std::byte task[MAX_TASK];
    memcpy(task, task_, copied_);
    const Call call = call_;
    std::atomic<uint64_t>& held = held_[thread].task;
    held.store(taken, std::memory_order_release);
    Claim claim(held, taken, NOTHING);
    call(task, index, thread, claim);
    if (!claim.first_) {
        held.store(NOTHING, std::memory_order_release);
        held.notify_one();
    }
    return claim.first_;
}

void Pool::help(int thread) {
    for (int seen = 0;;) {
        for (int spins = 0; phase_.load(std::memory_order_acquire) == seen && spins < SPINS; spins++) {
            relax();
        }
        phase_.wait(seen, std::memory_order_acquire);
        if (ending_) return;
        seen = phase_.load(std::memory_order_acquire);
        work(thread);
    }
}

}  // namespace fastserve
