"""Quantizes the linear layers of a checkpoint, output head included, to 8 or 4 bits.

    python quantize.py --checkpoint_path checkpoints/M/model.pth --mode int8    -> model_int8.pth
    python quantize.py --checkpoint_path checkpoints/M/model.pth --mode fp8     -> model_fp8.pth
    python quantize.py --checkpoint_path checkpoints/M/model.pth --mode int4    -> model_int4.g32.pth
    python quantize.py --checkpoint_path checkpoints/M/model.pth --mode int4-gptq --calibration_text book.txt

int8        symmetric, one scale per output channel
int4        asymmetric, a scale and a zero point per group along the input
int4-hqq    the same format; zero points refined without data (half-quadratic quantization, Badri & Shaji 2023)
int4-gptq   the same format; rounded so that the layers' outputs on a calibration text change little (gptq.py)
fp8         8-bit floats (e4m3), one scale per output channel
mxfp4       4-bit floats (e2m1); 32 inputs share a power of two as the scale. Of the two possible powers, the one with
            the smaller squared error wins

Norms, biases, routers and the embedding are not quantized. The table in formats/__init__.py says what the files hold.
One tensor at a time is in memory; with int4-gptq, one layer.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from cli.interrupts import exit_on_interrupt

    exit_on_interrupt()

import torch
from torch import Tensor

import formats
import gptq
from checkpoint import empty_model, read_checkpoint, save_checkpoint, with_tied_head
from cli import common_args
from cli.script import run_script
from config import ModelConfig
from converters.checkpoint_path import ensure_converted
from evaluation.lm_harness import task_text
from formats import Int4, Tensors, WeightFormat
from formats.base import in_chunks
from formats.integers import choose_qparams, decode_zeros, encode_zeros, quantize_affine, split_groups
from layers.linear import quantizable_linears
from loading import load
from utils.errors import UsageError, check_integer
from utils.files import read_text
from utils.machine import drop_pages, pick_device

QuantizedLayers = Iterator[tuple[str, Tensors]]  # (name of a linear layer, its tensors in model.pth)

# ---- Rounding -------------------------------------------------------------------------------------------------------


def quantize_each(weights: dict[str, Tensor], quantize: Callable[[Tensor], Tensors]) -> QuantizedLayers:
    for name, w in weights.items():
        gptq.check_finite_weight(name, w)
        yield name, quantize(w)


def hqq_quantize_rows(format: Int4, w: Tensor) -> Tensors:
    """Quantizes some rows of a matrix, w [rows, K]."""
    groups = split_groups(w.float(), format.group_size)  # [rows, n_groups, group_size]
    scales, zeros = choose_qparams(groups)
    return format.round_groups(groups, scales, hqq_zeros(groups, scales, zeros), w.shape[-1])


def hqq_zeros(groups: Tensor, scales: Tensor, zeros: Tensor, beta: float = 3.0, steps: int = 8) -> Tensor:
    """Refines zeros by half-quadratic splitting, which makes each group's sum of |w - dequantized|^0.5 small. Each step
    shrinks the rounding errors towards 0. What remains are outliers. The zero points are then fitted to the weights
    minus the outliers."""
    w, zero = groups / scales.float()[..., None], decode_zeros(zeros)[..., None]  # in units of the scale
    best, best_loss = zero, torch.full_like(zero, torch.inf)
    for _ in range(steps):
        q = quantize_affine(w, 1.0, zero)
        error = w - (q - zero)
        root = error.abs().clamp_(min=1e-8).sqrt_()
        loss = root.sum(-1, keepdim=True)
        best, best_loss = torch.where(loss < best_loss, zero, best), torch.minimum(loss, best_loss)
        outliers = error.sign() * (root.square() - 1 / (beta * root)).clamp_(min=0)
        zero = decode_zeros(encode_zeros((q - (w - outliers)).mean(-1, keepdim=True)))  # rounded as stored
    return encode_zeros(best[..., 0])


def round_by_gptq(args: argparse.Namespace, dtype: torch.dtype) -> QuantizedLayers:
    """Calibrates and rounds the checkpoint of --checkpoint_path, whose weights have dtype."""
    device, limit = pick_device(args.device), args.calibration_limit
    text = read_text(args.calibration_text) if args.calibration_text else task_text(args.calibration_tasks, limit)
    model, tokenizer = load(args.checkpoint_path, dtype=dtype, use_kernels=False)
    context = model.config.max_seq_len
    length = args.calibration_seq_length or min(512, context)
    if length > context:
        raise UsageError(f"--calibration_seq_length must be at most the model's context, {context}")
    windows = gptq.calibration_windows(tokenizer, text, length, limit)
    config = gptq.GPTQConfig(args.group_size, args.percdamp, args.blocksize, args.act_order)
    return gptq.quantize_model(model, windows, device, config)


# ---- The command line -----------------------------------------------------------------------------------------------

# By --mode: the format of the result
MODES: dict[str, type[WeightFormat]] = formats.FORMAT_BY_MODE | {"int4-hqq": Int4, "int4-gptq": Int4}
GROUP_SIZE_MODES = [mode for mode, format_class in MODES.items() if format_class.group_size_choices]
# Of options that only some modes read. argparse's own default is None, because check_mode asks what the user gave
DEFAULTS = {"group_size": 32, "calibration_limit": 64, "percdamp": 0.1, "blocksize": 128, "act_order": True}
GPTQ_OPTIONS = (
    "calibration_text", "calibration_tasks", "calibration_limit", "calibration_seq_length", "percdamp", "blocksize",
    "act_order", "device",
)
MAX_PERCDAMP = 100  # far beyond what helps; a float32 Hessian must stay finite


def parse_args() -> argparse.Namespace:
    parser = common_args.build_parser(__doc__)
    add = parser.add_argument
    help = "model.pth, or a model's folder or .gguf; the result goes beside model.pth"
    common_args.add_checkpoint_path(parser, help=help)
    add("--mode", default="int8", help=f"{', '.join(MODES)} (default: %(default)s)")
    sizes = ", ".join(map(str, formats.GROUP_SIZES))
    help = f"of {', '.join(GROUP_SIZE_MODES)}: one of {sizes} (default: {DEFAULTS['group_size']})"
    add("--groupsize", dest="group_size", metavar="GROUPSIZE", type=int, help=help)
    add("--label", default="_", help="goes between the old name and the mode (default: %(default)r)")
    group = parser.add_argument_group("int4-gptq")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--calibration_text", type=Path, help="text file to calibrate on")
    what.add_argument("--calibration_tasks", nargs="+", metavar="TASK", help="or the questions of these lm_eval tasks")
    add = group.add_argument
    limit, damp = DEFAULTS["calibration_limit"], DEFAULTS["percdamp"]
    add("--calibration_limit", type=int, help=f"windows of text, examples of a task (default: {limit})")
    add("--calibration_seq_length", type=int, help="tokens of a window (default: 512, or the model's context)")
    add("--percdamp", type=float, help=f"part of the Hessian's mean added to it (default: {damp})")
    add("--blocksize", type=int, help=f"columns rounded between updates (default: {DEFAULTS['blocksize']})")
    help = "round the columns that matter first (default: yes)"
    add("--act_order", action=argparse.BooleanOptionalAction, help=help)
    common_args.add_device(group)
    common_args.add_threads(parser)
    args = parser.parse_args()
    check_mode(args)
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    check_args(args)
    return args


def check_mode(args: argparse.Namespace):
    """Raises UsageError for an option that the mode does not read."""
    if args.mode not in MODES:
        raise UsageError(f"--mode must be one of {', '.join(MODES)}, not {args.mode}")
    if args.group_size is not None and args.mode not in GROUP_SIZE_MODES:
        raise UsageError(f"--groupsize belongs to {', '.join(GROUP_SIZE_MODES)}: leave it out, or take one of these")
    given = [name for name in GPTQ_OPTIONS if getattr(args, name) is not None]
    if given and args.mode != "int4-gptq":
        flag = "--no-act_order" if args.act_order is False and given[0] == "act_order" else f"--{given[0]}"
        raise UsageError(f"{flag} belongs to int4-gptq: leave it out, or take --mode int4-gptq")


def check_args(args: argparse.Namespace):
    choices = MODES[args.mode].group_size_choices
    if choices and args.group_size not in choices:
        raise UsageError(f"--groupsize must be one of {', '.join(map(str, choices))}, not {args.group_size}")
    check_integer("--calibration_limit", args.calibration_limit, 1)
    check_integer("--blocksize", args.blocksize, 1)
    if not 0 < args.percdamp <= MAX_PERCDAMP:
        raise UsageError(f"--percdamp must be above 0 and at most {MAX_PERCDAMP}, not {args.percdamp}")
    if args.calibration_seq_length is not None:
        check_integer("--calibration_seq_length", args.calibration_seq_length, 2)
    if Path(f"x{args.label}").name != f"x{args.label}":
        raise UsageError(f"--label {args.label!r} must be a part of a file's name")
    if args.mode == "int4-gptq" and not args.calibration_text and not args.calibration_tasks:
        raise UsageError("int4-gptq needs something to calibrate on: --calibration_text or --calibration_tasks")


def main():
    args = parse_args()
    common_args.set_threads(args.threads)
    path = args.checkpoint_path = ensure_converted(args.checkpoint_path)
    config, quantization, tensors = read_checkpoint(path)
    if quantization:
        raise UsageError(f"{path} is quantized already, to {quantization['mode']}; give a model.pth of 16 bits")
    format = MODES[args.mode].from_options(args.group_size)
    weights = linear_weights(path, config, tensors)
    check_input_widths(weights, format)
    if args.mode == "int4-gptq":
        quantized = round_by_gptq(args, weights["lm_head"].dtype)
    elif args.mode == "int4-hqq":
        quantized = quantize_each(weights, partial(in_chunks, partial(hqq_quantize_rows, format)))
    else:
        quantized = quantize_each(weights, format.quantize)
    suffix = format.name.replace(format.mode, args.mode)  # int4.g32 -> int4-hqq.g32
    out = path.with_name(f"{path.stem}{args.label}{suffix}.pth")
    write_quantized(out, config, tensors, weights, quantized, format)
    print(f"wrote {out}")


def linear_weights(path: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights to quantize, by the name of the layer. The weight of a tied head is the embedding.

    tensors: of the checkpoint in path."""
    shapes = {name: linear.weight.shape for name, linear in quantizable_linears(empty_model(config))}
    tensors = with_tied_head(config, tensors)
    weights = {name: tensors.get(f"{name}.weight") for name in shapes}
    for name, shape in shapes.items():
        if weights[name] is None or weights[name].shape != shape:
            raise UsageError(f"{path}: tensor {name}.weight is missing or of the wrong shape; convert it again")
    return weights


