"""Calibrated int4: weights rounded so that what the layers put out on a text stays close (GPTQ, arXiv:2210.17323).

    python quantize.py --checkpoint_path checkpoints/M/model.pth --mode int4-gptq --calibration_text book.txt

The layers are quantized one after the other. A layer's inputs x, as the quantized layers before it make them, give
every linear's Hessian H, the sum of x x^T. The columns of its weight are rounded in turn, and the columns to come make
up for each one's error.

Static groups, unlike the paper's: every group's scale and zero are fixed before the first column is rounded, as those
of several with the least error weighted by diag(H). So act_order, which rounds the columns in another order, leaves
the groups where they are.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from config import UsageError
from eval import evaluate, import_lm_eval, task_manager, windows_of
from kernels.formats import Int4, Tensors, pack_int4, range_of, split_groups, to_zeros
from model import ExpertsGateUp, KVCache, LayerCache, Linear, Transformer
from tokenizer import Tokenizer

CHUNK_WEIGHTS = 2**24  # weights rounded at a time; bounds the memory of float32 copies


@dataclass(frozen=True)
class GPTQConfig:
    group_size: int
    damp: float  # part of the Hessian's mean diagonal that is added to it, so that it has an inverse
    block_size: int  # columns rounded before their errors reach the columns behind the block
    act_order: bool  # round the columns with the largest inputs first


@torch.inference_mode()
def quantize_model(
    model: Transformer, windows: Tensor, device: torch.device, config: GPTQConfig
) -> Iterator[tuple[str, Tensors]]:
    """Quantizes the linears of model, which is on the CPU, on device, calibrated on windows [n, T] of tokens. Yields
    (name, tensors). A layer that is done leaves the memory."""
    positions = torch.zeros(1, dtype=torch.long, device=device)
    # Every window begins at position 0 and overwrites what is in the cache, so one layer's cache serves all layers.
    cache = LayerCache(*(t.to(device) for t in KVCache(model, 1, windows.shape[1]).layers[0]))
    xs = [model.embed(window[None]).to(device) for window in windows]  # of [1, T, dim]
    for i, layer in enumerate(model.layers):
        layer.to(device)
        hessians = hessians_of(model, i, xs, positions, cache)
        for name in list(hessians):
            linear, hessian = model.get_submodule(name), hessians.pop(name)  # each leaves the memory in turn
            yield name, quantize_linear(name, linear, hessian, config)
        xs = [layer(x, positions, cache) for x in xs]
        layer.to("meta")
    model.norm.to(device)
    model.output.to(device)
    hessian = sum(outer(model.norm(x)) for x in xs)
    yield "output", quantize_linear("output", model.output, hessian, config)


def quantize_linear(name: str, linear: Linear, hessian: Tensor, config: GPTQConfig) -> Tensors:
    """The tensors of linear in int4, on the CPU. Its weight becomes what they stand for, so that the layers to come see
    the error."""
    check_finite_weight(name, linear.weight)
    is_zero = hessian.diagonal(dim1=-2, dim2=-1) == 0  # [K], of experts [E, K]
    unseen = is_zero.all(-1).sum().item()
    if unseen:
        print(f"{name}: {unseen} of the experts got no token and are rounded to nearest", file=sys.stderr)
    tensors = gptq_quantize(linear.weight, hessian, config)
    linear.set_tensor("weight", Int4(config.group_size).dequantize(tensors, linear.weight.dtype))
    return {kind: t.cpu() for kind, t in tensors.items()}


def check_finite_weight(name: str, weight: Tensor):
    if not weight.isfinite().all():
        raise UsageError(f"{name}.weight holds NaN or infinite weights")


def hessians_of(
    model: Transformer, i: int, xs: list[Tensor], positions: Tensor, cache: LayerCache
) -> dict[str, Tensor]:
    """The Hessians of the linears in layer i over its inputs xs, by name: [K, K], of experts [E, K, K]."""
    sums, hooks = {}, []

    def add_inputs(name: str, linear: Linear, args: tuple, kwargs: dict):
        x, norm = args[0], kwargs.get("norm")
        if norm is not None:
            x = norm(x)
        if linear.n_experts is None:
            sums[name] += outer(x)
            return
        topk_ids = args[1]  # [B, T, K]
        if isinstance(linear, ExpertsGateUp):  # a token's experts all get the same
            x = x[..., None, :].expand(*topk_ids.shape, -1)  # [B, T, K, dim]
        for e in topk_ids.unique().tolist():
            sums[name][e] += outer(x[topk_ids == e])

    for name, linear in model.linears():
        if not name.startswith(f"layers.{i}."):
            continue
        experts = () if linear.n_experts is None else (linear.n_experts,)
        sums[name] = torch.zeros(*experts, linear.in_features, linear.in_features, device=linear.weight.device)
        hooks.append(linear.register_forward_pre_hook(partial(add_inputs, name), with_kwargs=True))
    for x in xs:
        model.layers[i](x, positions, cache)
    for hook in hooks:
        hook.remove()
    return sums


def outer(x: Tensor) -> Tensor:
    """x [..., K] -> the sum of its rows' x x^T [K, K], float32."""
    x = x.flatten(0, -2).float()
    return x.T @ x


