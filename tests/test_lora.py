"""convert_hf_checkpoint.py --lora merges adapters as PEFT does, and refuses other adapters by name."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint import read_checkpoint
from converters.convert_folder import convert_folder
from scripts import convert_hf_checkpoint
from tests.tiny import FAMILIES, assert_refused, call_main, make_hf, same_logits, write_tokenizer
from text.tokenizer import load_tokenizer
from utils.errors import UsageError

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": "all-linear", "bias": "none"}
RANDOM = torch.Generator()


def linear_names(model) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]


def random_halves(n: int, k: int, r: int = CONFIG["r"]) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r]."""
    return torch.randn(r, k, generator=RANDOM) / 10, torch.randn(n, r, generator=RANDOM) / 10


def write_adapter(folder: Path, halves: dict[str, tuple[Tensor, Tensor]], others: dict[str, Tensor] = {}, **config):  # noqa: B006
    """Writes an adapter as save_pretrained of PEFT does. halves: A and B, by the name of the module in transformers."""
    folder.mkdir(exist_ok=True)
    tensors = {PREFIX + name: t for name, t in others.items()}
    for name, (a, b) in halves.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))


def merged(model, halves: dict[str, tuple[Tensor, Tensor]], scale: float = CONFIG["lora_alpha"] / CONFIG["r"]):
    """Returns a copy of model, from transformers, with the adapter merged."""
    model = copy.deepcopy(model)
    weights = expert_weights(model) | dict(model.named_parameters())
    for name, (a, b) in halves.items():
        with torch.no_grad():
            weights[f"{name}.weight"] += scale * (b @ a)
    return model


def expert_weights(model) -> dict[str, Tensor]:
    """Returns the weight of each expert, in the memory of model, by the names of experts that are linear layers."""
    mixtral = model.config.model_type == "mixtral"
    weights = {}
    for name, experts in model.state_dict().items():
        match = re.fullmatch(r"(.+)\.experts\.(gate_up|down)_proj", name)
        if match is None or model.config.model_type in ("gpt_oss", "dbrx"):
            continue
        prefix = match[1].replace(".mlp", ".block_sparse_moe") if mixtral else match[1]
        for e, weight in enumerate(experts):
            parts = {"down_proj": weight}
            if match[2] == "gate_up":
                parts = dict(zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True))
            for part, rows in parts.items():
                new = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[part] if mixtral else part
                weights[f"{prefix}.experts.{e}.{new}.weight"] = rows
    return weights


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, torch.nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    """The folder of a base model, the model in transformers, and halves of an adapter for q_proj and down_proj."""
    folder = tmp_path_factory.mktemp("llama")
    model = make_hf("llama2")
    model.save_pretrained(folder)
    write_tokenizer(folder)
    RANDOM.manual_seed(0)
    names = [name for name in linear_names(model) if re.search("q_proj|down_proj", name)]
    weights = dict(model.named_parameters())
    return folder, model, {name: random_halves(*weights[f"{name}.weight"].shape) for name in names}


# ---- What is merged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_merged_weights(family, tmp_path):
    """The logits are right with an adapter for every linear layer, in a mixture of experts also for each expert."""
    RANDOM.manual_seed(0)
    model = make_hf(family)
    base, lora = tmp_path / "base", tmp_path / "lora"
    model.save_pretrained(base)
    weights = expert_weights(model) | dict(model.named_parameters())
    names = [*linear_names(model), *(name.removesuffix(".weight") for name in expert_weights(model))]
    halves = {name: random_halves(*weights[f"{name}.weight"].shape) for name in names}
    write_adapter(lora, halves)
    path = convert_folder(base, lora)
    assert path == lora / "model.pth" and not (base / "model.pth").exists()
    theirs = merged(model, halves)
    same_logits(path, theirs)
    theirs.save_pretrained(base)
    expected, tensors = read_checkpoint(convert_folder(base))[2], read_checkpoint(path)[2]
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


