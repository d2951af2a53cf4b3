// Threads that stay between decode steps and share out the work of each phase. An OpenMP region per operation would
// cost a step a few hundred wake-ups, and its threads spin at the end of each until another program on the same core
// has had its turn; these spin a bounded time, then yield, and sleep between steps.
#pragma once

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace benthic {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

// Wait until `done`: some ten microseconds at full speed, for the others are nearly there, then leaving the core to
// whoever wants it.
template <class Done>
void wait_until(Done done, int spins = 400) {
    for (int i = 0; !done(); ++i) {
        if (i < spins)
            pause();
        else
            std::this_thread::yield();
    }
}

struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
};

class Team;

// One thread's part in a job.
class Worker {
   public:
    const int index, threads;

    Worker(Team& team, int index);

    // Run body(first, last) over [0, units) in pieces of at most `grain`, whichever thread is free taking the next, and
    // wait for all of them. A thread begins with a range of its own, so that it reads memory in order.
    template <class Body>
    void share(int64_t units, int64_t grain, Body body);

    // Where this thread begins in a phase of so many units.
    int64_t begin_of(int64_t units) const { return units * index / threads; }

   private:
    void barrier();

    Team& team_;
    int64_t phase_;
};

class Team {
   public:
    explicit Team(int threads) : threads_(threads), taken_(3 * threads) { start(); }
    ~Team() { stop(); }
    Team(const Team&) = delete;

    int threads() const { return threads_; }

    // Run job(worker) on every thread, the caller among them.
    template <class Job>
    void run(Job& job) {
        if (getpid() != process_) start();  // threads do not survive a fork
        call_ = [](void* job, Worker& worker) { (*static_cast<Job*>(job))(worker); };
        job_ = &job;
        {
            const std::lock_guard lock(sleep_->mutex);
            sleep_->epoch.fetch_add(1, std::memory_order_release);
        }
        sleep_->wake.notify_all();
        work(0);
        wait_until([&] { return sleep_->finished.load(std::memory_order_acquire) == threads_ - 1; });
        sleep_->finished.store(0, std::memory_order_relaxed);
    }

   private:
    friend class Worker;

    // What threads wait on. Apart, so that a process that was forked off can leave its parent's behind.
    struct Sleep {
        std::mutex mutex;
        std::condition_variable wake;
        std::atomic<int64_t> epoch{0};
        std::atomic<int> finished{0};
        bool stopping = false;
        std::vector<std::thread> threads;
    };

    void start() {
        static_cast<void>(sleep_.release());
        sleep_ = std::make_unique<Sleep>();
        process_ = getpid();
        for (int i = 1; i < threads_; ++i) sleep_->threads.emplace_back([this, i] { live(i); });
    }

    void stop() {
        if (getpid() != process_) {
            static_cast<void>(sleep_.release());
            return;
        }
        {
            const std::lock_guard lock(sleep_->mutex);
            sleep_->stopping = true;
            sleep_->epoch.fetch_add(1, std::memory_order_release);
        }
        sleep_->wake.notify_all();
        for (std::thread& thread : sleep_->threads) thread.join();
    }

    void live(int index) {
        Sleep& sleep = *sleep_;
        for (int64_t seen = 0;; ++seen) {
            const auto called = [&] { return sleep.epoch.load(std::memory_order_acquire) != seen; };
            for (int i = 0; i < kIdleSpins + kIdleYields && !called(); ++i)
                i < kIdleSpins ? pause() : std::this_thread::yield();
            if (!called()) {
                std::unique_lock lock(sleep.mutex);
                sleep.wake.wait(lock, called);
            }
            if (sleep.stopping) return;
            work(index);
            sleep.finished.fetch_add(1, std::memory_order_release);
        }
    }

    void work(int index) {
        Worker worker(*this, index);
        call_(job_, worker);
    }

    // Waking up takes longer than what a program does between two steps of a small model: a thread offers its core to
    // others that long before it sleeps.
    static constexpr int kIdleSpins = 400, kIdleYields = 1000;

    const int threads_;
    std::vector<Counter> taken_;  // units taken of each thread's range, for this phase, the last and the next
    Counter arrived_, generation_;
    std::unique_ptr<Sleep> sleep_;
    pid_t process_ = 0;
    void (*call_)(void*, Worker&) = nullptr;
    void* job_ = nullptr;
};

inline Worker::Worker(Team& team, int index)
    : index(index), threads(team.threads()), team_(team), phase_(team.generation_.value.load()) {}

inline void Worker::barrier() {
    if (team_.arrived_.value.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
        team_.arrived_.value.store(0, std::memory_order_relaxed);
        team_.generation_.value.fetch_add(1, std::memory_order_release);
    } else {
        wait_until([&] { return team_.generation_.value.load(std::memory_order_acquire) != phase_; });
    }
    ++phase_;
}

template <class Body>
void Worker::share(int64_t units, int64_t grain, Body body) {
    Counter* now = &team_.taken_[phase_ % 3 * threads];
    // Nobody looks at the next phase's counters now: all have left the phase that used them last.
    team_.taken_[(phase_ + 1) % 3 * threads + index].value.store(0, std::memory_order_relaxed);
    for (int i = 0; i < threads; ++i) {
        const int whose = (index + i) % threads;
        const int64_t begin = units * whose / threads, size = units * (whose + 1) / threads - begin;
        while (now[whose].value.load(std::memory_order_relaxed) < size) {
            const int64_t at = now[whose].value.fetch_add(grain, std::memory_order_relaxed);
            if (at >= size) break;
            body(begin + at, begin + (at + grain < size ? at + grain : size));
        }
    }
    barrier();
}

}  // namespace benthic
