"""Records a decode step as a graph, and replays the graph for every token. Calling the operations of a step from Python
takes some milliseconds, about as long as computing the operations of a small model. The graph is a CUDA graph on a GPU,
and tapes of C++ kernels on a CPU.

    step = record(lambda tokens, start_pos: model(tokens, start_pos, kv_cache, position_tables))
    logits = step(tokens, start_pos)       # the first call with these shapes records; every later call replays

A call copies the arguments into the graph's inputs, and returns the graph's outputs, which the next call overwrites.
Only the contents of the arguments may change between calls.

Who owns whom:

    record's dict of graphs        one graph for each combination of the arguments' shapes
     +- CUDAGraph (CUDA, ROCm)     inputs, outputs, and PyTorch's CUDA graph of everything that step does on the GPU
     +- CPUGraph                   inputs, outputs, the activations between them, and the segments:
         +- Tape                   a C++ list of kernel calls, with the addresses of tensors (kernels/csrc/tape.h)
         +- function               Python to call at a graph break, between two tapes

How a CPUGraph records and replays:

    record    step runs once. Each kernel appends itself to the tape and computes nothing. A collective is no kernel, so
              step passes it to call_at_graph_break, which ends the tape and begins another.

              embed  fused_linear  attend  ...  fused_linear |   all_reduce   | add  fused_linear  attend  ...
              [------------------- Tape -------------------] |    function    | [----------- Tape -----------

    replay    copy the arguments to inputs, call the segments one by one, return outputs. A Tape executes all of its
              kernels in one parallel region.

A tape can hold the operations of kernels/schema.py: RECORDABLE. A CPUGraph raises an error for any other operation,
which would be computed once, during recording, and never again.
"""

import contextlib
import ctypes
import signal
import threading
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import build
from kernels.backend import CPU
from kernels.schema import RECORDABLE

# A step keeps this many CPUGraphs, the most recently used ones, since a graph holds the memory of all activations.
# Recording again takes some milliseconds, as much as calling the operations one by one (docs/measurements.md).
MAX_CPU_GRAPHS = 8
tape_functions: ctypes.CDLL | None = None  # the C++ library, once a thread has recorded a tape


class Recording(threading.local):
    """What a thread records. The tape in C++ and TorchDispatchMode belong to one thread, too."""

    graph: "CPUGraph | None" = None


recording = Recording()


def record(step: Callable) -> Callable:
    """Returns a function that takes step's arguments and returns step's result. The function records a graph for every
    combination of the arguments' shapes, and replays the graph. The arguments are tensors on one device, or None."""
    graphs: dict[tuple, CUDAGraph | CPUGraph] = {}  # by shapes, the most recently used at the end

    @torch.inference_mode()
    def replay(*args: Tensor | None):
        shapes = tuple(None if arg is None else arg.shape for arg in args)
        graph = graphs.pop(shapes, None)
        if graph is None:
            on_gpu = any(arg is not None and arg.is_cuda for arg in args)
            if not on_gpu and len(graphs) == MAX_CPU_GRAPHS:
                del graphs[next(iter(graphs))]
            if on_gpu:
                graph = CUDAGraph(step, args)
            else:
                with delay_interrupt():
                    graph = CPUGraph(step, args)
        graphs[shapes] = graph
        return graph(args)

    return replay


@contextlib.contextmanager
def delay_interrupt() -> Iterator[None]:
    """Delays Ctrl-C until the end of this context, some milliseconds later. An interrupt while a tape begins or ends
    would leave the kernels recording. Then a program that goes on, such as a chat, would get results that no kernel has
    computed."""
    handler, interrupts = signal.getsignal(signal.SIGINT), []
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield  # nothing here raises KeyboardInterrupt
        return
    signal.signal(signal.SIGINT, lambda *args: interrupts.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupts:
        handler(*interrupts[0])


def call_at_graph_break(fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Returns fn(*inputs). While a CPUGraph is recorded, ends the tape and begins another one, so that every replay
    calls fn between the two tapes. fn must always return the same shape."""
    if recording.graph is None:
        return fn(*inputs)
    return recording.graph.break_graph(fn, inputs)


def call_with_tape_threads(fn: Callable, *args):
    """Returns fn(*args), computed with as many threads as tapes use. On a busy machine tapes use fewer threads. Further
    threads of PyTorch would spin for cores that other programs hold."""
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
    """Everything that a step does on a GPU, in one launch."""

    def __init__(self, step: Callable, args: tuple):
        self.inputs = [None if arg is None else arg.clone() for arg in args]
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):  # compiles and loads the kernels, which is impossible during a capture
            step(*self.inputs)
        torch.cuda.current_stream().wait_stream(warm_up)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local allows calls of other threads: NCCL's thread queries the GPU during a capture.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = step(*self.inputs)

    def __call__(self, args: tuple):
        copy_all(args, self.inputs)
        self.graph.replay()
        return self.outputs


class CPUGraph(TorchDispatchMode):
    """What a step does on a CPU: tapes, and functions to call at graph breaks. The constructor records, and a call
    replays. As a TorchDispatchMode, the graph intercepts every PyTorch operation during recording."""

    def __init__(self, step: Callable, args: tuple):
        super().__init__()
        self.inputs = [None if arg is None else arg.clone(memory_format=torch.contiguous_format) for arg in args]
        self.segments: list[Callable[[], None]] = []  # tapes and functions, in order of execution
        self.keepalive = []  # all tensors whose addresses are on a tape
        self.begin_tape()
        try:
            with self:  # calls __torch_dispatch__ for every operation
                self.outputs = step(*self.inputs)
        finally:
            self.end_tape()
        if len(self.segments) == 1:
            self.segments[0].adapt_threads = True

    def __call__(self, args: tuple):
        copy_all(args, self.inputs)
        for segment in self.segments:
            segment()
        return self.outputs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Lets only the operations of RECORDABLE and views pass. An operation appends itself to the tape."""
        namespace, _, name = func._schema.name.partition("::")
        is_recordable = namespace == CPU.namespace and name in RECORDABLE
        if not is_recordable and not func.is_view:
            raise RuntimeError(f"{func} is no operation of kernels/ops.py: it cannot be recorded (kernels/record.py)")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.keepalive += [args, kwargs, result]
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returning True would make PyTorch import Dynamo (1 s, 150 MB), only to skip it."""
        return False

    def begin_tape(self):
        global tape_functions
        recording.graph, tape_functions = self, build.library()
        self.segments.append(Tape(tape_functions))

    def end_tape(self):
        recording.graph = None
        build.library().tape_end()

    def break_graph(self, fn: Callable[..., Tensor], inputs: tuple) -> Tensor:
        """Ends the tape, adds a segment that calls fn(*inputs), and begins another tape. Returns the tensor that will
        hold the result of fn."""
        self.end_tape()
        with torch.utils._python_dispatch._disable_current_modes():
            result = fn(*inputs).clone()  # has the right shape; the values are garbage, since inputs is not computed

        def call():
            result.copy_(fn(*inputs))

        self.keepalive += [inputs, result]
        self.segments.append(call)
        self.begin_tape()
        return result


class Tape:
    """A tape of kernels/csrc/tape.h. The constructor starts recording; CPUGraph.end_tape stops. A call replays.

    adapt_threads: whether to use fewer threads while other programs need the cores (kernels/csrc/threads.h)."""

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
