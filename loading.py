"""A model from its file: read, checked, cut for this rank, moved to its device, and put on the kernels.

    model, tokenizer = load("checkpoints/SmolLM2-135M-Instruct/model.pth")
    model = load_model(path, device="cuda", dtype=torch.float16)

A checkpoint is memory-mapped. Its tensors are converted and moved one by one, and the file's pages let go, so that no
tensor is in memory twice; on a CPU those that need no change stay where they are.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import tp
from checkpoint import read_checkpoint
from config import ModelConfig, UsageError
from kernels import enable as enable_kernels
from kernels.formats import Tensors, format_of
from machine import drop_pages, need_memory
from model import Transformer
from steps import OOM_HINT
from tokenizer import Tokenizer, load_tokenizer


def load(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    kernels: bool = True,
    sharded: bool = True,
) -> tuple[Transformer, Tokenizer]:
    """load_model, and the tokenizer beside the model. Raises UsageError if the one does not fit the other."""
    model = load_model(path, device, dtype, kernels, sharded)
    tokenizer = load_tokenizer(Path(path).parent)
    n_tokens, vocab_size = tokenizer.vocab_size, model.config.vocab_size
    if n_tokens > vocab_size:
        raise UsageError(f"{path}: the tokenizer's {n_tokens} tokens exceed the model's {vocab_size}")
    return model, tokenizer


def load_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    kernels: bool = True,
    sharded: bool = True,
) -> Transformer:
    """The model in path, on device, in dtype, in inference mode. kernels: on this project's own, where they run.
    sharded: of several ranks each gets its part (tp.py); else each has a model of its own. Raises UsageError."""
    path, device = Path(path), torch.device(device)
    config, quantization, tensors = read_checkpoint(path)
    model = empty_model(config, quantization)
    is_tied = config.tie_embeddings and quantization is None and "output.weight" not in tensors
    check_tensors(path, model, tensors, is_tied)
    n_ranks = tp.world_size() if sharded else 1
    if kernels and device.type == "cpu":  # they copy all weights
        n_bytes = sum(tensor.numel() * dtype_of(name, tensor, dtype).itemsize for name, tensor in tensors.items())
        need_memory(n_bytes // n_ranks, f"{path}, in {dtype},", OOM_HINT)

    shard = None
    if n_ranks > 1:
        shard = tp.shard(model, device)
        if is_tied:  # of the head each rank has some rows, of the embedding all
            tensors["output.weight"] = tensors["tok_embeddings.weight"]
            is_tied = False
    fill(model, move_tensors(tensors, device, dtype, shard), is_tied)
    model.eval().requires_grad_(False)
    if kernels:
        enable_kernels(model, mapped=True)
    if n_ranks > 1:
        tp.insert_collectives(model)
    return model


def empty_model(config: ModelConfig, quantization: dict | None) -> Transformer:
    """A model on the meta device, whose tensors have the shapes and types of a checkpoint's."""
    with torch.device("meta"):
        model = Transformer(config)
    for _, linear in model.linears():
        linear.set_format(format_of(quantization))
    return model


def check_tensors(path: Path, model: Transformer, tensors: Tensors, is_tied: bool):
    """Raises UsageError unless tensors, of the checkpoint in path, are those that model needs. is_tied: the embedding
    serves as the head too."""
    needed = model.state_dict()
    if is_tied:
        del needed["output.weight"]
    for name in needed.keys() | tensors.keys():
        if name not in needed or name not in tensors or not fits(name, tensors[name], needed[name]):
            raise UsageError(f"{path}: tensor {name} is missing, left over or of the wrong shape; convert it again")


def fits(name: str, tensor: Tensor, needed: Tensor) -> bool:
    """Whether a checkpoint's tensor can stand for the needed one."""
    fits_dtype = tensor.dtype == needed.dtype if is_quantized(name, needed) else tensor.is_floating_point()
    return fits_dtype and tensor.shape == needed.shape


def is_quantized(name: str, tensor: Tensor) -> bool:
    """Whether a tensor belongs to a quantized weight, and so keeps its type whatever the model's is. A format whose
    weights are of a floating type, as fp8's, must be named here."""
    return not tensor.is_floating_point() or name.endswith(".scales")


def dtype_of(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which type a tensor of a checkpoint is loaded into a model of dtype."""
    return tensor.dtype if is_quantized(name, tensor) else dtype


def move_tensors(
    tensors: Tensors, device: torch.device, dtype: torch.dtype, shard: Callable[[str, Tensor], Tensor] | None
) -> Tensors:
    """A checkpoint's tensors, or this rank's part of each, where and as the model wants them."""
    moved = {}
    for name, tensor in tensors.items():
        part = tensor if shard is None else shard(name, tensor)
        moved[name] = part.to(device, dtype_of(name, tensor, dtype))
        if moved[name] is not tensor:
            drop_pages(tensor)
    return moved


def fill(model: Transformer, tensors: Tensors, is_tied: bool):
    """Puts tensors in place of those on the meta device."""
    if is_tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    model.load_state_dict(tensors, assign=True)
    if is_tied:
        model.output.weight = model.tok_embeddings.weight  # one parameter: what moves the one, moves the other