def check_input_widths(weights: dict[str, Tensor], format: WeightFormat):
    for name, w in weights.items():
        k, factor = w.shape[-1], format.k_alignment
        if k % factor:
            needs = f"{format.mode} needs a multiple of {factor}"
            raise UsageError(f"{name}.weight has {k} inputs; {needs}: use --mode int8")


def write_quantized(
    path: Path, config: ModelConfig, tensors: dict[str, Tensor], weights: dict[str, Tensor],
    quantized: QuantizedLayers, format: WeightFormat,
):
    """Writes a checkpoint of tensors, with quantized in place of weights.

    quantized: (name, tensors in format) of all weights, in any order."""
    kept = {name: t for name, t in tensors.items() if name.removesuffix(".weight") not in weights}
    empty = dict(kept)
    for name, w in weights.items():
        empty |= {f"{name}.{part}": t for part, t in format.allocate(w.shape, w.dtype, "meta").items()}

    def all_tensors() -> Iterator[tuple[str, Tensor]]:
        yield from kept.items()
        for name, quantized_tensors in quantized:
            for tensor_name, t in quantized_tensors.items():
                yield f"{name}.{tensor_name}", t
            drop_pages(weights[name])  # or the mapped file's pages would count as memory in use

    save_checkpoint(path, config, empty, format.to_dict(), all_tensors())


if __name__ == "__main__":
    run_script(main)
