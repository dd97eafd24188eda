#include "pool.h"

namespace fastserve {

namespace {

constexpr int SPINS = 1000;  // some 10 to 50 microseconds

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) {
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
    done_.store(0, std::memory_order_relaxed);
    next_.store(static_cast<uint64_t>(count) << COUNT_BITS, std::memory_order_release);
    phase_.fetch_add(1);
    phase_.notify_all();
    work(0);
    for (int spins = 0; done_.load(std::memory_order_acquire) < count;) {
        if (++spins < SPINS) {
            relax();
        } else {
            // A helper lost its core in the middle of a task: it can have this one.
            const int done = done_.load(std::memory_order_acquire);
            if (done < count) done_.wait(done, std::memory_order_acquire);
        }
    }
}

// Tasks, until there are none.
void Pool::work(int thread) {
    constexpr uint64_t MASK = (uint64_t{1} << COUNT_BITS) - 1;
    for (;;) {
        const uint64_t taken = next_.fetch_add(1, std::memory_order_acq_rel);
        const auto index = static_cast<int>(taken & MASK);
        const auto count = static_cast<int>(taken >> COUNT_BITS & MASK);
        if (index >= count) return;
        call_(task_, index, thread);
        if (done_.fetch_add(1) + 1 == count) done_.notify_one();
    }
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
