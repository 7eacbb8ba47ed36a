// The threads of a parallel region: how they share work, how they wait for each other, and how many there are.
#pragma once

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

using Clock = std::chrono::steady_clock;
inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The range [begin, end) of n tasks that a thread does.
struct Range { int64_t begin, end; };
inline Range range_of_thread(int64_t thread, int64_t n_threads, int64_t n) {
  return {n * thread / n_threads, n * (thread + 1) / n_threads};
}
inline Range thread_range(int64_t n) { return range_of_thread(omp_get_thread_num(), omp_get_num_threads(), n); }

// Where the threads of a parallel region wait for each other. It spins only briefly, unlike OpenMP's barrier, and then
// yields the CPU: on a busy machine, the thread that is still missing may need it. The time from then on is a stall.
class Barrier {
  std::atomic<int> arrived{0}, round{0};
  std::atomic<int64_t> stalled_ns{0};

 public:
  void wait() {
    const int this_round = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {  // the last one
      arrived.store(0, std::memory_order_relaxed);
      round.store(this_round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; spins < 2000; spins++) {
      if (round.load(std::memory_order_acquire) != this_round) return;
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
    const auto start = Clock::now();
    while (round.load(std::memory_order_acquire) == this_round) std::this_thread::yield();
    stalled_ns.fetch_add(int64_t(seconds_since(start) * 1e9), std::memory_order_relaxed);
  }

  // The stalls of all threads together.
  double stalled_seconds() const { return stalled_ns.load(std::memory_order_relaxed) * 1e-9; }
};

// How many threads a repeated computation takes. If another program needs a core, the thread on it stops for
// milliseconds at a time, and all others wait for it at the next barrier. Then fewer threads are faster.
//
// If threads stall, it tries fewer of them for some repetitions, and keeps the number that took less time. Later it
// tries more again from time to time, since the other program may have ended. After a trial in vain, the next one waits
// twice as long. On an idle machine nobody stalls, and nothing is tried.
class ThreadCount {
  static constexpr int MIN_WINDOW = 2, MAX_WINDOW = 8;        // repetitions that are timed for a decision,
  static constexpr double WINDOW_SECONDS = 0.03;              // and how long that takes at least, up to MAX_WINDOW
  static constexpr double MAX_STALLED = 0.15;                 // of the waiting threads' time; above it fewer are tried
  static constexpr double MIN_GAIN = 0.03;                    // of the time; a trial that gains less is in vain
  static constexpr int MIN_PATIENCE = 16, MAX_PATIENCE = 256;  // windows between two trials

  int most = 0, current = 0;  // threads
  int before_trial = 0;       // threads before the trial that is going on; 0: there is none
  int drop = 1;               // threads that the next trial leaves out
  int patience = MIN_PATIENCE, n_windows = MIN_PATIENCE;  // n_windows: since the last trial
  int n_timed = 0;                                        // repetitions of this window
  double seconds = 0, stalled = 0, seconds_before = 0;    // of a repetition, in this window and before the trial

 public:
  // How many threads the next repetition takes, of n.
  int next(int n) {
    if (n != most) *this = ThreadCount{}, most = current = n;
    return current;
  }

  // Tells it how long that repetition took, and how long its threads stalled, all together.
  void add(double repetition_seconds, double stalled_seconds) {
    seconds += repetition_seconds, stalled += stalled_seconds;
    n_timed++;
    if (n_timed < MIN_WINDOW || (n_timed < MAX_WINDOW && seconds < WINDOW_SECONDS)) return;
    seconds /= n_timed, stalled /= n_timed;
    if (before_trial) end_trial();
    else if (++n_windows >= patience) begin_trial();
    n_timed = 0, seconds = stalled = 0;
  }

 private:
  void begin_trial() {
    int n = current;
    if (current > 1 && stalled > MAX_STALLED * (current - 1) * seconds) n = std::max(1, current - drop);
    else if (current < most) n = current + (most - current + 1) / 2;
    if (n == current) return;
    before_trial = current, current = n, seconds_before = seconds;
  }

  void end_trial() {
    if (seconds < (1 - MIN_GAIN) * seconds_before) {
      drop = 1, patience = MIN_PATIENCE;
    } else {
      if (current < before_trial) drop = std::min(2 * drop, most);
      current = before_trial, patience = std::min(2 * patience, MAX_PATIENCE);
    }
    before_trial = n_windows = 0;
  }
};
