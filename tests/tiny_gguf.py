"""Tiny GGUF files, as the converter of llama.cpp writes them."""

import re
import struct
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers as hf

from tests.tiny import SIZES

ARCHITECTURES = {  # of models that have another name in transformers
    "mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "olmo3": "olmo2",
    "gpt_oss": "gpt-oss",
}
IN_META_ORDER = ("llama", "smollm3", "granite", "arcee")
BPE = {  # the smallest vocabulary
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.eos_token_id": 3,
}


def make_llama(config_class=hf.LlamaConfig, **changes):
    """Returns a model of transformers, in sizes that every quantized type can hold."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "initializer_range": 0.05}
    torch.manual_seed(0)
    config = config_class(**SIZES | sizes | changes)
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def write_gguf(
    path: Path, theirs=None, qtype: str = "F32", meta: dict = BPE, tensors_per_part: int = 0,
    others: dict[str, str] | None = None,
) -> Path:
    """Writes theirs, a model of transformers, as a GGUF, and gives it the dequantized weights. tensors_per_part: if not
    0, the GGUF is split into several files. others: types for matrices whose names contain a key, in place of qtype."""
    writer = gguf.GGUFWriter(path, architecture(theirs), split_max_tensors=tensors_per_part)
    if theirs is not None:
        add_config(writer, theirs)
        add_tensors(writer, theirs, qtype, others or {})
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
    for key, value in meta.items():
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def architecture(theirs) -> str:
    model_type = theirs.config.model_type if theirs else "llama"
    return ARCHITECTURES.get(model_type, model_type)


def add_config(writer: gguf.GGUFWriter, theirs):
    config = theirs.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None and writer.arch != "llama":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    fields = {
        "num_local_experts": writer.add_expert_count,
        "num_experts": writer.add_expert_count,
        "num_experts_per_tok": writer.add_expert_used_count,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
    }
    for name, add in fields.items():
        if config.to_dict().get(name) is not None:
            add(config.to_dict()[name])
    if writer.arch == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if writer.arch not in ("llama", "qwen2", "qwen3", "qwen3moe", "smollm3") and hasattr(config, "sliding_window"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "olmo3":
        writer.add_sliding_window_pattern([layer_type == "sliding_attention" for layer_type in config.layer_types])
    add_rope(writer, theirs)


def add_rope(writer: gguf.GGUFWriter, theirs):
    rope = theirs.config.rope_parameters
    rope = rope.get("full_attention", rope)
    kind = rope["rope_type"]
    writer.add_rope_freq_base(rope["rope_theta"])
    partial = rope.get("partial_rotary_factor")
    if partial:
        head_dim = theirs.config.hidden_size // theirs.config.num_attention_heads
        writer.add_rope_dimension_count(int((getattr(theirs.config, "head_dim", None) or head_dim) * partial))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        original = rope["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(getattr(theirs.config, "original_max_position_embeddings", original))
    if kind == "yarn" and rope.get("attention_factor"):
        writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(theirs.model.rotary_emb.attention_scaling)
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))
    if kind == "llama3":
        inv_freq = theirs.model.rotary_emb.inv_freq
        dim = 2 * len(inv_freq)
        frequencies = rope["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
        writer.add_tensor("rope_freqs.weight", (frequencies / inv_freq).numpy())


def add_tensors(writer: gguf.GGUFWriter, theirs, default_type: str, others: dict[str, str]):
    config = theirs.config
    rng = np.random.default_rng(0)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[writer.arch], config.num_hidden_layers)
    for name, t in unfused(theirs.state_dict()).items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        data, kind = t.numpy(), gguf.GGMLQuantizationType.F32
        is_matrix = t.dim() > 1 and name.endswith(".weight") and "mlp.gate." not in name and "mlp.router." not in name
        qtype = next((kind for key, kind in others.items() if key in name), default_type)
        if is_matrix and (qtype != "MXFP4" or ".experts." in name):
            kind = qtype = gguf.GGMLQuantizationType[qtype]
            if "_K" in qtype.name:  # which gguf cannot make
                data = random_blocks(qtype, data.shape, rng)
            else:
                data = gguf.quantize(np.ascontiguousarray(data), qtype)
            t.copy_(torch.tensor(gguf.dequantize(data, qtype)))
        if "q_proj" in name and writer.arch in IN_META_ORDER:
            data = in_meta_order(data, config.num_attention_heads)
        if "k_proj" in name and writer.arch in IN_META_ORDER:
            data = in_meta_order(data, config.num_key_value_heads)
        if name.endswith("norm.weight") and writer.arch.startswith("gemma"):
            data = data + 1
        name = names.get_name(name, (".weight", ".bias"))
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)


def random_blocks(qtype: gguf.GGMLQuantizationType, shape: tuple[int, ...], rng) -> np.ndarray:
    """Returns random bytes that stand for weights of about 0.05. The floats in a block are scales and, in some types, a
    minimum, which is at most as many steps away from 0 as there are codes."""
    blocks = rng.integers(0, 256, gguf.quant_shape_to_byte_shape(shape, qtype), dtype=np.uint8)
    blocks = blocks.reshape(-1, gguf.GGML_QUANT_SIZES[qtype][1])
    floats = {  # byte in the block: size
        "Q4_0": {0: 0.01}, "Q4_1": {0: 0.01, 2: -0.07}, "Q5_0": {0: 0.005}, "Q5_1": {0: 0.005, 2: -0.07},
        "Q8_0": {0: 0.001}, "Q2_K": {80: 0.003, 82: 0.003}, "Q3_K": {108: 0.001}, "Q4_K": {0: 2e-4, 2: 7e-4},
        "Q5_K": {0: 1e-4, 2: 7e-4}, "Q6_K": {208: 3e-5},
    }
    for start, size in floats[qtype.name].items():
        values = size * rng.uniform(0.8, 1.2, (len(blocks), 1))
        blocks[:, start : start + 2] = values.astype(np.float16).view(np.uint8)
    if qtype.name in ("Q4_K", "Q5_K"):
        blocks[:, 4:8] |= 0b10100000  # scales of 32 to 63
    return blocks.reshape(gguf.quant_shape_to_byte_shape(shape, qtype))


def unfused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns state with three tensors for the experts of a layer where transformers has two, and their biases, in the
    same memory. In gpt-oss they are transposed, and rows of gate and up alternate."""
    state = {name + ".weight" if name.endswith("sinks") else name: t for name, t in state.items()}
    is_transposed = any(name.endswith("gate_up_proj_bias") for name in state)
    for name in [name for name in state if "experts." in name]:
        t = state.pop(name)
        prefix, projection, *is_bias = re.fullmatch(r"(.*)(gate_up|down)_proj(_bias)?", name).groups()
        kind = "bias" if is_bias[0] else "weight"
        t = t.mT if is_transposed and kind == "weight" else t
        parts = {"down": t}
        if projection == "gate_up":
            gate, up = (t[:, ::2], t[:, 1::2]) if is_transposed else t.chunk(2, dim=1)
            parts = {"gate": gate, "up": up}
        state |= {f"{prefix}{part}_proj.{kind}": t for part, t in parts.items()}
    return state


