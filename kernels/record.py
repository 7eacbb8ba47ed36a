"""record(step): a decode step that is recorded once and replayed.

    step = record(lambda tokens, positions: model(tokens, positions, kv_cache))
    logits = step(tokens, positions)       # the first call with these shapes records, every later one replays

One contract on both devices: a call copies its arguments into the buffers of the recording, and what it returns is
overwritten by the next call. Only what the arguments hold may change from call to call.

    CUDA, ROCm    a CUDA graph of everything that step does
    CPU           a tape of the leaf operations of kernels/csrc/, replayed in one parallel region (kernels/csrc/tape.h).
                  Anything else that step computes raises, since it would happen once, while recording, and never again:

        embed  linear  attend  linear  linear  linear  ...  linear |   all_reduce    | add  linear  attend ...
        [------------------------- tape -------------------------] between_tapes()   [-------- tape --------
"""

import ctypes
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cpu
from kernels.schema import SCHEMAS

current: "Recorder | None" = None  # whose tape is being recorded


def record(step: Callable) -> Callable:
    """step, a function of tensors on one device (or None), recorded for every combination of their shapes."""
    recordings = {}

    @torch.inference_mode()
    def replay(*args: Tensor | None):
        shapes = tuple(None if arg is None else arg.shape for arg in args)
        if shapes not in recordings:
            on_gpu = any(arg is not None and arg.is_cuda for arg in args)
            recordings[shapes] = Graph(step, args) if on_gpu else Tape(step, args)
        return recordings[shapes](args)

    return replay


def between_tapes(fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """fn(*inputs). While a tape is recorded, the tape ends before it and another begins after it, so that replaying
    calls it between the two; its result must always have the same shape."""
    if current is None:
        return fn(*inputs)
    return current.pause(fn, inputs)


class Graph:
    """A CUDA graph: one launch in place of hundreds."""

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


class Tape:
    """The leaf operations of a step in order, and what happens between them."""

    def __init__(self, step: Callable, args: tuple):
        self.inputs = [None if arg is None else arg.clone(memory_format=torch.contiguous_format) for arg in args]
        recorder = Recorder()
        with recorder:
            self.outputs = step(*self.inputs)
        self.stages, self.keepalive = recorder.stages, recorder.keepalive

    def __call__(self, args: tuple):
        copy_all(args, self.inputs)
        for stage in self.stages:
            stage()
        return self.outputs


class Recorder(TorchDispatchMode):
    """Inside `with`, sees every operation that PyTorch is asked for, and lets leaf operations and views pass."""

    def __init__(self):
        super().__init__()
        self.stages: list[Callable[[], None]] = []
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
        """No: PyTorch would import its compiler to see to it, which takes a second and 150 MB."""
        return False

    def begin_tape(self):
        global current
        current = self
        self.stages.append(TapeReplay(cpu.build()))

    def end_tape(self):
        global current
        current = None
        cpu.build().tape_end()

    def pause(self, fn: Callable[..., Tensor], inputs: tuple) -> Tensor:
        """See between_tapes()."""
        self.end_tape()
        with torch.utils._python_dispatch._disable_current_modes():
            result = fn(*inputs).clone()  # of inputs that have not been computed: only its shape counts

        def stage():
            result.copy_(fn(*inputs))

        self.keepalive += [inputs, result]
        self.stages.append(stage)
        self.begin_tape()
        return result


class TapeReplay:
    """One tape of kernels/csrc/tape.h, recorded until tape_end."""

    def __init__(self, functions: ctypes.CDLL):
        self.functions, self.address = functions, functions.tape_begin()
        weakref.finalize(self, functions.tape_free, self.address)

    def __call__(self):
        error = self.functions.tape_replay(self.address)
        if error:
            raise RuntimeError(error.decode())


def copy_all(args: tuple, inputs: list):
    for arg, static in zip(args, inputs, strict=True):
        if static is not None:
            static.copy_(arg)
