"""Writes model.pth from tensors with Hugging Face's names for Llama. Both converters end with this.

    convert(Path("model.pth"), config, tensors, read)

It renames tensors and stacks those that are always used together: q, k and v; gate and up; the experts of a layer. Only
one tensor is in memory at a time. This file has no command line.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import save_checkpoint
from config import ModelConfig, UsageError
from model import empty_model

# Our module -> Hugging Face's modules, whose weights are concatenated along dim 0 to ours
HF_SOURCES = {
    "embed_tokens": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "lm_head": ["lm_head"],
    # In a layer: our names begin with "layers.3.", theirs with "model.layers.3."
    "attention_norm": ["input_layernorm"],
    "attention": ["self_attn"],  # its sinks
    "attention.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.o_proj": ["self_attn.o_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "post_attention_norm": ["post_attention_norm"],
    "ffn_norm": ["post_attention_layernorm"],
    "post_ffn_norm": ["post_ffn_norm"],
    "feed_forward.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "feed_forward.down_proj": ["mlp.down_proj"],
}
# For a mixture of experts. Our tensor holds all experts; {e} is an expert's number.
MOE_SOURCES = HF_SOURCES | {
    "feed_forward.router": ["mlp.gate"],
    "feed_forward.gate_up_proj": ["mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"],
    "feed_forward.down_proj": ["mlp.experts.{e}.down_proj"],
}
COMPUTED = re.compile(r"(inv_freq|freqs_cos|freqs_sin)$")  # tables of RoPE in some checkpoints; we compute them
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

HFTensors = dict[str, Tensor]  # by Hugging Face's names
TensorReader = Callable[[str], Tensor]  # Hugging Face's name of a tensor -> the tensor with its data


@dataclass
class TensorPlan:
    """One of our tensors, and the tensors of Hugging Face whose concatenation along dim 0 it is."""

    shape: torch.Size
    dtype: torch.dtype
    sources: list[str]


def convert(path: Path, config: ModelConfig, tensors: HFTensors, read: TensorReader):
    """Writes model.pth. Of tensors only names, shapes and dtypes count: they may be on the meta device. read(name)
    gives the data. Raises UsageError naming a tensor that is missing, left over, of the wrong shape or of a dtype other
    than float32, float16 and bfloat16."""
    if config.tie_embeddings and HEAD in tensors and EMBEDDING in tensors:
        if not torch.equal(read(HEAD), read(EMBEDDING)):  # whatever config.json says; transformers takes the head, too
            config = replace(config, tie_embeddings=False)
    plans = plan_tensors(config, tensors)
    used = {source for plan in plans.values() for source in plan.sources}
    if config.tie_embeddings:
        used.add(HEAD)
    left_over = [name for name in tensors if name not in used and not COMPUTED.search(name)]
    if left_over:
        what = f"the checkpoint's tensor {min(left_over)} has no place in this model"
        raise UsageError(f"{what} ({len(left_over)} left over)")
    shapes = {name: (plan.shape, plan.dtype) for name, plan in plans.items()}
    save_checkpoint(path, config, shapes, stack_tensors(plans, read))


def write_folder(
    folder: Path, config: ModelConfig, tensors: HFTensors, read: TensorReader, files: dict[str, bytes | None]
):  # fmt: skip
    """Writes model.pth and files to folder; a file that is None is removed. model.pth gets its name last: where it is,
    its tokenizer is too. Raises UsageError, as convert does."""
    unnamed = folder / "model.pth.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        convert(unnamed, config, tensors, read)
        for name, data in files.items():
            if data is None:
                (folder / name).unlink(missing_ok=True)
                continue
            (folder / f"{name}.tmp").write_bytes(data)
            os.replace(folder / f"{name}.tmp", folder / name)
        os.replace(unnamed, folder / "model.pth")
    except OSError as e:
        raise UsageError(f"cannot write to {folder}: {e.strerror}") from None
    finally:
        unnamed.unlink(missing_ok=True)


def plan_tensors(config: ModelConfig, tensors: HFTensors) -> dict[str, TensorPlan]:
    """A plan for every tensor of our checkpoint. Raises UsageError if tensors lack what it needs."""
    try:
        one_layer = empty_model(config.with_layers(1)).state_dict()  # the shapes are the same in every layer
    except RuntimeError as e:
        raise UsageError(f"no model has the sizes of this config: {str(e).splitlines()[0]}") from None
    if config.tie_embeddings:
        del one_layer["lm_head.weight"]
    plans = {}
    for i in range(config.n_layers):
        for name, tensor in one_layer.items():
            name = name.replace("layers.0.", f"layers.{i}.")
            if name not in plans:
                sources = source_shapes(name, tensor.shape, config)
                plans[name] = TensorPlan(tensor.shape, common_dtype(sources, tensors), list(sources))
    return plans


def source_shapes(name: str, shape: torch.Size, config: ModelConfig) -> dict[str, list[int]]:
    """The names and shapes of Hugging Face's tensors whose concatenation along dim 0 is our tensor called name. Ours is
    a vector [N] or a matrix [N, K]; with experts it is [E, N] or [E, N, K], and theirs are those of each expert."""
    layer, module, kind = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(weight|bias|sinks)", name).groups()
    modules = (MOE_SOURCES if config.moe else HF_SOURCES)[module]
    n_experts = 1
    if "{e}" in modules[0]:
        n_experts, *shape = shape
    n_rows, *n_columns = shape
    if module == "attention.qkv_proj":
        rows = [n_heads * config.head_dim for n_heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    elif module == "feed_forward.router" and config.moe.n_shared_experts:
        modules, rows = [*modules, "mlp.shared_expert_gate"], [config.moe.n_experts, 1]
    else:
        rows = [n_rows // len(modules)] * len(modules)
    prefix = f"model.{layer}" if layer else ""
    shapes = {}
    for e in range(n_experts):
        for source, n in zip(modules, rows, strict=True):
            shapes[f"{prefix}{source.format(e=e)}.{kind}"] = [n, *n_columns]
    return shapes


def common_dtype(sources: dict[str, list[int]], tensors: HFTensors) -> torch.dtype:
    """The narrowest dtype in which no source loses anything. Raises UsageError for one that is missing or wrong."""
    dtype = None
    for name, shape in sources.items():
        if name not in tensors:
            raise UsageError(f"the checkpoint has no tensor {name}")
        tensor = tensors[name]
        if list(tensor.shape) != shape:
            raise UsageError(f"tensor {name} is {list(tensor.shape)}; the config makes it {shape}")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UsageError(f"tensor {name} is {tensor.dtype}, not float32, float16 or bfloat16")
        dtype = torch.promote_types(dtype or tensor.dtype, tensor.dtype)
    return dtype


def stack_tensors(plans: dict[str, TensorPlan], read: TensorReader) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, one at a time."""
    for name, plan in plans.items():
        ours = torch.empty(plan.shape, dtype=plan.dtype)
        start = 0
        for source in plan.sources:
            theirs = read(source).detach()
            rows = ours.flatten(0, 1) if ours.dim() > theirs.dim() else ours  # [E, N, ...] -> [E N, ...]
            rows[start : start + len(theirs)].copy_(theirs)
            start += len(theirs)
        yield name, ours
