"""Renames, splits and changes tensors that only one family has. The rows of families.py name these functions."""

import re
from collections.abc import Callable, Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig
from converters.canonical_checkpoint import EMBEDDING, HEAD, SourceTensors

# ---- tensor_renames: parts of a family's names -> parts of canonical names ------------------------------------------

# For every family. The renames of a family's row take precedence
LLAMA_NORMS_TO_CANONICAL = {
    ".input_layernorm.": ".pre_attention_norm.", ".post_attention_layernorm.": ".pre_ffn_norm.",
}
GEMMA_NORMS_TO_CANONICAL = {
    ".post_attention_layernorm.": ".post_attention_norm.", ".pre_feedforward_layernorm.": ".pre_ffn_norm.",
    ".post_feedforward_layernorm.": ".post_ffn_norm.",
}
GLM4_NORMS_TO_CANONICAL = {
    ".post_self_attn_layernorm.": ".post_attention_norm.", ".post_mlp_layernorm.": ".post_ffn_norm.",
}
META_FFN_TO_CANONICAL = {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
MIXTRAL_TO_CANONICAL = META_FFN_TO_CANONICAL | {".block_sparse_moe.": ".mlp."}
GPT_OSS_TO_CANONICAL = {".mlp.router.": ".mlp.gate."}
STARCODER2_TO_CANONICAL = {".c_fc.": ".up_proj.", ".c_proj.": ".down_proj."}
NANOCHAT_TO_CANONICAL = {".fc1.": ".up_proj.", ".fc2.": ".down_proj."}
PHI_TO_CANONICAL = NANOCHAT_TO_CANONICAL | {".dense.": ".o_proj.", ".final_layernorm.": ".norm."}
BAICHUAN_TO_CANONICAL = {".W_pack.": ".qkv_proj."}
GROK_TO_CANONICAL = {
    ".pre_attn_norm.scale": ".pre_attention_norm.weight", ".post_attn_norm.scale": ".post_attention_norm.weight",
    ".pre_moe_norm.scale": ".pre_ffn_norm.weight", ".post_moe_norm.scale": ".post_ffn_norm.weight",
    "model.norm.scale": "model.norm.weight", ".attn.": ".self_attn.", ".moe_block.": ".mlp.",
    ".linear_v.": ".up_proj.", ".linear_1.": ".down_proj.", ".linear.": ".gate_proj.",
}
DBRX_TO_CANONICAL = {
    "transformer.wte.": "model.embed_tokens.", "transformer.norm_f.": "model.norm.",
    "transformer.blocks.": "model.layers.", ".norm_attn_norm.norm_1.": ".pre_attention_norm.",
    ".norm_attn_norm.norm_2.": ".pre_ffn_norm.", ".norm_attn_norm.attn.": ".self_attn.",
    ".Wqkv.": ".qkv_proj.", ".out_proj.": ".o_proj.", ".ffn.router.layer.": ".mlp.gate.",
    ".ffn.experts.mlp.": ".mlp.experts.",
}


# ---- split_experts: splits, in place, tensors that hold all experts of a layer --------------------------------------
# The parts are views, so splitting reads nothing.


def split_stacked_experts(tensors: SourceTensors, config: ModelConfig, are_transposed: bool = False):
    """Splits gate_up_proj [E, 2F, dim] and down_proj [E, dim, F], as transformers 5 writes them.

    are_transposed: whether each expert's matrix is transposed, as in gpt-oss. Then columns of gate and up alternate,
    and there may be biases."""
    for experts, (prefix, projection, is_bias) in pop_matches(
        tensors, r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias)?"
    ):
        kind = "bias" if is_bias else "weight"
        for e, tensor in enumerate(experts):
            if are_transposed and tensor.dim() == 2:
                tensor = tensor.mT
            if projection == "down_proj":
                tensors[f"{prefix}.{e}.down_proj.{kind}"] = tensor
                continue
            gate, up = (tensor[::2], tensor[1::2]) if are_transposed else tensor.tensor_split(2)
            tensors[f"{prefix}.{e}.gate_proj.{kind}"] = gate
            tensors[f"{prefix}.{e}.up_proj.{kind}"] = up


def split_dbrx_experts(tensors: SourceTensors, config: ModelConfig):
    """Splits w1, v1 and w2 [E F, dim], which stack all experts. In w2 each expert's matrix is transposed."""
    projections = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}
    for experts, (prefix, kind) in pop_matches(tensors, r"(.*\.experts)\.(w1|v1|w2)"):
        for e, tensor in enumerate(experts.tensor_split(config.moe.n_experts)):
            tensors[f"{prefix}.{e}.{projections[kind]}.weight"] = tensor.mT if kind == "w2" else tensor


def pop_matches(tensors: SourceTensors, pattern: str, min_dim: int = 2) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """Removes every tensor whose name matches pattern, and yields it with the groups of the match. A tensor with fewer
    than min_dim dimensions cannot be split, so it stays. write_model then reports the missing parts."""
    for name in list(tensors):
        match = re.fullmatch(pattern, name)
        if match is not None and tensors[name].dim() >= min_dim:
            yield tensors.pop(name), match.groups()


# ---- find_change: changes of a tensor's numbers ---------------------------------------------------------------------


def find_change_of_baichuan(name: str, config: ModelConfig) -> Callable[[Tensor], Tensor] | None:
    """Baichuan 2 scales every row of the head to length one. Only the size of the vocabulary tells the two versions
    apart: Baichuan 1 has 64000 tokens."""
    return F.normalize if name == HEAD and config.vocab_size != 64000 else None


def find_change_of_nanochat(name: str, config: ModelConfig) -> Callable[[Tensor], Tensor] | None:
    """nanochat has a norm between the embedding and its first layer. Conversion applies it to the embedding."""
    if name != EMBEDDING:
        return None
    return partial(F.rms_norm, normalized_shape=(config.dim,), eps=config.norm_eps)
