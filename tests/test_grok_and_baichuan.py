"""Families that transformers does not have, Grok-1 and Baichuan, against plain PyTorch after their descriptions."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from config import UsageError
from families import config_from_hf
from loading import load_model
from model import KVCache
from tests.tiny import convert

DIM, N_LAYERS, H, G, D, FFN, V, E = 32, 2, 4, 2, 8, 48, 60, 4
SIZES = {
    "hidden_size": DIM, "num_hidden_layers": N_LAYERS, "num_attention_heads": H, "intermediate_size": FFN,
    "vocab_size": V, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
GROK = SIZES | {
    "architectures": ["Grok1ModelForCausalLM"], "model_type": "grok-1", "num_key_value_heads": G, "num_experts": E,
    "num_experts_per_tok": 2, "attn_output_multiplier": 0.4, "embedding_multiplier_scale": 7.0, "max_attn_value": 2.0,
    "output_multiplier_scale": 0.6, "hidden_act": "gelu",
}  # fmt: skip
BAICHUAN = SIZES | {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "hidden_act": "silu"}


def random_tensors(shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.3 + (1 if "norm" in name else 0) for name, shape in shapes.items()}


def grok_tensors() -> dict[str, torch.Tensor]:
    shapes = {"model.embed_tokens.weight": (V, DIM), "lm_head.weight": (V, DIM), "model.norm.scale": (DIM,)}
    for i in range(N_LAYERS):
        layer = f"model.layers.{i}"
        for norm in ("pre_attn", "post_attn", "pre_moe", "post_moe"):
            shapes[f"{layer}.{norm}_norm.scale"] = (DIM,)
        for name, n in (("q", H), ("k", G), ("v", G)):
            shapes[f"{layer}.attn.{name}_proj.weight"] = (n * D, DIM)
        shapes[f"{layer}.attn.o_proj.weight"] = (DIM, H * D)
        shapes[f"{layer}.moe_block.gate.weight"] = (E, DIM)
        for e in range(E):
            for name in ("linear", "linear_v"):
                shapes[f"{layer}.moe_block.experts.{e}.{name}.weight"] = (FFN, DIM)
            shapes[f"{layer}.moe_block.experts.{e}.linear_1.weight"] = (DIM, FFN)
    return random_tensors(shapes)


def baichuan_tensors(vocab_size: int) -> dict[str, torch.Tensor]:
    shapes = {"model.embed_tokens.weight": (vocab_size, DIM), "lm_head.weight": (vocab_size, DIM)}
    shapes["model.norm.weight"] = (DIM,)
    for i in range(N_LAYERS):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (DIM,)
        shapes[f"{layer}.self_attn.W_pack.weight"] = (3 * DIM, DIM)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (DIM, DIM)
        for name, shape in (("gate", (FFN, DIM)), ("up", (FFN, DIM)), ("down", (DIM, FFN))):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
    return random_tensors(shapes)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def attention(q, k, v, scale: float, cap: float | None) -> torch.Tensor:
    """q [T, H, D], k and v [T, G, D] -> [T, H D], with RoPE and a causal mask."""
    T = len(q)
    angles = torch.arange(T)[:, None] * 1e4 ** -(torch.arange(0, D, 2) / D)

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    q, k, v = rotate(q), *(t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (rotate(k), v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def grok_logits(w: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    x = w["model.embed_tokens.weight"][tokens] * GROK["embedding_multiplier_scale"]
    for i in range(N_LAYERS):
        layer = f"model.layers.{i}"
        h = norm(x, w[f"{layer}.pre_attn_norm.scale"])
        q, k, v = ((h @ w[f"{layer}.attn.{name}_proj.weight"].T).unflatten(-1, (-1, D)) for name in "qkv")
        y = attention(q, k, v, GROK["attn_output_multiplier"], GROK["max_attn_value"])
        x = x + norm(y @ w[f"{layer}.attn.o_proj.weight"].T, w[f"{layer}.post_attn_norm.scale"])
        h = norm(x, w[f"{layer}.pre_moe_norm.scale"])
        gates, ids = (h @ w[f"{layer}.moe_block.gate.weight"].T).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for t, (row, chosen) in enumerate(zip(gates, ids.tolist(), strict=True)):
            for gate, e in zip(row, chosen, strict=True):
                expert = f"{layer}.moe_block.experts.{e}"
                hidden = F.gelu(w[f"{expert}.linear.weight"] @ h[t], approximate="tanh")
                hidden = hidden * (w[f"{expert}.linear_v.weight"] @ h[t])
                y[t] += gate * (w[f"{expert}.linear_1.weight"] @ hidden)
        x = x + norm(y, w[f"{layer}.post_moe_norm.scale"])
    return norm(x, w["model.norm.scale"]) @ w["lm_head.weight"].T * GROK["output_multiplier_scale"]


def baichuan_logits(w: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(N_LAYERS):
        layer = f"model.layers.{i}"
        h = norm(x, w[f"{layer}.input_layernorm.weight"])
        q, k, v = (t.unflatten(-1, (-1, D)) for t in (h @ w[f"{layer}.self_attn.W_pack.weight"].T).chunk(3, dim=-1))
        x = x + attention(q, k, v, D**-0.5, None) @ w[f"{layer}.self_attn.o_proj.weight"].T
        h = norm(x, w[f"{layer}.post_attention_layernorm.weight"])
        gate, up, down = (w[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    head = w["lm_head.weight"]
    if len(head) > 64000:  # Baichuan 2
        head = head / head.norm(dim=1, keepdim=True)
    return norm(x, w["model.norm.weight"]) @ head.T


@pytest.mark.parametrize("use_kernels", [True, False])
@pytest.mark.parametrize("name", ["grok", "baichuan", "baichuan 2"])
def test_logits(name, use_kernels, tmp_path):
    if name == "grok":
        hf, tensors, reference = GROK, grok_tensors(), grok_logits
    else:
        vocab_size = 64000 if name == "baichuan" else 64003
        hf, tensors, reference = BAICHUAN | {"vocab_size": vocab_size}, baichuan_tensors(vocab_size), baichuan_logits
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(convert(tmp_path), "cpu", torch.float32, use_kernels)
    tokens = torch.randint(0, V, (20,))
    expected = reference(tensors, tokens)
    kv_cache, logits = KVCache(model, 1, 20), []
    with torch.inference_mode():
        for start, part in ((0, tokens[:11]), (11, tokens[11:12]), (12, tokens[12:])):
            logits.append(model(part[None], torch.tensor([start]), kv_cache)[0])
    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-4, rtol=1e-4)


def test_baichuan_13b_is_refused():
    with pytest.raises(UsageError, match="ALiBi"):
        config_from_hf(BAICHUAN | {"hidden_size": 5120, "num_attention_heads": 40})
