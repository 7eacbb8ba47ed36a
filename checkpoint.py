"""model.pth: one file with a model's config and weights. The converters and quantize.py write it, and loading.py reads
it.

    checkpoint = read_checkpoint(Path("checkpoints/M/model.pth"))
    checkpoint.config, checkpoint.quantization, checkpoint.tensors

The file is this dict, as torch.save writes it:

    {"format": "gpt-fast/8", "config": {...}, "quantization": None or {...}, "tensors": {name: tensor}}

torch.load(mmap=True, weights_only=True) reads the file, so a checkpoint cannot run code. A file named model.pth is
always complete: save_checkpoint writes to a temporary file, and renames it at the end. If two processes write the same
model.pth, the process that started first fails.
"""

import ctypes
import glob
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data
from tqdm import tqdm

from config import ModelConfig
from formats import QuantizationConfig, Unquantized
from layers.linear import Linear, quantizable_linears
from model import Transformer
from utils.errors import UsageError
from utils.files import delete_if_possible, is_state_dict, load_torch_file, replace_file

CHECKPOINT_VERSION = "gpt-fast/8"  # changes with any name in the file; UPGRADES then gets a row
UNQUANTIZED = Unquantized()
ALL_UNQUANTIZED = QuantizationConfig(UNQUANTIZED)


class Checkpoint(NamedTuple):
    config: ModelConfig
    quantization: dict | None  # for formats: QuantizationConfig.from_dict; None if no weight is quantized
    tensors: dict[str, Tensor]  # memory-mapped


# ---- Writing --------------------------------------------------------------------------------------------------------


def save_checkpoint(
    path: Path, config: ModelConfig, tensors: dict[str, Tensor], quantization: dict | None = None,
    stream: Iterable[tuple[str, Tensor]] | None = None, tokenizer_files: dict[str, bytes | None] | None = None,
):
    """Writes a checkpoint to path. An error leaves path unchanged.

    stream: yields all tensors in any order. Only one then needs to be in memory, and those in tensors may be on the
        meta device.
    tokenizer_files: name -> content of files next to path, where None removes the file. They are replaced before path,
        because a folder with a model.pth must have a complete tokenizer."""
    header = {"format": CHECKPOINT_VERSION, "config": config.to_dict(), "quantization": quantization}
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):  # temporary files of killed processes
            leftover.unlink(missing_ok=True)
        with open(temporary, "w+b") as file:
            placeholders = reserve_space(file, header, tensors)
            write_tensors(file, placeholders, tensors.items() if stream is None else stream)
            file.flush()
            os.fsync(file.fileno())
        for name, content in (tokenizer_files or {}).items():
            if content is None:
                path.with_name(name).unlink(missing_ok=True)
            else:
                replace_file(path.with_name(name), content)
        replace_checkpoint(temporary, path)
    except OSError as e:
        raise UsageError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        delete_if_possible(temporary)


