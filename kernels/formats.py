"""How weights are stored: Dense (16 or 32 bits), Int8, Int4. A format is one class here and a branch in each kernel.

A format knows the tensors of a weight W [..., N, K] (N outputs, K inputs; experts in front) in a checkpoint, how to
make them (quantize) and what they mean (dequantize, the reference), what a tensor-parallel rank keeps of them, and in
which order the kernels of a backend want them (pack, unpack).

    Dense    weight [N, K]
    Int8     weight [N, K] int8, scales [N] float32                                          w = q * scale
    Int4     weight [N, K / 2] uint8, scales [N, G] bfloat16, zeros [N, G] uint8             w = (q - zero / 16) * scale
             for G groups of group_size elements along K. Of 8 elements, byte j of 4 holds element j and element j + 4:

             byte        0        1        2        3
             low half    q0       q1       q2       q3
             high half   q4       q5       q6       q7
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from config import UsageError

Tensors = dict[str, Tensor]  # "weight" and, if quantized, "scales" and "zeros"
CPU_BLOCK_N = 16  # rows of W that the CPU kernels read side by side
GROUP_SIZES = (32, 64, 128, 256)
SLAB = 2**18  # elements quantized at a time: their float32 copies stay in the processor's cache


class Format:
    """What a format has to say. As it stands here, it stores W as it is."""

    kind = 0  # what the kernels are told
    name: str | None = None  # what --json says
    quantization: dict | None = None  # what model.pth says
    unit = 1  # inputs that are stored together: W can be cut between units alone

    def empty(self, shape: torch.Size, dtype: torch.dtype, device) -> Tensors:
        """Empty tensors as a checkpoint holds them for W of this shape."""
        return {"weight": torch.empty(shape, dtype=dtype, device=device)}

    def quantize(self, w: Tensor) -> Tensors:
        """The tensors that stand for w [..., N, K], each number rounded to the nearest that can be stored."""
        return {"weight": w}

    def dequantize(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """W [..., N, K] in dtype, from tensors as in a checkpoint."""
        return tensors["weight"]

    def slice_inputs(self, name: str, tensor: Tensor, start: int, n: int) -> Tensor:
        """What is left of one of the tensors when W keeps its inputs [start, start + n) alone."""
        return tensor[..., start : start + n].clone() if name == "weight" else tensor

    def for_inputs(self, n: int) -> "Format":
        """The format of such a slice."""
        return self

    def fits_kernels(self, in_features: int) -> bool:
        """Whether the kernels take W with in_features inputs."""
        return True

    def pack(self, tensors: Tensors, backend: str) -> Tensors:
        """Tensors as in a checkpoint, in the order in which the kernels of backend ("cpu" or "triton") read them."""
        return tensors

    def unpack(self, tensors: Tensors, backend: str, out_features: int, in_features: int) -> Tensors:
        """The inverse of pack, for W [..., out_features, in_features]."""
        return tensors


@dataclass(frozen=True)
class Dense(Format):
    """16 or 32 bits, as they are."""


@dataclass(frozen=True)
class Int8(Format):
    """Symmetric, -127 to 127, one scale for each output."""

    kind = 1
    name = "int8"
    quantization = {"mode": "int8"}

    def empty(self, shape, dtype, device):
        return {
            "weight": torch.empty(shape, dtype=torch.int8, device=device),
            "scales": torch.empty(shape[:-1], dtype=torch.float32, device=device),
        }

    def quantize(self, w):
        return in_slabs(self.quantize_rows, w)

    def quantize_rows(self, w: Tensor) -> Tensors:
        w = w.float()
        scales = w.abs().amax(-1) / 127
        q = (w / scales.clamp(min=1e-38)[:, None]).round()
        return {"weight": q.to(torch.int8), "scales": scales}

    def dequantize(self, tensors, dtype):
        return (tensors["weight"] * tensors["scales"][..., None]).to(dtype)

    def fits_kernels(self, in_features):
        return in_features % 8 == 0

    def pack(self, tensors, backend):
        """cpu: four bytes, each q + 128, of 16 rows side by side, then the next four: int32 [N / 16, K / 4, 16]."""
        if backend != "cpu":
            return tensors
        # One expression, so that the temporary q + 128 is freed before the next copy
        words = interleave_rows((tensors["weight"].view(torch.uint8) ^ 128).view(torch.int32))
        return {"weight": words, "scales": tensors["scales"]}

    def unpack(self, tensors, backend, out_features, in_features):
        if backend != "cpu":
            return tensors
        unsigned = separate_rows(tensors["weight"], out_features).view(torch.uint8)
        return {"weight": (unsigned ^ 128).view(torch.int8), "scales": tensors["scales"]}


@dataclass(frozen=True)
class Int4(Format):
    """Asymmetric, 0 to 15, with a scale and a zero point for every group_size inputs of an output. The last group of a
    row may be shorter."""

    group_size: int
    kind = 2
    unit = 8

    @property
    def name(self):
        return f"int4.g{self.group_size}"

    @property
    def quantization(self):
        return {"mode": "int4", "groupsize": self.group_size}

    def empty(self, shape, dtype, device):
        *rows, k = shape
        n_groups = math.ceil(k / self.group_size)
        return {
            "weight": torch.empty((*rows, k // 2), dtype=torch.uint8, device=device),
            "scales": torch.empty((*rows, n_groups), dtype=torch.bfloat16, device=device),
            "zeros": torch.empty((*rows, n_groups), dtype=torch.uint8, device=device),
        }

    def quantize(self, w):
        return in_slabs(self.quantize_rows, w)

    def quantize_rows(self, w: Tensor) -> Tensors:
        groups = split_groups(w.float(), self.group_size)  # [N, G, group_size]
        scales, zeros = range_of(groups)
        return self.round_to(groups, scales, zeros, w.shape[-1])

    def round_to(self, groups: Tensor, scales: Tensor, zeros: Tensor, k: int) -> Tensors:
        """Groups [N, G, group_size], of which the first k elements of a row count, rounded under scales and zeros."""
        q = (groups / scales.float()[..., None] + zeros[..., None] / 16).round().clamp(0, 15)
        return {"weight": pack_int4(q.to(torch.uint8).flatten(-2)[:, :k]), "scales": scales, "zeros": zeros}

    def dequantize(self, tensors, dtype):
        q = unpack_int4(tensors["weight"])  # [..., N, K]
        scales, zeros = (
            tensors[name].float().repeat_interleave(self.group_size, -1)[..., : q.shape[-1]]
            for name in ("scales", "zeros")
        )
        return ((q - zeros / 16) * scales).to(dtype)

    def slice_inputs(self, name, tensor, start, n):
        if name == "weight":
            return tensor[..., start // 2 : (start + n) // 2].clone()
        if name in ("scales", "zeros"):  # of each of the slice's own, maybe smaller groups
            first_inputs = torch.arange(start, start + n, self.for_inputs(n).group_size, device=tensor.device)
            return tensor[..., first_inputs // self.group_size]
        return tensor

    def for_inputs(self, n):
        return Int4(math.gcd(n, self.group_size))  # no group of the slice lies in two of W's

    def fits_kernels(self, in_features):
        return in_features % 8 == 0

    def pack(self, tensors, backend):
        """cpu: words of 8 elements, of 16 rows side by side, then the next: int32 [N / 16, K / 8, 16]; scales and zeros
        [N / 16, G, 16]. triton: tiles, drawn in triton_int4.py; scales and zeros [N, G], column by column."""
        if backend == "cpu":
            words = {"weight": tensors["weight"].view(torch.int32)}
            return {name: interleave_rows(t) for name, t in (tensors | words).items()}
        from kernels.triton_int4 import pack_int4_tiles  # Triton is installed only where there is a GPU

        by_columns = {name: tensors[name].mT.contiguous().mT for name in ("scales", "zeros")}
        return {"weight": pack_int4_tiles(unpack_int4(tensors["weight"]))} | by_columns

    def unpack(self, tensors, backend, out_features, in_features):
        if backend != "cpu":
            from kernels.triton_int4 import unpack_int4_tiles

            return tensors | {"weight": pack_int4(unpack_int4_tiles(tensors["weight"], out_features, in_features))}
        rows = {name: separate_rows(t, out_features) for name, t in tensors.items()}
        return rows | {"weight": rows["weight"].view(torch.uint8)}


def format_of(quantization: dict | None) -> Format:
    """The format that a checkpoint's "quantization" names. Raises UsageError."""
    if quantization is None:
        return Dense()
    if isinstance(quantization, dict):
        mode, group_size = quantization.get("mode"), quantization.get("groupsize")
        if mode == "int8":
            return Int8()
        if mode == "int4" and group_size in GROUP_SIZES:
            return Int4(group_size)
    raise UsageError(f"the checkpoint is quantized as {quantization!r}, which this version does not read")


