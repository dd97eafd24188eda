// Shared memory between the ranks of a group on one host: an all-reduce and byte rings.
//
// A waiter spins for a moment, then yields (ranks may outnumber cores), then sleeps on a futex. A wait
// for a rank that is lost ends with the process: see watch.py.

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>
#include <ctime>

namespace {

// A counter with one writer, which only grows (modulo 2^32).
struct alignas(64) Counter {
    std::atomic<uint32_t> value;
    std::atomic<uint32_t> sleepers;

    void advance(uint32_t to) {
        value.store(to, std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_seq_cst) > 0)
            syscall(SYS_futex, &value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }
};
static_assert(sizeof(Counter) == 64);

struct Ring {
    Counter written, read;
    char bytes[];
};

constexpr int SPINS = 2000, YIELDS = 20;

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Until `counter` is at or past `wanted`.
void await(Counter& counter, uint32_t wanted) {
    const auto there = [&](uint32_t value) { return static_cast<int32_t>(value - wanted) >= 0; };
    for (int i = 0; i < SPINS; i++) {
        if (there(counter.value.load(std::memory_order_acquire))) return;
        pause_briefly();
    }
    for (int i = 0; i < YIELDS; i++) {
        if (there(counter.value.load(std::memory_order_acquire))) return;
        sched_yield();
    }
    while (!there(counter.value.load(std::memory_order_acquire))) {
        counter.sleepers.fetch_add(1, std::memory_order_seq_cst);
        const uint32_t value = counter.value.load(std::memory_order_seq_cst);
        if (!there(value))
            syscall(SYS_futex, &counter.value, FUTEX_WAIT, value, nullptr, nullptr, 0);
        counter.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }
}

}  // namespace

extern "C" {

// data [count] = the sum over `ranks` ranks, added in the order of ranks, so every rank gets the same
// bits. area: `ranks` Counters, then two slots of `slot` floats per rank. Two slots do: a rank writes
// a slot again only after all have posted the operation in between, having read the one before.
// *turn counts operations of this rank.
void fs_ranks_sum(void* area, int rank, int ranks, int slot, uint32_t* turn,
                 float* data, int64_t count) {
    auto* counters = static_cast<Counter*>(area);
    auto* slots = reinterpret_cast<float*>(counters + ranks);
    for (int64_t done = 0; done < count; done += slot) {
        const int size = static_cast<int>(std::min<int64_t>(slot, count - done));
        const uint32_t now = ++*turn;
        const auto at = [&](int who) { return slots + (2 * who + (now & 1)) * static_cast<int64_t>(slot); };
        std::memcpy(at(rank), data + done, size * sizeof(float));
        counters[rank].advance(now);
        for (int other = 0; other < ranks; other++)
            await(counters[other], now);
        std::memcpy(data + done, at(0), size * sizeof(float));
        for (int other = 1; other < ranks; other++) {
            const float* theirs = at(other);
            for (int i = 0; i < size; i++) data[done + i] += theirs[i];
        }
    }
}

// capacity: bytes of the ring, a power of two. One process sends, one receives.
void fs_ranks_send(void* ring, int capacity, const char* data, int64_t count) {
    auto& to = *static_cast<Ring*>(ring);
    uint32_t at = to.written.value.load(std::memory_order_relaxed);
    while (count > 0) {
        const uint32_t offset = at & (capacity - 1);
        // Up to the end of the ring or a quarter of it, so that the reader starts early.
        const uint32_t size = std::min<int64_t>({count, capacity - offset, capacity / 4});
        await(to.read, at + size - capacity);
        std::memcpy(to.bytes + offset, data, size);
        to.written.advance(at += size);
        data += size;
        count -= size;
    }
}

void fs_ranks_receive(void* ring, int capacity, char* data, int64_t count) {
    auto& from = *static_cast<Ring*>(ring);
    uint32_t at = from.read.value.load(std::memory_order_relaxed);
    while (count > 0) {
        const uint32_t offset = at & (capacity - 1);
        await(from.written, at + 1);
        const uint32_t there = from.written.value.load(std::memory_order_acquire) - at;
        const uint32_t size = std::min<int64_t>({count, capacity - offset, there});
        std::memcpy(data, from.bytes + offset, size);
        from.read.advance(at += size);
        data += size;
        count -= size;
    }
}

}  // extern "C"
