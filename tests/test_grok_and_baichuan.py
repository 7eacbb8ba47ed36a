"""Grok-1 and Baichuan, which transformers lacks, against plain PyTorch written after their descriptions."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import quantize
from converters.hf_config import config_from_hf
from engine.generation import DecodeLoop
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from layers.kv_cache import KVCache
from layers.rope import alibi_slopes
from loading import load_model
from tests.tiny import call_main, convert, make_hf
from utils.errors import UsageError

DIM, N_LAYERS, H, G, D, FFN, V, E = 32, 2, 4, 2, 8, 48, 97, 4
SIZES = {
    "hidden_size": DIM, "num_hidden_layers": N_LAYERS, "num_attention_heads": H, "intermediate_size": FFN,
    "vocab_size": V, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}
GROK = SIZES | {
    "architectures": ["Grok1ModelForCausalLM"], "model_type": "grok-1", "num_key_value_heads": G, "num_experts": E,
    "num_experts_per_tok": 2, "attn_output_multiplier": 0.4, "embedding_multiplier_scale": 7.0, "max_attn_value": 2.0,
    "output_multiplier_scale": 0.6, "hidden_act": "gelu",
}
BAICHUAN = SIZES | {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "hidden_act": "silu"}
BAICHUAN_13B = BAICHUAN | {"model_max_length": 64, "hidden_size": 6 * D, "num_attention_heads": 6}
del BAICHUAN_13B["max_position_embeddings"]


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


def baichuan_tensors(hf: dict) -> dict[str, torch.Tensor]:
    vocab_size, dim = hf["vocab_size"], hf["hidden_size"]
    shapes = {"model.embed_tokens.weight": (vocab_size, dim), "lm_head.weight": (vocab_size, dim)}
    shapes["model.norm.weight"] = (dim,)
    for i in range(N_LAYERS):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (dim,)
        shapes[f"{layer}.self_attn.W_pack.weight"] = (3 * dim, dim)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (dim, dim)
        for name, shape in (("gate", (FFN, dim)), ("up", (FFN, dim)), ("down", (dim, FFN))):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
    return random_tensors(shapes)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def slopes(n_heads: int) -> torch.Tensor:
    """The slopes of ALiBi. For a power of two n, they are a geometric sequence whose first number and ratio are
    2^(-8 / n). Any other n takes those of the power of two below it, and then every second one of the power above."""

    def sequence(n: int) -> list[float]:
        return [(2 ** (-8 / n)) ** (i + 1) for i in range(n)]

    power = 2 ** math.floor(math.log2(n_heads))
    return torch.tensor(sequence(power) + sequence(2 * power)[::2][: n_heads - power])


def attention(q, k, v, scale: float, cap: float | None, alibi: bool = False) -> torch.Tensor:
    """q [T, H, D], k and v [T, G, D] -> [T, H D], with RoPE or ALiBi and a causal mask."""
    T = len(q)
    angles = torch.arange(T)[:, None] * 1e4 ** -(torch.arange(0, D, 2) / D)

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    if not alibi:
        q, k = rotate(q), rotate(k)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if alibi:
        scores += slopes(q.shape[1])[:, None, None] * (torch.arange(T) - torch.arange(T)[:, None])
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


def baichuan_logits(w: dict[str, torch.Tensor], tokens: torch.Tensor, alibi: bool = False) -> torch.Tensor:
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(N_LAYERS):
        layer = f"model.layers.{i}"
        h = norm(x, w[f"{layer}.input_layernorm.weight"])
        q, k, v = (t.unflatten(-1, (-1, D)) for t in (h @ w[f"{layer}.self_attn.W_pack.weight"].T).chunk(3, dim=-1))
        x = x + attention(q, k, v, D**-0.5, None, alibi) @ w[f"{layer}.self_attn.o_proj.weight"].T
        h = norm(x, w[f"{layer}.post_attention_layernorm.weight"])
        gate, up, down = (w[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    head = w["lm_head.weight"]
    if len(head) != 64000:  # Baichuan 2
        head = head / head.norm(dim=1, keepdim=True)
    return norm(x, w["model.norm.weight"]) @ head.T


CASES = {  # name: (config.json, function that makes the tensors, function tokens [T] -> logits)
    "grok": (GROK, lambda hf: grok_tensors(), grok_logits),
    "baichuan": (BAICHUAN | {"vocab_size": 64000}, baichuan_tensors, baichuan_logits),
    "baichuan 2": (BAICHUAN | {"vocab_size": 64003}, baichuan_tensors, baichuan_logits),
    "baichuan 13B": (BAICHUAN_13B, baichuan_tensors, partial(baichuan_logits, alibi=True)),
}


def write_folder(name: str, folder: Path) -> Path:
    """Writes the checkpoint called name as it is on the hub, and converts it."""
    hf, make_tensors, _ = CASES[name]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    save_file(make_tensors(hf), folder / "model.safetensors")
    return convert(folder)


def reference_of(name: str):
    hf, make_tensors, logits = CASES[name]
    return partial(logits, make_tensors(hf))


@torch.inference_mode()
def logits_in_parts(model, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the logits [20 + 14, V] of tokens [2, 20], computed in one batch: a chunk, a token, a chunk. After the
    first chunk the second row goes back to position 5, so that start_pos differs between rows, and it ends at the 14th
    token."""
    kv_cache, logits, starts = KVCache(model, 2, 20), torch.empty(2, 20, model.config.vocab_size), [0, 0]
    for n in (11, 1, 8):
        rows = torch.stack([row[start : start + n] for row, start in zip(tokens, starts, strict=True)])
        for b, part in enumerate(model(rows, torch.tensor(starts), kv_cache)):
            logits[b, starts[b] : starts[b] + n] = part
        starts = [11, 5] if n == 11 else [start + n for start in starts]
    return torch.cat([logits[0], logits[1, :14]])


