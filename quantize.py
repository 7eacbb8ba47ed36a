"""Rewrite a checkpoint's linear layers, output head included, in 8 or 4 bits.

    python quantize.py --checkpoint_path checkpoints/M/model.pth --mode int8                 -> model_int8.pth
    python quantize.py --checkpoint_path checkpoints/M/model.pth --mode int4 --groupsize 64  -> model_int4.g64.pth
    python quantize.py --checkpoint_path checkpoints/M/model.pth --mode int4-gptq --calibration_text book.txt

int8        symmetric, one scale per output channel
int4        asymmetric, a scale and a zero point per group along the input
int4-hqq    the same format; zero points refined without data (half-quadratic quantization, Badri & Shaji 2023)
int4-gptq   the same format; rounded so that the outputs on a calibration text stay close (gptq.py)

Norms, biases, routers and the embedding stay as they are. kernels.py describes the formats. One tensor (of int4-gptq,
one layer) is in memory at a time; the file appears under its name when it is complete.
"""

import argparse
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is being loaded; run() sees to the rest
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
from torch import Tensor

from checkpoint import read_checkpoint, run, save_checkpoint
from kernels import DONTNEED, advise
from model import Linear, ModelConfig, Transformer, UsageError

MODES = ("int8", "int4", "int4-hqq", "int4-gptq")
KINDS = ("weight", "scales", "zeros")  # the tensors of a quantized linear; int8 has no zeros
GROUPSIZES = (32, 64, 128, 256)
SLAB = 2**18  # elements quantized at a time: their float32 copies stay in the cache


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth; the result goes beside it")
    add("--mode", default="int8", help=f"{', '.join(MODES)} (default: %(default)s)")
    add("--groupsize", type=int, default=32, help="of int4: 32, 64, 128 or 256 (default: %(default)s)")
    add("--label", default="_", help="goes between the old name and the mode (default: %(default)r)")
    g = p.add_argument_group("int4-gptq")
    what = g.add_mutually_exclusive_group()
    what.add_argument("--calibration_text", type=Path, help="text file to calibrate on")
    add = g.add_argument
    what.add_argument("--calibration_tasks", nargs="+", metavar="TASK", help="or the questions of these lm_eval tasks")
    add("--calibration_limit", type=int, default=64, help="windows of text, examples of a task (default: %(default)s)")
    add("--calibration_seq_length", type=int, default=512, help="tokens of a window (default: %(default)s)")
    add("--percdamp", type=float, default=0.1, help="part of the Hessian's mean added to it (default: %(default)s)")
    add("--blocksize", type=int, default=128, help="columns rounded between updates (default: %(default)s)")
    add("--act_order", action=argparse.BooleanOptionalAction, default=True, help="round the columns that matter first")
    add("--device", help="cpu, cuda, mps, xpu ... (default: the machine's accelerator, else cpu)")
    args = p.parse_args()
    if args.mode not in MODES:
        raise UsageError(f"--mode must be one of {', '.join(MODES)}, not {args.mode}")
    if args.groupsize not in GROUPSIZES:
        raise UsageError(f"--groupsize must be one of {', '.join(map(str, GROUPSIZES))}, not {args.groupsize}")
    if min(args.calibration_limit, args.blocksize) < 1 or args.calibration_seq_length < 2 or not args.percdamp > 0:
        raise UsageError("--calibration_limit, --blocksize and --percdamp must be above 0, --calibration_seq_length 1")
    if Path(f"x{args.label}").name != f"x{args.label}":
        raise UsageError(f"--label {args.label!r} must be a part of a file's name")
    if args.mode != "int4-gptq" and (args.calibration_text or args.calibration_tasks):
        raise UsageError(f"--mode {args.mode} needs no calibration: leave it out, or take --mode int4-gptq")
    path, int8 = args.checkpoint_path, args.mode == "int8"
    config, quantization, tensors = read_checkpoint(path)
    out = path.with_name(f"{path.stem}{args.label}{args.mode}{'' if int8 else f'.g{args.groupsize}'}.pth")
    if quantization:
        raise UsageError(f"{path} is quantized already ({quantization}); start from the model.pth it came from")
    weights = linear_weights(path, config, tensors)
    for name, w in weights.items():
        if not int8 and w.shape[-1] % 8:
            raise UsageError(f"{name} has {w.shape[-1]} inputs; int4 needs a multiple of 8: use --mode int8")
    if args.mode == "int4-gptq":
        import gptq  # which stands on generate.py, and that on this file

        quantized = gptq.quantized(args, weights["output.weight"].dtype)
    else:
        quantized = ((name, quantize_plain(name, w, args.mode, args.groupsize)) for name, w in weights.items())
    quantization = {"mode": "int8"} if int8 else {"mode": "int4", "groupsize": args.groupsize}
    write(out, config, tensors, weights, quantized, quantization)
    print(f"wrote {out}")


