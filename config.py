"""ModelConfig: a model's sizes and options, read from its config.json by a table of the supported families.

    config = ModelConfig.from_hf(json.load(open("config.json")))

To add a family, add an entry to FAMILIES; docs/add_a_model.md has an example. This file has no command line.
"""

from dataclasses import dataclass


class UsageError(ValueError):
    """The user's input cannot work. The message is one sentence: what is wrong and what would be right."""


@dataclass(frozen=True)
class RopeScaling:
    """Stretches RoPE's wavelengths for contexts longer than the trained one: all of them ("linear") or only the long
    ones ("llama3")."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self):
        if self.rope_type not in ("linear", "llama3"):
            raise UsageError(f"rope_scaling of type {self.rope_type!r} is not supported; linear and llama3 are")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"):
            check_positive_number(f"rope_scaling's {name}", getattr(self, name))


@dataclass(frozen=True)
class MoEConfig:
    n_experts: int
    top_k: int  # experts that each token uses
    norm_topk_prob: bool = True  # scale the weights of a token's experts so that they sum to one

    def __post_init__(self):
        if type(self.n_experts) is not int or type(self.top_k) is not int:
            raise UsageError(f"the numbers of experts must be integers, not {self.n_experts!r} and {self.top_k!r}")
        if not 0 < self.top_k <= self.n_experts:
            raise UsageError(f"a token cannot use {self.top_k} of {self.n_experts} experts")
        if self.n_experts > MAX_OBJECTS:
            raise UsageError(f"{self.n_experts} experts are more than any model has")


MAX_OBJECTS = 2**16  # layers, or experts; a broken config must not create millions of modules
MAX_SIZE = 2**31


@dataclass(frozen=True)
class ModelConfig:
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int  # width of the feed-forward; with experts, of one expert
    vocab_size: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False  # RMSNorm on every query and key head before RoPE
    tie_embeddings: bool = False
    moe: MoEConfig | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        """Raises UsageError for sizes that no model can have."""
        for name in "dim n_layers n_heads n_kv_heads head_dim ffn_dim vocab_size max_seq_len".split():
            check_size(f"the model's {name}", getattr(self, name))
        if self.sliding_window is not None:
            check_size("sliding_window", self.sliding_window)
        for name in ("norm_eps", "rope_theta"):
            check_positive_number(f"the model's {name}", getattr(self, name))
        if self.n_layers > MAX_OBJECTS:
            raise UsageError(f"{self.n_layers} layers are more than any model has")
        if self.n_heads % self.n_kv_heads:
            raise UsageError(f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise UsageError(f"head_dim {self.head_dim} is odd, and RoPE rotates pairs")
        if not all(isinstance(i, int) for i in self.eos_ids):
            raise UsageError(f"eos_ids must be token ids, not {self.eos_ids}")

    @classmethod
    def from_dict(cls, fields: dict) -> "ModelConfig":
        """The inverse of dataclasses.asdict, for the config stored in model.pth."""
        try:
            fields = dict(fields, eos_ids=tuple(fields["eos_ids"]))
            if fields["rope_scaling"]:
                fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
            if fields["moe"]:
                fields["moe"] = MoEConfig(**fields["moe"])
            return cls(**fields)
        except (TypeError, KeyError) as e:
            raise UsageError(f"the checkpoint's config does not fit this version ({e}); convert it again") from None

    @classmethod
    def from_hf(cls, hf: dict, generation: dict | None = None) -> "ModelConfig":
        """Reads Hugging Face's config.json (hf), in its old spelling (rope_theta, rope_scaling) or its new one
        (rope_parameters). generation, if given, is generation_config.json, which may name more end tokens. Raises
        UsageError for what is not supported."""
        generation = generation or {}
        if not isinstance(hf, dict) or not isinstance(generation, dict):
            raise UsageError("config.json and generation_config.json must each hold one object")
        try:
            return config_from_hf(hf, generation)
        except (AttributeError, LookupError, TypeError) as e:
            raise UsageError(f"config.json holds something of the wrong kind ({e})") from None


def check_size(what: str, value):
    if type(value) is not int or not 0 < value < MAX_SIZE:
        raise UsageError(f"{what} must be a positive integer, not {value!r}")


def check_positive_number(what: str, value):
    if not isinstance(value, (int, float)) or not 0 < value < 1e15:
        raise UsageError(f"{what} must be a positive number, not {value!r}")


# ---- Families -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """How the config.json of one architecture is read."""

    model_type: str  # the value of config.json's "model_type"
    defaults: dict  # what transformers assumes for a field that config.json leaves out
    window: str = "none"  # which layers have the sliding window: "none", "all", or as "layer_types" lists them
    window_switch: bool = False  # whether the window needs use_sliding_window to be true
    ffn_dim_field: str = "intermediate_size"
    n_experts_fields: tuple[str, ...] = ()  # the first one that is there counts; (): the feed-forward is dense
    norm_topk_prob: bool | None = True  # None: as config.json's norm_topk_prob
    always_qkv_bias: bool = False  # q, k and v have a bias, and the output has none; if False, attention_bias decides
    qk_norm: bool = False


MISTRAL = dict(max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, num_key_value_heads=8)
QWEN = dict(max_position_embeddings=32768, num_key_value_heads=32, sliding_window=4096)
FAMILIES = {
    "LlamaForCausalLM": Family("llama", dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)),
    "MistralForCausalLM": Family("mistral", MISTRAL | dict(sliding_window=4096), window="layer_types"),
    "MixtralForCausalLM": Family(
        "mixtral",
        MISTRAL | dict(rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2),
        window="all",
        n_experts_fields=("num_local_experts",),
    ),
    "Qwen2ForCausalLM": Family("qwen2", QWEN, window="layer_types", window_switch=True, always_qkv_bias=True),
    "Qwen3ForCausalLM": Family(
        "qwen3", QWEN | dict(head_dim=128), window="layer_types", window_switch=True, qk_norm=True
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        QWEN
        | dict(num_key_value_heads=4, num_local_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
        window="all",
        window_switch=True,
        ffn_dim_field="moe_intermediate_size",
        n_experts_fields=("num_experts", "num_local_experts"),
        norm_topk_prob=None,
        qk_norm=True,
    ),
}
MODEL_TYPES = {family.model_type: name for name, family in FAMILIES.items()}  # for a config without "architectures"
# Fields that change the maths in a way that model.py does not implement -> the values with which they change nothing
UNSUPPORTED_FIELDS = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "clip_qkv": (),
    "alibi": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,),
}


def config_from_hf(hf: dict, generation: dict) -> ModelConfig:
    family = find_family(hf)
    hf = family.defaults | hf
    for field, allowed in UNSUPPORTED_FIELDS.items():
        if hf.get(field) not in (None, False, *allowed):
            raise UsageError(f"config.json: {field} = {hf[field]!r} is not supported")
    rope = read_rope(hf)
    attention_bias = bool(hf.get("attention_bias"))
    n_heads = required(hf, "num_attention_heads")
    bos_id = hf.get("bos_token_id")
    return ModelConfig(
        dim=required(hf, "hidden_size"),
        n_layers=required(hf, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=hf.get("num_key_value_heads") or n_heads,
        head_dim=read_head_dim(hf),
        ffn_dim=required(hf, family.ffn_dim_field),
        vocab_size=required(hf, "vocab_size"),
        max_seq_len=required(hf, "max_position_embeddings"),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=rope["rope_theta"],
        rope_scaling=read_rope_scaling(rope, hf),
        sliding_window=read_window(hf, family),
        qkv_bias=attention_bias or family.always_qkv_bias,
        out_bias=attention_bias and not family.always_qkv_bias,
        ffn_bias=bool(hf.get("mlp_bias")),
        qk_norm=family.qk_norm,
        tie_embeddings=bool(hf.get("tie_word_embeddings")),
        moe=read_moe(hf, family),
        bos_id=bos_id if isinstance(bos_id, int) else None,
        eos_ids=read_eos_ids(hf, generation),
    )


def required(hf: dict, *fields: str):
    """The value of the first of fields that config.json has. Raises UsageError if it has none of them."""
    for field in fields:
        if hf.get(field) is not None:
            return hf[field]
    raise UsageError(f"config.json: {' or '.join(fields)} is missing")


def find_family(hf: dict) -> Family:
    names = hf.get("architectures") or [MODEL_TYPES.get(hf.get("model_type"), hf.get("model_type"))]
    name = names if isinstance(names, str) else names[0]
    if name not in FAMILIES:
        raise UsageError(f"architecture {name!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def read_head_dim(hf: dict) -> int:
    if hf.get("head_dim") is not None:
        return hf["head_dim"]
    dim, n_heads = required(hf, "hidden_size"), required(hf, "num_attention_heads")
    if not isinstance(dim, int) or not isinstance(n_heads, int) or n_heads < 1 or dim % n_heads:
        raise UsageError(f"config.json: hidden_size {dim!r} is not a multiple of num_attention_heads {n_heads!r}")
    return dim // n_heads


def read_window(hf: dict, family: Family) -> int | None:
    """The sliding window, if all layers have it, or None. Raises UsageError if only some layers have it."""
    window = hf.get("sliding_window")
    if not window or family.window == "none":
        return None
    if family.window_switch and not hf.get("use_sliding_window"):
        return None
    if family.window == "all":
        return window
    layer_types = read_layer_types(hf, family)
    if len(set(layer_types)) > 1:
        raise UsageError("config.json: a sliding window on some layers only (layer_types) is not supported")
    return window if layer_types[:1] == ["sliding_attention"] else None


def read_layer_types(hf: dict, family: Family) -> list[str]:
    """The kind of attention of each layer. Without a list in config.json, all layers have the window; Qwen's only from
    max_window_layers on."""
    n_layers, types = required(hf, "num_hidden_layers"), hf.get("layer_types") or []
    first = hf.get("max_window_layers", 28) if family.window_switch else 0
    if type(first) is not int or not isinstance(types, list) or type(n_layers) is not int or n_layers > MAX_OBJECTS:
        raise UsageError(f"config.json: max_window_layers {first!r} or layer_types {types!r} makes no sense")
    n_full = min(first, n_layers)
    return types or ["full_attention"] * n_full + ["sliding_attention"] * (n_layers - n_full)


def read_rope(hf: dict) -> dict:
    """RoPE's fields (rope_theta, rope_type, factor ...), collected from where a config.json may have them."""
    rope = {"rope_theta": hf.get("rope_theta", 10000.0), "rope_type": "default"}
    for field in ("rope_parameters", "rope_scaling"):
        fields = hf.get(field) or {}
        if not isinstance(fields, dict):
            raise UsageError(f"config.json: {field} must be an object, not {fields!r}")
        rope |= fields
        if "rope_type" not in fields and "type" in fields:  # the older spelling
            rope["rope_type"] = fields["type"]
    if rope.get("partial_rotary_factor", 1) != 1 or any(isinstance(value, dict) for value in rope.values()):
        raise UsageError("config.json: rope_parameters with partial_rotary_factor or per layer type are not supported")
    return rope


