"""Defines Family: the columns of the table of families, which is families.py: FAMILIES."""

from collections.abc import Callable
from dataclasses import dataclass, field

from config import ModelConfig
from converters.family_tensors import split_stacked_experts
from converters.model_tensors import HFTensors


@dataclass(frozen=True)
class Family:
    """How the config.json of one architecture is read, and how its tensors become canonical ones."""

    model_type: str  # the value of config.json's "model_type"
    defaults: dict  # what transformers assumes for a field that config.json leaves out

    # Gives the fields of config.json Llama's names
    rename_fields: Callable[[dict], dict] = lambda hf_config: hf_config

    # Sliding window
    sliding_layers: str = "none"  # which layers have a window: "none", "all", or "layer_types": as that field says
    default_layer_types: Callable[[dict], list[str]] | None = None  # if layer_types is missing; None: it must be there
    needs_use_sliding_window: bool = False  # no layer has a window unless use_sliding_window is true
    scales_sliding_rope: bool = True  # False: rope_scaling is only for the layers without a sliding window

    # Feed-forward
    ffn_dim_field: str = "intermediate_size"
    n_experts_fields: tuple[str, ...] = ()  # config.json's names for n_experts, in order; (): no mixture of experts
    norm_topk_prob: bool | None = True  # None: config.json says it
    shared_expert: bool = False  # every token also uses an expert of shared_expert_intermediate_size
    experts_bias: bool = False  # the router and the experts have biases

    # Everything else that changes the maths
    handled_fields: tuple[str, ...] = ()  # fields of hf_config.py: HF_NEUTRAL_VALUES that may have any value
    config_overrides: dict = field(default_factory=dict)  # fields of ModelConfig that the whole family shares
    read_overrides: Callable[[dict], dict] = lambda hf_config: {}  # config.json -> more fields of ModelConfig

    # Tensors, at conversion. family_tensors.py defines the renames and functions, hf_tensors.py applies them.
    renames: dict[str, str] = field(default_factory=dict)  # part of a name -> part of a canonical name; in order
    split_experts: Callable[[HFTensors, ModelConfig], None] = split_stacked_experts  # a tensor for all experts
    normalizes_head: Callable[[ModelConfig], bool] = lambda config: False  # the head's rows are scaled to length one
    norm_offset: float = 0.0  # added to the weights of norms: Gemma computes x * (1 + w)
    layer_norm: bool = False  # norms subtract the mean of x; conversion makes this mean zero
    interleaved_rope: bool = False  # RoPE rotates elements 2 i and 2 i + 1, and not i and i + half of them
