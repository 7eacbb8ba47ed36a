// For test_threads.py.
//
//     threads_test 0 N_TASKS
//
// prints the most tasks that one of 1, 2 ... 64 threads has.
//
//     threads_test N_CPUS N_REPETITIONS [BUSY_CPUS FROM TO]...
//
// prints which numbers of threads ThreadCount chooses on a simulated machine. In repetitions FROM ... TO - 1 other programs keep BUSY_CPUS busy. A thread that shares its CPU takes three times as long
// as the others, which wait for it: it gets half of the time, in slices.
#include <cstdio>
#include <cstdlib>

#include "../kernels/csrc/threads.h"

int main(int argc, char** argv) {
  const int n_cpus = atoi(argv[1]), n_repetitions = atoi(argv[2]);
  for (int n_threads = 1; n_cpus == 0 && n_threads <= 64; n_threads++) {
    int64_t most = 0;
    for (int thread = 0; thread < n_threads; thread++) {
      const Range range = range_of_thread(thread, n_threads, n_repetitions);
      most = std::max(most, range.end - range.begin);
    }
    printf("%d\n", int(most));
  }
  ThreadCount count;
  for (int i = 0; n_cpus && i < n_repetitions; i++) {
    int busy = 0;
    for (int j = 3; j + 2 < argc; j += 3)
      if (i >= atoi(argv[j + 1]) && i < atoi(argv[j + 2])) busy = atoi(argv[j]);
    const int n = count.next(n_cpus);
    const bool shares = n > n_cpus - busy;
    const double work = 1.0 / n, seconds = shares ? 3 * work : work;
    const int n_slow = shares ? n - (n_cpus - busy) : n;
    count.add(seconds, (seconds - work) * (n - n_slow));
    printf("%d\n", n);
  }
}
