"""Calibrated int4: weights rounded so that what the layers put out on a text stays close (GPTQ, arXiv:2210.17323).

    python quantize.py --checkpoint_path checkpoints/M/model.pth --mode int4-gptq --calibration_text book.txt

One layer after the other: its inputs x, as the quantized layers before it make them, give every linear's Hessian, the
sum of x x^T; the columns of its weight are rounded in turn, and those to come make up for each one's error. Unlike the
paper, every group's scale and zero point are the best of several, the Hessian's diagonal being the weights, before the
first column is rounded; so any order of the columns keeps the groups where they are.
"""

import sys
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from checkpoint import read_text
from eval import evaluate, harness, task_manager, windows_of
from generate import load, pick_device
from model import Experts, Transformer, TransformerBlock, UsageError
from quantize import finite, linears, pack_int4, range_of, split_groups, to_zeros
from tokenizer import Tokenizer

SLAB = 2**24  # weights rounded at a time; bounds the memory of float32 copies
Parts = tuple[Tensor, Tensor, Tensor]  # weight, scales and zeros of the int4 format (kernels.py)


def quantized(args, dtype: torch.dtype) -> Iterator[tuple[str, Parts]]:
    """Every linear, by name, of the checkpoint that quantize.py's arguments name."""
    if not args.calibration_text and not args.calibration_tasks:
        raise UsageError("int4-gptq needs something to calibrate on: --calibration_text or --calibration_tasks")
    device = pick_device(args.device)
    if args.calibration_text:
        text = read_text(args.calibration_text)
    else:
        text = task_text(args.calibration_tasks, args.calibration_limit)
    model, tokenizer = load(args.checkpoint_path, torch.device("cpu"), dtype, fast=False)
    if args.calibration_seq_length > (limit := model.config.max_seq_len):
        raise UsageError(f"--calibration_seq_length must be at most the model's context, {limit}")
    windows = calibration_windows(tokenizer, text, args.calibration_seq_length, args.calibration_limit)
    settings = {"group": args.groupsize, "damp": args.percdamp, "block": args.blocksize, "act_order": args.act_order}
    return quantize_model(model, windows, device, **settings)


def calibration_windows(tokenizer: Tokenizer, text: str, length: int, limit: int) -> Tensor:
    """At most limit windows of length tokens, from all over text: [n, length]."""
    windows = [w for w in windows_of(tokenizer, text, length) if len(w) == length]
    if not windows:
        raise UsageError(f"the calibration text is shorter than one window of --calibration_seq_length {length} tokens")
    step = max(1, len(windows) / limit)
    return torch.tensor([windows[int(i * step)] for i in range(min(limit, len(windows)))])


def task_text(tasks: list[str], limit: int) -> str:
    """What lm_eval asks a model in the first limit examples of each task, with the answers it offers."""
    manager, texts = task_manager(tasks, None), []

    class Listener(harness().api.model.LM):
        def listen(self, requests, answer) -> list:
            texts.extend("".join(a for a in request.args if isinstance(a, str)) for request in requests)
            return [answer] * len(requests)

        def loglikelihood(self, requests):
            return self.listen(requests, (0.0, False))

        def loglikelihood_rolling(self, requests):
            return self.listen(requests, 0.0)

        def generate_until(self, requests):
            return self.listen(requests, "")

    evaluate(Listener(), tasks, manager, limit)
    return "\n\n".join(texts)


