#include "pool.h"

#include <cstring>

namespace fastserve {

namespace {

constexpr int SPINS = 1000;    // some 10 to 50 microseconds
constexpr int PATIENCE = 200;  // before a task is done again

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) : shares_(threads) {
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
    count_ = count;
    number_ = (number_ + 1) % (1 << 16);  // no task is late for so many phases, see `settle`
    done_.store(0, std::memory_order_relaxed);
    const auto parts = static_cast<int64_t>(shares_.size());
    for (int64_t part = 0; part < parts; part++) {
        const uint64_t begin = count * part / parts, end = count * (part + 1) / parts;
        shares_[part].next.store(number_ << PHASE_SHIFT | end << COUNT_BITS | begin,
                                 std::memory_order_release);
    }
    phase_.fetch_add(1);
    phase_.notify_all();
    work(0);
    const int patience = copied_ != 0 ? PATIENCE : SPINS;
    for (int spins = 0; done_.load(std::memory_order_acquire) < count;) {
        if (++spins < patience) {
            relax();
        } else if (copied_ != 0 && back_up()) {
            spins = 0;
        } else {
            // A helper lost its core in the middle of a task: it can have this one.
            const int done = done_.load(std::memory_order_acquire);
            if (done < count) done_.wait(done, std::memory_order_acquire);
        }
    }
}

// Does a task of this race again that a helper is not through with. False: there is none.
bool Pool::back_up() {
    for (Share& share : shares_) {
        const uint64_t task = share.held.load(std::memory_order_acquire);
        if (task <= LATE || task >> PHASE_SHIFT != number_) continue;
        Claim claim(share.held, task, LATE);
        call_(task_, static_cast<int>(task & COUNT_MASK), 0, claim);
        if (claim.first_) done_.fetch_add(1);
        return true;
    }
    return false;
}

void Pool::settle() {
    for (Share& share : shares_) {
        for (int spins = 0; share.held.load(std::memory_order_acquire) == LATE;) {
            if (++spins < SPINS) {
                relax();
            } else {
                share.held.wait(LATE, std::memory_order_acquire);
            }
        }
    }
}

// Tasks, until there are none.
void Pool::work(int thread) {
    const auto parts = static_cast<int>(shares_.size());
    for (int i = 0; i < parts; i++) {
        std::atomic<uint64_t>& next = shares_[(thread + i) % parts].next;
        while (left(next.load(std::memory_order_acquire))) {
            const uint64_t taken = next.fetch_add(1, std::memory_order_acq_rel);
            if (!left(taken)) break;
            if (!perform(static_cast<int>(taken & COUNT_MASK), thread, taken)) continue;
            const int count = count_;
            if (done_.fetch_add(1) + 1 == count) done_.notify_one();
        }
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
    std::atomic<uint64_t>& held = shares_[thread].held;
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