def linear_weights(path: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights to quantize, by name: of tensors, which path holds, or for a tied head the embedding's."""
    with torch.device("meta"):
        shapes = {f"{name}.weight": module.weight.shape for name, module in linears(Transformer(config))}
    if config.tie_embeddings:
        tensors = {"output.weight": tensors.get("tok_embeddings.weight")} | tensors
    for name, shape in shapes.items():
        if tensors.get(name) is None or tensors[name].shape != shape:
            raise UsageError(f"{path}: tensor {name} is missing or of the wrong shape; convert it again")
    return {name: tensors[name] for name in shapes}


def write(path: Path, config: ModelConfig, tensors: dict, weights: dict, quantized: Iterable, quantization: dict):
    """Writes a checkpoint of tensors in which what quantized yields, (name, (weight, scales[, zeros])) for every one of
    weights in any order, stands for these. Raises UsageError if it cannot."""
    kept = {name: t for name, t in tensors.items() if name not in weights}
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in kept.items()}
    for name, w in weights.items():
        for new, t in named(name, quantize_like(w.to("meta"), **quantization)):
            shapes[new] = (tuple(t.shape), t.dtype)

    def results() -> Iterator[tuple[str, Tensor]]:
        yield from kept.items()
        for name, parts in quantized:
            yield from named(name, parts)
            advise(weights[name], DONTNEED)  # or the file's pages would count as memory in use

    save_checkpoint(path, config, shapes, results(), quantization)


