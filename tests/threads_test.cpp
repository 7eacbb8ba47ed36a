// For test_threads.py.
//
//     threads_test 0 N_TASKS
//
// prints the most tasks that one of 1, 2 ... 64 threads has.
//
//     threads_test N_CPUS N_REPETITIONS [BUSY_CPUS FROM TO]...
//
// prints which numbers of threads ThreadCount chooses on a simulated machine. In repetitions FROM ... TO - 1 other
// programs keep BUSY_CPUS busy.
//
//     threads_test -N_CPUS N_MILLISECONDS
//
// prints the same, "FIRST SECOND" for each millisecond, for two programs that decode on one machine. There, every second
// repetition is of a shorter computation.
#include <cstdio>
#include <cstdlib>

#include "../kernels/csrc/threads.h"

constexpr double WORK = 0.01;  // seconds of a repetition on an idle machine

// The time of a repetition by n of n_cpus threads, beside n_others that are busy. stalled: how long its threads wait for
// each other, all together. A thread that shares its CPU gets half of it, in slices. If others wait for it, that costs
// twice as much. If all share, each waits for half of that time.
double repetition_seconds(double work, int n, int n_others, int n_cpus, double& stalled) {
  const int n_slow = std::min(n, std::max(0, n + n_others - n_cpus));
  const double fair = work * n_cpus / n, seconds = n_slow == 0 ? fair : n == 1 ? 2 * fair : 3 * fair;
  stalled = n == 1 ? 0 : (seconds - fair) * (n - n_slow / 2.0);
  return seconds;
}

void decode_twice(int n_cpus, int n_milliseconds) {
  struct Program {
    ThreadCount count;
    int n = 0, n_repetitions = 0;
    double begin = 0, end = 0, stalled = 0, work = WORK;
  } programs[2];
  programs[1].end = 0.1;  // starts later
  for (int i = 0; i < n_milliseconds; i++) {
    const double now = i * 1e-3;
    for (Program& p : programs) {
      if (now < p.end) continue;
      if (p.n) p.count.add(p.end, p.end - p.begin, p.stalled, p.work);
      const Program& other = programs[&p == programs];
      p.n = p.count.next(n_cpus);
      p.work = WORK * (p.n_repetitions++ % 2 ? 1 : 0.3);
      p.begin = now;
      p.end = now + repetition_seconds(p.work, p.n, other.n, n_cpus, p.stalled);
    }
    printf("%d %d\n", programs[0].n, programs[1].n);
  }
}

int main(int argc, char** argv) {
  const int n_cpus = atoi(argv[1]), n_repetitions = atoi(argv[2]);
  if (n_cpus < 0) return decode_twice(-n_cpus, n_repetitions), 0;
  for (int n_threads = 1; n_cpus == 0 && n_threads <= 64; n_threads++) {
    int64_t most = 0;
    for (int thread = 0; thread < n_threads; thread++) {
      const Range range = split_range(thread, n_threads, n_repetitions);
      most = std::max(most, range.end - range.begin);
    }
    printf("%d\n", int(most));
  }
  ThreadCount count;
  double now = 0;
  for (int i = 0; n_cpus && i < n_repetitions; i++) {
    int busy = 0;
    for (int j = 3; j + 2 < argc; j += 3)
      if (i >= atoi(argv[j + 1]) && i < atoi(argv[j + 2])) busy = atoi(argv[j]);
    const int n = count.next(n_cpus);
    double stalled;
    const double seconds = repetition_seconds(WORK, n, busy, n_cpus, stalled);
    count.add(now += seconds, seconds, stalled, WORK);
    printf("%d\n", n);
  }
}
