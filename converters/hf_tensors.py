"""Gives the tensors of any family in a Hugging Face checkpoint the names and the layout that Llama's have.

    read = to_llama_layout(tensors, config, family)    # docs/add_a_model.md says what a new family needs here

Differences between families that other weights can express never reach the model: fused matrices are split, heads are
reordered, constants are added.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig, UsageError
from converters.hf_config import Family
from converters.lora import Adapter, LoraMerger, replace_tensors
from converters.model_tensors import EMBEDDING, HEAD, HFTensors, TensorReader
from converters.quantized_weight import QuantizedWeight

# ---- Names ----------------------------------------------------------------------------------------------------------

# Parts of a family's names -> those in model_tensors.py: HF_SOURCES, which are Llama's. There input_layernorm comes
# before attention and post_attention_layernorm before the feed-forward. Renames are made in order: the first one of
# GEMMA_NORMS_TO_LLAMA frees a name that the second one takes.
GEMMA_NORMS_TO_LLAMA = {
    ".post_attention_layernorm.": ".post_attention_norm.", ".pre_feedforward_layernorm.": ".post_attention_layernorm.",
    ".post_feedforward_layernorm.": ".post_ffn_norm.",
}  # fmt: skip
GLM4_NORMS_TO_LLAMA = {".post_self_attn_layernorm.": ".post_attention_norm.", ".post_mlp_layernorm.": ".post_ffn_norm."}
META_FFN_TO_HF = {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
MIXTRAL_TO_LLAMA = META_FFN_TO_HF | {".block_sparse_moe.": ".mlp."}
GROK_TO_LLAMA = {
    ".pre_attn_norm.scale": ".input_layernorm.weight", ".post_attn_norm.scale": ".post_attention_norm.weight",
    ".pre_moe_norm.scale": ".post_attention_layernorm.weight", ".post_moe_norm.scale": ".post_ffn_norm.weight",
    "model.norm.scale": "model.norm.weight", ".attn.": ".self_attn.", ".moe_block.": ".mlp.",
    ".linear_v.": ".up_proj.", ".linear_1.": ".down_proj.", ".linear.": ".gate_proj.",
}  # fmt: skip
DBRX_TO_LLAMA = {
    "transformer.wte.": "model.embed_tokens.", "transformer.norm_f.": "model.norm.",
    "transformer.blocks.": "model.layers.", ".norm_attn_norm.norm_1.": ".input_layernorm.",
    ".norm_attn_norm.norm_2.": ".post_attention_layernorm.", ".norm_attn_norm.attn.": ".self_attn.",
    ".Wqkv.": ".qkv_proj.", ".out_proj.": ".o_proj.", ".ffn.router.layer.": ".mlp.gate.",
    ".ffn.experts.mlp.": ".mlp.experts.",
}  # fmt: skip
FAMILY_TO_LLAMA = {  # by model_type
    "gemma2": GEMMA_NORMS_TO_LLAMA, "gemma3_text": GEMMA_NORMS_TO_LLAMA, "olmo2": GEMMA_NORMS_TO_LLAMA,
    "olmo3": GEMMA_NORMS_TO_LLAMA, "glm4": GLM4_NORMS_TO_LLAMA, "mixtral": MIXTRAL_TO_LLAMA,
    "gpt_oss": {".mlp.router.": ".mlp.gate."}, "grok-1": GROK_TO_LLAMA, "baichuan": {".W_pack.": ".qkv_proj."},
    "dbrx": DBRX_TO_LLAMA,
}  # fmt: skip


def rename_tensor(name: str, new_names: dict[str, str]) -> str:
    for old, new in new_names.items():
        name = name.replace(old, new)
    return name


# ---- The families' exceptions ---------------------------------------------------------------------------------------

BAICHUAN_1_VOCAB = 64000  # Baichuan 2 has a larger vocabulary, and scales every row of its head to length one


def to_llama_layout(
    tensors: HFTensors, config: ModelConfig, family: Family, adapter: Adapter | None = None
) -> TensorReader:  # fmt: skip
    """Renames and splits tensors, in place. Returns the function that reads one of them: what changes its data is done
    there, so that only one is in memory at a time. adapter: is merged into them."""
    rename = partial(rename_tensor, new_names=FAMILY_TO_LLAMA.get(family.model_type, {}))
    split = partial(split_tensors, config=config, family=family)
    if not any(name.startswith("model.") for name in tensors) and any(name.startswith("layers.") for name in tensors):
        for name in [name for name in tensors if name != HEAD]:  # transformers saves a model without its head like this
            tensors[f"model.{name}"] = tensors.pop(name)
    for name in list(tensors):
        tensors[rename(name)] = tensors.pop(name)
    if config.tie_embeddings and EMBEDDING not in tensors and HEAD in tensors:
        tensors[EMBEDDING] = tensors[HEAD]
    if adapter is not None:
        replace_tensors(adapter, tensors, config, rename)
    split(tensors)
    merge = LoraMerger(adapter, tensors, config, rename, split) if adapter is not None else None
    order = rope_order(config, family.interleaved_rope)
    normalizes_head = family.model_type == "baichuan" and config.vocab_size > BAICHUAN_1_VOCAB

    def read(name: str) -> Tensor | QuantizedWeight:
        tensor = tensors[name]
        if merge is not None:
            tensor = merge(name, tensor)
        tensor = reorder_heads(name, tensor, order)
        if isinstance(tensor, QuantizedWeight):
            if family.layer_norm or normalizes_head and name == HEAD:
                raise UsageError(f"{name} is quantized, and this family's conversion changes it: take 16-bit weights")
            return tensor
        if normalizes_head and name == HEAD:
            tensor = F.normalize(tensor.float()).to(tensor.dtype)
        if family.norm_offset and re.search(r"norm\.weight$", name):
            tensor = (tensor.float() + family.norm_offset).to(tensor.dtype)
        if family.layer_norm:
            tensor = center_outputs(name, tensor)
        return tensor

    return read


def rope_order(config: ModelConfig, interleaved: bool) -> Tensor | None:
    """The order of a head's elements in which the two elements of a RoPE pair are half a head apart, and elements
    without RoPE come last in each half. None: the elements are in this order already.

    interleaved: the two elements of a pair are side by side, as in Meta's files. For six it is 0 2 4 1 3 5."""
    rotary_dim = config.rotary_dim or config.head_dim
    if rotary_dim == config.head_dim and not interleaved:
        return None
    rotated = torch.arange(rotary_dim)
    first, second = (rotated[::2], rotated[1::2]) if interleaved else rotated.chunk(2)
    rest_first, rest_second = torch.arange(rotary_dim, config.head_dim).tensor_split(2)
    return torch.cat([first, rest_first, second, rest_second])