# ---- What to calibrate on -------------------------------------------------------------------------------------------


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

    class Listener(import_lm_eval().api.model.LM):
        """Takes down what it is asked, and answers anything."""

        def listen(self, requests, answer) -> list:
            for request in requests:
                texts.append("".join(argument for argument in request.args if isinstance(argument, str)))
            return [answer] * len(requests)

        def loglikelihood(self, requests):
            return self.listen(requests, (0.0, False))

        def loglikelihood_rolling(self, requests):
            return self.listen(requests, 0.0)

        def generate_until(self, requests):
            return self.listen(requests, "")

    evaluate(Listener(), tasks, manager, limit)
    return "\n\n".join(texts)


# ---- Rounding. N and K: a weight's outputs and inputs, its rows and columns -----------------------------------------


def gptq_quantize(w: Tensor, hessian: Tensor, config: GPTQConfig) -> Tensors:
    """w [..., N, K] rounded so that (w - rounded) x is small for the x that hessian [..., K, K] was made of."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).clone()  # [..., K]
    mean = diagonal.mean(-1, keepdim=True)
    mean[mean == 0] = 1  # an expert without tokens: then all columns matter the same
    damping = (config.damp * mean).expand_as(diagonal)
    if config.act_order:
        order = diagonal.argsort(-1, descending=True)
    else:
        order = torch.arange(w.shape[-1], device=w.device).expand_as(diagonal)
    damped = hessian + torch.diag_embed(damping)
    damped = damped.take_along_dim(order[..., None], -2).take_along_dim(order[..., None, :], -1)
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        upper = torch.linalg.cholesky(inverse).mT.contiguous()
    except torch.linalg.LinAlgError:
        raise UsageError("a Hessian has no inverse: raise --percdamp, unless the model overflows") from None
    chunks = w.split(max(1, CHUNK_WEIGHTS * w.shape[-2] // w.numel()), dim=-2)  # of rows
    done = [gptq_quantize_rows(rows.float(), diagonal + damping, order, upper, config) for rows in chunks]
    return {kind: torch.cat([tensors[kind] for tensors in done], dim=-2) for kind in done[0]}


def gptq_quantize_rows(w: Tensor, diagonal: Tensor, order: Tensor, upper: Tensor, config: GPTQConfig) -> Tensors:
    """gptq_quantize for some rows of w. order: the columns'. upper: the Cholesky factor of the inverted Hessian."""
    group_size, k = config.group_size, w.shape[-1]
    padded = F.pad(diagonal[..., None, :], (0, -k % group_size))  # what fills up a short last group does not count
    importance = padded.unflatten(-1, (-1, group_size))
    scales, zeros = fit_range(split_groups(w, group_size), importance)  # [..., N, G]

    # Columns in the order in which they are rounded, as rows, which lie together in memory: [..., K, N]
    group_ids = order[..., None, :] // group_size
    column_scales = scales.float().take_along_dim(group_ids, -1).mT.contiguous()
    column_zeros = (zeros.float() / 16).take_along_dim(group_ids, -1).mT.contiguous()
    columns = w.take_along_dim(order[..., None, :], -1).mT.contiguous()

    for start in range(0, k, config.block_size):
        stop = min(start + config.block_size, k)
        errors = torch.empty_like(columns[..., start:stop, :])
        for i in range(start, stop):
            column, scale, zero = columns[..., i, :], column_scales[..., i, :], column_zeros[..., i, :]  # [..., N]
            q = (column / scale + zero).round_().clamp_(0, 15)
            error = (column - (q - zero) * scale) / upper[..., i, i, None]
            columns[..., i + 1 : stop, :] -= upper[..., i, i + 1 : stop, None] * error[..., None, :]
            columns[..., i, :], errors[..., i - start, :] = q, error
        columns[..., stop:, :] -= upper[..., start:stop, stop:].mT @ errors
    q = columns.take_along_dim(order.argsort(-1)[..., None], -2).mT  # [..., N, K], columns where they were
    return {"weight": pack_int4(q.to(torch.uint8)), "scales": scales, "zeros": zeros}


def fit_range(groups: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros [..., G] for groups [..., G, group_size]: those with the least sum of squared errors weighted by
    importance. Tried are ranges shrunk in several degrees; rounding and least squares, in turn, improve each."""
    best_loss, best_scales, best_zeros = torch.inf, 0, 0
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6):
        scales, zeros = range_of(groups * shrink)
        for _ in range(4):
            scale, zero = scales.float()[..., None], zeros.float()[..., None] / 16
            q = (groups / scale + zero).round_().clamp_(0, 15)
            loss = ((groups - (q - zero) * scale).square_() * importance).sum(-1)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scales = torch.where(better, scales, best_scales)
            best_zeros = torch.where(better, zeros, best_zeros)
            scales, zeros = least_squares(groups, q, importance, scales)
    return best_scales, best_zeros


def least_squares(groups: Tensor, q: Tensor, importance: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and zeros [..., G] under which (q - zero) * scale comes closest to groups, for fixed q. Where that is
    no positive scale, as when all q are the same, the given scales stay."""
    total = importance.sum(-1)
    weighted = q * importance
    q_mean, w_mean = weighted.sum(-1) / total, (groups * importance).sum(-1) / total
    covariance = (weighted * groups).sum(-1) - total * q_mean * w_mean
    variance = (weighted * q).sum(-1) - total * q_mean.square()
    slope = covariance / variance.clamp(min=1e-12 * total)
    scales = torch.where(slope > 0, slope, scales.float()).to(torch.bfloat16)
    return scales, to_zeros(q_mean - w_mean / scales.float())
