"""checkpoint.py: a file is complete or absent, and files of earlier versions load."""

import errno
import os
import signal
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

import quantize
from checkpoint import CHECKPOINT_VERSION, read_checkpoint, save_checkpoint
from config import ModelConfig
from converters.canonical_checkpoint import CanonicalCheckpoint
from converters.write_model import write_model
from formats import GroupedInt8, Int8, QuantizationConfig
from layers.kv_cache import KVCache
from loading import load_model
from tests.tiny import ACTIVATIONS_OF_VERSION_7, call_main, convert, make_hf, write_earlier_version
from utils.errors import UsageError
from utils.files import replace_file

CONFIG = ModelConfig(*[2] * 8)


def save(path: Path, tensors):
    save_checkpoint(path, CONFIG, {"a": torch.empty(9, device="meta")}, stream=tensors)


# ---- Writing --------------------------------------------------------------------------------------------------------


def test_tensors_are_read_as_saved(tmp_path):
    """Tensors of every dtype and layout are read as they were saved."""
    path, quantization = tmp_path / "model.pth", {"mode": "int4", "groupsize": 32}
    tensors = {
        "int": torch.arange(6, dtype=torch.uint8).view(2, 3),
        "half": torch.randn(3, 4).bfloat16(),
        "float8": torch.randn(3, 4).to(torch.float8_e4m3fn),
        "transposed": torch.randn(4, 3).T,
        "empty": torch.ones(0, 3),
        "scalar": torch.tensor(1.5),
    }
    empty = {name: t.to("meta") for name, t in tensors.items()}
    save_checkpoint(path, CONFIG, empty, quantization, reversed(tensors.items()))
    config, read_quantization, read = read_checkpoint(path)
    assert (config, read_quantization, read.keys()) == (CONFIG, quantization, tensors.keys())
    assert all(torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in tensors.items())
    assert torch.load(path)["config"]["clip_qkv"] == config.clip_qkv == 0  # as in files of earlier versions


def test_wrong_tensors_leave_the_old_file(tmp_path):
    path = tmp_path / "model.pth"
    path.write_text("old")
    a = torch.ones(9)
    for tensors, match in [
        ([], "no tensor for a"),
        ([("a", a), ("a", a)], "a was not expected, or came twice"),
        ([("b", a)], "b was not expected, or came twice"),
        ([("a", a[:8])], r"a is \[8\] torch.float32, not \[9\] torch.float32"),
        ([("a", a.half())], r"a is \[9\] torch.float16, not \[9\] torch.float32"),
    ]:
        with pytest.raises(UsageError, match=match):
            save(path, tensors)
        assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_killed_process_leaves_the_old_file(tmp_path):
    """A killed save leaves the old file and a temporary one, which the next save removes."""
    path = tmp_path / "model.pth"
    path.write_text("old")

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)
        yield

    child = os.fork()
    if child == 0:
        save(path, killed())
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_text() == "old" and len(list(tmp_path.glob("*.tmp"))) == 1
    save(path, [("a", torch.ones(9))])
    assert torch.equal(read_checkpoint(path)[2]["a"], torch.ones(9))
    assert not list(tmp_path.glob("*.tmp"))


def test_the_last_writer_wins(tmp_path):
    path = tmp_path / "model.pth"

    def overtaken():  # by another that writes the same file
        save(path, [("a", torch.ones(9))])
        yield "a", torch.zeros(9)

    with pytest.raises(UsageError, match="cannot write .*another process"):
        save(path, overtaken())
    assert torch.equal(read_checkpoint(path)[2]["a"], torch.ones(9))


def test_no_place_to_write(tmp_path):
    (tmp_path / "model.pth").mkdir()
    with pytest.raises(UsageError, match="cannot write .*model.pth: Is a directory"):
        save(tmp_path / "model.pth", [("a", torch.ones(9))])
    with pytest.raises(UsageError, match="cannot write .*No such file or directory"):
        save(tmp_path / "gone" / "model.pth", [])
    assert not list(tmp_path.glob("*.tmp"))


