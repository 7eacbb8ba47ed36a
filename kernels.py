"""The operations that a decode step is made of: which of them kernels.cpp does on a CPU, and how weights are stored.

    linear         [residual +] [swiglu] ([rms_norm] x W^T [+ bias]), W in 32, 16, 8 or 4 bits
    attention      a block's first half: norm, qkv, RoPE, cache write, softmax(q k^T) v over the filled cache, output
    feed_forward   its second half: norm, gate and up, SiLU, down
    experts        the same for the chosen experts of a mixture
    layers         all blocks of a dense model

linear's reference is here; the others' are the forward methods of model.Attention, FeedForward and Experts.

A weight is a model.Linear or anything with its fields. In a checkpoint:

    16 bits   weight [N, K]
    int8      weight [N, K] int8, scales [N] float32                          w = q * scale
    int4      weight [N, K / 2] uint8, scales [N, G] bfloat16, zeros [N, G] uint8   w = (q - zero / 16) * scale
              of 8 elements along K, byte j of 4 holds element j in its low half and element j + 4 in its high half

enable() compiles kernels.cpp once for this machine, turns quantized weights into the order in which it reads them and
sets fast to what it takes. On a GPU kernels_triton.py does the same operations, all layers' but one by one. Without a
C++ compiler, or without Triton, everything runs on the PyTorch versions.
"""

import ctypes
import hashlib
import mmap
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

MAX_ROWS = 8  # of activations; kernels.cpp's MAX_M. Beyond it a matrix product beats matrix-vector ones
DONTNEED, HUGEPAGE = 4, 14  # madvise's
ROWS = 16  # of weights that kernels.cpp reads side by side


def fits(x: Tensor, w) -> bool:
    """Whether the device's operations take x [..., K] times w: few rows, and w in their order."""
    return w.fast is not None and 0 < x.numel() <= MAX_ROWS * x.shape[-1]


def linear(x: Tensor, w, norm=None, residual: Tensor | None = None, swiglu: bool = False, wide: bool = False) -> Tensor:
    """x [..., K] -> [..., N]. norm (weight and eps) is applied to x first; swiglu takes the upper half of the N outputs
    times silu of the lower: [..., N / 2]; residual is added last. wide: a float32 result, whatever x is."""
    weight, eps = (norm.weight, norm.eps) if norm is not None else (None, 0.0)
    if not fits(x, w) or (swiglu and w.n_out % (2 * ROWS)):
        return linear_reference(x, w, norm, residual, swiglu, wide)
    ops = torch.ops.gptfast_triton if w.gpu else torch.ops.gptfast
    residual = residual if residual is None else residual.contiguous()
    return ops.linear(x.contiguous(), *w.fast, w.n_out, w.group, weight, eps, residual, swiglu, wide)


def linear_reference(x, w, norm=None, residual=None, swiglu=False, wide=False):
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps)
    y = F.linear(x, matrix(w, x.dtype), w.bias)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    if residual is not None:
        y = residual + y
    return y.float() if wide else y


def attention(x: Tensor, a, norm, positions: Tensor, rope: Tensor) -> Tensor:
    """A model.Attention in one go, for x that fits: x [B, T, dim] at positions [T], rope [T, D/2, 2] -> [B, T, dim]."""
    norms = (a.q_norm.weight, a.k_norm.weight) if a.q_norm is not None else (None, None)
    if a.wqkv.gpu:
        y = torch.ops.gptfast_triton.attend(
            linear(x, a.wqkv, norm), a.k_cache, a.v_cache, positions, rope, *norms, norm.eps, a.n_heads, a.window
        )
        return a.wo(y, residual=x)
    return torch.ops.gptfast.attention(
        x, norm.weight, norm.eps, *a.wqkv.fast, *a.wo.fast, a.n_heads, a.wqkv.group, a.k_cache, a.v_cache, positions,
        rope, *norms, a.window,
    )  # fmt: skip


def layers(x: Tensor, model, positions: Tensor, rope: Tensor) -> Tensor:
    """All blocks of a dense model.Transformer in one go, under the same conditions."""
    a, f = model.layers[0].attention, model.layers[0].feed_forward
    sizes = (model.config.norm_eps, a.n_heads, f.w2.n_in, a.wqkv.group)
    return torch.ops.gptfast.layers(x, model.stack, *model.caches, *sizes, positions, rope, a.window)


def experts(x: Tensor, e, norm, share: Tensor, chosen: Tensor) -> Tensor:
    """A model.Experts in one go, under the same conditions."""
    w13, w2 = e.w13, e.w2
    stored = (*w13.fast[:3], *w2.fast[:3])
    if w13.gpu:
        args = (x.contiguous(), norm.weight, norm.eps, share, chosen, *stored, w2.n_in, w13.group)
        return torch.ops.gptfast_triton.experts(*args)
    return torch.ops.gptfast.experts(x, norm.weight, norm.eps, share, chosen, *stored, w2.n_in, w13.group)


