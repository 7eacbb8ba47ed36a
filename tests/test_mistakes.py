"""A mistake in a call of generate.py ends it with status 2 and one line that says what is wrong."""

import pytest
import tokenizers
import torch

import generate
from cli.script import run_script
from tests.byte_models import VOCAB_SIZE, set_up
from utils.files import ROOT


@pytest.mark.parametrize(
    "args, word",
    [
        ("--device=nonsense", "nonsense"),
        ("--device=cuda:99", "cuda:99"),
        ("--device=meta", "meta"),
        ("--prompt=", "empty"),
        ("--prompt=\udcff", "prompt"),
        (f"--prompt_file={__file__}.missing", "cannot read"),
        (f"--prompt_file={ROOT}", "cannot read"),
        ("--prompt_file={tmp}/empty", "empty"),
        ("--prompt_file={tmp}/blank", "empty"),
        ("--prompt_file={tmp}/latin1", "cannot read"),
        (f"--prompt={'a' * 5000}", "a prompt of 5000 characters exceeds the model's context of 256 tokens"),
        ("--prompt_tokens=0", "prompt_tokens"),
        ("--prompt_tokens=256", "context"),
        (f"--prompt_tokens={2**63}", "context"),
        (f"--batch_size={2**64}", "KV cache"),
        ("--max_new_tokens=0", "max_new_tokens"),
        ("--max_new_tokens=256", "context"),
        ("--max_new_tokens=10000000000000000000000", "context"),
        ("--num_samples=0", "num_samples"),
        ("--threads=0", "--threads must be 1 to 1024, not 0"),
        ("--batch_size=0", "batch_size"),
        ("--temperature=-1", "--temperature must be 0 to 1000000, not -1.0"),
        ("--temperature=nan", "temperature"),
        ("--top_k=0", "--top_k must be at least 1, not 0"),
        ("--top_p=0", "--top_p must be above 0 and at most 1, not 0.0"),
        ("--top_p=2", "top_p"),
        ("--top_p=nan", "top_p"),
        ("--repetition_penalty=1e-39", "--repetition_penalty must be 0.01 to 100, not 1e-39"),
        ("--repetition_penalty=1e308", "--repetition_penalty must be 0.01 to 100, not 1e+308"),
        ("--seed=18446744073709551616", "seed"),
        ("--profile={tmp}/missing/trace.json", "trace.json"),
        ("--profile=/dev/full", "/dev/full"),
        ("--prompt_lookup --speculate_k=1000000000000", "speculate_k"),
        ("--prompt_lookup=33", "prompt_lookup"),
        ("--chat --json", "json"),
        ("--chat --batch_size=2", "batch_size"),
        ("--chat --prompt=Hi", "template"),
        ("--chat", "template"),
    ],
)
def test_wrong_argument(recall_model, assert_refused, tmp_path, args, word):
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text(" \n\n")
    (tmp_path / "latin1").write_bytes("Häuser\n".encode("latin-1"))
    prompt = [] if "prompt" in args or "chat" in args else ["--prompt=0"]
    assert_refused(recall_model / "model.pth", [*args.format(tmp=tmp_path).split(" "), *prompt], word, stdin="Hi\n")


def test_prompts_are_read_before_the_model(assert_refused, tmp_path):
    (tmp_path / "model.pth").write_text("this would be said second")
    assert_refused(tmp_path / "model.pth", [f"--prompt_file={tmp_path}/missing"], "cannot read")