def test_a_read_only_folder(tmp_path, monkeypatch):
    """In a read-only folder nothing can be written or deleted, and the message names the first error."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("mkdir", "unlink", "write_bytes"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(UsageError, match="cannot write .*model.pth: No such file or directory"):
        save(tmp_path / "gone" / "model.pth", [])
    with pytest.raises(UsageError, match="cannot write to .*: Read-only file system"):
        write_model(tmp_path / "M.pth", CanonicalCheckpoint(CONFIG, {}, refuse, {"tokenizer.json": b"{}"}))
    with pytest.raises(OSError, match="Read-only file system"):
        replace_file(tmp_path / "model.sources.json", b"{}")



# ---- Reading --------------------------------------------------------------------------------------------------------


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "model.pth"
    good = {"format": CHECKPOINT_VERSION, "config": {}, "quantization": None, "tensors": {}}
    for content, match in [
        ([1], "is not a gpt-fast/8 checkpoint"),
        (good | {"format": "gpt-fast/9"}, "is not a gpt-fast/8 checkpoint"),
        (good | {"tensors": [1]}, "holds no table of tensors"),
        (good | {"tensors": {"a": 1}}, "holds no table of tensors"),
        (good | {"tensors": {1: torch.ones(1)}, "format": "gpt-fast/1"}, "holds no table of tensors"),
        (good, "config does not fit this version"),
        (good | {"config": None, "format": "gpt-fast/1"}, "config does not fit this version"),
        (good | {"config": {"moe": 1}, "format": "gpt-fast/1"}, "config does not fit this version"),
    ]:
        torch.save(content, path)
        with pytest.raises(UsageError, match=match):
            read_checkpoint(path)
    for name, match in [("x.gguf", "convert_gguf.py"), ("x.safetensors", "convert_hf_checkpoint.py")]:
        (tmp_path / name).write_bytes(b"odd")
        with pytest.raises(UsageError, match=f"is not a model.pth; scripts/{match} makes one of it"):
            read_checkpoint(tmp_path / name)
    for path, match in [(tmp_path, "is a folder"), (tmp_path / "gone.pth", "does not exist or is not a file")]:
        with pytest.raises(UsageError, match=match):
            read_checkpoint(path)


EARLIER_FILES = [*product(["llama3", "llama-bias", "qwen3-moe"], [1, 2, 3])]
EARLIER_FILES += [("gemma2", 4), ("smollm3", 4)]  # whose layers and activations differ
EARLIER_FILES += [("gemma2", 5)]  # whose layers have all four norms
EARLIER_FILES += [*product(["llama-bias", "olmo2", "gemma3"], [6])]  # which have the renamed options
EARLIER_FILES += [*product(["llama3", "gemma2", "gpt-oss", "starcoder2", "nemotron"], [7])]  # of all activations


@pytest.mark.parametrize("family, version", EARLIER_FILES)
def test_files_of_earlier_versions_are_the_same_model(family, version, tmp_path):
    theirs = make_hf(family, norm_topk_prob=False) if family == "qwen3-moe" else make_hf(family)
    theirs.save_pretrained(tmp_path)
    path = convert(tmp_path)
    for mode in ("int8", "int4"):
        call_main(quantize.main, "--checkpoint_path", path, "--mode", mode)
    tokens = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(0))
    files = sorted(tmp_path.glob("*.pth"))
    assert len(files) == 3
    for file in files:
        expected = logits(file, tokens)
        config, quantization, tensors = read_checkpoint(file)
        write_earlier_version(file, version)
        read_config, read_quantization, read = read_checkpoint(file)
        assert (read_config, read_quantization, read.keys()) == (config, quantization, tensors.keys())
        assert torch.equal(logits(file, tokens), expected)


def test_every_activation_of_earlier_files(tmp_path):
    path = tmp_path / "model.pth"
    for (activation, gated), earlier in ACTIVATIONS_OF_VERSION_7.items():
        fields = CONFIG.to_dict() | {"activation": earlier}
        del fields["gated"]
        torch.save({"format": "gpt-fast/7", "config": fields, "quantization": None, "tensors": {}}, path)
        assert read_checkpoint(path).config == replace(CONFIG, activation=activation, gated=gated)


def test_grouped_int8_of_earlier_files(tmp_path):
    path, as_earlier = tmp_path / "model.pth", {"mode": "int8", "groupsize": 16}
    header = {"format": "gpt-fast/7", "config": CONFIG.to_dict(), "tensors": {}}
    for quantization in (as_earlier, {"mode": "int8", "layers": {"lm_head": as_earlier}}):
        torch.save(header | {"quantization": quantization}, path)
        formats = QuantizationConfig.from_dict(read_checkpoint(path).quantization)
        assert formats.of_layer("lm_head") == GroupedInt8(16)
    assert formats.default == Int8()


def logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = load_model(path, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        return model(tokens, torch.zeros(1, dtype=torch.long), KVCache(model, 1, 9))
