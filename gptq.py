"""GPTQ, arXiv:2210.17323: rounds weights to int4 so that the layers' outputs on a calibration text change little.

    python quantize.py --checkpoint_path checkpoints/M/model.pth --mode int4-gptq --calibration_text book.txt

Layers are quantized in order, so each one is calibrated on the outputs of already quantized layers. The Hessian H of a
layer is the sum of x x^T over all its inputs x. The columns of the weight are rounded one by one. Changes of the other
columns compensate each rounding error.

Unlike in the paper, groups are static: every group gets a scale and a zero before any column is rounded. Of several
candidates, the pair (scale, zero) with the least rounding error wins, weighted by diag(H). So act_order changes the
order of rounding alone.

quantize.py calls quantize_model. converters/hf_quantized_integers.py reads GPTQ checkpoints of other projects.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.scoring import split_windows
from formats import Int4, Tensors
from formats.base import pack_nibbles
from formats.integers import choose_qparams, decode_zeros, encode_zeros, quantize_affine, split_groups
from layers.experts import ExpertsGateUp
from layers.kv_cache import KVCache, LayerCache
from layers.linear import LinearBase, quantizable_linears
from model import Transformer
from text.tokenizer import Tokenizer
from utils.errors import UsageError

MAX_WEIGHTS_PER_PASS = 2**24  # weights rounded at a time; bounds the memory of the float32 copies


@dataclass(frozen=True)
class GPTQConfig:
    group_size: int
    percdamp: float  # adds percdamp * mean(diag(H)) to diag(H), so that H has an inverse
    blocksize: int  # columns rounded before the columns after them compensate the errors
    act_order: bool  # whether the columns with the largest inputs are rounded first


@torch.inference_mode()
def quantize_model(
    model: Transformer, windows: Tensor, device: torch.device, config: GPTQConfig
) -> Iterator[tuple[str, Tensors]]:
    """Quantizes the linear layers of model, calibrated on windows [n, T] of tokens. Yields (name, tensors).

    model: on the CPU. Its blocks move to device one by one, and then to the meta device, to free the memory."""
    start_pos = torch.zeros(1, dtype=torch.long, device=device)
    # One cache serves all windows, because every window begins at position 0
    kv_cache = KVCache(model, 1, windows.shape[1])
    block_inputs = [model.embed(window[None]).to(device) for window in windows]  # each [1, T, dim]
    for i, block in enumerate(model.layers):
        block.to(device)
        cache = LayerCache(*(t.to(device) for t in kv_cache.layers[i]))
        hessians = compute_hessians(model, i, block_inputs, start_pos, cache)
        for name in list(hessians):
            hessian = hessians.pop(name)  # frees the Hessian's memory before the next layer
            yield name, quantize_linear(name, model.get_submodule(name), hessian, config)
        block_inputs = [block(x, start_pos, cache) for x in block_inputs]
        block.to("meta")
    model.norm.to(device)
    model.lm_head.to(device)
    hessian = sum(sum_of_outer_products(model.norm(x)) for x in block_inputs)
    yield "lm_head", quantize_linear("lm_head", model.lm_head, hessian, config)


def quantize_linear(name: str, linear: LinearBase, hessian: Tensor, config: GPTQConfig) -> Tensors:
    """Returns the int4 tensors of linear, on the CPU. Also rounds the weight in linear: the inputs of later layers must
    include the rounding error."""
    check_finite_weight(name, linear.weight)
    is_zero = hessian.diagonal(dim1=-2, dim2=-1) == 0  # [K], for experts [E, K]
    n_unseen = is_zero.all(-1).sum().item()
    if n_unseen:
        why = f"{n_unseen} of the experts got no token and are" if linear.n_experts else "all inputs are 0, so it is"
        print(f"{name}: {why} rounded to nearest", file=sys.stderr)
    tensors = gptq_quantize(linear.weight, hessian, config)
    linear.set_tensor("weight", Int4(config.group_size).dequantize(tensors, linear.weight.dtype))
    return {tensor_name: tensor.cpu() for tensor_name, tensor in tensors.items()}


def check_finite_weight(name: str, weight: Tensor):
    if not weight.isfinite().all():
        raise UsageError(f"{name}.weight holds NaN or infinite weights")


def compute_hessians(
    model: Transformer, i: int, block_inputs: list[Tensor], start_pos: Tensor, cache: LayerCache
) -> dict[str, Tensor]:
    """Returns the Hessians of the linear layers in block i, by name: [K, K], or [E, K, K] for experts.

    block_inputs: [1, T, dim] for each window."""
    sums: dict[str, Tensor] = {}
    hooks = []

    def add_inputs(name: str, linear: LinearBase, args: tuple, kwargs: dict):
        (x,), norm = args, kwargs.get("norm")  # the forwards of layers/ take everything but x by keyword
        if norm is not None:
            x = norm(x)
        if linear.n_experts is None:
            sums[name] += sum_of_outer_products(x)
            return
        topk_ids = kwargs["topk_ids"]  # [B, T, top_k]
        if isinstance(linear, ExpertsGateUp):  # all experts of a token have the same input
            x = x[..., None, :].expand(*topk_ids.shape, -1)  # [B, T, top_k, dim]
        for e in topk_ids.unique().tolist():
            sums[name][e] += sum_of_outer_products(x[topk_ids == e])

    for name, linear in quantizable_linears(model):
        if not name.startswith(f"layers.{i}."):
            continue
        experts = () if linear.n_experts is None else (linear.n_experts,)
        sums[name] = torch.zeros(*experts, linear.in_features, linear.in_features, device=linear.weight.device)
        hooks.append(linear.register_forward_pre_hook(partial(add_inputs, name), with_kwargs=True))
    for x in block_inputs:
        model.layers[i](x, start_pos, cache)
    for hook in hooks:
        hook.remove()
    return sums


def sum_of_outer_products(x: Tensor) -> Tensor:
    """Returns the sum of x x^T over all vectors in x [..., K]: [K, K], float32."""
    x = x.flatten(0, -2).float()
    return x.T @ x


# ---- Calibration text -----------------------------------------------------------------------------------------------


def calibration_windows(tokenizer: Tokenizer, text: str, length: int, limit: int) -> Tensor:
    """Returns at most limit windows of length tokens, spread evenly over text: [n, length]."""
    windows = [window for window in split_windows(tokenizer, text, length) if len(window) == length]
    if not windows:
        short = f"the calibration text is shorter than one window of {length} tokens"
        raise UsageError(f"{short}; give a longer text, or a smaller --calibration_seq_length")
    step = max(1, len(windows) / limit)
    return torch.tensor([windows[int(i * step)] for i in range(min(limit, len(windows)))])


# ---- Rounding: W [N, K] has a row for each output and a column for each input ---------------------------------------


def gptq_quantize(w: Tensor, hessian: Tensor, config: GPTQConfig) -> Tensors:
    """Rounds w [..., N, K] so that (w - rounded) x is small. hessian [..., K, K]: the sum of x x^T over inputs x."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).clone()  # [..., K]
    mean = diagonal.mean(-1, keepdim=True)
    mean[mean == 0] = 1  # without inputs, all columns have the same importance
    damping = (config.percdamp * mean).expand_as(diagonal)
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
    chunks = w.split(max(1, MAX_WEIGHTS_PER_PASS * w.shape[-2] // w.numel()), dim=-2)
    quantized = [gptq_quantize_rows(rows.float(), diagonal + damping, order, upper, config) for rows in chunks]
    return {name: torch.cat([tensors[name] for tensors in quantized], dim=-2) for name in quantized[0]}


def gptq_quantize_rows(w: Tensor, diagonal: Tensor, order: Tensor, upper: Tensor, config: GPTQConfig) -> Tensors:
    """Does gptq_quantize for some rows of w.

    diagonal [..., K]: the damped Hessian's, in the order of w's columns.
    order [..., K]: the columns in the order of rounding.
    upper [..., K, K]: the upper Cholesky factor of the inverse Hessian, in the order of rounding."""
    group_size = config.group_size
    k = w.shape[-1]
    padded = F.pad(diagonal[..., None, :], (0, -k % group_size))  # the padding of a short last group has importance 0
    importance = padded.unflatten(-1, (-1, group_size))
    scales, zeros = fit_scales_and_zeros(split_groups(w, group_size), importance)  # [..., N, n_groups]

    # Columns in the order of rounding, [..., K, N]: then a column is contiguous
    group_ids = order[..., None, :] // group_size
    column_scales = scales.float().take_along_dim(group_ids, -1).mT.contiguous()
    column_zeros = decode_zeros(zeros).take_along_dim(group_ids, -1).mT.contiguous()
    columns = w.take_along_dim(order[..., None, :], -1).mT.contiguous()

    for start in range(0, k, config.blocksize):
        stop = min(start + config.blocksize, k)
        errors = torch.empty_like(columns[..., start:stop, :])
        for i in range(start, stop):
            column, scale, zero = columns[..., i, :], column_scales[..., i, :], column_zeros[..., i, :]  # [..., N]
            q = quantize_affine(column, scale, zero)
            error = (column - (q - zero) * scale) / upper[..., i, i, None]
            # Correct the later columns of this block now, and those after the block together
            columns[..., i + 1 : stop, :] -= upper[..., i, i + 1 : stop, None] * error[..., None, :]
            columns[..., i, :], errors[..., i - start, :] = q, error
        columns[..., stop:, :] -= upper[..., start:stop, stop:].mT @ errors
    q = columns.take_along_dim(order.argsort(-1)[..., None], -2).mT  # [..., N, K], in w's order
    return {"weight": pack_nibbles(q.to(torch.uint8)), "scales": scales, "zeros": zeros}


def fit_scales_and_zeros(groups: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the scales and zeros [..., n_groups] that round groups [..., n_groups, group_size] with the least sum of
    squared errors, weighted by importance. The first candidates span the range of a group, shrunk by a factor. Each is
    improved in several steps: round the group, then fit scale and zero to the rounded numbers."""
    best_loss, best_scales, best_zeros = torch.inf, 0, 0
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6):
        scales, zeros = choose_qparams(groups * shrink)
        for _ in range(4):
            scale, zero = scales.float()[..., None], decode_zeros(zeros)[..., None]
            q = quantize_affine(groups, scale, zero)
            loss = ((groups - (q - zero) * scale).square_() * importance).sum(-1)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_scales = torch.where(better, scales, best_scales)
            best_zeros = torch.where(better, zeros, best_zeros)
            scales, zeros = least_squares(groups, q, importance, scales)
    return best_scales, best_zeros


def least_squares(groups: Tensor, q: Tensor, importance: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the scales and zeros [..., n_groups] for which (q - zero) * scale is closest to groups, with q fixed. A
    group without a positive fit, such as one whose q are all equal, keeps the scale in scales."""
    total = importance.sum(-1)
    weighted = q * importance
    q_mean, w_mean = weighted.sum(-1) / total, (groups * importance).sum(-1) / total
    covariance = (weighted * groups).sum(-1) - total * q_mean * w_mean
    variance = (weighted * q).sum(-1) - total * q_mean.square()
    slope = covariance / variance.clamp(min=1e-12 * total)
    scales = torch.where(slope > 0, slope, scales.float()).to(torch.bfloat16)
    return scales, encode_zeros(q_mean - w_mean / scales.float())
