"""With a broken file of any kind, a command works, or prints one line and exits with status 2: no traceback, no hang,
no crash, and no memory as large as a header claims. The files are config.json, index.json, safetensors, GGUF, model.pth
and those of a tokenizer.

Each example is a folder. A process of its own (worker.py) runs the real commands on it, with bounded memory.
"""

import copy
import io
import json
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import quantize
from converters.gguf_file import read_gguf
from tests.test_convert import write_shards
from tests.tiny import call_main, convert, make_hf, write_earlier_version
from tests.tiny_gguf import BPE, gguf_bytes, make_llama, write_gguf
from tests.tiny_tokenizers import TEMPLATES, train
from utils.files import ROOT

SECONDS = 60  # after which a command hangs
SETTINGS = settings(
    derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
)
FAMILY = st.sampled_from(["llama3", "mixtral"])


# ---- Running commands -----------------------------------------------------------------------------------------------


class Commands:
    """A worker process, which is restarted after it has died or hung."""

    process = None

    def __call__(self, *args) -> int:
        """Runs a command, which must work or fail with one line, and returns its exit status."""
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps([str(a) for a in args]) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        answer = self.process.stdout.readline() if ready else ""
        lines = self.stderr.read().splitlines()
        if not answer:
            self.process.kill()
            code, self.process = self.process.wait(), None
            how = f"died ({code})" if ready else "hangs"
            pytest.fail("\n".join([f"{args}: {how}", *lines]))
        assert answer == "0\n" or (answer == "2\n" and len(lines) == 1), "\n".join([f"{args}: {answer}", *lines])
        return int(answer)

    def start(self):
        self.stderr = tempfile.NamedTemporaryFile("r", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests/worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self.stderr.name, "w"),
            text=True,
        )


@pytest.fixture(scope="module")
def commands():
    commands = Commands()
    yield commands
    if commands.process:
        commands.process.kill()
        commands.process.wait()


def converts(commands, folder: Path) -> int:
    """Converts folder and checks that the result runs."""
    status = commands("convert", "--checkpoint_dir", folder)
    if status == 0:
        generates(commands, folder / "model.pth")
    return status


def generates(commands, path: Path, *args) -> int:
    args = args or ("--prompt=Hello, my name is",)
    return commands("generate", "--checkpoint_path", path, "--json", "--max_new_tokens=4", "--device=cpu", *args)


# ---- Files that work ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of folders that work, and of files to break."""
    root = tmp_path_factory.mktemp("good")
    for family in ("llama3", "mixtral"):
        make_folder(family, root / family)
    theirs = make_llama(hidden_size=64, intermediate_size=64)
    write_gguf(root / "m.gguf", theirs, "Q8_0", BPE | {"general.x": [1.5, 2.0]})
    sentencepiece_vocabulary = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<0x61>", "▁", "b", "a", "ab"],
        "tokenizer.ggml.scores": [0.0] * 8,
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    write_gguf(root / "sp.gguf", theirs, "Q4_1", sentencepiece_vocabulary)
    for kind in ("llama2", "llama2-prepend", "qwen2"):
        train(kind).save(str(root / f"{kind}.json"))
    (root / "tokenizer.model").write_bytes(sentencepiece_model())
    return root


MODEL_FILES = ["model.pth", "model_int8.pth", "model_int4.g32.pth", "model_format_1.pth"]


def make_folder(family: str, folder: Path):
    """Makes a Hugging Face folder, and MODEL_FILES from it."""
    make_hf(family, vocab_size=1000, hidden_size=64, intermediate_size=96).save_pretrained(folder)
    train("llama3").save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATES["chatml"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    path = convert(folder)
    for mode in ("int8", "int4"):
        call_main(quantize.main, "--checkpoint_path", path, "--mode", mode)
    shutil.copy(path, folder / "model_format_1.pth")
    write_earlier_version(folder / "model_format_1.pth", 1)
    assert all((folder / name).is_file() for name in MODEL_FILES)


def sentencepiece_model() -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEMPLATES.values()),
        model_writer=out,
        vocab_size=400,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
        character_coverage=1.0,
    )
    return out.getvalue()


@pytest.fixture
def broken(good, tmp_path):
    """(a folder in good, {name: content, or None for no such file}) -> a folder with these files, and links to all
    others in good"""

    def make(folder: str, files: dict[str, bytes | None]) -> Path:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        for file in (good / folder).iterdir():
            if file.name not in files:
                (tmp_path / file.name).symlink_to(file)
        for name, content in files.items():
            if content is not None:
                (tmp_path / name).write_bytes(content)
        return tmp_path

    return make