def read_rope_scaling(rope: dict, hf: dict) -> RopeScaling | None:
    rope_type = rope["rope_type"]
    if rope_type == "default":
        return None
    if rope_type == "linear":
        return RopeScaling("linear", rope.get("factor"))
    if rope_type == "llama3":
        rope = {"original_max_position_embeddings": hf.get("max_position_embeddings")} | rope
        keys = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
        if any(not isinstance(rope.get(key), (int, float)) for key in keys):
            raise UsageError(f"config.json: rope_scaling of type llama3 needs numbers for {', '.join(keys)}")
        return RopeScaling("llama3", *(rope[key] for key in keys))
    what = f"rope_scaling of type {rope_type!r} is not supported"
    raise UsageError(f"config.json: {what}; default, linear and llama3 are")


def read_moe(hf: dict, family: Family) -> MoEConfig | None:
    if not family.n_experts_fields:
        return None
    normalize = family.norm_topk_prob
    if normalize is None:
        normalize = bool(hf.get("norm_topk_prob"))
    return MoEConfig(required(hf, *family.n_experts_fields), required(hf, "num_experts_per_tok"), normalize)


def read_eos_ids(hf: dict, generation: dict) -> tuple[int, ...]:
    """The end tokens of config.json and generation_config.json, without duplicates."""
    eos_ids = []
    for source in (hf, generation):
        ids = source.get("eos_token_id")
        for i in ids if isinstance(ids, list) else [ids]:
            if isinstance(i, int) and i not in eos_ids:
                eos_ids.append(i)
    return tuple(eos_ids)
