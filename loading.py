"""Loads a model: reads and checks a checkpoint, takes this rank's shard, moves it to the device and packs it for the
kernels.

    model, tokenizer = load("checkpoints/SmolLM2-135M-Instruct/model.pth")
    model = load_model(path, device="cuda", dtype=torch.float16)

A checkpoint is memory-mapped. Loading converts and moves one tensor after the other. It then releases the file's pages
of each, because no tensor should be in memory twice. A tensor that needs no change stays in the mapped file.

Read load_model first. The other functions are its steps, in order.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import tp
from checkpoint import empty_model, read_checkpoint, with_tied_head
from formats import QuantizationConfig
from layers import collectives
from layers.linear import quantizable_linears
from layers.packing import pack_model
from model import DTYPES, Transformer
from text.tokenizer import Tokenizer, load_tokenizer
from utils.errors import UsageError
from utils.machine import check_memory, drop_pages


def load(path: Path | str, **options) -> tuple[Transformer, Tokenizer]:
    """Returns the model in path and the tokenizer from the same folder. Adds the tokenizer's end tokens to the model's.
    Raises UsageError if the tokenizer, without special tokens, has more tokens than the model.

    options: the arguments of load_model."""
    model = load_model(path, **options)
    tokenizer = load_tokenizer(Path(path).parent)
    vocab_size = model.config.vocab_size
    tokenizer.drop_special_tokens(vocab_size)
    n_tokens = tokenizer.vocab_size
    if n_tokens > vocab_size:
        raise UsageError(f"{path}: the tokenizer's {n_tokens} tokens exceed the model's {vocab_size}")
    eos_ids = dict.fromkeys([*model.config.eos_ids, *tokenizer.eos_ids()])
    model.config = replace(model.config, eos_ids=tuple(eos_ids))
    return model, tokenizer


def load_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    use_kernels: bool = True,
    sharded: bool = True,
) -> Transformer:
    """Reads the model in path onto device, ready for inference.

    dtype: of activations and of all tensors but those of quantized weights.
    use_kernels: whether to use this project's kernels, if the device has them.
    sharded: whether to read only this rank's shard, if there are several ranks (tp.py)."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be {DTYPES[0]}, {DTYPES[1]} or {DTYPES[2]}, not {dtype!r:.80}")
    path = Path(path)
    device = torch.device(device)
    config, quantization, tensors = read_checkpoint(path)
    tensors = with_tied_head(config, tensors)
    model = empty_model(config, QuantizationConfig.from_dict(quantization))
    quantized_names = quantized_tensor_names(model)
    check_tensors(path, model, tensors, quantized_names)
    check_input_orders(path, tensors)

    n_ranks = collectives.world_size() if sharded else 1
    if use_kernels and device.type == "cpu":  # packing copies all weights
        check_memory(loaded_bytes(tensors, dtype, quantized_names) // n_ranks, f"{path}, in {dtype},")

    shard_tensor = tp.shard_model(model, device) if n_ranks > 1 else None
    moved = move_tensors(tensors, device, dtype, quantized_names, shard_tensor)
    model.load_state_dict(moved, assign=True)
    model.to(device)  # ALiBi's slopes, which no checkpoint has
    if moved["lm_head.weight"] is moved["embed_tokens.weight"]:  # never with several ranks: only the head is sharded
        model.tie_embedding()
    model.eval().requires_grad_(False)

    if use_kernels:
        pack_model(model, is_mmapped=True)
    if n_ranks > 1:
        tp.insert_collectives(model)
    return model


def quantized_tensor_names(model: Transformer) -> set[str]:
    """The names of the tensors of quantized weights: loading keeps their dtypes."""
    names = {name for name, _ in model.named_buffers() if name.endswith(".input_order")}
    for name, matrix in [("embed_tokens", model.embed_tokens), *quantizable_linears(model)]:
        if matrix.format.is_quantized:
            names |= {f"{name}.{tensor_name}" for tensor_name in matrix.tensors()}
    return names


def check_tensors(path: Path, model: Transformer, tensors: dict[str, Tensor], quantized_names: set[str]):
    """Raises UsageError unless the checkpoint in path holds exactly the tensors that model needs.

    tensors: of the checkpoint, with those of a tied head.
    quantized_names: these tensors must have the model's dtypes. Others may have any floating-point type."""
    needed = model.state_dict()
    for name in sorted(needed.keys() | tensors.keys()):  # embed_tokens before a tied lm_head
        fits = name in needed and name in tensors and tensors[name].shape == needed[name].shape
        if fits and name in quantized_names:
            fits = tensors[name].dtype == needed[name].dtype
        elif fits:
            fits = tensors[name].is_floating_point()
        if not fits:
            raise UsageError(f"{path}: tensor {name} is missing, left over or of the wrong shape; convert it again")


def check_input_orders(path: Path, tensors: dict[str, Tensor]):
    """Raises UsageError unless every input_order contains each input of the layer once."""
    for name, order in tensors.items():
        if name.endswith(".input_order") and not torch.equal(order.sort().values, torch.arange(len(order)).int()):
            raise UsageError(f"{path}: tensor {name} is no order of the layer's {len(order)} inputs; convert it again")


def loaded_bytes(tensors: dict[str, Tensor], dtype: torch.dtype, quantized_names: set[str]) -> int:
    """The bytes of a checkpoint's tensors after move_tensors. A tied head counts once."""
    sizes = {}
    for name, tensor in tensors.items():
        sizes[id(tensor)] = tensor.numel() * (tensor.itemsize if name in quantized_names else dtype.itemsize)
    return sum(sizes.values())


def move_tensors(
    tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype, quantized_names: set[str],
    shard_tensor: tp.ShardFn | None,
) -> dict[str, Tensor]:
    """Moves a checkpoint's tensors to device, and converts them to dtype. Tensors in quantized_names keep their dtypes.
    A tied head gets the embedding's moved tensors, unless it is sharded.

    shard_tensor: the result of tp.shard_model, or None if every tensor stays whole."""
    moved, whole = {}, {}  # whole: id of the checkpoint's tensor -> moved tensor
    for name, tensor in tensors.items():
        shard = tensor if shard_tensor is None else shard_tensor(name, tensor)
        if shard is tensor and id(tensor) in whole:
            moved[name] = whole[id(tensor)]
            continue
        moved[name] = shard.to(device, tensor.dtype if name in quantized_names else dtype)
        if shard is tensor:
            whole[id(tensor)] = moved[name]
        if moved[name] is not tensor:
            drop_pages(tensor)
    return moved