# ---- Ways to break files --------------------------------------------------------------------------------------------

ODD = st.sampled_from(
    [None, True, False, 0, 1, 2, 3, -1, 7, 64, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**63, -(2**63), 2**64, 10**400,
     0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), "", " ", "x", "0", "../x", "\ud800", "\0", "é" * 9,
     [], [1], [None], ["a", "b"], {}, {"a": 1}, [[[]]], {"": {"": []}}]
)
ODD_TENSORS = st.sampled_from(
    [
        torch.tensor(1.0),
        torch.ones(0),
        torch.ones(1).expand(64, 64),
        torch.ones(64, 64).T,
        torch.ones(64, 64) > 0,
        torch.ones(64, 64, dtype=torch.complex64),
        torch.ones(64, dtype=torch.int64),
        torch.ones(64, 64).to_sparse(),
        torch.ones(64, 64, device="meta"),
        torch.nn.Parameter(torch.ones(64)),
        torch.ones(64, 64, dtype=torch.float64),
        torch.full((64,), torch.nan),
        torch.ones(64, 64).to(torch.float8_e4m3fn),
        torch.ones(64, 32).T,
    ]
)


def places_in(document) -> list[tuple]:
    """Returns (container, key) of every value in a JSON document, but at most 200 in one container."""
    places, to_do = [], [document]
    while to_do:
        node = to_do.pop()
        inside = list(node.items() if isinstance(node, dict) else enumerate(node))[:200]
        places += [(node, key) for key, _ in inside]
        to_do += [value for _, value in inside if isinstance(value, (dict, list))]
    return places


