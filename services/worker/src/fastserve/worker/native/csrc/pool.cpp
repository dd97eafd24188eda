#include "pool.h"

namespace fastserve {

namespace {

constexpr int SPINS = 2000;  // some 20 to 50 microseconds

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void wait_for_change(const std::atomic<int>& value, int from) {
    for (int i = 0; i < SPINS; i++) {
        if (value.load(std::memory_order_acquire) != from) return;
        relax();
    }
    while (value.load(std::memory_order_acquire) == from) {
        value.wait(from, std::memory_order_acquire);
    }
}

}  // namespace

Pool::Pool(int threads) : threads_(threads) {
    for (int thread = 1; thread < threads; thread++) {
        others_.emplace_back([this, thread] { loop(thread); });
    }
}

Pool::~Pool() {
    ending_ = true;
    jobs_.fetch_add(1, std::memory_order_release);
    jobs_.notify_all();
    for (auto& other : others_) other.join();
}

void Pool::run(const std::function<void(int)>& job) {
    job_ = &job;
    jobs_.fetch_add(1, std::memory_order_release);
    jobs_.notify_all();
    job(0);
    barrier();
}

void Pool::loop(int thread) {
    for (int done = 0;; done++) {
        wait_for_change(jobs_, done);
        if (ending_) return;
        (*job_)(thread);
        barrier();
    }
}

void Pool::barrier() {
    const int before = passed_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < threads_) {
        wait_for_change(passed_, before);
        return;
    }
    // Everybody is here: nobody touches these until the barrier opens.
    arrived_.store(0, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    passed_.fetch_add(1, std::memory_order_release);
    passed_.notify_all();
}

}  // namespace fastserve
