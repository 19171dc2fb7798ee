// Where threads that share one piece of work meet.
#pragma once
#include <atomic>
#include <thread>

// Waiting is a few microseconds, so it spins. It hardly ever gives its core away: on a machine that others use too it would not have it
// back for milliseconds, once a meeting.
class Meeting {
    std::atomic<int> missing{0}, round{0};
    int threads = 0;

  public:
    void expect(int count) { missing = threads = count; }
    void wait() {
        const int now = round.load(std::memory_order_relaxed);
        if (missing.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            missing.store(threads, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++)
            if (spins % (1 << 22) == (1 << 22) - 1) std::this_thread::yield();
    }
};

// One thread's part in the work.
struct Share {
    int part, parts;
    Meeting &meeting;
    int from(int count) const { return int(int64_t(count) * part / parts); }
    int to(int count) const { return int(int64_t(count) * (part + 1) / parts); }
};
