"""record(step) records a decode step once, and replays it for every token: CUDA graphs, and the same for CPUs.

    step = record(lambda tokens, start_pos: model(tokens, start_pos, kv_cache))
    logits = step(tokens, start_pos)       # the first call with these shapes records, every later one replays

The contract is the same on both devices. A call copies the arguments into the recording's buffers, and returns tensors
that the next call overwrites. Only the arguments' contents may change from call to call.

    CUDA, ROCm    CUDAGraph: everything that step does on the GPU
    CPU           CPUGraph: a tape, which is the list of the C++ kernels that step calls, with the addresses of inputs
                  and outputs. A tape is replayed in one parallel region (kernels/csrc/tape.h)

A tape can hold leaf operations alone: the operations of kernels/schema.py: SCHEMAS, of which a model is composed. Any
other operation raises an error on a CPU, since it would run once, while recording, and never again. A collective is no
leaf operation, so it runs between two tapes:

        embed  fused_linear  attend  fused_linear  ...  fused_linear |  all_reduce   | add  fused_linear  attend ...
        [--------------------------- tape --------------------------] graph_break() [----------- tape ----------
"""

import ctypes
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cpu
from kernels.schema import SCHEMAS

# How many recordings a step keeps on a CPU: the most recently used ones. A recording holds the memory of all
# activations. Recording again takes some milliseconds, as much as calling the operations one by one
# (docs/measurements.md).
MAX_CPU_GRAPHS = 8
active_recorder: "Recorder | None" = None
tape_functions: ctypes.CDLL | None = None  # None: no tape has been recorded yet


def record(step: Callable) -> Callable:
    """Returns a function like step that records step for every combination of the arguments' shapes, and replays it
    from then on. step takes tensors on one device, or None."""
    recordings: dict[tuple, CUDAGraph | CPUGraph] = {}  # by shapes, the most recently used at the end

    @torch.inference_mode()
    def replay(*args: Tensor | None):
        shapes = tuple(None if arg is None else arg.shape for arg in args)
        recording = recordings.pop(shapes, None)
        if recording is None:
            on_gpu = any(arg is not None and arg.is_cuda for arg in args)
            if not on_gpu and len(recordings) == MAX_CPU_GRAPHS:
                del recordings[next(iter(recordings))]
            recording = CUDAGraph(step, args) if on_gpu else CPUGraph(step, args)
        recordings[shapes] = recording
        return recording(args)

    return replay


def graph_break(fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Returns fn(*inputs). While a CPUGraph is recorded, this is a graph break: the tape ends and another tape begins.
    Replaying calls fn between the two tapes. The result of fn must always have the same shape."""
    if active_recorder is None:
        return fn(*inputs)
    return active_recorder.graph_break(fn, inputs)


def with_tape_threads(fn: Callable, *args):
    """Runs fn(*args) with the tape's current thread count. On a busy machine the tape uses fewer threads; if PyTorch
    used more than that, they would spin for cores held by other programs."""
    n_threads = torch.get_num_threads()
    n_tape_threads = n_threads if tape_functions is None else tape_functions.tape_threads()
    if n_tape_threads == n_threads:
        return fn(*args)
    torch.set_num_threads(n_tape_threads)
    try:
        return fn(*args)
    finally:
        torch.set_num_threads(n_threads)


class CUDAGraph:
    """A recording of everything that a step does on a GPU: one launch in place of hundreds."""

    def __init__(self, step: Callable, args: tuple):
        self.inputs = [None if arg is None else arg.clone() for arg in args]
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):  # compiles and loads the kernels, which must not happen while capturing
            step(*self.inputs)
        torch.cuda.current_stream().wait_stream(warm_up)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's own thread may go on asking the GPU about its collectives
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = step(*self.inputs)

    def __call__(self, args: tuple):
        copy_all(args, self.inputs)
        self.graph.replay()
        return self.outputs


class CPUGraph:
    """A recording of what a step does on a CPU: the kernels' calls, as tapes, and the functions to call between two
    tapes."""

    def __init__(self, step: Callable, args: tuple):
        self.inputs = [None if arg is None else arg.clone(memory_format=torch.contiguous_format) for arg in args]
        recorder = Recorder()
        with recorder:
            self.outputs = step(*self.inputs)  # nothing is computed: every kernel only appends itself to a tape
        self.segments, self.keepalive = recorder.segments, recorder.keepalive
        if len(self.segments) == 1:
            self.segments[0].adapt_threads = True

    def __call__(self, args: tuple):
        copy_all(args, self.inputs)
        for segment in self.segments:
            segment()
        return self.outputs


class Recorder(TorchDispatchMode):
    """Makes the segments of a CPUGraph from what is called inside `with`. A Recorder sees every operation that PyTorch
    is asked for, and lets only leaf operations and views pass."""

    def __init__(self):
        super().__init__()
        self.segments: list[Callable[[], None]] = []  # the tapes, and the functions to call between two tapes
        self.keepalive = []  # every tensor whose address is on a tape

    def __enter__(self):
        self.begin_tape()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.end_tape()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_leaf = func.namespace == "gptfast" and func._schema.name.removeprefix("gptfast::") in SCHEMAS
        if not is_leaf and not func.is_view:
            raise RuntimeError(f"{func} is no leaf operation: it cannot be recorded (see kernels/record.py)")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.keepalive += [args, kwargs, result]
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False: to skip Dynamo, PyTorch would first import it, which takes a second and 150 MB."""
        return False

    def begin_tape(self):
        global active_recorder, tape_functions
        active_recorder, tape_functions = self, cpu.library()
        self.segments.append(Tape(tape_functions))

    def end_tape(self):
        global active_recorder
        active_recorder = None
        cpu.library().tape_end()

    def graph_break(self, fn: Callable[..., Tensor], inputs: tuple) -> Tensor:
        """Ends the tape, has fn called at this point of every replay, and begins another tape."""
        self.end_tape()
        with torch.utils._python_dispatch._disable_current_modes():
            result = fn(*inputs).clone()  # the inputs have not been computed yet: only the result's shape counts

        def call():
            result.copy_(fn(*inputs))

        self.keepalive += [inputs, result]
        self.segments.append(call)
        self.begin_tape()
        return result


class Tape:
    """A tape of kernels/csrc/tape.h. The constructor begins to record, and end_tape() of Recorder stops. A call replays
    the tape. adapt_threads: whether to use fewer threads while other programs need the cores
    (kernels/csrc/threads.h)."""

    def __init__(self, functions: ctypes.CDLL):
        self.functions, self.address, self.adapt_threads = functions, functions.tape_begin(), False
        weakref.finalize(self, functions.tape_free, self.address)

    def __call__(self):
        error = self.functions.tape_replay(self.address, self.adapt_threads)
        if error:
            raise RuntimeError(error.decode())


def copy_all(args: tuple, inputs: list):
    for arg, static in zip(args, inputs, strict=True):
        if static is not None:
            static.copy_(arg)