def reserve_space(file: BinaryIO, header: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Writes the checkpoint to file, with room for the tensors' bytes. Returns a placeholder for each tensor: a fake
    tensor without data that knows the offset of the bytes in the file."""
    with FakeTensorMode():
        fakes = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    with skip_data(materialize_fake_tensors=True):
        torch.save(header | {"tensors": fakes}, file)
    file.seek(0)
    with FakeTensorMode():  # in this mode torch.load makes fake tensors and records their offsets
        return torch.load(file, weights_only=True)["tensors"]


def write_tensors(file: BinaryIO, placeholders: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]]):
    """Writes the bytes of each tensor to the offset of its placeholder."""
    missing = dict(placeholders)
    for name, tensor in tqdm(tensors, "write", len(placeholders), disable=None, leave=False):
        placeholder = missing.pop(name, None)
        if placeholder is None:
            raise UsageError(f"{name} was not expected, or came twice")
        if (tensor.shape, tensor.dtype) != (placeholder.shape, placeholder.dtype):
            expected = f"{list(placeholder.shape)} {placeholder.dtype}"
            raise UsageError(f"{name} is {list(tensor.shape)} {tensor.dtype}, not {expected}")
        tensor = tensor.contiguous()
        file.seek(placeholder.untyped_storage()._checkpoint_offset)
        file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))  # any dtype, without a copy
    if missing:
        raise UsageError(f"no tensor for {', '.join(list(missing)[:3])}")


def replace_checkpoint(temporary: Path, path: Path):
    """Renames temporary to path. Raises UsageError if a later writer of path has deleted temporary."""
    try:
        os.replace(temporary, path)
    except FileNotFoundError:
        raise UsageError(f"cannot write {path}: another process has begun to write the same file") from None


# ---- Reading --------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint's config, and maps the tensors into memory without reading them. After a tensor is read,
    utils/machine.py: drop_pages can release its pages."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the model.pth in it, which scripts/convert_hf_checkpoint.py makes")
    data = load_torch_file(path)
    if not isinstance(data, dict) or data.get("format") not in (CHECKPOINT_VERSION, *UPGRADES):
        maker = "scripts/convert_hf_checkpoint.py"
        raise UsageError(f"{path} is not a {CHECKPOINT_VERSION} checkpoint; make one with {maker}")
    config, quantization, tensors = data.get("config"), data.get("quantization"), data.get("tensors")
    if not is_state_dict(tensors):
        raise UsageError(f"{path} holds no table of tensors; convert it again")
    if data["format"] in UPGRADES:
        config, quantization, tensors = upgrade(data["format"], config, quantization, tensors)
    return Checkpoint(ModelConfig.from_dict(config), quantization, tensors)


def with_tied_head(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds the tensors of a tied head. A checkpoint stores them only under the embedding's names. But a quantized
    head has tensors of its own."""
    if not config.tie_embeddings or "lm_head.weight" in tensors:
        return tensors
    embedding = {name: tensor for name, tensor in tensors.items() if name.startswith("embed_tokens.")}
    return tensors | {name.replace("embed_tokens.", "lm_head."): tensor for name, tensor in embedding.items()}


# ---- The empty model ------------------------------------------------------------------------------------------------


def empty_model(config: ModelConfig, formats: QuantizationConfig = ALL_UNQUANTIZED) -> Transformer:
    """A model on the meta device: its tensors have a checkpoint's shapes and dtypes, but no memory. The embedding is
    quantized only if formats.overrides names it. Raises UsageError if formats names a layer that the model lacks, or
    gives an input_order to a layer that cannot have it."""
    with torch.device("meta"):
        model = Transformer(config)
    linears = dict(quantizable_linears(model))
    unknown = formats.overrides.keys() - linears.keys() - {"embed_tokens"}
    if unknown:
        raise UsageError(f"the checkpoint's quantization names {min(unknown)}, which is no linear layer of the model")
    model.weight_format = formats.default
    for name, linear in linears.items():
        linear.set_format(formats.of_layer(name))
    model.embed_tokens.set_format(formats.overrides.get("embed_tokens", UNQUANTIZED))
    for name in formats.act_order_layers:
        linear = linears.get(name)
        if not isinstance(linear, Linear):
            raise UsageError(f"the checkpoint's quantization gives {name} an order of inputs, which it cannot have")
        linear.set_tensor("input_order", torch.empty(linear.in_features, dtype=torch.int32, device="meta"))
    return model


# ---- Files of earlier versions --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Renames:
    """What the next version calls otherwise: old -> new. Versions differ in nothing else."""

    tensors: dict[str, str] = field(default_factory=dict)  # parts of names: see rename_tensor
    fields: dict[str, str] = field(default_factory=dict)  # of ModelConfig, MoEConfig and RopeScaling
    values: dict[str, dict] = field(default_factory=dict)  # field of ModelConfig -> value, None or str -> new fields
    grouped_modes: dict[str, str] = field(default_factory=dict)  # modes of formats with a groupsize


UPGRADES = {
    "gpt-fast/1": Renames(
        tensors={
            ".wqkv.": ".qkv_proj.", ".wo.": ".o_proj.", ".gate.": ".router.", ".experts.": ".",
            ".w13.": ".gate_up_proj.", ".w2.": ".down_proj.",
        },
        fields={"n_active": "top_k", "normalize": "norm_topk_prob"},
    ),
    "gpt-fast/2": Renames(
        tensors={"tok_embeddings.": "embed_tokens.", "output.": "lm_head."}, fields={"kind": "rope_type"}
    ),
    "gpt-fast/3": Renames(fields={"n_shared": "n_shared_experts"}),
    "gpt-fast/4": Renames(
        fields={"window_layers": "layer_has_window", "rope_layers": "layer_has_rope"},
    ),
    "gpt-fast/5": Renames(
        tensors={".attention_norm.": ".pre_attention_norm.", ".ffn_norm.": ".pre_ffn_norm."},
    ),
    "gpt-fast/6": Renames(
        fields={
            "out_bias": "o_proj_bias", "qk_norm_all_heads": "qk_norm_across_heads",
            "window_rope_theta": "local_rope_theta",
        },
    ),
    "gpt-fast/7": Renames(
        values={
            "sliding_window": {None: {"sliding_window": 0}},
            "activation": {  # up to version 4 they had today's names
                "swiglu": {"activation": "silu"}, "geglu": {"activation": "gelu"},
                "geglu_tanh": {"activation": "gelu_tanh"}, "clamped_swiglu": {"activation": "clamped_silu"},
                "gelu_pytorch_tanh": {"activation": "gelu_tanh", "gated": False}, "relu2": {"gated": False},
            },
        },
        grouped_modes={"int8": "int8-grouped"},
    ),
}


def upgrade(version: str, config, quantization, tensors: dict[str, Tensor]) -> tuple:
    """Returns (config, quantization, tensors) with today's names. config and quantization may have any type, because
    the file may be broken. Only their from_dict, later, finds out."""
    first = list(UPGRADES).index(version)
    for renames in list(UPGRADES.values())[first:]:
        tensors = {rename_tensor(name, renames.tensors): tensor for name, tensor in tensors.items()}
        config = rename_fields(config, renames)
        quantization = rename_modes(quantization, renames.grouped_modes)
    return config, quantization, tensors


def rename_tensor(name: str, new_names: dict[str, str]) -> str:
    """new_names: a part of an old name -> what replaces it. The order counts."""
    for old, new in new_names.items():
        name = name.replace(old, new)
    return name


def rename_fields(config, renames: Renames):
    if not isinstance(config, dict):
        return config
    config = {renames.fields.get(old, old): value for old, value in config.items()}
    for name in ("moe", "rope_scaling"):
        if isinstance(config.get(name), dict):
            config[name] = {renames.fields.get(old, old): value for old, value in config[name].items()}
    for name, new_fields in renames.values.items():
        if isinstance(value := config.get(name), str | None):
            config |= new_fields.get(value, {})
    return config


def rename_modes(quantization, new_modes: dict[str, str]):
    """quantization: the dict of a format, with the dicts of more formats in "layers"."""
    if not isinstance(quantization, dict):
        return quantization
    renamed = dict(quantization)
    if "groupsize" in renamed and isinstance(renamed.get("mode"), str):
        renamed["mode"] = new_modes.get(renamed["mode"], renamed["mode"])
    if isinstance(renamed.get("layers"), dict):
        renamed["layers"] = {name: rename_modes(layer, new_modes) for name, layer in renamed["layers"].items()}
    return renamed