def route(logits: Tensor, slots: int, normalize: bool, on_gpu: bool) -> tuple[Tensor, Tensor]:
    """The router's choice for float32 logits [..., E]: of the slots likeliest experts the softmax's shares, made to sum
    to one if normalize, and the indices, both [..., slots]. on_gpu: by kernels_triton, which takes few rows."""
    if on_gpu:
        return torch.ops.gptfast_triton.route(logits, slots, normalize)
    share, chosen = F.softmax(logits, dim=-1).topk(slots, dim=-1)
    return share / share.sum(-1, keepdim=True) if normalize else share, chosen


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in float32 up to the weight (arXiv:1910.07467)."""
    f = x.float()
    return (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def matrix(w, dtype: torch.dtype, expert=slice(None)) -> Tensor:
    """W as numbers of dtype; of the experts in expert (an index, or a tensor of them) alone."""
    weight, scales, zeros = (t if t is None else t[expert] for t in (w.weight, w.scales, w.zeros))
    if w.gpu and scales is not None and not isinstance(expert, Tensor):
        return torch.ops.gptfast_triton.dequantize(weight, scales, zeros, w.n_out, w.n_in, w.group, dtype)
    return dequantize(weight, scales, zeros, w.n_out, w.group, dtype)


def dequantize(weight: Tensor, scales: Tensor | None, zeros: Tensor | None, n: int, group: int, dtype) -> Tensor:
    """The matrix [..., N, K] of dtype that the stored numbers, packed or not, stand for."""
    if scales is None:
        return weight
    if weight.dtype == torch.int32:
        if weight.dim() == 3:
            return torch.ops.gptfast.dequantize(weight, scales, zeros, n, group, dtype)
        weight, scales, zeros = unpack(weight, scales, zeros, n)
    if zeros is None:
        return (weight * scales[..., None]).to(dtype)
    halves = weight.unflatten(-1, (-1, 4))  # [..., N, K / 8, 4]
    q = torch.cat([halves & 15, halves >> 4], dim=-1).flatten(-2)  # [..., N, K]
    scales, zeros = (t.float().repeat_interleave(group, -1)[..., : q.shape[-1]] for t in (scales, zeros))
    return ((q - zeros / 16) * scales).to(dtype)


def pack(weight: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 or int4 as in a checkpoint -> as kernels.cpp reads it: of 16 rows the first 4 bytes each, then the next ...
    [N / 16, K in words, 16] int32, int8 shifted to 0..255; scales and zeros of int4 [N / 16, G, 16]."""
    if zeros is None:
        return side_by_side((weight.view(torch.uint8) ^ 128).view(torch.int32)), scales, None
    return side_by_side(weight.view(torch.int32)), side_by_side(scales), side_by_side(zeros)


