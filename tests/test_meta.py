"""Meta's format: each generation, in any number of shards, gives the logits of transformers. The tokenizer.model of
Llama 3 gives the tokens of tiktoken. A broken checkpoint is refused."""

import base64
import json
from pathlib import Path

import mistral_common
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from checkpoint import read_checkpoint
from converters.gguf_tokenizer import LLAMA3_WORDS
from converters.meta import infer_llama_version
from tests.test_convert import TINYLLAMAS_NAMES
from tests.tiny import LLAMA3, assert_refused, convert, make_hf, same_logits
from tests.tiny_gguf import in_meta_order
from tests.tiny_tokenizers import FORGED, LLAMA3_SPLIT, MISTRAL, TEXTS, train_byte_level
from text.tokenizer import byte_level_alphabet, load_tokenizer

PARAMS = {
    "dim": 48, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1, "multiple_of": 16,
    "ffn_dim_multiplier": 0.6, "norm_eps": 1e-5,
}
CUT_COLUMNS = ("attention.wo", "feed_forward.w2")


def meta_tensors(model) -> dict[str, torch.Tensor]:
    config, tensors = model.config, {"rope.freqs": torch.ones(3)}
    for name, t in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            t = in_meta_order(t, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        for old, new in TINYLLAMAS_NAMES.items():
            name = name.replace(old, new)
        tensors[name] = t.clone()
    return tensors


def write_meta(folder: Path, model, params: dict, n_shards: int = 1, cuts_rows: bool = True):
    """Writes consolidated.*.pth and params.json. cuts_rows: whether shards have rows of the embedding, as in Llama 3,
    or columns, as in Llama 2."""
    tensors = meta_tensors(model)
    for i in range(n_shards):
        shard = {}
        for name, t in tensors.items():
            cuts_columns = any(part in name for part in CUT_COLUMNS) or (name.startswith("tok") and not cuts_rows)
            shard[name] = t if t.dim() < 2 else t.chunk(n_shards, 1 if cuts_columns else 0)[i].clone()
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))


def rope(theta: float, factor: float = 0) -> dict:
    if not factor:
        return {"rope_type": "default", "rope_theta": theta}
    return LLAMA3 | {"rope_theta": theta, "factor": factor, "original_max_position_embeddings": 8192}


EPS_1 = {"norm_eps": 1e-6}
THETA_3 = {"rope_theta": 500000.0}
SCALED = THETA_3 | {"use_scaled_rope": True}
WIDE = {"hidden_dim": 80, "head_dim": 32, "sliding_window": 9, "rope_theta": 1e6}
GENERATIONS = {  # name: params, config in transformers, shards, whether the embedding is cut by rows, what is printed
    "Llama 1": (EPS_1, {"rms_norm_eps": 1e-6}, 2, False, "a context of 2048 tokens, as Llama 1 has"),
    "Llama 2": ({}, {}, 1, False, "a context of 4096 tokens, as Llama 2 has"),
    "CodeLlama": ({"rope_theta": 1e6}, {"rope_parameters": rope(1e6)}, 2, False, "of 16384 tokens, as CodeLlama has"),
    "Llama 3": (THETA_3, {"rope_parameters": rope(5e5)}, 2, True, "a context of 8192 tokens, as Llama 3 has"),
    "Llama 3.1": (SCALED, {"rope_parameters": rope(5e5, 8.0)}, 1, True, "of 131072 tokens and RoPE stretched 8-fold"),
    "Llama 3.2": (SCALED, {"rope_parameters": rope(5e5, 32.0), "tie_word_embeddings": True}, 2, True, "32-fold, as"),
    "Mistral": (WIDE, {"rope_parameters": rope(1e6)}, 1, True, "a context of 32768 tokens, as Mistral has"),
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_logits(generation, tmp_path, capsys):
    params, changes, n_shards, cuts_rows, said = GENERATIONS[generation]
    family, sizes = "llama2", {"num_key_value_heads": 2, "vocab_size": 96, "rms_norm_eps": 1e-5}
    if generation == "Mistral":
        family, changes = "mistral-window", changes | {"sliding_window": 9, "head_dim": 32}
    model = make_hf(family, **sizes | changes)
    write_meta(tmp_path, model, PARAMS | params, n_shards, cuts_rows)
    if generation == "Mistral":
        save_file(torch.load(tmp_path / "consolidated.00.pth"), tmp_path / "consolidated.safetensors")
        (tmp_path / "consolidated.00.pth").unlink()
    path = convert(tmp_path)
    same_logits(path, model)
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    config = read_checkpoint(path)[0]
    assert str(config.max_seq_len) in err or generation == "Llama 3.2"
    assert config.tie_embeddings == bool(changes.get("tie_word_embeddings"))
    assert (config.rope_scaling.factor if config.rope_scaling else 0) == changes.get("rope_parameters", {}).get(
        "factor", 0
    )


def test_versions_that_look_like_others():
    """The version is right if hidden_dim stands beside use_scaled_rope, for the 65B of Llama 1, with the norm_eps of
    Llama 2, and for the 70B of Llama 2, with as many layers."""
    assert infer_llama_version(PARAMS | SCALED | {"hidden_dim": 80}, False) == ("Llama 3.1", 131072, 8.0)
    large = {"dim": 8192, "n_layers": 80, "n_heads": 64, "norm_eps": 1e-5}
    assert infer_llama_version(large, False) == ("Llama 1", 2048, 0)
    assert infer_llama_version(large | {"n_kv_heads": 8}, False) == ("Llama 2", 4096, 0)


def test_optional_fields_of_params(tmp_path, capsys):
    """max_seq_len in params.json is the context. The file of weights may have another name, and a tied head may be left
    out."""
    model = make_hf("llama2", num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5)
    write_meta(tmp_path, model, PARAMS | {"max_seq_len": 77, "vocab_size": 97, "moe": None})
    tensors = torch.load(tmp_path / "consolidated.00.pth")
    del tensors["output.weight"]
    (tmp_path / "consolidated.00.pth").unlink()
    torch.save(tensors, tmp_path / "meta_model_0.pt")
    path = convert(tmp_path)
    same_logits(path, model)
    assert read_checkpoint(path)[0].max_seq_len == 77 and not capsys.readouterr().err


# ---- Tokenizers -----------------------------------------------------------------------------------------------------


def make_ranks() -> dict[bytes, int]:
    """Makes a small vocabulary: bytes, trained pairs, and at the end a word that no pairs lead to."""
    byte_of = byte_level_alphabet()
    vocab = train_byte_level("llama3").get_vocab()
    pieces = sorted(vocab, key=vocab.get)
    tokens = [bytes(byte_of[c] for c in piece) for piece in pieces] + [" zebra🦓".encode()[:6], "日本語".encode()]
    return {token: rank for rank, token in enumerate(tokens)}


def write_tiktoken(path: Path, ranks: dict[bytes, int]):
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))