@pytest.mark.parametrize("use_kernels", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens(name, use_kernels, tmp_path):
    model, reference = load_model(write_folder(name, tmp_path), "cpu", torch.float32, use_kernels), reference_of(name)
    tokens = torch.randint(0, V, (2, 20))
    expected = torch.cat([reference(tokens[0]), reference(tokens[1, :14])])
    torch.testing.assert_close(logits_in_parts(model, tokens), expected, atol=1e-4, rtol=1e-4)

    runner, text = ModelRunner(model, KVCache(model, 1, 32), SamplingParams()), tokens[0]
    ours = [i for (i,) in DecodeLoop(runner).decode_tokens(text[None], 12)]
    for _ in range(12):
        text = torch.cat([text, reference(text)[-1:].argmax(-1)])
    assert ours == text[20:].tolist()


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("name", ["baichuan 13B", "dbrx"])
def test_quantized(name, mode, tmp_path):
    """With quantized weights, ALiBi and clipping, the kernels give the logits of PyTorch."""
    if name == "dbrx":
        make_hf(name).save_pretrained(tmp_path)
        path = convert(tmp_path)
    else:
        path = write_folder(name, tmp_path)
    call_main(quantize.main, "--checkpoint_path", path, "--mode", mode)
    (quantized,) = tmp_path.glob("model_*.pth")
    tokens = torch.randint(0, V, (2, 20))
    ours, plain = (load_model(quantized, "cpu", torch.float32, use_kernels) for use_kernels in (True, False))
    expected = logits_in_parts(plain, tokens)
    torch.testing.assert_close(logits_in_parts(ours, tokens), expected, atol=1e-4, rtol=1e-4)


def test_which_baichuan_has_alibi():
    sizes = {"hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40}
    config = config_from_hf(BAICHUAN_13B | sizes)
    assert config.alibi and not any(config.layer_has_rope) and config.max_seq_len == 64
    for architecture in ("BaiChuanForCausalLM", "BaichuanForCausalLM"):  # 7B: the first one, and Baichuan 2
        config = config_from_hf(BAICHUAN | {"architectures": [architecture], "model_max_length": 4096})
        assert not config.alibi and config.layer_has_rope is None and config.max_seq_len == 64
    with pytest.raises(UsageError, match="hidden_size 5120 has ALiBi"):
        config_from_hf(BAICHUAN | sizes)
    neither = {name: value for name, value in BAICHUAN.items() if name != "max_position_embeddings"}
    with pytest.raises(UsageError, match="max_position_embeddings or model_max_length is missing"):
        config_from_hf(neither)


def test_slopes_stay_float32(tmp_path):
    model = load_model(write_folder("baichuan 13B", tmp_path), "cpu", torch.bfloat16, use_kernels=False)
    for layer in model.layers:
        assert torch.equal(layer.attention.alibi_slopes, alibi_slopes(model.config.n_heads))
    assert not any("slopes" in name for name in model.state_dict())


def test_slopes():
    for n_heads in (1, 2, 3, 6, 8, 12, 32, 40, 64):
        torch.testing.assert_close(alibi_slopes(n_heads), slopes(n_heads))
