// The threads of a parallel region.
//
//     thread_range    how threads share tasks; every operation calls it
//     Barrier         how threads wait for each other; op_list.h has one for each region
//     ThreadCount     how many threads a region has; op_list.h has one for all OpLists
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

// Returns the time in seconds. All programs of the machine read the same clock.
inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// [begin, end)
struct Range { int64_t begin, end; };
// Splits [0, n) into n_parts ranges of nearly equal size, and returns range i.
inline Range split_range(int64_t i, int64_t n_parts, int64_t n) { return {n * i / n_parts, n * (i + 1) / n_parts}; }
// The range of n tasks that the calling thread of a parallel region has.
inline Range thread_range(int64_t n) { return split_range(omp_get_thread_num(), omp_get_num_threads(), n); }

// Lets the threads of a parallel region wait for each other. wait spins briefly and then yields the CPU, because on a
// busy machine the last thread may need this CPU. OpenMP's barrier would continue to spin. The time after the spinning
// is a stall.
class Barrier {
  std::atomic<int> arrived{0}, round{0};
  std::atomic<int64_t> stalled_ns{0};

 public:
  void wait() {
    const int this_round = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {  // the last thread
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

  // Returns the sum of all threads' stalls.
  double stalled_seconds() const { return stalled_ns.load(std::memory_order_relaxed) * 1e-9; }
};

// Decides how many threads a repeated computation uses, such as the replay of an OpList. Fewer threads are faster while
// another program needs a core: the thread on that core stops for milliseconds, and all other threads wait at the next
// barrier.
//
//     what happens                          what ThreadCount does
//     threads stall                         tries fewer threads for some repetitions, and keeps the faster number
//     no stalls, some threads are unused    tries more threads again: the other program may have ended
//     no stalls, all threads are used       nothing: the machine is idle
//     a trial gains nothing                 returns to the earlier number; the next trial waits twice as long
//     a pause                               forgets everything
//
// If two programs decode at the same time, both must use fewer threads before either gets faster. So their trials
// should coincide, although neither program knows of the other. A trial begins when the common clock passes a multiple
// of `patience` windows:
//
//     windows of the clock           0   1   2   3   4   5   6   7   8   9
//     first program                          trial   trial           trial      patience 2, 4, 8
//     second program, starts in 5                            trial   trial      patience 2, 4
//
// Graphs of different length may take turns, such as those of draft and model in speculative decoding. To compare their
// times, add divides the time of a repetition by the time of the second replay of the same graph.
class ThreadCount {
  static constexpr double WINDOW_SECONDS = 0.03;  // repetitions are timed for at least this long before a decision
  static constexpr int MIN_TIMED = 2;             // and at least this many repetitions
  static constexpr double MAX_STALLED = 0.15;     // try fewer threads above this share of the waiting threads' time
  static constexpr double MIN_GAIN = 0.03;        // a trial must save this share of the time
  static constexpr double MAX_LOSS = 0.25;        // a trial of more threads ends if a repetition is this much slower
  static constexpr int LESS_PATIENCE = 2, MORE_PATIENCE = 16, MAX_PATIENCE = 256;
  static constexpr double PAUSE_SECONDS = 1;

  int most = 0, current = 0;     // numbers of threads
  int before_trial = 0;          // the number of threads before the current trial, or 0 if there is no trial
  int divisor = 2;               // the next trial of fewer threads uses current / divisor threads less
  int patience = LESS_PATIENCE;  // windows between two trials
  double mean_before_trial = 0;  // the mean relative time before the current trial

  // Of the repetitions since the last decision:
  int64_t first_window = 0;  // the window of the clock in which the first repetition began
  int n_timed = 0;
  double total_seconds = 0, total_stalled = 0;
  double total_relative = 0;  // of relative times: seconds / reference_seconds (see add)

 public:
  // Returns how many of n threads the next repetition uses. pause_seconds is the time since the last repetition.
  int next(int n, double pause_seconds = 0) {
    if (n != most || pause_seconds > PAUSE_SECONDS) *this = ThreadCount{}, most = current = n;
    return current;
  }

  // Takes the times of a repetition: when it ended, how long it took, how long its threads stalled (the sum over all
  // threads), and how long an earlier repetition of the same computation took.
  void add(double end, double seconds, double stalled_seconds, double reference_seconds) {
    const int64_t window = int64_t(end / WINDOW_SECONDS);
    const double relative = seconds / reference_seconds;
    if (n_timed++ == 0) first_window = int64_t((end - seconds) / WINDOW_SECONDS);
    total_seconds += seconds, total_stalled += stalled_seconds, total_relative += relative;
    const bool is_hopeless = before_trial && current > before_trial && relative > (1 + MAX_LOSS) * mean_before_trial;
    if ((n_timed < MIN_TIMED || window == first_window) && !is_hopeless) return;
    const double mean = total_relative / n_timed;
    if (before_trial) end_trial(mean);
    else if (window / patience != first_window / patience) begin_trial(mean);
    n_timed = 0, total_seconds = total_stalled = total_relative = 0;
  }

 private:
  void begin_trial(double mean) {
    const bool is_stalling = total_stalled > MAX_STALLED * (current - 1) * total_seconds;
    int n = current;
    if (current > 1 && is_stalling) n = current - std::max(1, current / divisor);
    else if (current < most) n = current + (most - current + 1) / 2;
    if (n == current) return;
    before_trial = current, current = n, mean_before_trial = mean;
  }

  void end_trial(double mean) {
    const bool was_fewer_threads = current < before_trial;
    if (mean < (1 - MIN_GAIN) * mean_before_trial) {
      divisor = 2, patience = was_fewer_threads ? MORE_PATIENCE : LESS_PATIENCE;
    } else {
      current = before_trial, patience = std::min(2 * patience, MAX_PATIENCE);
      if (was_fewer_threads) divisor = divisor < current ? 2 * divisor : 2;
    }
    before_trial = 0;
  }
};