def reference_ids(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Encodes a word as tiktoken does: joins the pair with the lowest rank, the first one if there are several."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.fixture(scope="module")
def llama3(tmp_path_factory) -> tuple[Path, dict[bytes, int]]:
    """A converted folder of Llama 3.1 with a small tokenizer.model, and its ranks."""
    folder, ranks = tmp_path_factory.mktemp("llama3"), make_ranks()
    model = make_hf("llama2", num_key_value_heads=2, vocab_size=len(ranks) + 16)
    write_meta(folder, model, PARAMS | SCALED)
    write_tiktoken(folder / "tokenizer.model", ranks)
    convert(folder)
    return folder, ranks


def test_tokens_are_tiktokens(llama3):
    folder, ranks = llama3
    tokenizer, n = load_tokenizer(folder), len(ranks)
    assert LLAMA3_WORDS == LLAMA3_SPLIT
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated")
    texts = [*TEXTS, *FORGED, " zebra", "日本語 のテキスト", "zebra🦓 zebra", Path(__file__).read_text()]
    for text in texts:
        expected = []
        for word, _ in split.pre_tokenize_str(text):
            expected += reference_ids(word.encode(), ranks)
        if not any(token in text for token in tokenizer.special_token_ids):
            assert tokenizer.encode(text) == [n, *expected], text
            assert tokenizer.decode(expected) == text
    assert tokenizer.encode("a<|eot_id|>") == [n, ranks[b"a"], n + 9]
    assert tokenizer.vocab_size == n + 16


def test_special_tokens_and_chat(llama3):
    folder, ranks = llama3
    config, tokenizer, n = read_checkpoint(folder / "model.pth")[0], load_tokenizer(folder), len(ranks)
    assert (config.bos_id, config.eos_ids) == (n, (n + 1, n + 8, n + 9))
    names = [name for name, _ in sorted(tokenizer.special_token_ids.items(), key=lambda item: item[1])]
    assert names[4:12] == [
        "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_3|>",
    ]
    ids = tokenizer.encode_chat([{"role": "user", "content": " Hi<|eot_id|> "}])
    text = "user", "\n\nHi<|eot_id|>", "assistant", "\n\n"
    parts = [tokenizer.encode(part.replace("<|eot", "<\0|eot"), bos=False) for part in text]
    del parts[1]  # a message's special token is text
    assert ids[:2] == [n, n + 6] and ids.count(n + 9) == 1 and ids[-len(parts[2]) - 1 :] == [n + 7, *parts[2]]
    assert tokenizer.decode(ids) == "user\n\nHi<|eot_id|>assistant\n\n"


def test_llama_3_0_has_other_special_tokens(tmp_path):
    ranks = make_ranks()
    write_meta(tmp_path, make_hf("llama2", num_key_value_heads=2, vocab_size=len(ranks) + 12), PARAMS | THETA_3)
    write_tiktoken(tmp_path / "tokenizer.model", ranks)
    config, tokenizer, n = read_checkpoint(convert(tmp_path))[0], load_tokenizer(tmp_path), len(ranks)
    assert config.eos_ids == (n + 1, n + 9)
    assert tokenizer.special_token_ids["<|reserved_special_token_4|>"] == n + 8
    assert tokenizer.special_token_ids["<|reserved_special_token_6|>"] == n + 11


def test_sentencepiece_stays_as_it_is(tmp_path):
    """A tokenizer.model of sentencepiece is copied, also from the folder above, where Meta's download puts it."""
    data = (Path(mistral_common.__file__).parent / "data" / MISTRAL["v1"]).read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data)
    folder = tmp_path / "7B"
    folder.mkdir()
    write_meta(folder, make_hf("llama2", num_key_value_heads=2), PARAMS)
    config = read_checkpoint(convert(folder))[0]
    assert (config.bos_id, config.eos_ids) == (1, (2,)) and (folder / "tokenizer.model").read_bytes() == data


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def meta(tmp_path) -> Path:
    """A folder of two shards and an older model.pth."""
    write_meta(tmp_path, make_hf("llama2", num_key_value_heads=2, vocab_size=96), PARAMS, n_shards=2)
    (tmp_path / "model.pth").write_text("old")
    return tmp_path


