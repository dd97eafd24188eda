// Threads that run one function together, and meet at barriers inside it.
//
// A step of the model is some three hundred short phases. Waiting threads spin for a moment, since
// the next phase is microseconds away, and then sleep in the kernel: the gateway and the scheduler
// share the cores.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace fastserve {

class Pool {
public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // Runs `job(thread)` on all threads, the caller being number 0; returns when all are through.
    void run(const std::function<void(int)>& job);

    // Inside a job: waits for all threads.
    void barrier();

    // Inside a job, called by all threads: does task(0) .. task(count - 1), each on whichever thread
    // is free, and waits for all.
    template <class Task>
    void each(int count, const Task& task) {
        for (int i = next_.fetch_add(1, std::memory_order_relaxed); i < count;
             i = next_.fetch_add(1, std::memory_order_relaxed)) {
            task(i);
        }
        barrier();
    }

private:
    void loop(int thread);

    const int threads_;
    alignas(64) std::atomic<int> next_{0};     // task of `each` that nobody has begun
    alignas(64) std::atomic<int> arrived_{0};  // threads at the barrier
    alignas(64) std::atomic<int> passed_{0};   // barriers passed so far
    alignas(64) std::atomic<int> jobs_{0};     // jobs begun so far
    const std::function<void(int)>* job_ = nullptr;
    bool ending_ = false;
    std::vector<std::thread> others_;
};

}  // namespace fastserve
