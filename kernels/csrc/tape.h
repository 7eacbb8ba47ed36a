// Operations, the threads that share their work, and tapes of them.
//
// An operation is executed by all threads of a parallel region; each does its share. Called on its own, it gets a region
// of its own. While a tape is being recorded, it is only written down, with the addresses of its inputs and outputs:
//
//     tape_begin   linear(...)  attend(...)  linear(...)  ...   tape_end        records: nothing is computed
//     tape_replay                                                               computes, on the same addresses
//
//     thread 0     | linear's first half  | attend: RoPE | keys | out | linear ...
//     thread 1     | linear's second half | attend: RoPE | keys | out | linear ...
//                                         ^ barrier      ^      ^     ^
//
// Called one by one instead, a small model's operations ran at 0.4 to 0.7 of the speed (docs/how_it_works.md).
#pragma once

#include <omp.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "simd.h"

// Where the threads of a parallel region wait for each other. Unlike OpenMP's barrier it soon lets go of the processor: on
// a busy machine the thread that it waits for may need it.
class Barrier {
  std::atomic<int> arrived{0}, round{0};

 public:
  void wait() {
    const int this_round = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
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

// This thread's share of n things: [begin, end).
struct Share { int64_t begin, end; };
inline Share my_share(int64_t n) {
  const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
  return {n * thread / threads, n * (thread + 1) / threads};
}

inline int threads() { return torch::stable::get_num_threads(); }

// Memory that grows and is kept from one operation to the next.
class Memory {
  std::vector<char> bytes;

 public:
  char* at_least(size_t n) {
    if (bytes.size() < n) bytes.resize(n);
    return bytes.data();
  }
};
inline thread_local Memory private_memory;  // each thread's own

// Hands memory out piece by piece, each on a cache line of its own.
class Allocator {
  char* next;

 public:
  static constexpr size_t LINE = 64;
  template <typename T> static size_t bytes_for(size_t n) { return n * sizeof(T) + LINE; }

  explicit Allocator(char* memory) : next(memory) {}
  template <typename T> T* take(size_t n) {
    T* piece = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(next) + LINE - 1) / LINE * LINE);
    next = reinterpret_cast<char*>(piece + n);
    return piece;
  }
};

// An operation is a struct of its inputs, outputs and sizes with
//
//     void execute(char* shared, Barrier&) const    Every thread of the region calls it. It may wait at the barrier; when
//                                                   all have returned, the output is complete.
//     const char* error() const                     (optional) What is wrong with the values of its inputs, or null. One
//                                                   thread asks, before the parallel region.
//     size_t shared_bytes() const                   (optional) Bytes that its threads share while they execute it.
//
// Op is any of them.
class Op {
 public:
  virtual ~Op() = default;
  virtual const char* error() const = 0;
  virtual size_t shared_bytes() const = 0;
  virtual void execute(char* shared, Barrier& barrier) const = 0;
};

template <typename Operation> class AnyOp : public Op {
  const Operation operation;

 public:
  explicit AnyOp(Operation o) : operation(o) {}
  const char* error() const override {
    if constexpr (requires { operation.error(); }) return operation.error();
    return nullptr;
  }
  size_t shared_bytes() const override {
    if constexpr (requires { operation.shared_bytes(); }) return operation.shared_bytes();
    return 0;
  }
  void execute(char* shared, Barrier& barrier) const override { operation.execute(shared, barrier); }
};

using Tape = std::vector<std::unique_ptr<Op>>;

// Executes a tape in one parallel region. Returns what is wrong, having computed nothing, or null.
inline const char* replay(const Tape& tape) {
  static thread_local Memory memory;
  size_t n_bytes = 0;
  for (const auto& op : tape) {
    if (const char* error = op->error()) return error;
    n_bytes = std::max(n_bytes, op->shared_bytes());
  }
  char* shared = memory.at_least(n_bytes);
  Barrier barrier;
#pragma omp parallel num_threads(threads())
  for (const auto& op : tape) {
    op->execute(shared, barrier);
    barrier.wait();
  }
  return nullptr;
}

inline thread_local Tape* recording = nullptr;

// Writes an operation down if a tape is being recorded, else executes it.
template <typename Operation> void submit(Operation operation) {
  auto op = std::make_unique<AnyOp<Operation>>(operation);
  if (recording) {
    recording->push_back(std::move(op));
    return;
  }
  Tape alone;
  alone.push_back(std::move(op));
  const char* error = replay(alone);
  STD_TORCH_CHECK(!error, error ? error : "");
}

// What record.py calls.
extern "C" {
Tape* tape_begin() { return recording = new Tape; }
void tape_end() { recording = nullptr; }
const char* tape_replay(const Tape* tape) { return replay(*tape); }
void tape_free(Tape* tape) { delete tape; }
}