def in_meta_order(weight, n_heads: int):
    """Permutes the rows of Q or K from the order of Hugging Face to that of Meta, as Meta and llama.cpp do."""
    return weight.reshape(n_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


# ---- Files as bytes, which gguf's writer would refuse ----------------------------------------------------------------


def gguf_bytes(meta: dict, tensors: dict) -> bytes:
    """Returns the bytes of a GGUF file of gguf_file.StoredTensors. A value that a GGUF cannot hold has no bytes."""
    fields = []
    for name, value in meta.items():
        kind, content = gguf_value(value)
        fields.append(gguf_string(name) + struct.pack("<I", kind) + content)
    infos, body = [], b""
    for name, stored in tensors.items():
        shape = stored.shape()[::-1]
        numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, stored.ggml_type, len(body))
        infos.append(gguf_string(name) + numbers)
        body += stored.data.tobytes() + bytes(-stored.data.nbytes % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(fields)) + b"".join(fields + infos)
    return head + bytes(-len(head) % 32) + body


def gguf_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def gguf_value(value) -> tuple[int, bytes]:
    """Returns (type, bytes) of a metadata field."""
    if isinstance(value, list):
        elements = [gguf_value(element) for element in value]
        kind = elements[0][0] if elements else gguf.GGUFValueType.UINT32
        content = b"".join(data for element_kind, data in elements if element_kind == kind)
        return gguf.GGUFValueType.ARRAY, struct.pack("<IQ", kind, len(value)) + content
    if isinstance(value, str):
        return gguf.GGUFValueType.STRING, gguf_string(value)
    forms = {bool: [(7, "?")], int: [(4, "I"), (11, "q"), (10, "Q")], float: [(6, "f"), (12, "d")]}
    for kind, form in forms.get(type(value), []):
        try:
            return kind, struct.pack("<" + form, value)
        except (OverflowError, struct.error):
            continue
    return 7, b"\0"
