"""Gives the tensors of a Hugging Face checkpoint of any family canonical names and layout (canonical_checkpoint.py).

    read = to_canonical_layout(tensors, config, family)    # family: a row of families.py: FAMILIES

Fused matrices are split, heads reordered and constants added, so that model.py sees fewer differences between families.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from checkpoint import rename_tensor
from config import ModelConfig
from converters.canonical_checkpoint import EMBEDDING, HEAD, SourceTensors, TensorReader
from converters.family import Family
from converters.family_tensors import LLAMA_NORMS_TO_CANONICAL, pop_matches
from converters.lora import Adapter, LoraMerger, replace_tensors
from converters.quantized_weight import QuantizedWeight
from utils.errors import UsageError


def to_canonical_layout(
    tensors: SourceTensors, config: ModelConfig, family: Family, adapter: Adapter | None = None
) -> TensorReader:
    """Renames and splits tensors, in place. Returns a function that reads a tensor by canonical name, with the LoRA
    adapter, if given, merged into it."""
    rename = partial(rename_tensor, new_names=LLAMA_NORMS_TO_CANONICAL | family.tensor_renames)
    split = partial(split_tensors, config=config, family=family)
    rename_all(tensors, rename)
    add_tied_tensors(tensors, config, family)
    if config.parallel_residual:
        add_shared_norms(tensors)
    if not family.has_norm_weights:
        add_norm_weights(tensors, config)
    if adapter is not None:
        replace_tensors(adapter, tensors, config, rename)
    split(tensors)
    merge = LoraMerger(adapter, tensors, config, rename, split) if adapter is not None else None
    norm_biases = pop_norm_biases(tensors, config) if family.norm_bias else {}
    row_order = rope_row_order(config, family.interleaved_rope, family.reversed_rope)
    read = CanonicalReader(dict(tensors), config, family, merge, norm_biases, row_order)
    mark_as_float32(tensors, [name for name in tensors if read.computes(name)])
    return read


def rename_all(tensors: SourceTensors, rename: Callable[[str], str]):
    """Renames tensors, in place. Raises UsageError if two tensors get the same name."""
    if not any(name.startswith("model.") for name in tensors) and any(name.startswith("layers.") for name in tensors):
        # transformers leaves out "model." when it saves a model without a head
        for name in [name for name in tensors if name != HEAD]:
            tensors[f"model.{name}"] = tensors.pop(name)
    # All at once: the new name of one tensor may be the old name of another tensor, and they may come in any order
    old_name = {rename(name): name for name in tensors}
    if len(old_name) < len(tensors):
        name = min(tensors.keys() - old_name.values())
        raise UsageError(f"the checkpoint's tensors {name} and {old_name[rename(name)]} are the same weight")
    renamed = {name: tensors[old] for name, old in old_name.items()}
    tensors.clear()
    tensors |= renamed


def add_tied_tensors(tensors: SourceTensors, config: ModelConfig, family: Family):
    """With tied embeddings, adds the embedding if only the head is stored. Adds the head if conversion changes the
    embedding: it must not change the head."""
    if config.tie_embeddings and EMBEDDING not in tensors and HEAD in tensors:
        tensors[EMBEDDING] = tensors[HEAD]
    if config.tie_embeddings and family.layer_norm:  # conversion centers the embedding, but must not change the head
        tensors.setdefault(HEAD, tensors[EMBEDDING])


def add_shared_norms(tensors: SourceTensors):
    """In a layer without a norm of its own before the feed-forward, adds the norm before attention under that name."""
    for name in [name for name in tensors if ".pre_attention_norm." in name]:
        tensors.setdefault(name.replace(".pre_attention_norm.", ".pre_ffn_norm."), tensors[name])


def add_norm_weights(tensors: SourceTensors, config: ModelConfig):
    """Adds weights of ones. A norm without weights commutes with RoPE. So nanochat's q/k norms, which come after RoPE,
    may also come before it."""
    dtype = tensors[EMBEDDING].dtype if EMBEDDING in tensors else torch.float32
    tensors["model.norm.weight"] = torch.ones(config.dim, dtype=dtype)
    for i in range(config.n_layers):
        for name in ("pre_attention_norm", "pre_ffn_norm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(config.dim, dtype=dtype)
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = torch.ones(config.head_dim, dtype=dtype)


@dataclass(frozen=True)
class CanonicalReader:
    """read(name) returns a tensor by canonical name, changed to what model.py needs. The change happens on reading, so
    only one tensor is in memory at a time. Computed values are float32, because 16 bits would round them."""

    stored: SourceTensors  # renamed and split, but with the data of the checkpoint
    config: ModelConfig
    family: Family
    merge: LoraMerger | None  # None without an adapter
    norm_biases: dict[str, Tensor]  # from pop_norm_biases
    row_order: Tensor | None  # from rope_row_order

    def __call__(self, name: str) -> Tensor | QuantizedWeight:
        tensor, change = self.read_merged(name), self.find_change(name)
        if name in self.norm_biases:
            weight = self.read_merged(name.replace(".bias", ".weight"))
            tensor = add_norm_bias(tensor, weight, self.norm_biases[name])
        tensor = reorder_heads(name, tensor, self.row_order)
        if isinstance(tensor, QuantizedWeight) and (self.family.layer_norm or change is not None):
            raise UsageError(f"{name} is quantized, and this family's conversion changes it: take 16-bit weights")
        return tensor if change is None else change(tensor.float())

    def read_merged(self, name: str) -> Tensor | QuantizedWeight:
        tensor = self.stored[name]
        return tensor if self.merge is None else self.merge(name, tensor)

    def computes(self, name: str) -> bool:
        """Whether reading changes numbers of the tensor, apart from an adapter."""
        return name in self.norm_biases or self.find_change(name) is not None

    def find_change(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """Returns the function that changes the numbers of a tensor, from float32 to float32, or None."""
        change = self.family.find_change(name, self.config)
        if change is not None:
            return change
        if name.endswith("norm.weight") and self.family.norm_offset:
            return partial(torch.add, other=self.family.norm_offset)
        writes_to_residual = name == EMBEDDING or re.search(r"\.(o_proj|down_proj)\.(weight|bias)$", name)
        if writes_to_residual and self.family.layer_norm:
            return partial(center_outputs, dim=1 if name == EMBEDDING else 0)
        return None


def mark_as_float32(tensors: SourceTensors, names: list[str]):
    """Replaces 16-bit tensors among names, in place, by empty ones of float32, the dtype that reading will return."""
    for name in names:
        if isinstance(tensors[name], Tensor) and tensors[name].dtype in (torch.float16, torch.bfloat16):
            tensors[name] = torch.empty_like(tensors[name], dtype=torch.float32, device="meta")


def rope_row_order(config: ModelConfig, interleaved: bool, reverses: bool = False) -> Tensor | None:
    """Returns the order that puts the elements of a head where model.py expects them, or None if they are there
    already: the two elements of a RoPE pair are half a head apart, and elements without RoPE come last in each half.

    interleaved: whether the two elements of a pair are stored as neighbours, as in Meta's files. Then six elements get
    the order 0 2 4 1 3 5.
    reverses: whether RoPE rotates by the negative angle. This is the same as exchanging the elements of each pair."""
    rotary_dim = config.rotary_dim or config.head_dim
    if rotary_dim == config.head_dim and not interleaved and not reverses:
        return None
    rotated = torch.arange(rotary_dim)
    first, second = (rotated[::2], rotated[1::2]) if interleaved else rotated.chunk(2)
    if reverses:
        first, second = second, first
    rest_first, rest_second = torch.arange(rotary_dim, config.head_dim).tensor_split(2)
    return torch.cat([first, rest_first, second, rest_second])


def reorder_heads(name: str, tensor: Tensor | QuantizedWeight, row_order: Tensor | None) -> Tensor | QuantizedWeight:
    """Puts the rows of each head in row_order (see rope_row_order) if the tensor called name makes queries or keys.
    Returns other tensors unchanged."""
    if row_order is None or not re.search(r"self_attn\.[qk]_(proj|norm)\.", name):
        return tensor
    return select_rows(tensor, torch.arange(tensor.shape[0]).unflatten(0, (-1, len(row_order)))[:, row_order].flatten())


def select_rows(tensor: Tensor | QuantizedWeight, rows: Tensor) -> Tensor | QuantizedWeight:
    return tensor.select_rows(rows) if isinstance(tensor, QuantizedWeight) else tensor[rows]


def undo_act_order(tensors: SourceTensors):
    """Undoes the act-order of down_proj, in place. Its inputs are the outputs of gate_proj and up_proj. So it is enough
    to sort the rows of these two by input_order: the output of the model stays the same."""
    for name, down in tensors.items():
        prefix, is_down, _ = name.rpartition("down_proj.weight")
        if not is_down or not isinstance(down, QuantizedWeight) or down.input_order is None:
            continue
        gate_up = [f"{prefix}{part}_proj.{kind}" for part in ("gate", "up") for kind in ("weight", "bias")]
        gate_up = [part for part in gate_up if part in tensors]
        if any(isinstance(tensors[part], Tensor) and tensors[part].dim() > 1 for part in gate_up):
            continue  # sorting an unquantized weight would hold a copy of it in memory
        for part in gate_up:
            tensors[part] = select_rows(tensors[part], down.input_order)
        tensors[name] = replace(down, input_order=None)


# LayerNorm -> the layers after it, and the field of ModelConfig for their biases: (field, layers)
LINEARS_AFTER_NORM = {
    "pre_attention_norm": ("qkv_bias", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    "pre_ffn_norm": ("ffn_bias", ["mlp.gate_proj", "mlp.up_proj"]),
    "norm": ("head_bias", ["lm_head"]),
}


def with_norm_biases(config: ModelConfig) -> ModelConfig:
    return replace(config, **dict.fromkeys((bias for bias, _ in LINEARS_AFTER_NORM.values()), True))


def pop_norm_biases(tensors: SourceTensors, config: ModelConfig) -> dict[str, Tensor]:
    """Removes the biases [dim] of LayerNorms from tensors. Returns {name of a linear layer's bias: bias of the norm
    before it}. A linear layer without a bias gets a bias of zeros. So does down_proj: in model.py, either both
    projections of a feed-forward have biases or neither has. config: before with_norm_biases."""
    norm_biases = {}
    for name in list(tensors):
        match = re.fullmatch(rf"(.*\.)({'|'.join(LINEARS_AFTER_NORM)})\.weight", name)
        if match is None:
            continue
        prefix, norm = match.groups()
        norm_bias = tensors.pop(f"{prefix}{norm}.bias", None)
        if norm_bias is None or norm_bias.shape != (config.dim,):
            what = "missing" if norm_bias is None else f"{list(norm_bias.shape)}; the config makes it [{config.dim}]"
            raise UsageError(f"tensor {prefix}{norm}.bias is {what}")
        option, linears = LINEARS_AFTER_NORM[norm]
        paths = [linear if norm == "norm" else prefix + linear for linear in linears]
        norm_biases |= {f"{path}.bias": norm_bias for path in paths}
        if norm == "pre_ffn_norm":
            paths.append(f"{prefix}mlp.down_proj")
        if not getattr(config, option):
            add_zero_biases(tensors, paths, norm_bias.dtype)
    return norm_biases


def add_zero_biases(tensors: SourceTensors, paths: list[str], dtype: torch.dtype):
    """Adds a bias of zeros to each linear layer of paths. Raises UsageError if one has a bias already."""
    for path in paths:
        if f"{path}.bias" in tensors:
            raise UsageError(f"the checkpoint's tensor {path}.bias has no place in this model")
        if f"{path}.weight" in tensors:
            tensors[f"{path}.bias"] = torch.zeros(tensors[f"{path}.weight"].shape[:1], dtype=dtype)


def add_norm_bias(bias: Tensor, weight: Tensor | QuantizedWeight, norm_bias: Tensor) -> Tensor:
    """Moves the bias of a norm into the linear layer after it: W (norm(x) + norm_bias) + bias = W norm(x) + result."""
    if isinstance(weight, QuantizedWeight):  # CanonicalReader refuses it
        return bias
    return bias.float() + weight.float() @ norm_bias.float()


def center_outputs(tensor: Tensor, dim: int) -> Tensor:
    """Subtracts the mean of the outputs, for tensors that write to the residual stream x: the embedding, o_proj and
    down_proj. LayerNorm subtracts the mean of x anyway. With a mean of zero, LayerNorm(x) is RMSNorm(x). dim: the
    dimension of the outputs."""
    return tensor - tensor.mean(dim, keepdim=True)


# ---- Splitting makes views, and reads nothing -----------------------------------------------------------------------


def split_tensors(tensors: SourceTensors, config: ModelConfig, family: Family):
    split_fused(tensors, config)
    undo_act_order(tensors)
    family.split_experts(tensors, config)
    if config.moe is not None and config.moe.n_shared_experts:
        split_shared_expert(tensors, config)


def split_fused(tensors: SourceTensors, config: ModelConfig):
    """Splits qkv_proj and gate_up_proj, as Phi-3 stores them."""
    for tensor, (prefix, kind) in pop_matches(tensors, r"(.*\.self_attn)\.qkv_proj\.(\w+)", min_dim=1):
        for projection, part in zip("qkv", tensor.tensor_split(kv_starts(config)), strict=True):
            tensors[f"{prefix}.{projection}_proj.{kind}"] = part
    for tensor, (prefix,) in pop_matches(tensors, r"(.*\.mlp)\.gate_up_proj\.weight"):
        tensors[f"{prefix}.gate_proj.weight"], tensors[f"{prefix}.up_proj.weight"] = tensor.tensor_split(2)


def kv_starts(config: ModelConfig) -> list[int]:
    """Returns the first row of k and of v in a matrix that stacks q, k and v."""
    return [config.q_dim, config.q_dim + config.kv_dim]


def split_shared_expert(tensors: SourceTensors, config: ModelConfig):
    """Splits a shared expert, n_shared_experts times as wide as the others, into experts of the usual width. Their
    outputs add up to the output of the shared expert."""
    n_experts, n_shared_experts = config.moe.n_experts, config.moe.n_shared_experts
    for tensor, (prefix, projection) in pop_matches(tensors, r"(.*\.mlp)\.shared_expert\.(\w+)\.weight"):
        dim = 1 if projection == "down_proj" else 0
        for i, part in enumerate(tensor.tensor_split(n_shared_experts, dim)):
            tensors[f"{prefix}.experts.{n_experts + i}.{projection}.weight"] = part
