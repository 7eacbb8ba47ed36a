"""Converts a GGUF file to model.pth and a tokenizer, for scripts/convert_gguf.py and checkpoint_path.py.

    convert_gguf(Path("model.Q4_1.gguf"), Path("checkpoints/model"))
"""

import re
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from config import ModelConfig
from converters.canonical_checkpoint import CanonicalCheckpoint, SourceTensors, TensorReader
from converters.families import FAMILIES
from converters.gguf_config import (
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    Architecture,
    find_architecture,
    read_gguf_config,
)
from converters.gguf_file import GGUFTensor, read_gguf
from converters.gguf_quantized import GGUFQuantizer
from converters.gguf_tokenizer import make_tokenizer_files
from converters.hf_tensors import kv_starts, reorder_heads, rope_row_order
from converters.source_files import describe_sources, find_gguf_parts, record_sources
from converters.write_model import Announcement, plan_stacks, write_model
from text.tokenizer_files import TOKENIZER_FILES
from utils.errors import UsageError, convert_type_errors

GGUF_TO_CANONICAL = {  # name of a module in a GGUF -> canonical name (canonical_checkpoint.py)
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "pre_attention_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_sinks": "self_attn",
    "post_attention_norm": "post_attention_norm",
    "ffn_norm": "pre_ffn_norm",
    "post_ffw_norm": "post_ffn_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # the parts of attn_qkv, stacked along the rows
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def convert_gguf(
    file: Path, folder: Path, dtype: torch.dtype = torch.bfloat16, keep: bool = False,
    announce: Announcement | None = None,
) -> Path:
    """Writes model.pth, with weights in dtype, and the tokenizer to folder. Returns the path of model.pth.

    keep: leave quantized weights quantized, put the format into the name of model.pth, and print a report.
    announce: see write_model."""
    if file.is_dir():
        raise UsageError(f"{file} is a folder; give a .gguf file")
    if not file.is_file():
        raise UsageError(f"{file} does not exist")
    sources = describe_sources(find_gguf_parts(file))
    metadata, stored = read_gguf(file)
    with convert_type_errors(f"{file} lacks metadata, or", Exception):  # tokenizers raises bare Exception
        config = read_gguf_config(metadata, stored)
        architecture = find_architecture(metadata)
        renamed, row_order = rename_gguf_tensors(stored, config, architecture)
        tensors, read = dequantize_gguf_tensors(renamed, row_order, dtype)
        kept = GGUFQuantizer(plan_stacks(config, tensors), renamed, row_order) if keep else None
        tokenizer = make_tokenizer_files(metadata)
    files = dict.fromkeys(TOKENIZER_FILES) | tokenizer
    checkpoint = CanonicalCheckpoint(config, tensors, read, files)
    if kept is not None:
        checkpoint.tensors, checkpoint.read = tensors | kept.weights, kept.reader(read)
    path = write_model(folder / "model.pth", checkpoint, announce)
    if kept is not None:
        print(*kept.report(), sep="\n")
    record_sources(folder, sources, path)
    return path


# ---- From tensors of a GGUF to canonical ones -----------------------------------------------------------------------


def rename_gguf_tensors(
    stored: dict[str, GGUFTensor], config: ModelConfig, architecture: Architecture
) -> tuple[dict[str, GGUFTensor], Tensor | None]:
    """Returns the tensors by canonical names, and the row order of their heads (see rope_row_order)."""
    renamed: dict[str, GGUFTensor] = {}
    for name, tensor in stored.items():
        if name not in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS):
            renamed |= split_tensor(name, tensor, config, architecture)
    is_interleaved = architecture.interleaved_rope or FAMILIES[architecture.family].interleaved_rope
    return renamed, rope_row_order(config, is_interleaved)


def dequantize_gguf_tensors(
    renamed: dict[str, GGUFTensor], row_order: Tensor | None, dtype: torch.dtype
) -> tuple[SourceTensors, TensorReader]:
    """Returns the tensors (on the meta device) and the read function of a CanonicalCheckpoint. The norms of Gemma need
    no change, because a GGUF stores 1 + w."""
    tensors = {name: torch.empty(tensor.shape(), dtype=dtype, device="meta") for name, tensor in renamed.items()}

    def read(name: str) -> Tensor:
        packed = renamed[name]
        try:
            values = gguf.dequantize(packed.data, packed.ggml_type)
        except NotImplementedError:
            raise UsageError(f"{name} is {packed.ggml_type.name}, which the gguf package cannot dequantize") from None
        tensor = torch.from_numpy(np.require(values, requirements="W"))  # writable, or PyTorch warns
        return reorder_heads(name, tensor, row_order)

    return tensors, read


def split_tensor(
    name: str, tensor: GGUFTensor, config: ModelConfig, architecture: Architecture
) -> dict[str, GGUFTensor]:
    """Returns the canonical tensors in a tensor of a GGUF, by name. These are one tensor, several stacked along the
    rows, or one for each expert."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    layer, module, kind = match.groups() if match else (None, "", None)
    names = GGUF_TO_CANONICAL | architecture.names
    if module == "attn_qkv":
        parts = zip(QKV, np.split(tensor.data, kv_starts(config)), strict=True)
    elif module == "ffn_up" and architecture.ffn_up_has_gate:
        parts = zip(GATE_UP, np.array_split(tensor.data, 2), strict=True)
    elif module in names:
        parts = [(names[module], tensor.data)]
    else:
        raise UsageError(f"the GGUF's tensor {name} has no place in this model")
    prefix = "" if layer is None else f"model.layers.{layer}."
    suffix = "sinks" if module == "attn_sinks" else kind
    renamed = {}
    for canonical_module, rows in parts:
        experts = rows if "{e}" in canonical_module else [rows]
        for e, data in enumerate(experts):
            renamed[f"{prefix}{canonical_module.format(e=e)}.{suffix}"] = GGUFTensor(tensor.ggml_type, data)
    return renamed