@torch.inference_mode()
def quantize_model(model: Transformer, windows: Tensor, device, **settings) -> Iterator[tuple[str, Parts]]:
    """Quantizes model, which is on the CPU, on device, calibrated on windows [n, T] of tokens. A layer that is done
    leaves the memory. settings are those of solve()."""
    positions, rest = torch.arange(windows.shape[1]), []
    model.setup_caches(1, len(positions))
    model.hidden(windows[:1], positions, len(positions), lambda layer, x, *args: rest.append(args) or x)
    rest = [t.to(device) if isinstance(t, Tensor) else t for t in rest[0]]  # what every layer gets besides x
    xs = [model.tok_embeddings(window[None]).to(device) for window in windows]  # of [1, T, dim]
    for i, layer in enumerate(model.layers):
        layer.to(device)
        hessians = hessians_of(layer, xs, rest)
        for name, linear in linears(layer):
            full, hessian = f"layers.{i}.{name}.weight", hessians.pop(name)
            if unseen := (hessian.diagonal(dim1=-2, dim2=-1) == 0).all(-1).sum().item():
                print(f"{full}: {unseen} of the experts got no token and are rounded to nearest", file=sys.stderr)
            parts = solve(finite(full, linear.weight), hessian, **settings)
            weight = kernels.dequantize(*parts, linear.n_out, settings["group"], linear.weight.dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            yield full, tuple(t.cpu() for t in parts)
        xs = [layer(x, *rest) for x in xs]
        layer.to("meta")
    model.norm.to(device), model.output.to(device)
    parts = solve(finite("output.weight", model.output.weight), sum(outer(model.norm(x)) for x in xs), **settings)
    yield "output.weight", tuple(t.cpu() for t in parts)


def outer(x: Tensor) -> Tensor:
    """x [..., K] -> the sum of its rows' x x^T [K, K], float32."""
    x = x.flatten(0, -2).float()
    return x.T @ x


def hessians_of(layer: TransformerBlock, xs: list[Tensor], rest: list) -> dict[str, Tensor]:
    """The Hessians of layer's linears over xs by name: [K, K], of experts [E, K, K]."""
    sums = {}

    def watch(name: str, _, args: tuple, kwargs: dict):
        norm = kwargs.get("norm")
        sums[name] += outer(args[0] if norm is None else norm(args[0]))

    def watch_experts(name: str, module: Experts, args: tuple):
        x, norm, _, chosen = args
        x, chosen = norm(x).flatten(0, 1), chosen.flatten(0, 1)  # [N, dim], [N, K]
        for e in chosen.unique().tolist():
            rows = x[(chosen == e).any(-1)]
            gate, up = F.linear(rows, module.w13.weight[e]).chunk(2, dim=-1)
            sums[f"{name}.w13"][e] += outer(rows)
            sums[f"{name}.w2"][e] += outer(F.silu(gate) * up)

    hooks = []
    for name, module in layer.named_modules():
        if isinstance(module, Experts):
            hooks.append(module.register_forward_pre_hook(partial(watch_experts, name)))
    for name, linear in linears(layer):
        w = linear.weight
        sums[name] = torch.zeros(*w.shape[:-2], w.shape[-1], w.shape[-1], device=w.device)
        hooks.append(linear.register_forward_pre_hook(partial(watch, name), with_kwargs=True))
    for x in xs:
        layer(x, *rest)
    for hook in hooks:
        hook.remove()
    return sums


def solve(w: Tensor, hessian: Tensor, group: int, damp: float, block: int, act_order: bool) -> Parts:
    """w [..., N, K] rounded so that (w - rounded) x is small for the x that hessian [..., K, K] was made of."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).clone()  # [..., K]
    mean = diagonal.mean(-1, keepdim=True)
    mean[mean == 0] = 1
    order = torch.arange(w.shape[-1], device=w.device).expand_as(diagonal)
    if act_order:
        order = diagonal.argsort(-1, descending=True)
    damped = hessian + torch.diag_embed((damp * mean).expand_as(diagonal))
    damped = damped.take_along_dim(order[..., None], -2).take_along_dim(order[..., None, :], -1)
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        upper = torch.linalg.cholesky(inverse).mT.contiguous()
    except torch.linalg.LinAlgError:
        raise UsageError("a Hessian has no inverse: raise --percdamp, unless the model overflows") from None
    slabs = w.split(max(1, SLAB * w.shape[-2] // w.numel()), dim=-2)
    parts = [solve_rows(rows.float(), diagonal + damp * mean, order, upper, group, block) for rows in slabs]
    return tuple(torch.cat(p, dim=-2) for p in zip(*parts, strict=True))


def solve_rows(w: Tensor, diagonal: Tensor, order: Tensor, upper: Tensor, group: int, block: int) -> Parts:
    """solve for some rows of w; order is that of the columns, upper the Cholesky factor of the inverted Hessian."""
    k = w.shape[-1]
    scales, zeros = fit_range(split_groups(w, group), split_groups(diagonal[..., None, :], group))  # [..., N, G]
    groups = order[..., None, :] // group
    steps = scales.float().take_along_dim(groups, -1).mT.contiguous()  # [..., K, N], as all that follows
    starts = (zeros.float() / 16).take_along_dim(groups, -1).mT.contiguous()
    w = w.take_along_dim(order[..., None, :], -1).mT.contiguous()
    for a in range(0, k, block):
        b = min(a + block, k)
        errors = torch.empty_like(w[..., a:b, :])
        for i in range(a, b):
            q = (w[..., i, :] / steps[..., i, :] + starts[..., i, :]).round_().clamp_(0, 15)
            error = (w[..., i, :] - (q - starts[..., i, :]) * steps[..., i, :]) / upper[..., i, i, None]
            w[..., i + 1 : b, :] -= upper[..., i, i + 1 : b, None] * error[..., None, :]
            w[..., i, :], errors[..., i - a, :] = q, error
        w[..., b:, :] -= upper[..., a:b, b:].mT @ errors
    q = w.take_along_dim(order.argsort(-1)[..., None], -2).mT
    return pack_int4(q.to(torch.uint8)), scales, zeros


def fit_range(groups: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros [..., G] of groups [..., G, group]: of ranges shrunk in several degrees, each improved by least
    squares in turn with rounding, the one with the least sum of squared errors weighted by importance."""
    total = importance.sum(-1)
    best = [torch.inf, 0, 0]
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6):
        scales, zeros = range_of(groups * shrink)
        for _ in range(4):
            scale, zero = scales.float()[..., None], zeros.float()[..., None] / 16
            q = (groups / scale + zero).round_().clamp_(0, 15)
            loss = ((groups - (q - zero) * scale).square_() * importance).sum(-1)
            better = loss < best[0]
            best = [torch.where(better, new, old) for new, old in zip((loss, scales, zeros), best, strict=True)]
            weighted = q * importance
            q_mean, w_mean = weighted.sum(-1) / total, (groups * importance).sum(-1) / total
            slope = (weighted * groups).sum(-1) - total * q_mean * w_mean
            slope /= ((weighted * q).sum(-1) - total * q_mean.square()).clamp(min=1e-12 * total)
            scales = torch.where(slope > 0, slope, scale[..., 0]).to(torch.bfloat16)
            zeros = to_zeros(q_mean - w_mean / scales.float())
    return best[1], best[2]
