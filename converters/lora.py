"""Merges a LoRA adapter, as saved by PEFT, into the weights of its base model, for convert_folder.py and hf_tensors.py.

    adapter = read_adapter(Path("checkpoints/my-adapter"))    # adapter_config.json, adapter_model.safetensors or .bin
    merge = LoraMerger(adapter, tensors, config, rename, split)    # in hf_tensors.py: to_canonical_layout
    weight = merge(name, tensors[name])

LoRA (arXiv:2106.09685) learns a small change to a weight W [N, K]. W becomes W + scale * B A, with A [r, K] and B [N,
r]. Other types of PEFT adapters are refused by name.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import ModelConfig
from converters.canonical_checkpoint import EMBEDDING, HEAD, SourceTensors
from converters.quantized_weight import QuantizedWeight
from converters.source_files import ADAPTER_CONFIG
from utils.errors import UsageError, convert_type_errors
from utils.files import load_safetensors, load_torch_state_dict, read_json

PREFIX = "base_model.model."  # PEFT puts this before the names of transformers

# Fields of adapter_config.json that change the maths unless they are null, false or empty -> their meaning
UNSUPPORTED_FIELDS = {
    "use_dora": "DoRA", "lora_bias": "biases of LoRA's own", "fan_in_fan_out": "transposed weights",
    "layer_replication": "layers that are used several times", "target_parameters": "LoRA of whole stacks of experts",
    "trainable_token_indices": "single trained tokens", "alora_invocation_tokens": "LoRA that begins at a token",
    "use_qalora": "QA-LoRA", "use_bdlora": "block-diagonal LoRA", "kasa_config": "KaSA", "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA", "ensure_weight_tying": "LoRA of an embedding and a head together",
}
# Initializations of A and B that leave W unchanged. Others, such as PiSSA, train an adapter for a changed W.
SUPPORTED_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraDelta:
    """An adapter adds scale * B A to a weight."""

    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    scale: float

    def compute(self) -> Tensor:
        return self.scale * (self.b.float() @ self.a.float())


@dataclass(frozen=True)
class Adapter:
    deltas: dict[str, LoraDelta]  # by the name of the weight in transformers
    whole_tensors: SourceTensors  # modules_to_save: these replace tensors of the base model
    has_all_layers: bool  # whether a delta in one layer must have a counterpart in every layer


# ---- Reading --------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> Adapter:
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UsageError(f"{folder} holds no adapter: it has no {ADAPTER_CONFIG}")
    config = read_json(path)
    with convert_type_errors(str(path)):
        try:
            check_config(config)
            lora_pairs, whole_tensors = sort_tensors(read_adapter_tensors(folder))
            deltas = {f"{module}.weight": make_delta(module, config, *ab) for module, ab in lora_pairs.items()}
        except UsageError as e:
            raise UsageError(f"{folder}: {e}") from None
    targets = config.get("target_modules")
    is_list = isinstance(targets, list) or targets == "all-linear"
    may_lack_layers = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    names_layers = isinstance(targets, list) and any(re.search(r"(^|\.)\d+\.", target) for target in targets)
    return Adapter(deltas, whole_tensors, has_all_layers=is_list and not may_lack_layers and not names_layers)


def check_config(config: dict):
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise UsageError(f"an adapter of type {peft_type!r} is not supported; LORA is")
    for name, meaning in UNSUPPORTED_FIELDS.items():
        if config.get(name):
            raise UsageError(f"{ADAPTER_CONFIG}: {name} means {meaning}, which is not supported")
    if config.get("bias", "none") != "none":
        raise UsageError(f"{ADAPTER_CONFIG}: bias = {config['bias']!r} is not supported; 'none' is")
    start = config.get("init_lora_weights")
    if start not in SUPPORTED_INITS:
        why = "its base is not the original model: save it with PEFT's path_initial_model_for_weight_conversion"
        raise UsageError(f"{ADAPTER_CONFIG}: init_lora_weights = {start!r} is not supported, for {why}")


def read_adapter_tensors(folder: Path) -> SourceTensors:
    """Reads all tensors, by their names in transformers. Raises UsageError if a number is not finite."""
    if (folder / "adapter_model.safetensors").is_file():
        tensors = load_safetensors(folder / "adapter_model.safetensors")
    elif (folder / "adapter_model.bin").is_file():
        tensors = load_torch_state_dict(folder / "adapter_model.bin")
    else:
        raise UsageError("neither adapter_model.safetensors nor adapter_model.bin is there")
    if not tensors:
        raise UsageError("the adapter has no tensors")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UsageError(f"tensor {name} is not finite; the adapter is broken")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def sort_tensors(tensors: SourceTensors) -> tuple[dict[str, tuple[Tensor, Tensor]], SourceTensors]:
    """Returns (A and B of each module by name, whole tensors by name)."""
    lora_pairs, whole_tensors = {}, {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.default)?(\.weight)?", name)
        if match is None:
            if ".lora_" in name:
                raise UsageError(f"tensor {name} is of a kind of LoRA that is not supported")
            whole_tensors[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = tensor
            continue
        module, is_embedding, half, *_ = match.groups()
        if tensor.dim() != 2:
            raise UsageError(f"tensor {name} is not a matrix but {list(tensor.shape)}")
        if is_embedding:  # the weight is [V, dim], A [r, V] and B [dim, r], so B A is the transposed change
            tensor, half = tensor.mT, {"A": "B", "B": "A"}[half]
        lora_pairs.setdefault(module, {})[half] = tensor
    for module, half in lora_pairs.items():
        if len(half) != 2:
            raise UsageError(f"of {module}, lora_{'B' if 'A' in half else 'A'} is missing")
    return {module: (half["A"], half["B"]) for module, half in lora_pairs.items()}, whole_tensors


def make_delta(module: str, config: dict, a: Tensor, b: Tensor) -> LoraDelta:
    if not is_target(module, config.get("target_modules")):
        raise UsageError(f"there are tensors for {module}, which target_modules of {ADAPTER_CONFIG} does not name")
    r = find_pattern(config.get("rank_pattern"), module, config["r"] if "r" in config else 8)
    alpha = find_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    for name, value in (("r", r), ("lora_alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{ADAPTER_CONFIG}: {name} must be a number, not {value!r}")
    if len(a) != r or b.shape[1] != r:
        raise UsageError(f"{ADAPTER_CONFIG} gives {module} the rank {r}; its tensors have {len(a)} and {b.shape[1]}")
    return LoraDelta(a, b, alpha / (math.sqrt(r) if config.get("use_rslora") else r))


def is_target(module: str, target_modules: str | list[str]) -> bool:
    """target_modules: "all-linear", a regular expression, or a list of last parts of names."""
    if isinstance(target_modules, str):
        return target_modules == "all-linear" or re.fullmatch(target_modules, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in target_modules)


def find_pattern(value_of: dict | None, module: str, default: float) -> float:
    """Returns the value of the first regular expression that matches the end of the name module, or default."""
    for pattern, value in (value_of or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


# ---- Merging --------------------------------------------------------------------------------------------------------


def replace_tensors(adapter: Adapter, tensors: SourceTensors, config: ModelConfig, rename: Callable[[str], str]):
    """Replaces tensors of the model by whole tensors of the adapter. A tied head becomes a separate tensor if the
    adapter changes the head or the embedding."""
    names = {rename(name) for name in (*adapter.deltas, *adapter.whole_tensors)}
    if config.tie_embeddings and names & {EMBEDDING, HEAD} and EMBEDDING in tensors:
        tensors.setdefault(HEAD, tensors[EMBEDDING])
    for name, tensor in adapter.whole_tensors.items():
        base = tensors.get(rename(name))
        if base is None:
            raise UsageError(f"the adapter replaces {name}, which the base model does not have")
        if tensor.shape != base.shape:
            shapes = f"{list(tensor.shape)}, the base's {list(base.shape)}"
            raise UsageError(f"the adapter's {name} is {shapes}: it was made for another model, or tokens were added")
        tensors[rename(name)] = tensor.to(base.dtype)


class LoraMerger:
    """merge(name, weight) adds the delta of the adapter. Deltas are renamed and split like the weights."""

    def __init__(
        self, adapter: Adapter, tensors: SourceTensors, config: ModelConfig, rename: Callable[[str], str],
        split: Callable[[SourceTensors], None],
    ):
        """tensors: of the base model, renamed and split"""
        self.rename, self.split = rename, split
        self.delta_of: dict[str, tuple[str, LoraDelta]] = {}  # canonical name -> name in transformers, delta
        for name, delta in adapter.deltas.items():
            shape = len(delta.b), delta.a.shape[1]
            for part, empty in self.split_delta(name, torch.empty(shape, device="meta")).items():
                check_fit(name, shape, empty, tensors.get(part), part in self.delta_of)
                self.delta_of[part] = name, delta
        if adapter.has_all_layers:
            check_layers(self.delta_of, config.n_layers)
        self.last: tuple[str, SourceTensors] = "", {}  # (name, parts) of the last delta

    def split_delta(self, name: str, delta: Tensor) -> SourceTensors:
        parts = {self.rename(name): delta}
        self.split(parts)
        return parts

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        if name not in self.delta_of:
            return weight
        whole, delta = self.delta_of[name]
        if self.last[0] != whole:
            self.last = whole, self.split_delta(whole, delta.compute())
        merged = (weight.float() + self.last[1][name]).to(weight.dtype)
        if not merged.isfinite().all():
            raise UsageError(f"{whole} is not finite with the adapter; one of them is broken")
        return merged


def check_fit(name: str, shape: tuple[int, int], delta: Tensor, weight: Tensor | None, is_changed: bool):
    if weight is None:
        raise UsageError(f"the adapter changes {name}, which the base model does not have")
    if delta.shape != weight.shape:
        base = f"the base's are {list(weight.shape)}, not {list(delta.shape)}"
        raise UsageError(f"the adapter's {name} is {list(shape)}: {base}; it was made for another model")
    if isinstance(weight, QuantizedWeight):
        raise UsageError(f"the adapter changes {name}, which is quantized: give the model that the base was made from")
    if is_changed:
        raise UsageError(f"the adapter changes {name} twice")


def check_layers(changed: dict[str, tuple[str, LoraDelta]], n_layers: int):
    layers_of: dict[str, set[int]] = {}  # name within a layer -> layers
    for name in changed:
        match = re.match(r"model\.layers\.(\d+)\.(.+)", name)
        if match is not None:
            layers_of.setdefault(match[2], set()).add(int(match[1]))
    for name, layers in layers_of.items():
        if len(layers) != n_layers:
            what = f"the adapter changes {name} in {len(layers)} of {n_layers} layers"
            raise UsageError(f"{what}: it is incomplete, or was made for another model")