def reorder_heads(name: str, tensor: Tensor | QuantizedWeight, order: Tensor | None) -> Tensor | QuantizedWeight:
    """The tensor of this name with the rows of each head in rope_order's order, if it is of queries or keys."""
    if order is None or not re.search(r"self_attn\.[qk]_(proj|norm)\.", name):
        return tensor
    return select_rows(tensor, torch.arange(tensor.shape[0]).unflatten(0, (-1, len(order)))[:, order].flatten())


def select_rows(tensor: Tensor | QuantizedWeight, rows: Tensor) -> Tensor | QuantizedWeight:
    return tensor.select_rows(rows) if isinstance(tensor, QuantizedWeight) else tensor[rows]


def undo_act_order(tensors: HFTensors):
    """Undoes act-order in down_proj, where it has scattered the inputs of groups: each group's inputs come to stand
    together. The inputs of down_proj are the rows of gate_proj and up_proj. These are put in the same order, so the
    model stays the same."""
    for name, down in tensors.items():
        prefix, is_down, _ = name.rpartition("down_proj.weight")
        if not is_down or not isinstance(down, QuantizedWeight) or down.input_order is None:
            continue
        sources = [f"{prefix}{part}_proj.{kind}" for part in ("gate", "up") for kind in ("weight", "bias")]
        sources = [source for source in sources if source in tensors]
        if any(isinstance(tensors[source], Tensor) and tensors[source].dim() > 1 for source in sources):
            continue  # copies of these would stay in memory
        for source in sources:
            tensors[source] = select_rows(tensors[source], down.input_order)
        tensors[name] = replace(down, input_order=None)