def unpack(weight: Tensor, scales: Tensor, zeros: Tensor | None, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of pack; n is the number of rows."""
    below = lambda t: t.transpose(-1, -2).flatten(-3, -2)[..., :n, :].contiguous()  # noqa: E731
    if zeros is None:
        return (below(weight).view(torch.uint8) ^ 128).view(torch.int8), scales, None
    return below(weight).view(torch.uint8), below(scales), below(zeros)


def side_by_side(t: Tensor) -> Tensor:
    """[..., N, X] -> [..., N / 16, X, 16], N filled up with zeros to a multiple of 16."""
    t = F.pad(t, (0, 0, 0, -t.shape[-2] % ROWS))
    return t.unflatten(-2, (-1, ROWS)).transpose(-1, -2).contiguous()


def enable(model: torch.nn.Module, mapped: bool = False):
    """Puts model on the operations for its device, if they can be had: Triton's for an NVIDIA or AMD GPU, C++ for a
    CPU. For these the weights of its linears move to huge pages, in the order in which they are read. mapped: they lie
    in a memory-mapped file, of which they are let go one by one, so that they are never in memory twice."""
    device = next(iter(model.state_dict().values())).device
    if device.type == "cuda":
        try:
            import kernels_triton

            torch.ops.gptfast_triton.route(torch.zeros(1, 2, device=device), 1, True)  # needs a C compiler and Python.h
        except Exception as e:  # whatever keeps it from running here
            why = str(e).partition("\n")[0]
            print(f"Triton does not run here ({why}): running on PyTorch's own, slower operations", file=sys.stderr)
        else:
            kernels_triton.enable(model)
    if device.type != "cpu" or not build():
        return
    move, moved = mover(), {}
    for w in tqdm(list(model.modules()), "load", disable=None, leave=False):
        if hasattr(w, "fast") and not w.fast and (w.scales is None or w.n_in % 8 == 0):
            old = (w.weight, w.scales, w.zeros)
            new = old if w.scales is None else pack(*old)
            for name, before, after in zip(("weight", "scales", "zeros"), old, new, strict=True):
                if after is not None:
                    after = moved[before.data_ptr()] = move(after)
                    setattr(w, name, torch.nn.Parameter(after, False) if name in w._parameters else after)
                    if mapped:
                        advise(before, DONTNEED)
            w.fast = (w.weight, w.scales, w.zeros, w.bias)
    if getattr(model, "layers", None) and all(map(is_whole, model.layers)):
        model.stack = [t for layer in model.layers for t in layer_tensors(layer)]
    embedding = getattr(model, "tok_embeddings", None)
    if embedding is not None and embedding.weight.data_ptr() in moved:  # tied to the head, which is not quantized
        embedding.weight = torch.nn.Parameter(moved[embedding.weight.data_ptr()], False)


def is_whole(layer) -> bool:
    """Whether layers() can do a block: dense, every weight fast, whole blocks of rows."""
    a, f = layer.attention, layer.feed_forward
    return hasattr(f, "w13") and all(w.fast for w in (a.wqkv, a.wo, f.w13, f.w2)) and f.w2.n_in % ROWS == 0


def layer_tensors(layer) -> list[Tensor]:
    """What layers() takes of a block, in kernels.cpp's order."""
    a, f, none = layer.attention, layer.feed_forward, torch.empty(0)
    q_norm, k_norm = (a.q_norm.weight, a.k_norm.weight) if a.q_norm is not None else (none, none)
    tensors = [layer.attention_norm.weight, *a.wqkv.fast, *a.wo.fast, q_norm, k_norm]
    tensors += [layer.ffn_norm.weight, *f.w13.fast, *f.w2.fast]
    return [none if t is None else t for t in tensors]


def mover() -> Callable[[Tensor], Tensor]:
    """A function that copies tensors one after the other into huge pages: at 4 KB a page, looking up where each one is
    costs a fifth of the bandwidth."""
    room, used = torch.empty(0, dtype=torch.uint8), 0

    def move(t: Tensor) -> Tensor:
        nonlocal room, used
        if used + t.nbytes > room.numel():
            room = torch.empty(max(t.nbytes, 2**26) + 2**22, dtype=torch.uint8)
            used = -room.data_ptr() % 2**21
            advise(room[used:], HUGEPAGE)
        copy = room[used : used + t.nbytes].view(t.dtype).view(t.shape).copy_(t)
        used += -(-t.nbytes // 64) * 64
        return copy

    return move


def advise(t: Tensor, advice: int):
    """Linux's madvise on the whole pages of t; elsewhere nothing."""
    page = mmap.PAGESIZE
    start = -(-t.data_ptr() // page) * page
    length = (t.data_ptr() + t.nbytes) // page * page - start
    if sys.platform == "linux" and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


@cache
def build() -> bool:
    """Compiles kernels.cpp for this CPU, unless it has been before, and loads it. False, after one line on stderr, if
    that is not possible. Any number of processes may do so at once. $CXX and $CXXFLAGS are heeded."""
    source = Path(__file__).with_suffix(".cpp")
    compiler = next((c for c in (shlex.split(os.environ.get("CXX") or "g++"), ["clang++"]) if shutil.which(c[0])), None)
    if compiler is None:
        print("no C++ compiler ($CXX, g++ or clang++): running on PyTorch's own, slower operations", file=sys.stderr)
        return False
    torch_dir = Path(torch.__file__).parent
    flags = ["-O3", "-std=c++20", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
    flags += [f"-I{torch_dir / 'include'}", f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    flags += ["-shared", "-fPIC", *os.environ.get("CXXFLAGS", "").split()]
    macros = [*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]  # its version and what the CPU can do
    try:
        setting = subprocess.run(macros, capture_output=True).stdout + repr((flags, torch.__version__)).encode()
        key = hashlib.sha256(source.read_bytes() + setting)
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-fast"
        library = folder / f"kernels-{key.hexdigest()[:16]}.so"
        try:
            torch.ops.load_library(library)
        except OSError:  # it has not been built yet, or the file is broken
            folder.mkdir(parents=True, exist_ok=True)
            if sys.stderr and sys.stderr.isatty():
                print("compiling kernels.cpp for this machine, once", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                out = f"{scratch}/kernels.so"
                subprocess.run([*compiler, str(source), "-o", out, *flags], check=True, capture_output=True, text=True)
                os.replace(out, library)
            torch.ops.load_library(library)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as e:  # RuntimeError: no home
        lines = (getattr(e, "stderr", None) or str(e)).splitlines()
        why = next((line for line in lines if "error" in line), str(e))
        print(f"kernels.cpp does not build here ({why}): running on PyTorch's own, slower operations", file=sys.stderr)
        return False
    register_shapes()
    return True


def register_shapes():
    """What torch.compile has to know of the C++ operations."""

    @torch.library.register_fake("gptfast::linear")
    def _(x, w, scales, zeros, bias, n, group, norm, eps, residual, swiglu, wide):
        return x.new_empty(*x.shape[:-1], n // 2 if swiglu else n, dtype=torch.float32 if wide else x.dtype)

    @torch.library.register_fake("gptfast::dequantize")
    def _(w, scales, zeros, n, group, dtype):
        return w.new_empty(n, w.shape[1] * (4 if zeros is None else 8), dtype=dtype)

    for name in ("layers", "attention", "experts"):
        torch.library.register_fake(f"gptfast::{name}", lambda x, *args: torch.empty_like(x))
