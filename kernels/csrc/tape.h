// Operations, the threads that share their work, and tapes of operations.
//
// All threads of an OpenMP parallel region execute an operation together, each a range of it. Called from Python, an
// operation gets a parallel region of its own. But while a tape is being recorded, a call only appends the operation to
// it, with the addresses of inputs and outputs. Replaying the tape executes all of them in one parallel region:
//
//     tape_begin   fused_linear(...)  attend(...)  fused_linear(...)  ...   tape_end        records: nothing is computed
//     tape_replay                                                               computes, on the same addresses
//
//     thread 0     | fused_linear: first half   | attend: RoPE | keys | out | fused_linear ...
//     thread 1     | fused_linear: second half  | attend: RoPE | keys | out | fused_linear ...
//                                               ^ barrier      ^      ^     ^
//
// Separate calls are slower: they ran a small model at 0.4 to 0.7 of a tape's speed (docs/how_it_works.md).
#pragma once

#include <omp.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "simd.h"

// ---- Threads --------------------------------------------------------------------------------------------------------

// Where the threads of a parallel region wait for each other. It spins only briefly, unlike OpenMP's barrier, and then
// yields the CPU: on a busy machine, the thread that is still missing may need it.
class Barrier {
  std::atomic<int> arrived{0}, round{0};

 public:
  void wait() {
    const int this_round = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {  // the last one
      arrived.store(0, std::memory_order_relaxed);
      round.store(this_round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == this_round; spins++) {
      if (spins > 2000) std::this_thread::yield();
#if defined(__x86_64__)
      else _mm_pause();
#endif
    }
  }
};

// The range [begin, end) of n tasks that this thread does.
struct Range { int64_t begin, end; };
inline Range thread_range(int64_t n) {
  const int64_t thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
  return {n * thread / n_threads, n * (thread + 1) / n_threads};
}

// Scratch memory that starts on a cache line. It grows as needed and is kept for the next operation.
class Scratch {
  struct alignas(64) CacheLine { char bytes[64]; };
  std::vector<CacheLine> lines;

 public:
  template <typename T> T* at_least(size_t n) {
    const size_t n_lines = (n * sizeof(T) + 63) / 64;
    if (lines.size() < n_lines) lines.resize(n_lines);
    return reinterpret_cast<T*>(lines.data());
  }
};

// ---- Operations -----------------------------------------------------------------------------------------------------

// An operation is a struct of its inputs, outputs and sizes with one to three functions:
//
//     void execute(char* shared, Barrier&) const    Every thread of the region calls it. The output is complete when
//                                                   all have returned. barrier.wait() separates phases.
//     size_t shared_bytes() const                   (optional) The size of shared: scratch memory of all threads.
//     const char* error() const                     (optional) What is wrong with the inputs' values, or null.
//                                                   Called once, before the region.
class Op {
 public:
  virtual ~Op() = default;
  virtual void execute(char* shared, Barrier& barrier) const = 0;
  virtual size_t shared_bytes() const = 0;
  virtual const char* error() const = 0;
};

// Gives such a struct the interface above.
template <typename Operation> class OpOf : public Op {
  const Operation operation;

 public:
  explicit OpOf(const Operation& o) : operation(o) {}
  void execute(char* shared, Barrier& barrier) const override { operation.execute(shared, barrier); }
  size_t shared_bytes() const override {
    if constexpr (requires { operation.shared_bytes(); }) return operation.shared_bytes();
    return 0;
  }
  const char* error() const override {
    if constexpr (requires { operation.error(); }) return operation.error();
    return nullptr;
  }
};

using Tape = std::vector<std::unique_ptr<Op>>;

// Executes a tape in one parallel region. If an input's value is wrong, computes nothing and returns the message.
inline const char* replay(const Tape& tape) {
  static thread_local Scratch scratch;
  size_t n_bytes = 0;
  for (const auto& op : tape) {
    if (const char* error = op->error()) return error;
    n_bytes = std::max(n_bytes, op->shared_bytes());
  }
  char* shared = scratch.at_least<char>(n_bytes);
  Barrier barrier;
#pragma omp parallel num_threads(torch::stable::get_num_threads())
  for (const auto& op : tape) {
    op->execute(shared, barrier);
    barrier.wait();
  }
  return nullptr;
}

inline thread_local Tape* recording = nullptr;

// Appends an operation to the tape that is being recorded. If there is none, executes it.
inline void submit_op(std::unique_ptr<Op> op) {
  if (recording) {
    recording->push_back(std::move(op));
    return;
  }
  Tape tape;
  tape.push_back(std::move(op));
  const char* error = replay(tape);
  STD_TORCH_CHECK(!error, error ? error : "");
}
template <typename Operation> void submit(const Operation& operation) {
  submit_op(std::make_unique<OpOf<Operation>>(operation));
}

// For kernels/record.py.
extern "C" {
Tape* tape_begin() { return recording = new Tape; }
void tape_end() { recording = nullptr; }
const char* tape_replay(const Tape* tape) { return replay(*tape); }
void tape_free(Tape* tape) { delete tape; }
}
