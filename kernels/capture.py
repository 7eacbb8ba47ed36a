"""Captures a decode step as a graph, and replays it for every token. On a GPU the graph is a CUDA graph. On a CPU it is
a CPU graph: lists of calls of C++ kernels. Without a graph, Python takes some milliseconds to call the operations of a
step. A small model's operations themselves take about as long.

    step = capture(lambda tokens, start_pos: model(tokens, start_pos, kv_cache))
    logits = step(tokens, start_pos)       # the first call with these shapes captures; every later call replays

A call copies the arguments into the graph's inputs, and returns the graph's outputs, which the next call overwrites.
Only the contents of the arguments may change between calls.

Who owns whom:

    capture's dict of graphs       one graph for each combination of the arguments' shapes
     +- CUDAGraph (CUDA, ROCm)     inputs, outputs, and PyTorch's CUDA graph of everything that step does on the GPU
     +- CPUGraph                   inputs, outputs, the activations between them, and the segments:
         +- OpList                 a C++ list of kernel calls, with the addresses of tensors (kernels/csrc/op_list.h)
         +- function               Python to call between two OpLists; vLLM calls this a piecewise graph

How a CPUGraph captures and replays:

    capture   step runs once. Each kernel appends itself to the OpList and computes nothing. A collective is not a
              kernel, so step passes it to call_between_op_lists. This ends the OpList and begins another.

              embed  fused_linear  attend  ...  fused_linear |   all_reduce   | add  fused_linear  attend  ...
              [------------------ OpList ------------------] |    function    | [---------- OpList -----------

    replay    copy the arguments to inputs, call the segments one by one, return outputs. An OpList executes all of its
              kernels in one parallel region.

An OpList can hold the operations of kernels/schema.py: CAPTURABLE. CaptureMode raises an error for any other operation.
Such an operation would be computed once, during the capture, and never again.
"""

import ctypes
import threading
import weakref
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import build
from kernels.schema import CAPTURABLE, CPU_NAMESPACE
from utils.signals import defer_signals

# capture keeps this many CPUGraphs, the most recently used ones. A graph holds the memory of all activations, and
# capturing it again is cheap: some milliseconds, as much as calling the operations one by one (docs/measurements.md).
MAX_CPU_GRAPHS = 8


class ThreadState(threading.local):
    """Per thread, as in C++ (kernels/csrc/op_list.h: captured_list)."""

    capture_mode: "CaptureMode | None" = None  # None if nothing is being captured


this_thread = ThreadState()


def capture(step: Callable) -> Callable:
    """Returns a function with step's arguments and result. It captures a graph for every combination of the arguments'
    shapes, and replays it. The arguments are tensors on one device, or None."""
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
                # An interrupt halfway would leave the kernels in capture mode. A program that continues, such as a
                # chat, would then get results that no kernel has computed.
                with defer_signals():
                    graph = CPUGraph(step, args)
        graphs[shapes] = graph
        return graph(args)

    return replay


def call_between_op_lists(fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Returns fn(*inputs). During the capture of a CPU graph, ends the OpList and begins another. Every replay then
    calls fn between the two. fn must always return the same shape."""
    if this_thread.capture_mode is None:
        return fn(*inputs)
    return this_thread.capture_mode.append_call(fn, inputs)


@contextmanager
def graph_num_threads():
    """Inside, PyTorch uses as many threads as this thread's CPU graphs. On a busy machine these are fewer, because more
    threads would spin while other programs hold the cores."""
    n_threads, library = torch.get_num_threads(), build.loaded_cpp_kernels()
    n_graph_threads = n_threads if library is None else library.op_list_threads()
    if n_graph_threads == n_threads:
        yield
        return
    torch.set_num_threads(n_graph_threads)
    try:
        yield
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


class CPUGraph:
    """What a step does on a CPU: OpLists, and functions to call between two OpLists."""

    def __init__(self, step: Callable, args: tuple):
        self.inputs = [None if arg is None else arg.clone(memory_format=torch.contiguous_format) for arg in args]
        with CaptureMode() as mode:
            self.outputs = step(*self.inputs)
        self.segments, self.keepalive = mode.segments, mode.keepalive
        # With several OpLists the number of threads would change within a step. That costs more than it gains.
        if len(self.segments) == 1:
            self.segments[0].adapt_threads = True

    def __call__(self, args: tuple):
        copy_all(args, self.inputs)
        for segment in self.segments:
            segment()
        return self.outputs


class CaptureMode(TorchDispatchMode):
    """Inside, kernels append themselves to an OpList and compute nothing. PyTorch calls __torch_dispatch__ for every
    operation of this thread."""

    def __init__(self):
        super().__init__()
        self.segments: list[Callable[[], None]] = []  # OpLists and functions, in order of execution
        self.keepalive = []  # all tensors whose addresses are in an OpList

    def __enter__(self):
        self.begin_op_list()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.end_op_list()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Lets only the operations of CAPTURABLE and views pass."""
        namespace, _, name = func._schema.name.partition("::")
        is_capturable = namespace == CPU_NAMESPACE and name in CAPTURABLE
        if not is_capturable and not func.is_view:
            raise RuntimeError(f"{func} cannot be captured: a CPU graph holds only kernels (kernels/capture.py)")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.keepalive += [args, kwargs, result]
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returning True would make PyTorch import Dynamo (1 s, 150 MB), only to skip it."""
        return False

    def begin_op_list(self):
        this_thread.capture_mode = self
        self.segments.append(OpList(build.load_cpp_kernels()))

    def end_op_list(self):
        this_thread.capture_mode = None
        build.load_cpp_kernels().op_list_end()

    def append_call(self, fn: Callable[..., Tensor], inputs: tuple) -> Tensor:
        """Puts a call of fn(*inputs) between two OpLists. Returns the tensor that will hold the result."""
        self.end_op_list()
        with torch.utils._python_dispatch._disable_current_modes():
            # Only for the shape: the replay computes inputs. If fn is a collective, all ranks run it here, too, in the
            # same order.
            result = fn(*inputs).clone()

        def call():
            result.copy_(fn(*inputs))

        self.keepalive += [inputs, result]
        self.segments.append(call)
        self.begin_op_list()
        return result


class OpList:
    """OpList of kernels/csrc/op_list.h. The constructor starts the capture, and CaptureMode ends it. A call replays.

    adapt_threads: whether to use fewer threads while other programs need the cores (kernels/csrc/threads.h)."""

    def __init__(self, functions: ctypes.CDLL):
        self.functions, self.address, self.adapt_threads = functions, functions.op_list_begin(), False
        weakref.finalize(self, functions.op_list_free, self.address)

    def __call__(self):
        error = self.functions.op_list_replay(self.address, self.adapt_threads)
        if error:
            raise RuntimeError(error.decode())


def copy_all(args: tuple, inputs: list):
    for arg, static in zip(args, inputs, strict=True):
        if static is not None:
            static.copy_(arg)
