"""Load a model: read its checkpoint, check it, keep this rank's shard, move it to the device, pack it for the kernels.

    model, tokenizer = load("checkpoints/SmolLM2-135M-Instruct/model.pth")
    model = load_model(path, device="cuda", dtype=torch.float16)

A checkpoint is memory-mapped. Its tensors are converted and moved one by one, and after each the file's pages are
released, so that no tensor is in memory twice. A tensor that needs no change stays in the mapped file.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import tp
from checkpoint import read_checkpoint
from config import UsageError
from kernels.formats import Tensors, format_of
from machine import check_memory, drop_pages
from model import Transformer, empty_model
from steps import OOM_HINT
from tokenizer import Tokenizer, load_tokenizer


def load(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    use_kernels: bool = True,
    sharded: bool = True,
) -> tuple[Transformer, Tokenizer]:
    """load_model, and the tokenizer from the same folder. The tokenizer's end tokens become the model's, too. Raises
    UsageError if the tokenizer has more tokens than the model, special tokens aside."""
    model = load_model(path, device, dtype, use_kernels, sharded)
    tokenizer = load_tokenizer(Path(path).parent)
    vocab_size = model.config.vocab_size
    tokenizer.drop_special_tokens(vocab_size)
    n_tokens = tokenizer.vocab_size
    if n_tokens > vocab_size:
        raise UsageError(f"{path}: the tokenizer's {n_tokens} tokens exceed the model's {vocab_size}")
    eos_ids = dict.fromkeys([*model.config.eos_ids, *tokenizer.end_ids()])
    model.config = replace(model.config, eos_ids=tuple(eos_ids))
    return model, tokenizer


def load_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    use_kernels: bool = True,
    sharded: bool = True,
) -> Transformer:
    """Reads the model in path onto device, in dtype, ready for inference. Raises UsageError.

    use_kernels: run on this project's kernels where they are available; False: plain PyTorch.
    sharded: with several ranks, this rank gets its shard (tp.py); False: it gets the whole model."""
    path, device = Path(path), torch.device(device)
    config, quantization, tensors = read_checkpoint(path)
    model = empty_model(config, format_of(quantization))
    is_tied = config.tie_embeddings and quantization is None and "lm_head.weight" not in tensors
    check_tensors(path, model, tensors, is_tied)
    n_ranks = tp.world_size() if sharded else 1
    if use_kernels and device.type == "cpu":  # packing copies all weights
        n_bytes = sum(tensor.numel() * dtype_of(name, tensor, dtype).itemsize for name, tensor in tensors.items())
        check_memory(n_bytes // n_ranks, f"{path}, in {dtype},", OOM_HINT)

    if is_tied and n_ranks > 1:  # each rank has all of the embedding, but only some rows of the head
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
        is_tied = False

    shard = tp.shard(model, device) if n_ranks > 1 else None
    moved = move_tensors(tensors, device, dtype, shard)
    if is_tied:
        moved["lm_head.weight"] = moved["embed_tokens.weight"]
    model.load_state_dict(moved, assign=True)
    if is_tied:
        model.lm_head.weight = model.embed_tokens.weight
    model.embed_scale = torch.tensor(model.embed_scale).to(dtype).item()  # rounded as in transformers
    model.eval().requires_grad_(False)
    if use_kernels:
        model.pack_weights(mapped=True)
    if n_ranks > 1:
        tp.insert_collectives(model)
    return model


def check_tensors(path: Path, model: Transformer, tensors: Tensors, is_tied: bool):
    """Raises UsageError unless the checkpoint in path holds exactly the tensors that model needs. is_tied: the head is
    the embedding, so the checkpoint holds no tensor for it."""
    needed = model.state_dict()
    if is_tied:
        del needed["lm_head.weight"]
    for name in needed.keys() | tensors.keys():
        if name not in needed or name not in tensors or not fits(name, tensors[name], needed[name]):
            raise UsageError(f"{path}: tensor {name} is missing, left over or of the wrong shape; convert it again")


def fits(name: str, tensor: Tensor, needed: Tensor) -> bool:
    """Whether a checkpoint's tensor has the shape and, after conversion, the dtype of the needed one."""
    fits_dtype = tensor.dtype == needed.dtype if is_quantized(name, needed) else tensor.is_floating_point()
    return fits_dtype and tensor.shape == needed.shape


def is_quantized(name: str, tensor: Tensor) -> bool:
    """Whether a tensor belongs to a quantized weight. Such a tensor keeps its dtype, whatever the model's is. A format
    that stores weights in a floating-point dtype, such as fp8, needs a case here."""
    return not tensor.is_floating_point() or name.endswith(".scales")


def dtype_of(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a checkpoint's tensor gets in a model of dtype."""
    return tensor.dtype if is_quantized(name, tensor) else dtype


def move_tensors(
    tensors: Tensors, device: torch.device, dtype: torch.dtype, shard: Callable[[str, Tensor], Tensor] | None
) -> Tensors:
    """A checkpoint's tensors (with shard: this rank's part of each) on device, in the model's dtypes."""
    moved = {}
    for name, tensor in tensors.items():
        kept = tensor if shard is None else shard(name, tensor)
        moved[name] = kept.to(device, dtype_of(name, tensor, dtype))
        if moved[name] is not tensor:
            drop_pages(tensor)
    return moved