@pytest.mark.parametrize(
    "args", ["--nonsense", "--max_new_tokens=x", "--precision=int8", "--prompt=a --prompt_tokens=3", "stray"]
)
def test_argparse_refuses(recall_model, monkeypatch, capsys, args):
    """A mistake that argparse finds is one line, too."""
    set_up(monkeypatch, recall_model / "model.pth", args.split())
    with pytest.raises(SystemExit) as stopped:
        run_script(generate.main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("generate.py: ") and err.endswith(" (see --help)\n") and err.count("\n") == 1


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle ran code')",)


WRONG_FILES = {  # content instead of model.pth, and a word of the error
    "missing": (lambda path, data: None, "does not exist"),
    "directory": (lambda path, data: path.mkdir(), "holds no model: it needs"),
    "empty": (lambda path, data: path.touch(), "truncated or not a PyTorch file"),
    "text": (lambda path, data: path.write_text("Hello\n"), "not"),
    "truncated": (lambda path, data: path.write_bytes(data[: len(data) // 2]), "truncated"),
    "tensor": (lambda path, data: torch.save(torch.ones(3), path), "not a gpt-fast/8 checkpoint"),
    "pickle": (lambda path, data: torch.save({"format": "gpt-fast/8", "tensors": Evil()}, path), "more than weights"),
    "old pickle": (lambda path, data: torch.save(Evil(), path, _use_new_zipfile_serialization=False), "not a PyTorch"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_wrong_checkpoint_file(recall_model, assert_refused, tmp_path, kind):
    make, word = WRONG_FILES[kind]
    (tmp_path / "tokenizer.json").symlink_to(recall_model / "tokenizer.json")
    make(tmp_path / "model.pth", (recall_model / "model.pth").read_bytes())
    assert_refused(tmp_path / "model.pth", ["--prompt=0"], word)


def test_wrong_checkpoint_path(assert_refused, tmp_path):
    assert_refused(tmp_path / "nowhere" / "model.pth", ["--prompt=0"], "nowhere/model.pth does not exist")
    assert_refused(tmp_path / "nowhere.gguf", ["--prompt=0"], "nowhere.gguf does not exist")
    (tmp_path / "a.safetensors").touch()
    assert_refused(tmp_path / "a.safetensors", ["--prompt=0"], "scripts/convert_hf_checkpoint.py makes one of it")


def small_embedding(data):
    data["config"]["vocab_size"] = 100
    for name in ("embed_tokens.weight", "lm_head.weight"):
        data["tensors"][name] = data["tensors"][name][:100].clone()


INTEGERS = torch.ones(VOCAB_SIZE, dtype=torch.int64)
WRONG_CONTENTS = {
    "missing": (lambda d: d["tensors"].pop("norm.weight"), "norm.weight"),
    "left over": (lambda d: d["tensors"].update(extra=torch.zeros(1)), "extra"),
    "shape": (lambda d: d["tensors"].update({"norm.weight": torch.ones(3)}), "norm.weight"),
    "integers": (lambda d: d["tensors"].update({"norm.weight": INTEGERS}), "norm.weight"),
    "no tensor": (lambda d: d["tensors"].update({"norm.weight": 5}), "table of tensors"),
    "NaN": (lambda d: d["tensors"]["norm.weight"].fill_(torch.nan), "not finite"),
    "infinite": (lambda d: d["tensors"]["lm_head.weight"].fill_(torch.inf), "not finite"),
    "vocabulary": (small_embedding, "tokens"),
    "format": (lambda d: d.update(format="gpt-fast/9"), "gpt-fast/8"),
    "no config": (lambda d: d.update(config=None), "config"),
    "config lacks": (lambda d: d["config"].pop("dim"), "dim"),
    "config wrong": (lambda d: d["config"].update(dim=-1), "dim"),
    "activation": (lambda d: d["config"].update(activation="swiglu"), "activation 'swiglu' is not supported"),
    "config unknown": (lambda d: d["config"].update(mrope=True), "mrope"),
    "layers": (lambda d: d["config"].update(n_layers=2), "layers.1"),
    "quantization": (lambda d: d.update(quantization={"bits": 3}), "quantiz"),
}


@pytest.mark.parametrize("kind", WRONG_CONTENTS)
def test_wrong_checkpoint_content(recall_model, assert_refused, tmp_path, kind):
    change, word = WRONG_CONTENTS[kind]
    data = torch.load(recall_model / "model.pth", weights_only=True)
    change(data)
    torch.save(data, tmp_path / "model.pth")
    (tmp_path / "tokenizer.json").symlink_to(recall_model / "tokenizer.json")
    assert_refused(tmp_path / "model.pth", ["--prompt=0"], word)


@pytest.mark.parametrize("content", [None, b"{}", b"not JSON", b"\xff"])
def test_wrong_tokenizer(recall_model, assert_refused, tmp_path, content):
    (tmp_path / "model.pth").symlink_to(recall_model / "model.pth")
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    assert_refused(tmp_path / "model.pth", ["--prompt=0"], "tokenizer")


def test_prompt_of_no_tokens(recall_model, assert_refused, tmp_path):
    (tmp_path / "model.pth").symlink_to(recall_model / "model.pth")
    tok = tokenizers.Tokenizer.from_file(str(recall_model / "tokenizer.json"))
    tok.normalizer = tokenizers.normalizers.Strip()
    tok.save(str(tmp_path / "tokenizer.json"))
    assert_refused(tmp_path / "model.pth", ["--prompt= "], "empty")
