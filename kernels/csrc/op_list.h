// Operations and OpLists. A CPU replays a captured list of operations, an OpList, like a GPU replays a CUDA graph. A
// small model computes an operation in microseconds, and calling it from Python takes about as long. Without OpLists, a
// small model ran at 0.4 to 0.7 of the speed (docs/how_it_works.md).
//
// The threads of an OpenMP parallel region execute an operation together. Each thread computes a range of the tasks.
// ops.cpp submits every operation that Python calls (submit). What happens next depends on the state:
//
//     eager       submit executes the operation in a parallel region of its own
//     capture     submit appends the operation to the OpList, with the addresses of its tensors; computes nothing
//     replay      one parallel region executes all operations of the OpList, on the captured addresses
//
//     op_list_begin   fused_linear(...)  attend(...)  fused_linear(...)  ...  op_list_end
//
//     op_list_replay  thread 0 | fused_linear: first half  | attend: RoPE | keys | out | fused_linear ...
//                     thread 1 | fused_linear: second half | attend: RoPE | keys | out | fused_linear ...
//                                                  barrier ^              ^      ^     ^
#pragma once

#include <torch/csrc/stable/ops.h>

#include <memory>
#include <vector>

#include "simd.h"
#include "threads.h"

// Scratch memory, aligned to cache lines. It grows as needed, and stays for the next operation.
class Scratch {
  struct alignas(64) CacheLine { char bytes[64]; };
  std::vector<CacheLine> lines;

 public:
  template <typename T> T* at_least(size_t n) {
    const size_t n_lines = divide_up(n * sizeof(T), 64);
    if (lines.size() < n_lines) lines.resize(n_lines);
    return reinterpret_cast<T*>(lines.data());
  }
};

// ---- Operations -----------------------------------------------------------------------------------------------------

// An operation is a struct that holds the addresses and sizes of inputs and outputs, with one to three functions:
//
//     void execute(char* shared, Barrier&) const    Every thread of the region calls execute. The output is complete
//                                                   when all threads have returned. barrier.wait() separates phases.
//     size_t shared_bytes() const                   (optional) The size of shared, scratch memory for all threads.
//     const char* validate() const                  (optional) Says what is wrong with the values of the inputs, or
//                                                   returns null. Is called once, before the region.
class AnyOp {
 public:
  virtual ~AnyOp() = default;
  virtual void execute(char* shared, Barrier& barrier) const = 0;
  virtual size_t shared_bytes() const = 0;
  virtual const char* validate() const = 0;
};

// Makes an AnyOp of a struct such as FusedLinearOp. Supplies the optional functions that the struct lacks.
template <typename Op> class OpAdapter : public AnyOp {
  const Op op;

 public:
  explicit OpAdapter(const Op& o) : op(o) {}
  void execute(char* shared, Barrier& barrier) const override { op.execute(shared, barrier); }
  size_t shared_bytes() const override {
    if constexpr (requires { op.shared_bytes(); }) return op.shared_bytes();
    return 0;
  }
  const char* validate() const override {
    if constexpr (requires { op.validate(); }) return op.validate();
    return nullptr;
  }
};

using Ops = std::vector<std::unique_ptr<AnyOp>>;
struct OpList {
  Ops ops;
  int n_replays = 0;
  // The duration of the second replay, because the first replay also waits for new memory. ThreadCount::add compares
  // the durations of later replays with it.
  double reference_seconds = 0;
};

// Executes ops in one parallel region. Returns the sum of all threads' stalls in seconds.
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

// Returns the first error that an operation's validate() finds, or null.
inline const char* validate(const Ops& ops) {
  for (const auto& op : ops)
    if (const char* error = op->validate()) return error;
  return nullptr;
}

// All OpLists of a thread use the same number of threads. A change from one to the next costs more than it gains.
inline thread_local ThreadCount thread_count;

// Executes an OpList. If the value of an input is wrong, computes nothing and returns the message.
//
// adapt_threads: whether to use fewer threads while other programs need the cores. Must be false if a step is several
// OpLists (kernels/capture.py: CPUGraph). ThreadCount decides after each, and would change the number within a step.
inline const char* replay(OpList& list, bool adapt_threads) {
  static thread_local double last_end = 0;
  if (const char* error = validate(list.ops)) return error;
  const int most = torch::stable::get_num_threads();
  const double start = now();
  const double stalled = execute(list.ops, adapt_threads ? thread_count.next(most, start - last_end) : most);
  const double end = last_end = now();
  if (++list.n_replays == 2) list.reference_seconds = end - start;
  if (adapt_threads && list.n_replays > 2) thread_count.add(end, end - start, stalled, list.reference_seconds);
  return nullptr;
}

inline thread_local OpList* captured_list = nullptr;  // the OpList that is being captured, or null

// Appends an operation to captured_list. If captured_list is null, executes the operation now.
inline void submit_op(std::unique_ptr<AnyOp> op) {
  if (captured_list) {
    captured_list->ops.push_back(std::move(op));
    return;
  }
  Ops ops;
  ops.push_back(std::move(op));
  const char* error = validate(ops);
  STD_TORCH_CHECK(!error, error ? error : "");
  execute(ops, torch::stable::get_num_threads());
}
template <typename Op> void submit(const Op& op) {
  submit_op(std::make_unique<OpAdapter<Op>>(op));
}

// kernels/capture.py calls these functions. op_list_begin starts to capture a new OpList, and op_list_end stops.
// op_list_threads returns the current number of threads. op_list_free frees an OpList.
extern "C" {
OpList* op_list_begin() { return captured_list = new OpList; }
void op_list_end() { captured_list = nullptr; }
const char* op_list_replay(OpList* list, bool adapt_threads) { return replay(*list, adapt_threads); }
int op_list_threads() { return thread_count.next(torch::stable::get_num_threads()); }
void op_list_free(OpList* list) { delete list; }
}
