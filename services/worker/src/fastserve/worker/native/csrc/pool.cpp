#include "pool.h"

#if defined(__linux__)
#include <sched.h>
#endif

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

// The cores that this thread may run on; none where the system does not tell.
std::vector<int> allowed() {
    std::vector<int> cores;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return cores;
    for (int core = 0; core < CPU_SETSIZE; core++) {
        if (CPU_ISSET(core, &set)) cores.push_back(core);
    }
#endif
    return cores;
}

// Keeps this thread to cores [first, end). A failure is no harm: it runs as it did.
void keep_to([[maybe_unused]] const int* first, [[maybe_unused]] const int* end) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    for (; first != end; first++) CPU_SET(*first, &set);
    sched_setaffinity(0, sizeof set, &set);
#endif
}

}  // namespace

Pool::Pool(int threads) : cores_(allowed()) {
    if (threads == 1 || cores_.size() != static_cast<size_t>(threads)) cores_.clear();
    for (int thread = 1; thread < threads; thread++) {
        helpers_.emplace_back([this, thread] {
            if (!cores_.empty()) keep_to(&cores_[thread], &cores_[thread] + 1);
            help(thread);
        });
    }
}

Pool::OnCore::OnCore(const Pool& pool) : pool_(pool) {
    const auto& cores = pool_.cores_;
    if (!cores.empty()) keep_to(cores.data(), cores.data() + 1);
}

Pool::OnCore::~OnCore() {
    const auto& cores = pool_.cores_;
    if (!cores.empty()) keep_to(cores.data(), cores.data() + cores.size());
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
            std::this_thread::yield();  // a helper lost its core in the middle of a task
        }
    }
}

// Tasks, until there are none.
void Pool::work(int thread) {
    constexpr uint64_t MASK = (uint64_t{1} << COUNT_BITS) - 1;
    for (;;) {
        const uint64_t taken = next_.fetch_add(1, std::memory_order_acq_rel);
        const auto index = static_cast<int>(taken & MASK);
        if (index >= static_cast<int>(taken >> COUNT_BITS & MASK)) return;
        call_(task_, index, thread);
        done_.fetch_add(1, std::memory_order_release);
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
