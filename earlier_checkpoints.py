"""Upgrades the config and the tensors of a model.pth of an earlier version. The versions differ only in names."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Renames:
    """The names that the next version changed: old name -> new name."""

    tensors: dict[str, str] = field(default_factory=dict)  # parts of names: see rename_tensor
    fields: dict[str, str] = field(default_factory=dict)  # of ModelConfig, MoEConfig and RopeScaling
    activations: dict[str, str] = field(default_factory=dict)


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
        activations={"silu": "swiglu", "gelu_tanh": "geglu_tanh"},
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
}


def upgrade(version: str, config, tensors: dict[str, Tensor]) -> tuple:
    """Returns (config, tensors) with today's names. config may have any type, since only ModelConfig.from_dict, which
    comes later, finds a broken file."""
    first = list(UPGRADES).index(version)
    for renames in list(UPGRADES.values())[first:]:
        tensors = {rename_tensor(name, renames.tensors): tensor for name, tensor in tensors.items()}
        if isinstance(config, dict):
            config = rename_fields(config, renames)
    return config, tensors


def rename_tensor(name: str, new_names: dict[str, str]) -> str:
    """new_names: a part of an old name -> the part of the new name. The order counts."""
    for old, new in new_names.items():
        name = name.replace(old, new)
    return name


def rename_fields(config: dict, renames: Renames) -> dict:
    config = {renames.fields.get(old, old): value for old, value in config.items()}
    for name in ("moe", "rope_scaling"):
        if isinstance(config.get(name), dict):
            config[name] = {renames.fields.get(old, old): value for old, value in config[name].items()}
    if isinstance(activation := config.get("activation"), str):
        config["activation"] = renames.activations.get(activation, activation)
    return config
