"""Family: the columns of the table of families (families.py)."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from config import ModelConfig
from converters.canonical_checkpoint import SourceTensors
from converters.family_tensors import split_stacked_experts


@dataclass(frozen=True)
class Family:
    """How to read the config.json of one architecture, and how to make its tensors canonical."""

    model_type: str  # "model_type" in config.json
    hf_defaults: dict  # what transformers assumes for fields that config.json lacks, beyond COMMON_DEFAULTS

    # Gives the fields of config.json the names and the nesting of Llama's config.json
    normalize_hf_config: Callable[[dict], dict] = lambda hf_config: hf_config

    # Sliding window
    sliding_layers: str = "none"  # which layers have a window: "none", "all", or "layer_types" (config.json lists them)
    default_layer_types: Callable[[dict], list[str]] | None = None  # if config.json lacks layer_types; None is an error
    needs_use_sliding_window: bool = False  # layers have a window only if use_sliding_window is true
    # The field of config.json with rope_theta of layers with a window. Then rope_scaling does not change these layers.
    # None: all layers have the same RoPE
    sliding_rope_theta_field: str | None = None

    # Feed-forward
    ffn_dim_field: str = "intermediate_size"
    n_experts_fields: tuple[str, ...] = ()  # names of n_experts in config.json; the first found counts
    norm_topk_prob: bool | None = True  # norm_topk_prob of MoEConfig; None if config.json has the field
    shared_expert: bool = False  # whether every token also uses an expert of shared_expert_intermediate_size
    experts_bias: bool = False  # whether the router and the experts have biases

    # Everything else that changes the maths. HF_NO_OP_VALUES (hf_config.py) lists the values of a field that change
    # nothing. All other values are refused, unless the field is in handled_hf_fields. Then read_config_fields reads and
    # checks it.
    handled_hf_fields: tuple[str, ...] = ()
    config_fields: dict = field(default_factory=dict)  # fields of ModelConfig with one value for the whole family
    read_config_fields: Callable[[dict], dict] = lambda hf_config: {}  # config.json -> fields, which override others

    # Tensors, at conversion. family_tensors.py defines the functions and names, and hf_tensors.py applies them.
    tensor_renames: dict[str, str] = field(default_factory=dict)  # part of a name -> part of a canonical name; in order
    # Splits tensors that hold all experts of a layer
    split_experts: Callable[[SourceTensors, ModelConfig], None] = split_stacked_experts
    # (canonical name, config) -> function that changes the numbers of this tensor, or None
    find_change: Callable[[str, ModelConfig], Callable[[Tensor], Tensor] | None] = lambda name, config: None
    has_norm_weights: bool = True  # if not, conversion makes weights of ones
    norm_offset: float = 0.0  # added to the weights of norms; Gemma computes x * (1 + w)
    layer_norm: bool = False  # whether norms subtract the mean of x; conversion makes the mean zero
    norm_bias: bool = False  # whether LayerNorms have biases; conversion moves them into the next layers
    interleaved_rope: bool = False  # whether RoPE pairs elements 2 i and 2 i + 1, instead of i and i + rotary_dim / 2
    reversed_rope: bool = False  # whether RoPE rotates by the negative angle
