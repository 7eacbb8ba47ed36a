"""Defines Family: the columns of the table of families, which is families.py: FAMILIES."""

from collections.abc import Callable
from dataclasses import dataclass, field

from config import ModelConfig
from converters.family_tensors import split_stacked_experts
from converters.model_tensors import SourceTensors


@dataclass(frozen=True)
class Family:
    """How to read the config.json of one architecture, and how to make its tensors canonical."""

    model_type: str  # the value of config.json's "model_type"
    defaults: dict  # transformers' defaults for fields that config.json leaves out

    # Renames the fields of config.json to Llama's names
    rename_fields: Callable[[dict], dict] = lambda hf_config: hf_config

    # Sliding window
    sliding_layers: str = "none"  # the layers with a window: "none", "all", or "layer_types" (config.json lists them)
    default_layer_types: Callable[[dict], list[str]] | None = None  # if config.json lacks layer_types; None: an error
    needs_use_sliding_window: bool = False  # layers have a window only if use_sliding_window is true
    scales_sliding_rope: bool = True  # False: rope_scaling changes only layers without a window

    # Feed-forward
    ffn_dim_field: str = "intermediate_size"
    n_experts_fields: tuple[str, ...] = ()  # config.json's names of n_experts; the first found counts; (): no experts
    norm_topk_prob: bool | None = True  # MoEConfig's norm_topk_prob; None: config.json has the value
    shared_expert: bool = False  # whether every token also uses an expert of shared_expert_intermediate_size
    experts_bias: bool = False  # whether the router and the experts have biases

    # Everything else that changes the maths. The fields of ModelConfig are set in this order, and later ones win:
    # config.json over defaults, both after rename_fields; then config_overrides; then read_overrides. A field of
    # HF_NEUTRAL_VALUES (hf_config.py) with another value is refused, unless it is one of allowed_fields.
    allowed_fields: tuple[str, ...] = ()  # fields of HF_NEUTRAL_VALUES that may have any value
    config_overrides: dict = field(default_factory=dict)  # fields of ModelConfig with one value for the whole family
    read_overrides: Callable[[dict], dict] = lambda hf_config: {}  # config.json -> more fields of ModelConfig

    # Tensors, at conversion. family_tensors.py defines the renames and functions, hf_tensors.py applies them.
    renames: dict[str, str] = field(default_factory=dict)  # part of a name -> part of a canonical name; in order
    # Splits tensors that hold all experts of a layer
    split_experts: Callable[[SourceTensors, ModelConfig], None] = split_stacked_experts
    # Whether conversion scales the rows of the head to length one
    normalizes_head: Callable[[ModelConfig], bool] = lambda config: False
    norm_offset: float = 0.0  # added to the weights of norms: Gemma computes x * (1 + w)
    layer_norm: bool = False  # whether norms subtract the mean of x; conversion makes the mean zero
    norm_bias: bool = False  # whether these norms have biases; conversion adds them to the biases of the layers after
    interleaved_rope: bool = False  # whether RoPE pairs elements 2 i and 2 i + 1, instead of i and i + rotary_dim / 2
