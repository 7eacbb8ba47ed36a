"""Makes the files that compare_llama_cpp.py measures: one model in this project's formats and in llama.cpp's formats.

    make_model("TinyLlama-1.1B", None, folder / "bf16.pth")
    make_ours(folder)
    make_theirs(files_in(folder), threads)

gguf and llama_cpp are imported only where they are needed.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import read_checkpoint
from config import ModelConfig
from converters.write_model import part_shapes
from formats import Int4, Int8
from layers.rope import rope_frequencies
from quantize import linear_weights, quantize_each, write_quantized
from scripts.benchmarking.compare_speed import PREFILL
from scripts.benchmarking.speed import find_config, save_random_checkpoint
from utils.errors import UsageError

OURS = {"int8": Int8(), "int4.g32": Int4(32)}  # all formats but bf16
THEIRS = {"BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q4_K_M": 15}  # name -> llama.cpp's number of the file type
LLAMA_OPTIONS = (  # the options of ModelConfig that llama.cpp's architecture "llama" supports
    "norm_eps", "qkv_bias", "o_proj_bias", "ffn_bias", "tie_embeddings", "sliding_window", "rope_theta", "rope_scaling",
    "bos_id", "eos_ids",
)


def files_in(folder: Path) -> dict[str, Path]:
    ours = {name: folder / f"{name}.pth" for name in ("bf16", *OURS)}
    return ours | {name: folder / f"{name}.gguf" for name in THEIRS}


# ---- The model ------------------------------------------------------------------------------------------------------


def make_model(config_name: str | None, gguf_file: Path | None, path: Path):
    """Writes bfloat16 weights to path: random weights for config_name, or the weights of gguf_file. Raises UsageError
    for a model that llama.cpp cannot run."""
    if gguf_file:
        from converters.convert_gguf import convert_gguf

        convert_gguf(gguf_file, path.parent, torch.bfloat16)
        config = read_checkpoint(path.with_name("model.pth").rename(path)).config
        check_comparable(config)
    else:
        config = find_config(config_name)
        check_comparable(config)
        check_like_llama(config)
        save_random_checkpoint(path, config, torch.bfloat16)


def check_comparable(config: ModelConfig):
    widths = config.dim, config.ffn_dim, config.q_dim
    if any(width % 32 for width in widths):
        raise UsageError("only models of widths that are multiples of 32 can be compared")
    if config.max_seq_len < PREFILL:
        raise UsageError(f"the model's context is below the {PREFILL} tokens of a prefill")


def check_like_llama(config: ModelConfig):
    """Raises UsageError for a model that write_gguf cannot write for llama.cpp's architecture "llama"."""
    defaults = {field.name: field.default for field in fields(ModelConfig) if field.default is not MISSING}
    other = [name for name in defaults if name not in LLAMA_OPTIONS and getattr(config, name) != defaults[name]]
    if config.rope_scaling is not None and config.rope_scaling.rope_type not in ("linear", "llama3"):
        other.append("rope_scaling")
    if other:
        why = f"this model has {', '.join(other)}"
        raise UsageError(f"without --gguf, only Llama and its like can be compared; {why}")
    if config.sliding_window and config.sliding_window < PREFILL:  # write_gguf leaves the window out
        raise UsageError(f"the model's sliding window is below the {PREFILL} tokens of a prefill")


# ---- This project's formats -----------------------------------------------------------------------------------------


def make_ours(folder: Path):
    """Quantizes bf16.pth to our other formats, as quantize.py does."""
    source = folder / "bf16.pth"
    config, _, tensors = read_checkpoint(source)
    weights = linear_weights(source, config, tensors)
    for name, format in OURS.items():
        quantized = quantize_each(weights, format.quantize)
        write_quantized(folder / f"{name}.pth", config, tensors, weights, quantized, format)


# ---- llama.cpp's formats --------------------------------------------------------------------------------------------


def write_gguf(source: Path, target: Path):
    """Writes a checkpoint of bfloat16 weights as a GGUF file without a tokenizer. A tied head is stored only as the
    embedding, in a GGUF as in model.pth."""
    import gguf

    config, _, tensors = read_checkpoint(source)
    out = gguf.GGUFWriter(target, "llama")
    out.add_tokenizer_model("no_vocab")
    out.add_vocab_size(config.vocab_size)
    out.add_context_length(config.max_seq_len)
    out.add_embedding_length(config.dim)
    out.add_block_count(config.n_layers)
    out.add_feed_forward_length(config.ffn_dim)
    out.add_head_count(config.n_heads)
    out.add_head_count_kv(config.n_kv_heads)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope_theta)
    out.add_layer_norm_rms_eps(config.norm_eps)
    if config.rope_scaling:  # a GGUF holds the divisor of each frequency
        unscaled = rope_frequencies(replace(config, rope_scaling=None), config.max_seq_len)
        factors = unscaled / rope_frequencies(config, config.max_seq_len)
        out.add_tensor("rope_freqs.weight", factors.numpy())
    for name, tensor in gguf_tensors(tensors, config):
        if tensor.dim() == 1:
            out.add_tensor(name, tensor.float().numpy())
        else:
            bfloat16 = tensor.contiguous().view(torch.uint8).numpy()
            out.add_tensor(name, bfloat16, raw_dtype=gguf.GGMLQuantizationType.BF16)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def gguf_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields a checkpoint's tensors with the names and the row order of a GGUF of the architecture "llama". A GGUF has
    the rows of q and k in the order of Meta's RoPE: rows i and i + D/2 are neighbours."""
    from converters.convert_gguf import GGUF_TO_CANONICAL

    gguf_names = {hf_name: gguf_name for gguf_name, hf_name in GGUF_TO_CANONICAL.items()}
    for name, tensor in tensors.items():
        shapes = part_shapes(name, tensor.shape, config)
        parts = tensor.split([n_rows for n_rows, *_ in shapes.values()])
        for part_name, part in zip(shapes, parts, strict=True):
            layer, module, kind = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(\w+)", part_name).groups()
            if module in ("self_attn.q_proj", "self_attn.k_proj"):
                halves = part.unflatten(0, (-1, 2, config.head_dim // 2))  # [heads, 2, D/2, ...]
                part = halves.transpose(1, 2).reshape(part.shape)
            prefix = f"blk.{layer}." if layer else ""
            yield f"{prefix}{gguf_names[module]}.{kind}", part


def make_theirs(files: dict[str, Path], threads: int) -> str:
    """Makes the files in llama.cpp's formats: BF16 from the file of --gguf, if there is one, and every other file from
    BF16. Returns llama.cpp's description of the build."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.allow_requantize = True  # the file may be quantized
    for name, number in THEIRS.items():
        source = files.get("file") if name == "BF16" else files["BF16"]
        if source is None or name not in files:  # write_gguf has made BF16
            continue
        params.ftype = number
        if llama_cpp.llama_model_quantize(str(source).encode(), str(files[name]).encode(), params) != 0:
            raise UsageError(f"llama.cpp cannot make {name} of {source}")
    return llama_cpp.llama_print_system_info().decode()