def in_slabs(quantize_rows, w: Tensor) -> Tensors:
    """quantize_rows, which takes [rows, K], for w [..., N, K], some rows at a time, so that memory is bounded."""
    slabs = w.flatten(0, -2).split(max(1, SLAB // w.shape[-1]))
    done = [quantize_rows(slab) for slab in slabs]
    return {name: torch.cat([tensors[name] for tensors in done]).unflatten(0, w.shape[:-1]) for name in done[0]}


# ---- Int4's pieces, which its finer ways of rounding share ----------------------------------------------------------


def split_groups(w: Tensor, group_size: int) -> Tensor:
    """[..., K] -> [..., G, group_size]. A shorter last group is filled up with the last element, which changes no
    range."""
    missing = -w.shape[-1] % group_size
    if missing:
        w = torch.cat([w, w[..., -1:].expand(*w.shape[:-1], missing)], dim=-1)
    return w.unflatten(-1, (-1, group_size))


def range_of(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (bfloat16) and zeros (uint8, sixteenths) [...] under which 0..15 spans the elements [..., group_size] and
    zero."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).to(torch.bfloat16)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return scales, to_zeros(-low / scales.float())


def to_zeros(zero_point: Tensor) -> Tensor:
    """Zero points in steps of the scale, as they are stored: in sixteenths of a step."""
    return (zero_point * 16).round().clamp(0, 255).to(torch.uint8)


def pack_int4(q: Tensor) -> Tensor:
    """q [..., K] uint8 in 0..15 -> [..., K / 2], as drawn above."""
    low, high = q.unflatten(-1, (-1, 2, 4)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack_int4(weight: Tensor) -> Tensor:
    """The inverse of pack_int4."""
    octets = weight.unflatten(-1, (-1, 4))  # [..., K / 8, 4]
    return torch.cat([octets & 15, octets >> 4], dim=-1).flatten(-2)


# ---- The CPU kernels' order of rows ---------------------------------------------------------------------------------


def interleave_rows(t: Tensor) -> Tensor:
    """[..., N, X] -> [..., N / 16, X, 16], N filled up with zeros to a multiple of 16."""
    t = F.pad(t, (0, 0, 0, -t.shape[-2] % CPU_BLOCK_N))
    return t.unflatten(-2, (-1, CPU_BLOCK_N)).mT.contiguous()


def separate_rows(t: Tensor, n: int) -> Tensor:
    """The inverse of interleave_rows, for the first n rows."""
    return t.mT.flatten(-3, -2)[..., :n, :].contiguous()