def test_scale_is_alpha_over_r_or_its_root(llama, tmp_path):
    """It is alpha / r or, with use_rslora, alpha / sqrt(r). The first pattern that matches the end of a name counts."""
    base, model, halves = llama
    q, down = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    halves = halves | {q: random_halves(48, 48, r=2)}
    patterns = {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 4}, "alpha_pattern": {"down_proj": 3}}
    for use_rslora in (False, True):
        write_adapter(tmp_path / "lora", halves, use_rslora=use_rslora, **patterns)
        expected = model
        for name, ab in halves.items():
            r, alpha = 2 if name == q else 4, 3 if "down_proj" in name else 6
            expected = merged(expected, {name: ab}, alpha / (math.sqrt(r) if use_rslora else r))
        tensors = read_checkpoint(convert_folder(base, tmp_path / "lora"))[2]
        q_weight = expected.get_submodule(q).weight
        torch.testing.assert_close(tensors["layers.1.attention.qkv_proj.weight"][:48], q_weight, atol=1e-6, rtol=1e-6)
        down_weight = expected.get_submodule(down).weight
        torch.testing.assert_close(tensors["layers.1.feed_forward.down_proj.weight"], down_weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("names", [["q_proj", "down_proj"], r".*\.(q|down)_proj", "all-linear"])
def test_target_modules(llama, tmp_path, names):
    base, model, halves = llama
    write_adapter(tmp_path, halves, target_modules=names)
    same_logits(convert_folder(base, tmp_path), merged(model, halves))


def test_target_modules_with_the_number_of_a_layer(llama, tmp_path):
    """Layers that are not in a list of full names do not change. PEFT writes such a list if a pattern chose the
    layers."""
    base, model, halves = llama
    halves = {name: ab for name, ab in halves.items() if "layers.1." in name}
    write_adapter(tmp_path, halves, target_modules=list(halves))
    same_logits(convert_folder(base, tmp_path), merged(model, halves))


def test_bfloat16_is_rounded_once(tmp_path):
    """The sum is float32, and the result has the dtype of the base."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    model = make_hf("llama2").bfloat16()
    model.save_pretrained(base)
    name = "model.layers.0.mlp.down_proj"
    a, b = random_halves(48, 80)
    write_adapter(lora, {name: (a.half(), b.half())}, layers_to_transform=[0])
    ours = read_checkpoint(convert_folder(base, lora))[2]["layers.0.feed_forward.down_proj.weight"]
    exact = model.get_submodule(name).weight.double() + 1.5 * b.half().double() @ a.half().double()
    error = (ours.double() - exact).abs()
    assert ours.dtype == torch.bfloat16 and (error <= exact.abs() * 2**-8 * (1 + 1e-4) + 1e-7).all()


def test_embedding_and_whole_tensors(tmp_path):
    """lora_embedding_A and lora_embedding_B are merged, and modules_to_save replaces tensors. The head of a tied model
    does not change."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    model = make_hf("llama3")
    assert model.config.tie_word_embeddings
    model.save_pretrained(base)
    a, b = torch.randn(4, 97), torch.randn(48, 4)
    embed, norm = "model.embed_tokens", torch.rand(48)
    old = model.model.embed_tokens.weight.detach().clone()
    others = {f"{embed}.lora_embedding_A": a, f"{embed}.lora_embedding_B": b, f"{embed}.base_layer.weight": old,
              "model.norm.weight": norm}
    write_adapter(lora, {}, others, target_modules=["embed_tokens"], modules_to_save=["norm"])
    config, _, tensors = read_checkpoint(convert_folder(base, lora))
    assert not config.tie_embeddings and torch.equal(tensors["lm_head.weight"], old)
    assert torch.equal(tensors["norm.weight"], norm)
    torch.testing.assert_close(tensors["embed_tokens.weight"], old + 1.5 * (b @ a).T)
    write_adapter(lora, {}, {"lm_head.weight": old + 1}, modules_to_save=["lm_head"])
    tensors = read_checkpoint(convert_folder(base, lora))[2]
    assert torch.equal(tensors["lm_head.weight"], old + 1) and torch.equal(tensors["embed_tokens.weight"], old)


def test_bin_and_default_names(llama, tmp_path):
    """adapter_model.bin is read, and so are tensors with the name of the adapter in theirs."""
    base, model, halves = llama
    write_adapter(tmp_path, halves)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    renamed = {re.sub(r"(lora_[AB])", r"\1.default", name): t for name, t in tensors.items()}
    torch.save(renamed, tmp_path / "adapter_model.bin")
    same_logits(convert_folder(base, tmp_path), merged(model, halves))


def test_the_tokenizer_comes_along(llama, tmp_path):
    base, _, halves = llama
    write_adapter(tmp_path, halves)
    (tmp_path / "chat_template.jinja").write_text("mine")
    names = base / "special_tokens_map.json"
    names.write_text('{"mask_token": "<mask>"}')
    call_main(convert_hf_checkpoint.main, "--checkpoint_dir", base, "--lora", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens_map["mask_token"] == "<mask>"
    assert tokenizer.vocab_size == load_tokenizer(base).vocab_size and tokenizer.chat_template == "mine"
    names.unlink()
    (tmp_path / "tokenizer.json").write_text("its own")
    (tmp_path / "tokenizer_config.json").unlink()
    convert_folder(base, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "its own"
    assert not (tmp_path / "tokenizer_config.json").exists()


# ---- What is refused ------------------------------------------------------------------------------------------------

FIELDS = {
    "type 'IA3'": {"peft_type": "IA3"},
    "type None": {"peft_type": None},
    "DoRA": {"use_dora": True},
    "bias = 'all'": {"bias": "all"},
    "stacks of experts": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "init_lora_weights = 'pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "the rank 8; its tensors have 4 and 4": {"r": 8},
    "rank_pattern|rank 3": {"rank_pattern": {"down_proj": 3}},
    "target_modules of adapter_config.json does not name": {"target_modules": ["v_proj"]},
    "something of the wrong kind": {"target_modules": 3},
    "something of the wrong kind.*unterminated": {"target_modules": "(["},
    "adapter_config.json: lora_alpha must be a number, not '6'": {"lora_alpha": "6"},
    "adapter_config.json: r must be a number, not '4'": {"r": "4"},
}


@pytest.mark.parametrize("match", FIELDS)
def test_a_config_that_is_not_supported(llama, tmp_path, match):
    base, _, halves = llama
    write_adapter(tmp_path, halves, **FIELDS[match])
    assert_refused(base, match, lora=tmp_path)


def test_tensors_that_do_not_fit(llama, tmp_path):
    base, _, halves = llama
    q = "model.layers.1.self_attn.q_proj"
    a, b = halves[q]
    wrong = {
        "changes model.layers.3.self_attn.q_proj.weight, which the base model does not have": {
            "model.layers.3.self_attn.q_proj": (a, b)
        },
        "changes model.layers.1.attn.q_proj.weight, which": {"model.layers.1.attn.q_proj": (a, b)},
        r"q_proj.weight is \[96, 48\]: .*made for another model": {q: random_halves(96, 48)},
        r"q_proj.weight is \[48, 64\]: .*made for another model": {q: random_halves(48, 64)},
        "not finite; the adapter is broken": {q: (a, b * torch.nan)},
        "is not a matrix": {q: (a[0], b)},
        "not finite with the adapter": {q: (a + 1e38, b + 1e38)},
    }
    for match, changes in wrong.items():
        write_adapter(tmp_path, halves | changes)
        assert_refused(base, match, lora=tmp_path)
    write_adapter(tmp_path, {name: ab for name, ab in halves.items() if name != q})
    assert_refused(base, "changes self_attn.q_proj.weight in 2 of 3 layers", lora=tmp_path)
    one_half = {f"{q}.lora_A.weight": a}
    for match, others in {
        f"of {q}, lora_B is missing": one_half,
        "replaces model.extra.weight, which the base": {"model.extra.weight": a},
        "tokens were added": {"model.embed_tokens.weight": torch.ones(99, 48)},
        "kind of LoRA that is not supported": {f"{q}.lora_magnitude_vector": a},
        "tensor .*step is not finite": {"step": torch.ones(3, dtype=torch.int64)},
    }.items():
        write_adapter(tmp_path, {}, others)
        assert_refused(base, match, lora=tmp_path)
    write_adapter(tmp_path, {})
    assert_refused(base, "has no tensors|truncated", lora=tmp_path)


def test_folders_that_do_not_fit(llama, tmp_path):
    base, _, halves = llama
    assert_refused(base, "holds no adapter: it has no adapter_config.json", lora=tmp_path)
    write_adapter(tmp_path, halves, base_model_name_or_path="meta-llama/Llama-3.2-1B")
    with pytest.raises(UsageError, match=r"holds an adapter, not a model: .*the folder of meta-llama/Llama-3.2-1B"):
        convert_folder(tmp_path)
    assert_refused(tmp_path, "has no config.json: --lora needs a model in Hugging Face's format", lora=tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"garbage")
    assert_refused(base, "truncated or not safetensors", lora=tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert_refused(base, "neither adapter_model.safetensors nor adapter_model.bin", lora=tmp_path)
    for text in ("{", "[]", "3"):
        (tmp_path / "adapter_config.json").write_text(text)
        assert_refused(base, "not readable JSON|wrong kind", lora=tmp_path)


def test_a_quantized_base(llama, tmp_path):
    base, _, halves = llama
    write_adapter(tmp_path / "lora", halves)
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert_refused(tmp_path / "base", "is quantized .*give the model that it was made from", lora=tmp_path / "lora")
    write_adapter(base, halves)
    assert_refused(base, "put the adapter into a folder of its own", lora=base)