@st.composite
def mutated(draw, document):
    """A JSON document with a few values replaced, removed, renamed, swapped or doubled."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = places_in(document)
        if not places:
            break
        node, key = draw(st.sampled_from(places))
        other, other_key = draw(st.sampled_from(places))
        what = draw(st.integers(0, 5))
        if what <= 2:
            node[key] = copy.deepcopy(draw(ODD))
        elif what == 3:
            del node[key]
        elif what == 4:
            node[key] = copy.deepcopy(other[other_key])
        elif isinstance(node, dict):
            node[draw(st.sampled_from(["x", "", "weight", str(other_key)]))] = node.pop(key)
    return document


@st.composite
def corrupted(draw, data: bytes, start: int = 0, stop: int | None = None):
    """data with a few bytes between start and stop (from the end if negative) overwritten, removed or inserted."""
    stop = len(data) if stop is None else stop
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(start, stop) if start >= 0 else st.integers(len(data) + start, len(data)))
        n = draw(st.sampled_from([1, 1, 1, 2, 4, 8, 100]))
        new = draw(st.sampled_from([b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b" ", b"9", b"[", b'"'])) * n
        bit_flipped = bytes([data[i % len(data)] ^ 1 << draw(st.integers(0, 7))]) if data else b""
        new = draw(st.sampled_from([new, bit_flipped]))
        what = draw(st.integers(0, 6))
        if what <= 4:
            data = data[:i] + new + data[i + len(new) :]
        elif what == 5:
            data = data[:i] + new + data[i:]
        elif draw(st.booleans()):
            data = data[:i] + data[i + n :]
        else:
            data = data[:i]
    return data


def dumps(document) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


def broken_json(text: bytes):
    """A JSON file with other values, or with other bytes."""
    return mutated(json.loads(text)).map(dumps) | corrupted(text)


# ---- Hugging Face's files -------------------------------------------------------------------------------------------


@given(st.data())
@SETTINGS
def test_config(good, broken, commands, data):
    family = data.draw(FAMILY)
    name = data.draw(st.sampled_from(["config.json"] * 4 + ["generation_config.json"]))
    change = data.draw(broken_json((good / family / name).read_bytes()))
    converts(commands, broken(family, {name: change, "model.pth": None}))


@given(st.data())
@SETTINGS
def test_weights_and_their_index(good, broken, commands, data):
    tensors = load_file(good / "llama3/model.safetensors")
    kind = data.draw(st.sampled_from(["model.safetensors", "pytorch_model.bin"]))
    folder = broken("llama3", {"model.safetensors": None, "model.pth": None})
    write_shards(folder, kind, tensors, save_file if kind == "model.safetensors" else torch.save)
    index, shard = folder / f"{kind}.index.json", folder / kind.replace(".", "-00001-of-00002.")
    if data.draw(st.booleans()):
        index.write_bytes(data.draw(broken_json(index.read_bytes())))
    elif kind == "model.safetensors":
        shard.write_bytes(data.draw(broken_safetensors(shard.read_bytes())))
    else:
        content = shard.read_bytes()
        shard.write_bytes(data.draw(corrupted(content) | corrupted(content, 0, 2000) | corrupted(content, -3000)))
    converts(commands, folder)


@st.composite
def broken_safetensors(draw, content: bytes):
    n = int.from_bytes(content[:8], "little")
    header = draw(mutated(json.loads(content[8 : 8 + n])).map(dumps))
    mutated_content = len(header).to_bytes(8, "little") + header + content[8 + n :]
    return draw(st.just(mutated_content) | corrupted(content, 0, n + 8))


# ---- model.pth ------------------------------------------------------------------------------------------------------


@given(st.data())
@SETTINGS
def test_model_pth(good, broken, commands, data):
    family, name = data.draw(FAMILY), data.draw(st.sampled_from(MODEL_FILES))
    content = (good / family / name).read_bytes()
    if data.draw(st.booleans()):
        content = data.draw(corrupted(content, 0, 9000) | corrupted(content, -9000))
        folder = broken(family, {name: content})
    else:
        model = data.draw(mutated_model(torch.load(good / family / name, weights_only=True)))
        folder = broken(family, {name: None})
        torch.save(model, folder / name)
    generates(commands, folder / name)


@st.composite
def mutated_model(draw, model: dict):
    what = draw(st.sampled_from(["config", "quantization", "tensors", "all"]))
    if what == "all":
        return draw(mutated(model | {"tensors": None}))
    if what == "tensors":
        for name in draw(st.lists(st.sampled_from(list(model["tensors"])), min_size=1, max_size=3, unique=True)):
            like = model["tensors"][name]
            alike = [like[:-1], like.double(), like.half(), like[:1].expand_as(like), like.int(), like * 1e30]
            model["tensors"][name] = draw(ODD_TENSORS | st.sampled_from(alike) | ODD)
    elif model[what]:
        model[what] = draw(mutated(model[what]))
    return model


# ---- Tokenizers -----------------------------------------------------------------------------------------------------

CHAT = st.sampled_from([["--prompt=Hello\u2003w<s>\r\n \u0300 1"], ["--chat", "--prompt=Hi </s>", "--system= a"]])


@given(st.data())
@SETTINGS
def test_tokenizer_json(good, broken, commands, data):
    change = {}
    if data.draw(st.booleans()):
        file = data.draw(st.sampled_from([good / "llama3/tokenizer.json", *good.glob("*.json")]))
        change["tokenizer.json"] = data.draw(broken_json(file.read_bytes()))
    if not change or data.draw(st.booleans()):
        text = (good / "llama3/tokenizer_config.json").read_bytes()
        change["tokenizer_config.json"] = data.draw(broken_json(text))
    generates(commands, broken("llama3", change) / "model.pth", *data.draw(CHAT))


@given(st.data())
@SETTINGS
def test_tokenizer_model(good, broken, commands, data):
    content = (good / "tokenizer.model").read_bytes()
    change = {"tokenizer.json": None, "tokenizer.model": data.draw(corrupted(content) | corrupted(content, -300))}
    added = {str(i): {"content": f"<|im_{x}|>", "special": True} for i, x in ((400, "start"), (401, "end"))}
    settings = {"chat_template": TEMPLATES["chatml"], "legacy": False, "added_tokens_decoder": added}
    if data.draw(st.booleans()):
        del settings["added_tokens_decoder"]
        names = {"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>"}, "additional_special_tokens": ["<x>"]}
        change["special_tokens_map.json"] = data.draw(mutated(names).map(dumps))
        change["added_tokens.json"] = data.draw(mutated({"<|im_start|>": 400, "<|im_end|>": 401}).map(dumps))
    change["tokenizer_config.json"] = data.draw(st.just(dumps(settings)) | mutated(settings).map(dumps))
    generates(commands, broken("llama3", change) / "model.pth", *data.draw(CHAT))


# ---- GGUF -----------------------------------------------------------------------------------------------------------


@given(st.data())
@SETTINGS
def test_gguf(good, commands, tmp_path, data):
    if data.draw(st.booleans()):
        content = (good / "m.gguf").read_bytes()
        content = data.draw(corrupted(content, 0, 4500))
    else:
        meta, tensors = read_gguf(good / data.draw(st.sampled_from(["m.gguf", "sp.gguf"])))
        content = gguf_bytes(data.draw(mutated(meta)), tensors)
    (tmp_path / "m.gguf").write_bytes(content)
    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    if commands("gguf", tmp_path / "m.gguf", "--checkpoint_dir", folder) == 0:
        generates(commands, folder / "model.pth", "--prompt=ab")
