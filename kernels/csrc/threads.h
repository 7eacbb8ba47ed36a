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

// Returns seconds, by a clock that all programs share.
inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A range [begin, end) of n tasks, which one thread does.
struct Range { int64_t begin, end; };
inline Range range_of_thread(int64_t thread, int64_t n_threads, int64_t n) {
  return {n * thread / n_threads, n * (thread + 1) / n_threads};
}
inline Range thread_range(int64_t n) { return range_of_thread(omp_get_thread_num(), omp_get_num_threads(), n); }

// Lets the threads of a parallel region wait for each other. Unlike OpenMP's barrier, wait spins only briefly and then
// yields the CPU: on a busy machine, the thread that is still missing may need the CPU. The time after spinning is a
// stall.
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
    const double start = now();
    while (round.load(std::memory_order_acquire) == this_round) std::this_thread::yield();
    stalled_ns.fetch_add(int64_t((now() - start) * 1e9), std::memory_order_relaxed);
  }

  // Returns the stalls of all threads together.
  double stalled_seconds() const { return stalled_ns.load(std::memory_order_relaxed) * 1e-9; }
};

// Decides how many threads repeated computations take. If another program needs a core, the thread on this core stops
// for milliseconds at a time, and all other threads wait at the next barrier. Then fewer threads are faster.
//
// If threads stall, ThreadCount tries fewer for some repetitions, and keeps the number that took less time. From time
// to time it tries more again, since the other program may have ended. After a trial in vain, the next one waits twice
// as long. On an idle machine nobody stalls, and nothing is tried. After a pause all of that is forgotten.
//
// Two programs that decode at the same time are only faster if both take fewer threads. So both should try it together,
// without knowing of each other. A trial begins when their common clock passes a multiple of the time to wait:
//
//     windows of the clock    0   1   2   3   4   5   6   7   8      trials every 2 windows at first, then every 4 ...
//     one program                     |trial  |       |trial          every 2, then every 4
//     another, just started                           |trial
//
// Several computations may take turns, such as decoding and verifying. Then their times cannot be compared, so each is
// divided by what the same computation took once.
class ThreadCount {
  static constexpr double WINDOW_SECONDS = 0.03;             // for how long they are timed before a decision, at least
  static constexpr int MIN_TIMED = 2;                        // how many repetitions are timed before it, at least
  static constexpr double MAX_STALLED = 0.15;                // of the waiting threads' time; above it fewer are tried
  static constexpr double MIN_GAIN = 0.03;                   // of the time; a trial that gains less is in vain
  static constexpr double MAX_LOSS = 0.25;                   // of a repetition; above it a trial of more threads ends
  static constexpr int LESS_PATIENCE = 2, MORE_PATIENCE = 16, MAX_PATIENCE = 256;  // windows between two trials
  static constexpr double PAUSE_SECONDS = 1;

  int most = 0, current = 0;  // threads
  int before_trial = 0;       // threads before the trial that is going on; 0: there is none
  int divisor = 2;            // the next trial of fewer threads leaves out one of so many
  int patience = LESS_PATIENCE;
  int64_t first_window = 0;          // of the clock, in which the repetitions began that are being timed
  int n_timed = 0;                   // how many these are
  double seconds = 0, stalled = 0;   // of all of these
  double time = 0;                   // of all of these, each relative to once_seconds (see add); then their mean
  double time_before = 0;            // that mean before the trial

 public:
  // How many threads the next repetition takes, of n. pause_seconds: since the last one.
  int next(int n, double pause_seconds = 0) {
    if (n != most || pause_seconds > PAUSE_SECONDS) *this = ThreadCount{}, most = current = n;
    return current;
  }

  // Tells it when that repetition ended, how long it took, how long its threads stalled, all together, and how long the
  // same computation took once.
  void add(double end, double repetition_seconds, double stalled_seconds, double once_seconds) {
    const int64_t window = int64_t(end / WINDOW_SECONDS);
    const double repetition = repetition_seconds / once_seconds;
    if (n_timed++ == 0) first_window = int64_t((end - repetition_seconds) / WINDOW_SECONDS);
    seconds += repetition_seconds, stalled += stalled_seconds, time += repetition;
    const bool is_hopeless = before_trial && current > before_trial && repetition > (1 + MAX_LOSS) * time_before;
    if ((n_timed < MIN_TIMED || window == first_window) && !is_hopeless) return;
    time /= n_timed;
    if (before_trial) end_trial();
    else if (window / patience != first_window / patience) begin_trial();
    n_timed = 0, seconds = stalled = time = 0;
  }

 private:
  void begin_trial() {
    int n = current;
    if (current > 1 && stalled > MAX_STALLED * (current - 1) * seconds) n = current - std::max(1, current / divisor);
    else if (current < most) n = current + (most - current + 1) / 2;
    if (n == current) return;
    before_trial = current, current = n, time_before = time;
  }

  void end_trial() {
    const bool is_drop = current < before_trial;
    if (time < (1 - MIN_GAIN) * time_before) {
      divisor = 2, patience = is_drop ? MORE_PATIENCE : LESS_PATIENCE;
    } else {
      current = before_trial, patience = std::min(2 * patience, MAX_PATIENCE);
      if (is_drop) divisor = divisor < current ? 2 * divisor : 2;
    }
    before_trial = 0;
  }
};