def test_wrong_shards(meta):
    first, second = meta / "consolidated.00.pth", meta / "consolidated.01.pth"
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    assert_refused(meta, "consolidated.01.pth is truncated")
    second.unlink()
    assert_refused(meta, "the model is in 2 files consolidated.*; 1 are there")
    second.write_bytes(first.read_bytes())
    assert_refused(meta, "consolidated.00.pth and consolidated.01.pth hold the same shard")
    second.write_bytes(data)
    first.rename(meta / "consolidated.02.pth")
    assert_refused(meta, "holds consolidated.01.pth, but no consolidated.00.pth")
    (meta / "consolidated.02.pth").rename(first)
    tensors = torch.load(first)
    torch.save({name: t for name, t in tensors.items() if name != "norm.weight"}, first)
    assert_refused(meta, "consolidated.01.pth and consolidated.00.pth do not both have the tensor norm.weight")
    torch.save(tensors | {"layers.1.attention.wq.weight": torch.ones(3, 5)}, first)
    assert_refused(meta, "a tensor that does not fit it")
    torch.save(tensors | {"norm.weight": tensors["norm.weight"] + 1}, first)
    assert_refused(meta, "hold different values of the tensor model.norm.weight")
    torch.save([tensors], first)
    assert_refused(meta, "not a table of tensors")
    for file in (first, second):
        file.unlink()
    assert_refused(meta, "holds params.json, but no consolidated.00.pth")


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"dim": 64}, "o_proj|embed_tokens"),
        ({"n_layers": 2}, "layers.2.* has no place"),
        ({"n_layers": 4}, "no tensor model.layers.3"),
        ({"n_heads": 6}, r"k_proj.weight is \[24, 48\]; the config makes it \[16, 48\]"),
        ({"n_kv_heads": 4}, r"k_proj.weight is \[24, 48\]; the config makes it \[48, 48\]"),
        ({"multiple_of": 64}, r"gate_proj.weight is \[80, 48\]; the config makes it \[128, 48\]"),
        ({"vocab_size": 97}, r"embed_tokens.weight is \[96, 48\]; the config makes it \[97, 48\]"),
        ({"dim": None}, "params.json: dim is missing"),
        ({"n_heads": "x"}, "something of the wrong kind"),
        ({"n_heads": 0}, "something of the wrong kind"),
        ({"norm_eps": -1.0}, "norm_eps must be a positive number"),
        ({"moe": {"num_experts": 8}}, "params.json: moe = .* is not supported"),
        ({"vision_chunk_size": 448}, "vision_chunk_size = 448 is not supported"),
    ],
)
def test_params_that_contradict_the_tensors(meta, changes, match):
    (meta / "params.json").write_text(json.dumps(PARAMS | changes))
    assert_refused(meta, match)


def test_broken_params_and_tokenizers(meta):
    for text in ("{", "[]", "3", "null"):
        (meta / "params.json").write_text(text)
        assert_refused(meta, "not readable JSON|something of the wrong kind")
    (meta / "params.json").write_text(json.dumps(PARAMS))
    ranks, path = make_ranks(), meta / "tokenizer.model"
    write_tiktoken(path, ranks)
    assert_refused(meta, "at least 10 special tokens; this vocabulary leaves room for -")
    write_tiktoken(path, {token: rank for token, rank in ranks.items() if token != b"a"})
    assert_refused(meta, "do not have the ranks from 0 on")
    write_tiktoken(path, {b"a": 0, b"b": 1})
    assert_refused(meta, "lacks tokens of single bytes")
    for line in ("YQ== 1 2\n", "YQ== x\n", "Y 1\n"):
        path.write_text("YQ== 0\n" + line)
        assert_refused(meta, "line 2 is not a token in base64 and its rank")
    path.write_text("nonsense")
    assert_refused(meta, "is not a sentencepiece model")
