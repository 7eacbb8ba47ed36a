"""Rewrite a checkpoint's linear layers, output head included, in 8 or 4 bits.

    python quantize.py --checkpoint_path checkpoints/M/model.pth --mode int8              -> model_int8.pth
    python quantize.py --checkpoint_path checkpoints/M/model.pth --mode int4 --groupsize 64  -> model_int4.g64.pth

int8        symmetric, one scale per output channel
int4        asymmetric, a scale and a zero point per group along the input
int4-hqq    the same format; zero points refined without data (half-quadratic quantization, Badri & Shaji 2023)
int4-gptq   the same format; rounded so that the outputs on a calibration text stay close (gptq.py)

Norms, biases, routers and the embedding stay as they are. kernels.py describes the formats. One tensor is in memory at
a time; the file appears under its name when it is complete.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import read_checkpoint, run, save_checkpoint
from model import Linear, ModelConfig, Transformer, UsageError

MODES = ("int8", "int4", "int4-hqq", "int4-gptq")
KINDS = ("weight", "scales", "zeros")  # the tensors of a quantized linear; int8 has no zeros
GROUPSIZES = (32, 64, 128, 256)
SLAB = 2**24  # elements quantized at a time; bounds the memory of float32 copies


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint_path", type=Path, required=True, help="model.pth; the result goes beside it")
    p.add_argument("--mode", choices=MODES, default="int8", help="default: %(default)s")
    p.add_argument("--groupsize", type=int, choices=GROUPSIZES, default=32, help="of int4 (default: %(default)s)")
    p.add_argument("--label", default="_", help="goes between the old name and the mode (default: %(default)r)")
    args = p.parse_args()
    path, int8 = args.checkpoint_path, args.mode == "int8"
    out = path.with_name(f"{path.stem}{args.label}{args.mode}{'' if int8 else f'.g{args.groupsize}'}.pth")
    config, quantization, tensors = read_checkpoint(path)
    if quantization:
        raise UsageError(f"{path} is quantized already ({quantization['mode']}); start from the model.pth it came from")
    if args.mode == "int4-gptq":
        import gptq  # which stands on generate.py, and that on this file

        quantize = gptq.calibrated(args, config)
    else:
        quantize = partial(quantize_plain, mode=args.mode, group=args.groupsize)
    write(out, config, tensors, {"mode": args.mode[:4]} | ({} if int8 else {"groupsize": args.groupsize}), quantize)
    print(f"wrote {out}")


def write(path: Path, config: ModelConfig, tensors: dict[str, Tensor], quantization: dict, quantize: Callable):
    """Writes a checkpoint in which quantize(name, weight) stands for every linear's weight."""
    with torch.device("meta"):
        model = Transformer(config)
    names = {f"{name}.weight" for name, _ in linears(model)}
    if config.tie_embeddings:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    shapes = {}
    for name, t in tensors.items():
        if name in names and quantization["mode"] == "int4" and t.shape[-1] % 8:
            raise UsageError(f"{name} has {t.shape[-1]} inputs, not a multiple of 8, which int4 needs; use --mode int8")
        empty = torch.empty_like(t, device="meta")
        for new, like in named(name, quantize_like(empty, quantization) if name in names else (empty,)):
            shapes[new] = (tuple(like.shape), like.dtype)

    def results() -> Iterator[tuple[str, Tensor]]:
        for name, t in tensors.items():
            if name in names and not t.isfinite().all():
                raise UsageError(f"{name} holds NaN or infinite weights")
            yield from named(name, quantize(name, t) if name in names else (t,))

    save_checkpoint(path, config, shapes, results(), quantization)


def named(name: str, parts: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
    if len(parts) == 1:
        return [(name, parts[0])]
    return [(name.removesuffix("weight") + kind, t) for kind, t in zip(KINDS, parts, strict=False)]


def quantize_plain(name: str, w: Tensor, mode: str, group: int) -> tuple[Tensor, ...]:
    """(weight, scales) or (weight, scales, zeros) of w [..., N, K], without data."""
    rows = w.flatten(0, -2)
    slabs = rows.split(max(1, SLAB // w.shape[-1]))
    parts = [quantize_int8(s) if mode == "int8" else quantize_int4(s, group, mode == "int4-hqq") for s in slabs]
    return tuple(torch.cat(p).unflatten(0, w.shape[:-1]) for p in zip(*parts, strict=True))


def quantize_like(w: Tensor, quantization: dict) -> tuple[Tensor, ...]:
    """Meta tensors of the shapes and dtypes that quantizing w makes."""
    return quantize_plain("", w, quantization["mode"], quantization.get("groupsize"))


def prepare(model: Transformer, quantization: dict | None):
    """Gives model, on the meta device, the tensors of a quantized checkpoint. Raises UsageError for an unknown kind."""
    if quantization is None:
        return
    mode, group = quantization.get("mode"), quantization.get("groupsize")
    if mode not in ("int8", "int4") or (mode == "int4" and group not in GROUPSIZES):
        raise UsageError(f"the checkpoint is quantized as {quantization!r}, which this version does not read")
    for _, module in linears(model):
        like = quantize_like(module.weight, quantization)
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


def hqq_zeros(groups: Tensor, scales: Tensor, zeros: Tensor, p=0.7, beta=10.0, steps=20) -> Tensor:
    """Zero points that minimize sum |w - dequantized|^p over each group, by half-quadratic splitting."""
    scale, zero = scales.float()[..., None], zeros.float()[..., None] / 16
    best, best_error = zero, torch.full_like(scale, torch.inf)
    for _ in range(steps):
        q = (groups / scale + zero).round().clamp(0, 15)
        error = groups - (q - zero) * scale
        loss = error.abs().pow(p).sum(-1, keepdim=True)
        best, best_error = torch.where(loss < best_error, zero, best), torch.minimum(loss, best_error)
        shrunk = error.sign() * (error.abs() - error.abs().clamp(min=1e-8).pow(p - 1) / beta).clamp(min=0)
        zero = (q - (groups - shrunk) / scale).mean(-1, keepdim=True).mul(16).round().clamp(0, 255) / 16
        beta *= 1.01
    return to_zeros(best[..., 0])


def pack_int4(q: Tensor) -> Tensor:
    """q [..., K] uint8 in 0..15 -> [..., K / 2]: of 8 elements, byte j holds j (low half) and j + 4 (high)."""
    low, high = q.unflatten(-1, (-1, 2, 4)).unbind(-2)
    return (low | high << 4).flatten(-2)


if __name__ == "__main__":
    run(main)
