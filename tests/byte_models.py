"""Small checkpoints whose tokens are bytes, and calls of generate.py on them, as from a command line.

recall_model    has learned some texts by heart
chat_model      has random weights, attention and a chat template
cli             calls generate.py in this process
"""

import io
import json
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

import checkpoint
import generate
from cli.script import run_script
from config import ModelConfig
from converters.hf_config import config_from_hf
from model import Transformer

VOCAB_SIZE = 260  # the 256 bytes and
SPECIAL_TOKENS = ["<s>", "</s>", "<|user|>", "<|bot|>"]
END = 257  # </s>
TEMPLATE = (
    "{% for m in messages %}{{ {'system': '<s>', 'user': '<|user|>', 'assistant': '<|bot|>'}[m.role] }}{{ m.content }}"
    "</s>{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)
RECALLED_TEXTS = ["S🙂E\0", "W X!", "P.", "01234567890"]  # each byte is followed by the next one; \0 stands for END
SIZES = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "ffn_dim": 48,
    "vocab_size": VOCAB_SIZE,
    "eos_ids": (END,),
}


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def recall_model(tmp_path_factory) -> Path:
    """Returns the folder of a model that knows RECALLED_TEXTS by heart. After a letter from a to h, any of these is
    equally likely. A text ends with END or ".", as config.json says, or with "!", as generation_config.json says."""
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": VOCAB_SIZE,
        "intermediate_size": 1,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB_SIZE,
        "num_attention_heads": 1,
        "head_dim": 2,
        "max_position_embeddings": 256,
        "eos_token_id": [END, ord(".")],
    }
    config = config_from_hf(hf, {"eos_token_id": ord("!")})
    tensors = zero_tensors(config)
    tensors |= {"embed_tokens.weight": torch.eye(VOCAB_SIZE), "norm.weight": torch.ones(VOCAB_SIZE)}
    follows = tensors["lm_head.weight"]  # [next, last]
    follows[END, END] = follows[ord("."), ord(".")] = 4
    follows[ord("a") : ord("h") + 1, ord("a") : ord("h") + 1] = 4
    for text in RECALLED_TEXTS:
        data = text.encode()
        for last, following in zip(data, data[1:], strict=False):
            follows[following or END, last] = 4
    return write_folder(tmp_path_factory.mktemp("recall_model"), config, tensors)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> Path:
    return random_folder(tmp_path_factory.mktemp("chat_model"), max_seq_len=160)


def random_folder(folder: Path, **config) -> Path:
    """Returns the folder of a random model that answers in capitals, with a chat template."""
    config = ModelConfig(**SIZES, **config)
    torch.manual_seed(0)
    tensors = {}
    for name, t in zero_tensors(config).items():
        tensors[name] = torch.randn(t.shape) / (4 if t.ndim > 1 else 1)
    if config.tie_embeddings:
        del tensors["lm_head.weight"]
    head = tensors["embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"]
    head[ord("A") : ord("Z") + 1] *= 4
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>"}))
    return write_folder(folder, config, tensors)


def zero_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Transformer(config).state_dict().items()}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def write_folder(folder: Path, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> Path:
    """Writes model.pth, and a tokenizer whose ids are bytes, decoded as in Llama 2."""
    checkpoint.save_checkpoint(folder / "model.pth", config, tensors)
    tok = tokenizers.Tokenizer(tokenizers.models.BPE({f"<0x{b:02X}>": b for b in range(256)}, [], byte_fallback=True))
    d = tokenizers.decoders
    tok.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    tok.add_special_tokens(SPECIAL_TOKENS)
    tok.save(str(folder / "tokenizer.json"))
    return folder


# ---- Commands -------------------------------------------------------------------------------------------------------


def set_up(monkeypatch, model: Path, args, stdin: str | bytes = ""):
    """Sets the arguments and the standard input that generate.main reads."""
    monkeypatch.setattr(sys, "argv", ["generate.py", f"--checkpoint_path={model}", "--device=cpu", *args])
    stdin = stdin if isinstance(stdin, bytes) else stdin.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))


@pytest.fixture(name="cli")
def call_cli(monkeypatch, capsys):
    """(folder, arguments) -> the stdout of generate.py"""

    def call(folder: Path, *args: str, stdin: str = "") -> str:
        set_up(monkeypatch, folder / "model.pth", args, stdin)
        capsys.readouterr()
        run_script(generate.main)
        return capsys.readouterr().out

    return call


@pytest.fixture
def ask(request):
    """(folder, arguments) -> what generate.py --json prints for each prompt"""
    call = request.getfixturevalue("cli")

    def no_number(constant):
        raise AssertionError(f"{constant} is not JSON")

    def call_json(folder: Path, *args: str) -> list[dict]:
        lines = call(folder, *args, "--json").splitlines()
        return [json.loads(line, parse_constant=no_number) for line in lines]

    return call_json


@pytest.fixture
def assert_refused(monkeypatch, capsys, library):
    """(model.pth, arguments, word): checks that generate.py stops with status 2 and one line on stderr that has this
    word. library: loaded first, since building it would print a line."""

    def check(model: Path, args, word: str, stdin: str | bytes = ""):
        set_up(monkeypatch, model, args, stdin)
        with pytest.raises(SystemExit) as stopped:
            run_script(generate.main)
        out, err = capsys.readouterr()
        assert stopped.value.code == 2 and out == ""
        assert word in err and err.startswith("generate.py: ") and err.count("\n") == 1 and err.endswith("\n")

    return check
