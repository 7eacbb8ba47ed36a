"""The benchmark's shapes are the published ones, and what it says of bytes agrees with the config alone."""

import json
import math
import sys

import pytest

from scripts import benchmark

PUBLISHED = {  # parameters; a tied head counts once
    "SmolLM2-135M": 134515008,
    "Qwen2.5-0.5B": 494032768,
    "TinyLlama-1.1B": 1100048384,
    "Llama-3.2-1B": 1235814400,
    "Llama-2-7B": 6738415616,
    "Mistral-7B": 7241732096,
    "Llama-3.1-8B": 8030261248,
    "Qwen3-8B": 8190735360,
    "Qwen3-30B-A3B": 30532122624,
    "Mixtral-8x7B": 46702792704,
    "Llama-3-70B": 70553706496,
    "Llama-3.1-405B": 405853388800,
}


def test_shapes_have_the_published_number_of_parameters():
    counts = {name: sum(map(math.prod, benchmark.shapes(c).values())) for name, c in benchmark.CONFIGS.items()}
    assert counts == PUBLISHED


DENSE = dict(
    architectures=["LlamaForCausalLM"], hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=600, tie_word_embeddings=True,
)  # fmt: skip
MOE = dict(architectures=["MixtralForCausalLM"], num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False)


@pytest.mark.parametrize(["config", "active", "stored"], [(DENSE, 1, 1), (DENSE | MOE, 2, 8)], ids=["dense", "moe"])
def test_report_is_consistent(config, active, stored, tmp_path, monkeypatch, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    flags = "--json --device cpu --prompt_tokens 4 --max_new_tokens 3".split()
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--config", str(path), *flags])
    benchmark.main()
    r = json.loads(capsys.readouterr().out.splitlines()[-1])

    attention, router = 32 * (32 + 16 + 16 + 32), 32 * stored * (stored > 1)
    layer, expert, table, norms = attention + router, 3 * 32 * 48, 64 * 32, 5 * 32
    tables = 1 if config["tie_word_embeddings"] else 2
    assert r["model_bytes"] == 2 * (2 * (layer + active * expert) + table + norms)  # bfloat16; of two tables the head
    assert r["weights_bytes"] == 2 * (2 * (layer + stored * expert) + tables * table + norms)
    assert r["kv_bytes"] == 2 * 2 * 2 * 2 * 8 * 7  # k and v, bytes, layers, heads, head_dim, places
    assert r["peak_over_weights_and_kv_bytes"] == r["peak_memory_bytes"] - r["weights_bytes"] - r["kv_bytes"]
    step_bytes = r["model_bytes"] + r["kv_bytes"] / 7 * 5.5  # 5 tokens to look at in the first step, 6 in the second
    assert r["decode_gb_per_sec"] == pytest.approx(step_bytes * r["decode_tokens_per_sec"] / 1e9)
    best = max(r["read_gb_per_sec_before"], r["read_gb_per_sec_after"])
    assert r["decode_share_of_read"] == pytest.approx(r["decode_gb_per_sec"] / best)
    flops = 2 * 512 * 2 * (layer + active * expert) + 2 * table + 2 * 4 * 32 * 512 * 513 // 2
    assert r["prefill_512_tflop_per_sec"] == pytest.approx(r["prefill_512_tokens_per_sec"] / 512 * flops / 1e12)
    assert r["verify_5_over_1"] > 0
    assert "prefill_2048_tokens_per_sec" not in r  # beyond this model's context
