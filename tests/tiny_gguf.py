"""Tiny GGUF files, as llama.cpp's converter writes them."""

import struct
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers as hf

from tests.tiny import SIZES

NAMES = {  # Hugging Face's parts of names, and GGUF's; replaced in this order
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate.": "ffn_gate_inp.",
}
BPE = {  # the smallest vocabulary
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.eos_token_id": 3,
}


def make_llama(config_class=hf.LlamaConfig, **changes):
    """transformers' model, of sizes that every quantized type can hold."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "initializer_range": 0.05}
    torch.manual_seed(0)
    config = config_class(**SIZES | sizes | changes)
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def write_gguf(path: Path, theirs=None, qtype: str = "F32", meta: dict = BPE) -> Path:
    """theirs, transformers' model, as a GGUF; its weights become what the stored ones stand for."""
    writer = gguf.GGUFWriter(path, "llama")
    if theirs is not None:
        add_config(writer, theirs)
        add_tensors(writer, theirs, gguf.GGMLQuantizationType[qtype])
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
    for key, value in meta.items():
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_config(writer: gguf.GGUFWriter, theirs):
    config = theirs.config
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    if "num_local_experts" in config.to_dict():
        sizes |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    rope = config.rope_parameters
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("llama.rope.freq_base", rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", rope["factor"])
    if rope["rope_type"] == "llama3":
        frequencies = rope["rope_theta"] ** -(torch.arange(0, 64, 2) / 64)
        writer.add_tensor("rope_freqs.weight", (frequencies / theirs.model.rotary_emb.inv_freq).numpy())


def add_tensors(writer: gguf.GGUFWriter, theirs, qtype: gguf.GGMLQuantizationType):
    config = theirs.config
    rng = np.random.default_rng(0)
    for name, t in unfused(theirs.state_dict()).items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        data, kind = t.numpy(), gguf.GGMLQuantizationType.F32
        if t.dim() > 1 and "mlp.gate." not in name:
            kind = qtype
            if "_K" in qtype.name:  # which gguf cannot make; any bytes will do that make small scales
                shape = gguf.quant_shape_to_byte_shape(data.shape, qtype)
                data = rng.integers(0, 0x20, shape, dtype=np.uint8)
            else:
                data = gguf.quantize(data, qtype)
            t.copy_(torch.tensor(gguf.dequantize(data, qtype)))
        if "q_proj" in name:
            data = in_meta_order(data, config.num_attention_heads)
        if "k_proj" in name:
            data = in_meta_order(data, config.num_key_value_heads)
        for old, new in NAMES.items():
            name = name.replace(old, new)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)


def unfused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """state with three tensors for a layer's experts, of which transformers makes two; they share their memory."""
    state = dict(state)
    for name in [name for name in state if name.endswith("gate_up_proj")]:
        prefix = name.removesuffix("gate_up_proj")
        gate, up = state.pop(name).chunk(2, dim=1)
        state[f"{prefix}gate_proj.weight"] = gate
        state[f"{prefix}up_proj.weight"] = up
        state[f"{prefix}down_proj.weight"] = state.pop(f"{prefix}down_proj")
    return state


def in_meta_order(weight, n_heads: int):
    """Rows of Q or K from Hugging Face's order to Meta's, as Meta's and llama.cpp's own tools permute them."""
    return weight.reshape(n_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


# ---- Files as bytes, which gguf's writer would refuse ----------------------------------------------------------------


def gguf_bytes(meta: dict, tensors: dict) -> bytes:
    """A GGUF file of convert_gguf.StoredTensors; of a value that it cannot hold, nothing."""
    fields = []
    for name, value in meta.items():
        kind, content = gguf_value(value)
        fields.append(gguf_string(name) + struct.pack("<I", kind) + content)
    infos, body = [], b""
    for name, stored in tensors.items():
        shape = stored.shape()[::-1]
        numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, stored.type, len(body))
        infos.append(gguf_string(name) + numbers)
        body += stored.data.tobytes() + bytes(-stored.data.nbytes % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(fields)) + b"".join(fields + infos)
    return head + bytes(-len(head) % 32) + body


def gguf_string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def gguf_value(value) -> tuple[int, bytes]:
    """(type, bytes) of a metadata field."""
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
