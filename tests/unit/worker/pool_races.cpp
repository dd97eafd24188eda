// What races of the pool promise. Ends with 0, or says what is broken.
#include <array>
#include <cstdio>
#include <cstdlib>

#include "pool.h"

using fastserve::Pool;

namespace {

constexpr int TASKS = 40;

void check(bool holds, const char* what) {
    if (holds) return;
    std::puts(what);
    std::exit(1);
}

// All of it outlives every race.
std::array<std::atomic<int>, TASKS> shown;
std::atomic<bool> stuck, again, over;
std::atomic<int> which, late;

void forget() {
    for (auto& times : shown) times = 0;
    stuck = again = over = false;
    which = -1;
    late = 0;
}

void all_shown_once() {
    for (auto& times : shown) check(times == 1, "a task was not shown once");
}

// Whoever is faster: every task is shown once, and before the race is over.
void any_order(Pool& pool) {
    for (int round = 0; round < 3000; round++) {
        forget();
        pool.race(TASKS, [](int i, int, Pool::Claim& claim) {
            if (claim()) shown[i]++;
        });
        all_shown_once();
    }
    pool.settle();
}

// A helper that gets stuck in a task of a race, for longer than several phases last.
void stuck_helper(Pool& pool) {
    forget();
    pool.race(TASKS, [](int i, int thread, Pool::Claim& claim) {
        if (thread == 0) {
            while (!stuck) std::this_thread::yield();
            if (i == which) again = true;
        } else if (int none = -1; which.compare_exchange_strong(none, i)) {
            stuck = true;
            while (!over) std::this_thread::yield();
            check(!claim(), "what was shown already is shown again");
            late++;
            return;
        }
        if (claim()) shown[i]++;
    });
    check(again, "nobody did the task again");
    all_shown_once();
    std::atomic<int> done{0};
    pool.each(TASKS, [&](int, int) { done++; });
    check(done == TASKS, "a phase without the helper is not complete");
    for (auto& times : shown) times = 0;
    pool.race(TASKS, [](int i, int, Pool::Claim& claim) {
        if (claim()) shown[i]++;
    });
    all_shown_once();
    check(late == 0, "the helper was not stuck");
    over = true;
    pool.settle();
    check(late == 1, "settled with a task under way");
}

}  // namespace

int main() {
    for (int threads : {1, 2, 3}) {
        Pool pool(threads);
        any_order(pool);
        if (threads > 1) stuck_helper(pool);
        any_order(pool);
    }
}
