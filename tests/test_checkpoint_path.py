"""--checkpoint_path takes a folder or a .gguf: the first start converts it, and later starts find the result."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval
import generate
import quantize
from cli.script import run_script
from converters.checkpoint_path import ensure_converted
from converters.convert_folder import convert_folder
from llm import LLM
from scripts import convert_hf_checkpoint
from tests.test_lora import linear_names, random_halves, write_adapter
from tests.test_meta import PARAMS, SCALED, make_ranks, write_meta, write_tiktoken
from tests.test_mxfp4 import mxfp4  # noqa: F401  (a fixture)
from tests.tiny import call_main, convert, make_hf, same_logits, write_folder
from tests.tiny_gguf import make_llama, write_gguf
from utils.errors import UsageError

RUN = ["--prompt", "Hi", "--max_new_tokens", 3, "--temperature", 0, "--device", "cpu", "--ignore_eos"]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_folder("llama3", tmp_path / "M")
    return tmp_path / "M"


def make_older(path: Path, seconds: float):
    time = path.stat().st_mtime - seconds
    os.utime(path, (time, time))


def test_a_folder_is_converted_once(folder, capsys):
    model = folder / "model.pth"
    call_main(generate.main, "--checkpoint_path", folder, *RUN)
    out, err = capsys.readouterr()
    assert f"Converting {folder}, once: the result stays in {folder}.\n" in err
    first = model.stat().st_mtime_ns
    for path in (folder, model):
        call_main(generate.main, "--checkpoint_path", path, *RUN)
        again, err = capsys.readouterr()
        assert (again, model.stat().st_mtime_ns) == (out, first) and "Converting" not in err
    make_older(model, 3600)  # older than the sources
    call_main(generate.main, "--checkpoint_path", folder, *RUN, "--draft_checkpoint_path", folder)
    again, err = capsys.readouterr()
    assert again == out and err.count("Converting") == 1 and model.stat().st_mtime_ns > first


def test_mistakes_are_found_before_the_conversion(folder, assert_refused):
    for args, word in [("--prompt_file=missing", "cannot read"), ("--threads=0", "--threads"), ("--device=no", "no")]:
        for paths in [[], [f"--draft_checkpoint_path={folder}"]]:
            assert_refused(folder, [*paths, args], word)
    assert not (folder / "model.pth").exists()


def test_replaced_sources_are_converted_again(folder, tmp_path, capsys):
    """Replaced files are converted again, whatever their times. Quantized files stay."""
    model, weights = ensure_converted(folder), folder / "model.safetensors"
    call_main(quantize.main, "--checkpoint_path", model)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    make_older(tmp_path / "copy/model.pth", -1)
    for path in [folder, tmp_path / "copy"]:  # the same sources
        before = (path / "model.pth").stat().st_mtime_ns
        assert ensure_converted(path) == path / "model.pth" and model.with_name("model_int8.pth").is_file()
        assert (path / "model.pth").stat().st_mtime_ns == before
    settings, tensors = folder / "config.json", {name: t.clone() for name, t in load_file(weights).items()}
    for file in (weights, settings, folder / "model.sources.json"):
        if file == weights:  # of the same size
            tensors["model.layers.1.mlp.up_proj.weight"] += 1
            save_file(tensors, weights, {"format": "pt"})
        else:
            file.write_text(file.read_text().replace("256", "257")[: -1 if file != settings else None])
        make_older(file, 9999)
        capsys.readouterr()
        assert ensure_converted(folder) == ensure_converted(folder) == model
        assert capsys.readouterr().err.count("Converting") == 1
    assert model.with_name("model_int8.pth").is_file()


def test_a_quantized_file_of_replaced_sources_is_stale(folder):
    """After the sources were replaced, a quantized file is not used, even if it is newer than they are and the only
    model in the folder."""
    model, quantized, weights = ensure_converted(folder), folder / "model_int8.pth", folder / "model.safetensors"
    call_main(quantize.main, "--checkpoint_path", model)
    save_file({name: t + 1 for name, t in load_file(weights).items()}, weights, {"format": "pt"})
    make_older(weights, 9999)
    assert ensure_converted(folder) == model
    model.unlink()
    assert ensure_converted(folder) == ensure_converted(folder) == model and quantized.is_file()
    call_main(quantize.main, "--checkpoint_path", model)
    model.unlink()
    assert ensure_converted(folder) == quantized
    weights.unlink()
    assert ensure_converted(folder) == quantized


@pytest.mark.parametrize("broken", ["", "{}", "[]", '{"stale models": []}'])
def test_after_a_broken_record_every_other_model_is_stale(broken, folder):
    """Without a valid record no converted model is used, because only the record tells from which files it was made."""
    model, quantized, record = ensure_converted(folder), folder / "model_int8.pth", folder / "model.sources.json"
    call_main(quantize.main, "--checkpoint_path", model)
    record.write_text(broken)
    assert ensure_converted(folder) == model
    model.unlink()
    assert ensure_converted(folder) == model and quantized.is_file()


def test_a_record_that_cannot_be_written_stays(folder, monkeypatch):
    """If the record cannot be written, the old one stays, and the next start converts again."""
    record, weights = folder / "model.sources.json", folder / "model.safetensors"
    before = ensure_converted(folder) and record.read_bytes()
    save_file({name: t + 1 for name, t in load_file(weights).items()}, weights, {"format": "pt"})

    def write_a_part(path: Path, content: bytes):
        with open(path, "wb") as file:
            file.write(content[:9])
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "write_bytes", write_a_part)
        with pytest.raises(UsageError, match="cannot write .*model.sources.json: No space left"):
            ensure_converted(folder)
    assert record.read_bytes() == before and not [*folder.glob("*.tmp")]
    first = (folder / "model.pth").stat().st_mtime_ns
    assert ensure_converted(folder).stat().st_mtime_ns > first


def test_every_command_takes_a_folder(folder, capsys):
    call_main(quantize.main, "--checkpoint_path", folder)
    assert capsys.readouterr().out == f"wrote {folder / 'model_int8.pth'}\n"
    options = ["--checkpoint_path", folder, "--text_file", folder / "config.json", "--device", "cpu", "--json"]
    call_main(eval.main, *options)
    out, err = capsys.readouterr()
    assert "perplexity" in out and "Converting" not in err
    text = "".join(LLM(folder / "model.pth", "cpu").generate("Hi", max_new_tokens=3))
    (folder / "model.pth").unlink()
    (folder / "model_int8.pth").unlink()
    assert "".join(LLM(folder, "cpu").generate("Hi", max_new_tokens=3)) == text
    assert (folder / "model.pth").is_file()


def test_files_that_hold_no_weights(folder, tmp_path):
    """Other files of a trainer do not count as weights. Of two models with the same weights, the newer one is used."""
    model = ensure_converted(folder)
    for name in ("training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(b"not weights")
    assert ensure_converted(folder) == model
    make_older(model, 3600)
    os.rename(folder / "model.pth", folder / "old.pth")
    quantized = folder / "model_int4.g128.pth"  # of the same weights, converted later
    shutil.copy(folder / "old.pth", quantized)
    os.rename(folder / "old.pth", folder / "model.pth")
    assert ensure_converted(folder) == quantized


def test_metas_folder(tmp_path, capsys):
    ranks = make_ranks()
    write_meta(tmp_path, make_hf("llama2", num_key_value_heads=2, vocab_size=len(ranks) + 16), PARAMS | SCALED)
    write_tiktoken(tmp_path / "tokenizer.model", ranks)
    call_main(generate.main, "--checkpoint_path", tmp_path, *RUN)
    assert "131072" in capsys.readouterr().err


def test_a_folder_around_the_models(folder, tmp_path):
    """A folder around that of the model works, such as a repository with Meta's files in "original", or the cache of
    the hub with its "snapshots"."""
    for outer in (tmp_path / "repository/original", tmp_path / "cache/snapshots/1f2e"):
        shutil.copytree(folder, outer)
        top = tmp_path / outer.relative_to(tmp_path).parts[0]
        for call_on in (ensure_converted, convert_folder):
            with pytest.raises(UsageError, match=rf"{top} holds no .*; {outer} may hold one$"):
                call_on(top)
        assert not list(top.rglob("*.pth"))


def test_a_gguf_is_converted_beside_it(tmp_path, capsys):
    """A GGUF is converted to a folder next to it, with its name. A folder with only one GGUF stands for this file."""
    file = write_gguf(tmp_path / "tiny.Q8_0.gguf", make_llama(vocab_size=4), "Q8_0")
    model = tmp_path / "tiny.Q8_0-gguf/model.pth"
    call_main(generate.main, "--checkpoint_path", file, *RUN, "--prompt", "ab")
    out, err = capsys.readouterr()
    assert f"Converting {file}, once: the result stays in {model.parent}.\n" in err
    for path in (file, model.parent, tmp_path):  # a folder with a single GGUF is that
        call_main(generate.main, "--checkpoint_path", path, *RUN, "--prompt", "ab")
        again, err = capsys.readouterr()
        assert again == out and "Converting" not in err
    shutil.copy(file, tmp_path / "b.gguf")
    with pytest.raises(UsageError, match="holds b.gguf, tiny.Q8_0.gguf: choose one of them"):
        ensure_converted(tmp_path)


def test_a_split_gguf_is_one_model(tmp_path, capsys):
    write_gguf(tmp_path / "tiny.gguf", make_llama(vocab_size=4), tensors_per_part=10)
    parts = sorted(tmp_path.glob("tiny-*-of-*.gguf"))
    assert len(parts) > 1
    for path in (tmp_path, parts[-1], parts[0]):
        assert ensure_converted(path) == tmp_path / "tiny-gguf/model.pth"
    assert capsys.readouterr().err.count("Converting") == 1
    data = parts[-1].read_bytes()
    parts[-1].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # another model, whose first part is the same
    make_older(parts[-1], 9999)
    ensure_converted(parts[0])
    assert capsys.readouterr().err.count("Converting") == 1


def test_quantized_weights_are_found_again(mxfp4, tmp_path, capsys):  # noqa: F811
    """A quantized result is found under the name of its format, also after an adapter was merged."""
    folder, _, theirs = mxfp4
    assert ensure_converted(folder) == ensure_converted(folder) == folder / "model_mxfp4.pth"
    assert capsys.readouterr().err.count("Converting") == 1
    lora, weights = tmp_path / "lora", dict(theirs.named_parameters())
    halves = {name: random_halves(*weights[f"{name}.weight"].shape) for name in linear_names(theirs)}
    write_adapter(lora, halves)
    convert_folder(folder, lora)
    assert ensure_converted(lora) == lora / "model_mxfp4.pth"
    with torch.inference_mode():
        for name, (a, b) in halves.items():
            weights[f"{name}.weight"].copy_((weights[f"{name}.weight"] + 1.5 * b @ a).bfloat16())
    same_logits(lora / "model_mxfp4.pth", theirs)


def test_a_folder_without_sources(folder):
    """A folder with only the converted model works."""
    convert(folder)
    (folder / "model.safetensors").unlink()
    make_older(folder / "model.pth", 3600)
    assert ensure_converted(folder) == folder / "model.pth"
    (folder / "model.pth").rename(folder / "model_int8.pth")
    assert ensure_converted(str(folder)) == folder / "model_int8.pth"
    shutil.copy(folder / "model_int8.pth", folder / "model_int4.g32.pth")
    with pytest.raises(UsageError, match="holds model_int4.g32.pth, model_int8.pth: choose one of them"):
        ensure_converted(folder)


def test_an_adapters_folder(folder, tmp_path, capsys):
    theirs = make_hf("llama3", vocab_size=320, hidden_size=64, intermediate_size=96)
    weights = dict(theirs.named_parameters())
    lora = tmp_path / "lora"
    write_adapter(lora, {name: random_halves(*weights[f"{name}.weight"].shape) for name in linear_names(theirs)})
    with pytest.raises(UsageError, match="holds an adapter, not a model: merge it with .* --lora"):
        ensure_converted(lora)
    call_main(convert_hf_checkpoint.main, "--checkpoint_dir", folder, "--lora", lora)
    assert ensure_converted(lora) == lora / "model.pth" and "Converting" not in capsys.readouterr().err

    def must_be_merged_again(file: Path):
        """Gives file an older time, and checks that the adapter must be merged again."""
        make_older(file, 3600)
        with pytest.raises(UsageError, match="holds an adapter, not a model"):
            ensure_converted(lora)
        call_main(convert_hf_checkpoint.main, "--checkpoint_dir", folder, "--lora", lora)
        assert ensure_converted(lora) == lora / "model.pth"

    config, weights = lora / "adapter_config.json", load_file(lora / "adapter_model.safetensors")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 7}))
    must_be_merged_again(config)
    (lora / "adapter_model.safetensors").unlink()
    for factor in (1, 2):
        torch.save({name: factor * t for name, t in weights.items()}, lora / "adapter_model.bin")
        must_be_merged_again(lora / "adapter_model.bin")


def test_mistakes(folder, tmp_path, monkeypatch, capsys):
    (folder / "model.safetensors").write_bytes(b"garbage")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    for path, said in [
        (folder, f"generate.py: {folder}/model.safetensors is truncated or not safetensors"),
        (tmp_path / "empty", "generate.py: .*empty holds no model: it needs config.json and .* .gguf, or model.pth"),
        (tmp_path / "bad.gguf", "generate.py: .*bad.gguf"),
    ]:
        monkeypatch.setattr("sys.argv", ["generate.py", "--checkpoint_path", str(path)])
        with pytest.raises(SystemExit) as stopped:
            run_script(generate.main)
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and re.match(said, line)
    assert not list(tmp_path.glob("**/model.pth*"))
