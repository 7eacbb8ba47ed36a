"""CanonicalCheckpoint: every reader makes one, and write_model.py writes it. Its tensors have canonical names.

These are the names in transformers, apart from a layer's norms:

    of Llama      for most tensors
    of Qwen       q_norm, k_norm, gate, experts, shared_expert_gate
    of gpt-oss    sinks
    our own       pre_attention_norm, post_attention_norm, pre_ffn_norm, post_ffn_norm: in transformers,
                  post_attention_layernorm comes before the feed-forward in Llama, but after attention in Gemma

The layout is that of Llama in transformers: the weight of a linear layer is [outputs, inputs], and RoPE rotates
elements i and i + head_dim / 2 of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from config import ModelConfig
from converters.quantized_weight import QuantizedWeight

# Our module in model.pth -> the canonical modules whose weights are concatenated along dim 0 to our weight
CANONICAL_PARTS = {
    "embed_tokens": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "lm_head": ["lm_head"],
    # In a layer. The prefixes are left out: "layers.3." in our names, "model.layers.3." in canonical ones
    "pre_attention_norm": ["pre_attention_norm"],
    "attention": ["self_attn"],  # the sinks
    "attention.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.o_proj": ["self_attn.o_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "post_attention_norm": ["post_attention_norm"],
    "pre_ffn_norm": ["pre_ffn_norm"],
    "post_ffn_norm": ["post_ffn_norm"],
    "feed_forward.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],  # without a gate, up_proj alone
    "feed_forward.down_proj": ["mlp.down_proj"],
}
# The same for a mixture of experts. Our tensor stacks all experts; {e} is the number of one.
MOE_CANONICAL_PARTS = CANONICAL_PARTS | {
    "feed_forward.router": ["mlp.gate"],
    "feed_forward.gate_up_proj": ["mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"],
    "feed_forward.down_proj": ["mlp.experts.{e}.down_proj"],
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

SourceTensors = dict[str, Tensor | QuantizedWeight]  # by the names in the files or, after renaming, canonical names
TensorReader = Callable[[str], Tensor | QuantizedWeight]  # canonical name -> the tensor, with its data


@dataclass
class CanonicalCheckpoint:
    """A checkpoint of any format, ready to be written as model.pth."""

    config: ModelConfig
    tensors: SourceTensors  # by canonical names; only shapes and dtypes count, so they may be on the meta device
    read: TensorReader
    tokenizer_files: dict[str, bytes | None] = field(default_factory=dict)  # name -> contents; None removes the file
    note: str = ""  # printed when model.pth has been written