def named(name: str, parts: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
    return [(name.removesuffix("weight") + kind, t) for kind, t in zip(KINDS, parts, strict=False)]


def finite(name: str, w: Tensor) -> Tensor:
    if not w.isfinite().all():
        raise UsageError(f"{name} holds NaN or infinite weights")
    return w


def quantize_plain(name: str, w: Tensor, mode: str, group: int) -> tuple[Tensor, ...]:
    """(weight, scales) or (weight, scales, zeros) of w [..., N, K], without data."""
    slabs = finite(name, w).flatten(0, -2).split(max(1, SLAB // w.shape[-1]))
    parts = [quantize_int8(s) if mode == "int8" else quantize_int4(s, group, mode == "int4-hqq") for s in slabs]
    return tuple(torch.cat(p).unflatten(0, w.shape[:-1]) for p in zip(*parts, strict=True))


def quantize_like(w: Tensor, mode: str, groupsize: int | None = None) -> tuple[Tensor, ...]:
    """Empty tensors of the shapes and dtypes that quantizing w makes, on its device."""
    *rows, k = w.shape
    if mode == "int8":
        return w.new_empty(w.shape, dtype=torch.int8), w.new_empty(rows, dtype=torch.float32)
    groups = (*rows, -(-k // groupsize))
    scales, zeros = w.new_empty(groups, dtype=torch.bfloat16), w.new_empty(groups, dtype=torch.uint8)
    return w.new_empty((*rows, k // 2), dtype=torch.uint8), scales, zeros


def prepare(model: Transformer, quantization: dict | None):
    """Gives model, on the meta device, the tensors of a quantized checkpoint. Raises UsageError for an unknown kind."""
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise UsageError(f"the checkpoint is quantized as {quantization!r}, which this version does not read")
    mode, group = quantization.get("mode"), quantization.get("groupsize")
    if mode not in ("int8", "int4") or (mode == "int4" and group not in GROUPSIZES):
        raise UsageError(f"the checkpoint is quantized as {quantization!r}, which this version does not read")
    for _, module in linears(model):
        like = quantize_like(module.weight, mode, group)
        del module.weight
        for kind, t in zip(KINDS, like, strict=False):
            module.register_buffer(kind, t)
        module.group = group or module.n_in


def linears(model: Transformer) -> Iterator[tuple[str, Linear]]:
    """The layers that quantization rewrites, by name: all but the routers."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, Linear) and not n.endswith("feed_forward.gate"))


def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K] -> q int8 [N, K] in -127..127, scales [N] float32; w is about q * scale."""
    w = w.float()
    scales = w.abs().amax(-1) / 127
    return (w / scales.clamp(min=1e-38)[:, None]).round().to(torch.int8), scales


def quantize_int4(w: Tensor, group: int, refine: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """w [N, K] -> weight, scales and zeros of the int4 format (kernels.py); the last group may be shorter. refine:
    improve the zero points by half-quadratic quantization."""
    groups = split_groups(w.float(), group)  # [N, G, group]
    scales, zeros = range_of(groups)
    if refine:
        zeros = hqq_zeros(groups, scales, zeros)
    q = (groups / scales.float()[..., None] + zeros[..., None] / 16).round().clamp(0, 15).to(torch.uint8)
    return pack_int4(q.flatten(-2)[:, : w.shape[-1]]), scales, zeros


def split_groups(w: Tensor, group: int) -> Tensor:
    """[..., K] -> [..., G, group]; a shorter last group is filled up with the last element, which changes no range."""
    missing = -w.shape[-1] % group
    if missing:
        w = torch.cat([w, w[..., -1:].expand(*w.shape[:-1], missing)], dim=-1)
    return w.unflatten(-1, (-1, group))


def range_of(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (bfloat16) and zeros (uint8, sixteenths) [...] under which 0..15 spans the elements [..., group] and 0."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).to(torch.bfloat16)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return scales, to_zeros(-low / scales.float())


def to_zeros(zero_point: Tensor) -> Tensor:
    return (zero_point * 16).round().clamp(0, 255).to(torch.uint8)


def hqq_zeros(groups: Tensor, scales: Tensor, zeros: Tensor, beta: float = 3.0, steps: int = 8) -> Tensor:
    """Zero points under which the sum over each group of |w - dequantized|^0.5 is small, by half-quadratic splitting:
    what shrinking leaves of the errors is taken out of the weights, and the zero points are fitted to the rest."""
    w, zero = groups / scales.float()[..., None], zeros.float()[..., None] / 16  # all in steps of the scale
    best, best_loss = zero, torch.full_like(zero, torch.inf)
    for _ in range(steps):
        q = (w + zero).round_().clamp_(0, 15)
        error = w - (q - zero)
        root = error.abs().clamp_(min=1e-8).sqrt_()
        loss = root.sum(-1, keepdim=True)
        best, best_loss = torch.where(loss < best_loss, zero, best), torch.minimum(loss, best_loss)
        outliers = error.sign() * (root.square() - 1 / (beta * root)).clamp_(min=0)
        zero = (q - (w - outliers)).mean(-1, keepdim=True).mul_(16).round_().clamp_(0, 255) / 16
    return to_zeros(best[..., 0])


def pack_int4(q: Tensor) -> Tensor:
    """q [..., K] uint8 in 0..15 -> [..., K / 2]: of 8 elements, byte j holds j (low half) and j + 4 (high)."""
    low, high = q.unflatten(-1, (-1, 2, 4)).unbind(-2)
    return (low | high << 4).flatten(-2)


if __name__ == "__main__":
    run(main)
