"""ModelConfig: a model's sizes and options.

The converters make a ModelConfig of another project's config, such as config.json (converters/hf_config.py). model.pth
stores it, and model.py builds the model from it. An option's default is what most families do, so a family states only
what differs. Below are the fields, then the dict of model.pth, then the checks of the values.
"""

from dataclasses import asdict, dataclass, replace

from utils.errors import UsageError

# layers/linear.py: activate_torch has the formulas
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_silu", "relu2")
ROPE_TYPES = ("linear", "llama3", "dynamic", "yarn", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE changes for contexts longer than the trained context. layers/rope.py: rope_frequencies has the formulas.
    A stretched pair has its frequency divided by factor."""

    rope_type: str  # one of ROPE_TYPES
    factor: float  # how many times as long the context becomes
    low_freq_factor: float = 1.0  # llama3: a pair with fewer rotations within the trained context is stretched
    high_freq_factor: float = 4.0  # llama3: a pair with more rotations within the trained context keeps its frequency
    original_max_seq_len: int = 8192  # the trained context
    attention_factor: float = 1.0  # yarn, longrope: multiplies cos and sin
    beta_fast: float = 32.0  # yarn: a pair with more rotations within the trained context keeps its frequency
    beta_slow: float = 1.0  # yarn: a pair with fewer rotations within the trained context is stretched
    truncate: bool = True  # yarn: the pairs of beta_fast and beta_slow get whole numbers, rounded outwards
    short_factor: tuple[float, ...] = ()  # longrope: divisors of the frequencies, one for each pair of elements
    long_factor: tuple[float, ...] = ()  # longrope: the divisors for KV caches longer than the trained context

    def __post_init__(self):
        check_rope_scaling(self)


@dataclass(frozen=True)
class MoEConfig:
    n_experts: int  # routed experts of each layer
    top_k: int  # routed experts that each token uses
    norm_topk_prob: bool = True  # scale the weights of a token's routed experts so that they sum to one
    n_shared_experts: int = 0  # every token also uses these experts, weighted by one sigmoid
    bias: bool = False  # the router and the experts' projections have biases

    @property
    def active_fraction(self) -> float:
        """The fraction of all experts, routed and shared, that a token uses."""
        return (self.top_k + self.n_shared_experts) / (self.n_experts + self.n_shared_experts)

    def __post_init__(self):
        check_moe(self)


@dataclass(frozen=True)
class ModelConfig:
    """Conventions: 0 disables a numeric option. None means the default named in the field's comment, except in moe,
    rope_scaling and bos_id: there the model has none."""

    dim: int  # width of the residual stream
    n_layers: int  # transformer blocks
    n_heads: int  # heads of queries
    n_kv_heads: int  # heads of keys and values; each serves n_heads / n_kv_heads heads of queries
    head_dim: int  # width of a head; n_heads * head_dim may differ from dim
    ffn_dim: int  # width of the feed-forward, or of one expert
    vocab_size: int  # rows of the embedding and of the head
    max_seq_len: int  # the longest context, in tokens
    norm_eps: float = 1e-5  # RMSNorm adds this to the mean square
    pre_norm: bool = True  # RMSNorm before attention and feed-forward
    post_norm: bool = False  # RMSNorm after attention and feed-forward, before the residual is added
    parallel_residual: bool = False  # attention and feed-forward of a block have the same input
    activation: str = "silu"  # one of ACTIVATIONS
    gated: bool = True  # the feed-forward is down(activation(gate x) * up x), and otherwise down(activation(up x))
    qkv_bias: bool = False  # the projections to queries, keys and values have biases
    o_proj_bias: bool = False  # attention's output projection has a bias
    ffn_bias: bool = False  # the feed-forward's projections have biases
    head_bias: bool = False  # the output head has a bias
    tie_embeddings: bool = False  # head and embedding share one weight
    moe: MoEConfig | None = None  # experts in place of one feed-forward

    # Attention
    qk_norm: bool = False  # RMSNorm of queries and keys before RoPE, each head by itself
    qk_norm_across_heads: bool = False  # the RMSNorm of qk_norm is over all heads of a token together
    sliding_window: int = 0  # a token sees only the last sliding_window tokens, itself included; 0: all
    layer_has_window: tuple[bool, ...] | None = None  # whether each layer has the window; None means all have
    sinks: bool = False  # every head has a score for attending to nothing
    attention_scale: float | None = None  # multiplies the scores; None means 1 / sqrt(head_dim)
    attention_softcap: float = 0.0  # scores become softcap * tanh(score / softcap); 0: off
    clip_qkv: float = 0.0  # queries, keys and values are clamped to [-clip_qkv, clip_qkv]; 0: off

    # Positions
    rope_theta: float = 10000.0  # the base of RoPE's frequencies
    rope_scaling: RopeScaling | None = None  # changes the frequencies for longer contexts
    rotary_dim: int | None = None  # how many elements of a head RoPE rotates; None means all
    layer_has_rope: tuple[bool, ...] | None = None  # whether each layer has RoPE; None means all have
    # Gemma 3, OLMo 3: the base in layers with the window, which ignore rope_scaling. None means rope_theta, scaled.
    local_rope_theta: float | None = None
    alibi: bool = False  # scores fall with the distance, with a slope for each head (layers/rope.py: alibi_slopes)

    # Multipliers
    embed_scale: float = 1.0  # multiplies the embedding's output
    residual_scale: float = 1.0  # multiplies the outputs of attention and feed-forward before the residual is added
    logit_scale: float = 1.0  # multiplies the logits
    logit_softcap: float = 0.0  # logits become softcap * tanh(logit / softcap); 0: off

    # Tokens
    bos_id: int | None = None  # the token with which a text begins
    eos_ids: tuple[int, ...] = ()  # the tokens that end a text

    def __post_init__(self):
        check_dimensions(self)
        check_layers(self)
        check_options(self)
        if self.rope_scaling is not None:
            check_can_scale_rope(self, self.rope_scaling)

    @property
    def q_dim(self) -> int:
        """The width of the queries of a token: all heads together."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """The width of the keys, and of the values, of a token: all heads together."""
        return self.n_kv_heads * self.head_dim

    @property
    def gate_up_dims(self) -> tuple[int, ...]:
        """The outputs of each projection that gate_up_proj stacks: gate and up, or up alone."""
        return (self.ffn_dim,) * (2 if self.gated else 1)

    def window(self, layer_idx: int) -> int:
        """Returns how many tokens a token sees in a layer, itself included. 0 means all."""
        has_window = self.layer_has_window is None or self.layer_has_window[layer_idx]
        return self.sliding_window if has_window else 0

    def with_layers(self, n: int) -> "ModelConfig":
        """Returns the config of a model that has only the first n layers."""
        has_window = self.layer_has_window and self.layer_has_window[:n]
        has_rope = self.layer_has_rope and self.layer_has_rope[:n]
        return replace(self, n_layers=n, layer_has_window=has_window, layer_has_rope=has_rope)

    def to_dict(self) -> dict:
        """Returns the dict that model.pth stores."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "ModelConfig":
        """Makes the config from the dict that model.pth stores."""
        try:
            fields = lists_to_tuples(fields)
            if fields["rope_scaling"]:
                fields["rope_scaling"] = RopeScaling(**lists_to_tuples(fields["rope_scaling"]))
            if fields["moe"]:
                fields["moe"] = MoEConfig(**fields["moe"])
            return cls(**fields)
        except (AttributeError, TypeError, KeyError) as e:
            raise UsageError(f"the checkpoint's config does not fit this version ({e}); convert it again") from None


def lists_to_tuples(fields: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


# ---- Checks ---------------------------------------------------------------------------------------------------------

# A config comes from a file, and the file may be broken. Without these checks a wrong value would raise an error far
# from its cause, or change the output silently.

MAX_MODULES = 2**16  # layers, heads or experts; a broken config must not make model.py create millions of modules
MAX_SIZE = 2**31  # the limit of a dimension, in elements or tokens


def check_dimensions(config: ModelConfig):
    """Kernels compute addresses from these dimensions."""
    for name in "dim n_layers n_heads n_kv_heads head_dim ffn_dim vocab_size max_seq_len".split():
        check_size(f"the model's {name}", getattr(config, name))
    if config.sliding_window != 0:
        check_size("sliding_window", config.sliding_window)
    for what, n in (("layers", config.n_layers), ("heads", config.n_heads)):
        if n > MAX_MODULES:
            raise UsageError(f"{n} {what} are more than any model has")
    if config.n_heads % config.n_kv_heads:
        raise UsageError(f"n_heads {config.n_heads} is no multiple of n_kv_heads {config.n_kv_heads}")
    if config.head_dim % 2:
        raise UsageError(f"head_dim {config.head_dim} is odd, and RoPE rotates pairs")
    if config.rotary_dim is not None and (config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim):
        raise UsageError(f"RoPE cannot rotate {config.rotary_dim} of {config.head_dim} elements")


def check_layers(config: ModelConfig):
    """Without this check, a list that is too long would pass unseen."""
    for name in ("layer_has_window", "layer_has_rope"):
        layers = getattr(config, name)
        if layers is not None and len(layers) != config.n_layers:
            raise UsageError(f"{name} is about {len(layers)} layers; the model has {config.n_layers}")


def check_options(config: ModelConfig):
    """A scale of 0 or NaN would ruin the logits. model.py ignores some options in a mixture of experts."""
    for name in "norm_eps rope_theta embed_scale residual_scale logit_scale".split():
        check_positive_number(f"the model's {name}", getattr(config, name))
    for name in "attention_scale local_rope_theta".split():
        if getattr(config, name) is not None:
            check_positive_number(f"the model's {name}", getattr(config, name))
    for name in "attention_softcap clip_qkv logit_softcap".split():
        if getattr(config, name) != 0:
            check_positive_number(f"the model's {name}", getattr(config, name))
    if config.activation not in ACTIVATIONS:
        raise UsageError(f"activation {config.activation!r} is not supported; {', '.join(ACTIVATIONS)} are")
    if config.moe is not None and (config.residual_scale != 1 or config.ffn_bias):
        raise UsageError("a mixture of experts has neither residual_scale nor ffn_bias; MoEConfig has a bias")
    if not all(isinstance(i, int) for i in config.eos_ids):
        raise UsageError(f"eos_ids must be token ids, not {config.eos_ids}")


def check_rope_scaling(scaling: RopeScaling):
    """layers/rope.py divides by most of these numbers."""
    if scaling.rope_type not in ROPE_TYPES:
        raise UsageError(f"rope_scaling of type {scaling.rope_type!r} is not supported; {', '.join(ROPE_TYPES)} are")
    numbers = "factor low_freq_factor high_freq_factor original_max_seq_len attention_factor beta_fast beta_slow"
    for name in numbers.split():
        check_positive_number(f"rope_scaling's {name}", getattr(scaling, name))
    for factor in (*scaling.short_factor, *scaling.long_factor):
        check_positive_number("a factor of rope_scaling", factor)


def check_can_scale_rope(config: ModelConfig, scaling: RopeScaling):
    """longrope has a factor for each pair of elements; yarn divides by log(rope_theta), dynamic by rotary_dim - 2."""
    rotary_dim = config.rotary_dim or config.head_dim
    n_pairs = rotary_dim // 2
    if scaling.rope_type == "longrope" and not len(scaling.short_factor) == len(scaling.long_factor) == n_pairs:
        raise UsageError(f"rope_scaling of type longrope needs {n_pairs} short and long factors")
    if (scaling.rope_type == "yarn" and config.rope_theta <= 1) or (scaling.rope_type == "dynamic" and rotary_dim == 2):
        raise UsageError(f"RoPE with theta {config.rope_theta} and {rotary_dim} elements cannot be scaled")


def check_moe(moe: MoEConfig):
    """The router takes the top_k largest of n_experts numbers for each token."""
    if type(moe.n_experts) is not int or type(moe.top_k) is not int:
        raise UsageError(f"the numbers of experts must be integers, not {moe.n_experts!r} and {moe.top_k!r}")
    if type(moe.n_shared_experts) is not int or moe.n_shared_experts < 0:
        raise UsageError(f"the number of shared experts must be an integer, not {moe.n_shared_experts!r}")
    if not 0 < moe.top_k <= moe.n_experts:
        raise UsageError(f"a token cannot use {moe.top_k} of {moe.n_experts} experts")
    if moe.n_experts + moe.n_shared_experts > MAX_MODULES:
        raise UsageError(f"{moe.n_experts + moe.n_shared_experts} experts are more than any model has")


def check_size(what: str, value):
    if type(value) is not int or not 0 < value < MAX_SIZE:  # True is an int for isinstance
        raise UsageError(f"{what} must be a positive integer, not {value!r}")


def check_positive_number(what: str, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e15:
        raise UsageError(f"{what} must be a positive number, not {value!r}")
