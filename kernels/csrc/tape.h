// Operations, and tapes. A tape is a recorded list of operations: for a CPU what a CUDA graph is for a GPU.
//
// All threads of an OpenMP parallel region execute an operation together, each thread a range of the tasks. Called from
// Python, an operation gets a parallel region of its own. But while a tape is being recorded, a call only appends the
// operation to the tape, with the addresses of inputs and outputs. A replay executes all operations in one region:
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

#include <torch/csrc/stable/ops.h>

#include <memory>
#include <vector>

#include "simd.h"
#include "threads.h"

// Holds scratch memory that starts on a cache line, grows as needed, and is kept for the next operation.
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

// Wraps the struct of an operation as an Op.
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

using Ops = std::vector<std::unique_ptr<Op>>;
struct Tape {
  Ops ops;
  int n_replays = 0;
  double second_seconds = 0;  // of the second replay; the first one also waits for new memory
};

// Executes ops in one parallel region. Returns how long threads stalled, all threads together.
inline double execute(const Ops& ops, int n_threads) {
  static thread_local Scratch scratch;
  size_t n_bytes = 0;
  for (const auto& op : ops) n_bytes = std::max(n_bytes, op->shared_bytes());
  char* shared = scratch.at_least<char>(n_bytes);
  Barrier barrier;
#pragma omp parallel num_threads(n_threads)
  for (const auto& op : ops) {
    op->execute(shared, barrier);
    barrier.wait();
  }
  return barrier.stalled_seconds();
}

// Returns what is wrong with the values of the inputs, or null.
inline const char* find_error(const Ops& ops) {
  for (const auto& op : ops)
    if (const char* error = op->error()) return error;
  return nullptr;
}

// Decides for all tapes that this thread replays. One number of threads serves all tapes, since changing it from tape
// to tape would cost more than it gains.
inline thread_local ThreadCount thread_count;

// Executes a tape. If the value of an input is wrong, computes nothing and returns the message. adapt_threads: take
// fewer threads while other programs need the cores. Not for one of several tapes with functions between them.
inline const char* replay(Tape& tape, bool adapt_threads) {
  static thread_local double last_end = 0;
  if (const char* error = find_error(tape.ops)) return error;
  const int most = torch::stable::get_num_threads();
  const double start = now();
  const double stalled = execute(tape.ops, adapt_threads ? thread_count.next(most, start - last_end) : most);
  const double end = last_end = now();
  if (++tape.n_replays == 2) tape.second_seconds = end - start;
  if (adapt_threads && tape.n_replays > 2) thread_count.add(end, end - start, stalled, tape.second_seconds);
  return nullptr;
}

inline thread_local Tape* recording = nullptr;

// Appends an operation to the tape that is being recorded. If there is none, executes it.
inline void submit_op(std::unique_ptr<Op> op) {
  if (recording) {
    recording->ops.push_back(std::move(op));
    return;
  }
  Ops ops;
  ops.push_back(std::move(op));
  const char* error = find_error(ops);
  STD_TORCH_CHECK(!error, error ? error : "");
  execute(ops, torch::stable::get_num_threads());
}
template <typename Operation> void submit(const Operation& operation) {
  submit_op(std::make_unique<OpOf<Operation>>(operation));
}

// For kernels/record.py.
extern "C" {
Tape* tape_begin() { return recording = new Tape; }
void tape_end() { recording = nullptr; }
const char* tape_replay(Tape* tape, bool adapt_threads) { return replay(*tape, adapt_threads); }
int tape_threads() { return thread_count.next(torch::stable::get_num_threads()); }
void tape_free(Tape* tape) { delete tape; }
}
