// Threads that help with the tasks of one phase after another.
//
// A step of the model is some two hundred short phases. The caller works too, and a phase is over
// when its tasks are done, not when every thread has come by: on a machine where the gateway and
// the scheduler want the cores as well, a helper that has to wait for its turn holds nobody up.
// Helpers without work spin for a moment, since the next phase is microseconds away, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
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
        call_ = [](const void* of, int i, int thread) {
            (*static_cast<const Task*>(of))(i, thread);
        };
        task_ = &task;
        run(count);
    }

private:
    using Call = void (*)(const void*, int, int);

    void run(int count);
    void work(int thread);
    void help(int thread);

    // Count and the next task in one word: who takes a task knows at once whether there is
    // one, and while it is being done the phase cannot end, nor call_ and task_ change.
    static constexpr int COUNT_BITS = 24;
    alignas(64) std::atomic<uint64_t> next_{0};
    alignas(64) std::atomic<int> done_{0};   // tasks of this phase
    alignas(64) std::atomic<int> phase_{0};  // helpers wait for it to change
    Call call_ = nullptr;
    const void* task_ = nullptr;
    std::atomic<bool> ending_{false};
    std::vector<std::thread> helpers_;
};

}  // namespace fastserve
