// Threads that help with the tasks of one phase after another.
//
// A step of the model is some two hundred short phases. The caller works too, and a phase is over
// when its tasks are done, not when every thread has come by: on a machine where the gateway and
// the scheduler want the cores as well, a helper that has to wait for its turn holds nobody up.
// Helpers without work spin for a moment, since the next phase is microseconds away, then sleep.
//
// A helper may lose its core in the middle of a task, for longer than a phase lasts. In a `race` the
// caller does such a task again instead of waiting, and whoever has the results first shows them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace fastserve {

class Pool {
public:
    explicit Pool(int threads);  // the caller included
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return static_cast<int>(helpers_.size()) + 1; }

    // Does task(i, thread) for i = 0 .. count - 1, each on whichever thread is free (the caller is
    // thread 0), and returns when all are done. A task must not throw.
    template <class Task>
    void each(int count, const Task& task) {
        if (count == 1 || helpers_.empty()) {
            for (int i = 0; i < count; i++) task(i, 0);
            return;
        }
        call_ = [](const void* of, int i, int thread, Claim&) {
            (*static_cast<const Task*>(of))(i, thread);
        };
        task_ = &task;
        copied_ = 0;
        run(count);
    }

    // Asked once by a task of `race`, when it has its results and nobody has seen them.
    class Claim {
    public:
        Claim() = default;  // of a task that nobody else does
        // Whether they are to be shown: the other thread that did the task has not done so.
        bool operator()() {
            if (held_ != nullptr) first_ = held_->compare_exchange_strong(task_, left_);
            return first_;
        }

    private:
        friend Pool;
        Claim(std::atomic<uint64_t>& held, uint64_t task, uint64_t left)
            : held_(&held), task_(task), left_(left) {}

        std::atomic<uint64_t>* held_ = nullptr;
        uint64_t task_ = 0, left_ = 0;  // what is held until the claim, and from then on
        bool first_ = true;
    };

    // Does task(i, thread, claim) as `each` does, but some by two threads. A task changes nothing
    // before claim() and nothing if that is false. It may then still be under way when the phase is
    // over, with inputs that change meanwhile: they must stay in place until `settle`.
    template <class Task>
    void race(int count, const Task& task) {
        static_assert(std::is_trivially_copyable_v<Task> && sizeof(Task) <= MAX_TASK);
        if (count == 1 || helpers_.empty()) {
            for (int i = 0; i < count; i++) {
                Claim sure;
                task(i, 0, sure);
            }
            return;
        }
        call_ = [](const void* of, int i, int thread, Claim& claim) {
            (*static_cast<const Task*>(of))(i, thread, claim);
        };
        task_ = &task;
        copied_ = sizeof(Task);
        run(count);
    }

    // Returns when no task is under way any more.
    void settle();

private:
    using Call = void (*)(const void*, int, int, Claim&);

    void run(int count);
    bool back_up();
    void work(int thread);
    bool perform(int index, int thread, uint64_t taken);
    void help(int thread);

    static constexpr int COUNT_BITS = 24, PHASE_SHIFT = 2 * COUNT_BITS;
    static constexpr uint64_t COUNT_MASK = (uint64_t{1} << COUNT_BITS) - 1;
    static constexpr uint64_t NOTHING = 0, LATE = 1;
    static constexpr size_t MAX_TASK = 128;
    // Whether a part has tasks.
    static constexpr bool left(uint64_t next) {
        return (next & COUNT_MASK) < (next >> COUNT_BITS & COUNT_MASK);
    }
    // Of a thread. Neighbouring tasks read neighbouring memory, which the hardware fetches ahead:
    // each thread begins with a part of its own, then helps with those of others.
    struct alignas(64) Share {
        // The number of the phase, the end of the part and the next task in one word: who takes a
        // task knows at once whether there is one, and while it is being done the phase cannot
        // end, nor call_, task_ and count_ change.
        std::atomic<uint64_t> next{0};
        // The task of a race that it does, as in `next`; LATE: the caller was faster.
        alignas(64) std::atomic<uint64_t> held{NOTHING};
    };

    std::vector<Share> shares_;
    alignas(64) std::atomic<int> done_{0};   // tasks of this phase
    alignas(64) std::atomic<int> phase_{0};  // helpers wait for it to change
    Call call_ = nullptr;
    const void* task_ = nullptr;
    size_t copied_ = 0;  // bytes of a task of a race; 0: the phase is none
    int count_ = 0;      // tasks of the phase
    uint64_t number_ = 0;
    std::atomic<bool> ending_{false};
    std::vector<std::thread> helpers_;
};

}  // namespace fastserve