def center_outputs(name: str, tensor: Tensor) -> Tensor:
    """The tensor of this name, changed so that its outputs have mean zero, if they are added to x: the embedding and
    the last projection of each sublayer. Then x has mean zero, too, and LayerNorm(x) is RMSNorm(x). The model stays the
    same: every LayerNorm would subtract that mean from x anyway."""
    is_embedding = name == EMBEDDING
    if not is_embedding and not re.search(r"\.(o_proj|down_proj)\.weight$", name):
        return tensor
    wide = tensor.float()
    return (wide - wide.mean(1 if is_embedding else 0, keepdim=True)).to(tensor.dtype)


# ---- Splitting: views, without reading ------------------------------------------------------------------------------


def split_tensors(tensors: HFTensors, config: ModelConfig, family: Family):
    """Splits tensors that hold several of Llama's tensors, or all experts."""
    split_fused(tensors, config)
    undo_act_order(tensors)
    split_experts(tensors, is_transposed=family.model_type == "gpt_oss")
    if config.moe is not None and config.moe.n_shared_experts:
        split_shared_expert(tensors, config)
    if family.model_type == "dbrx":
        split_dbrx_experts(tensors, config)


def pop_matches(tensors: HFTensors, pattern: str, min_dim: int = 2) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """Removes every tensor whose name matches, and yields it with the groups of the match. One of fewer dimensions than
    min_dim stays, since it cannot be split; convert will name what is missing instead."""
    for name in list(tensors):
        match = re.fullmatch(pattern, name)
        if match is not None and tensors[name].dim() >= min_dim:
            yield tensors.pop(name), match.groups()


def split_fused(tensors: HFTensors, config: ModelConfig):
    """Splits qkv_proj and gate_up_proj, as Phi-3 has them."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    for tensor, (prefix, kind) in pop_matches(tensors, r"(.*\.self_attn)\.qkv_proj\.(\w+)", min_dim=1):
        for projection, part in zip("qkv", tensor.tensor_split([q, q + kv]), strict=True):
            tensors[f"{prefix}.{projection}_proj.{kind}"] = part
    for tensor, (prefix,) in pop_matches(tensors, r"(.*\.mlp)\.gate_up_proj\.weight"):
        tensors[f"{prefix}.gate_proj.weight"], tensors[f"{prefix}.up_proj.weight"] = tensor.tensor_split(2)


def split_experts(tensors: HFTensors, is_transposed: bool):
    """Splits what holds all experts of a layer: gate_up_proj [E, 2F, dim] and down_proj [E, dim, F], as transformers 5
    writes them. gpt-oss has them transposed, the rows of gate and up in turn, and biases."""
    for experts, (prefix, projection, is_bias) in pop_matches(
        tensors, r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias)?"
    ):
        kind = "bias" if is_bias else "weight"
        for e, tensor in enumerate(experts):
            if is_transposed and tensor.dim() == 2:
                tensor = tensor.mT
            if projection == "down_proj":
                tensors[f"{prefix}.{e}.down_proj.{kind}"] = tensor
                continue
            gate, up = (tensor[::2], tensor[1::2]) if is_transposed else tensor.tensor_split(2)
            tensors[f"{prefix}.{e}.gate_proj.{kind}"] = gate
            tensors[f"{prefix}.{e}.up_proj.{kind}"] = up


def split_shared_expert(tensors: HFTensors, config: ModelConfig):
    """Splits a shared expert, n_shared_experts times as wide as the others, into experts of their width. It is the sum
    of these."""
    n_experts, n_shared_experts = config.moe.n_experts, config.moe.n_shared_experts
    for tensor, (prefix, projection) in pop_matches(tensors, r"(.*\.mlp)\.shared_expert\.(\w+)\.weight"):
        dim = 1 if projection == "down_proj" else 0
        for i, part in enumerate(tensor.tensor_split(n_shared_experts, dim)):
            tensors[f"{prefix}.experts.{n_experts + i}.{projection}.weight"] = part


def split_dbrx_experts(tensors: HFTensors, config: ModelConfig):
    """Splits DBRX's w1, v1 and w2, each of all experts [E F, dim]. w2's are transposed."""
    projections = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}
    for experts, (prefix, kind) in pop_matches(tensors, r"(.*\.experts)\.(w1|v1|w2)"):
        for e, tensor in enumerate(experts.tensor_split(config.moe.n_experts)):
            tensors[f"{prefix}.{e}.{projections[kind]}.weight"] = tensor.mT if kind == "w2" else tensor
