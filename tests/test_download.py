"""download.py and prepare.sh download the right files, from a small server with the API of the hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from cli.script import run_script
from scripts.download import main
from tests.hub import Hub, serve, url_of, use_hub
from tests.tiny import make_hf
from utils.files import ROOT

REPOS = {
    "me/safetensors": "config.json generation_config.json tokenizer.json tokenizer.model tokenizer_config.json "
    "README.md special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.jinja "
    "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json "
    "consolidated.safetensors pytorch_model.bin "
    "original/consolidated.00.pth original/tokenizer.model onnx/model.safetensors",
    "me/bin": "config.json quantize_config.json quant_config.json hf_quant_config.json tokenizer.model "
    "pytorch_model-1-of-1.bin pytorch_model.bin.index.json training_args.bin",
    "me/tinyllamas": "stories15M.pt stories42M.pt stories15M.bin stories260K/stories260K.pt",
    "me/gguf": "model.gguf README.md",
    "me/consolidated": "params.json config.json consolidated.safetensors",
}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_hf("llama2").save_pretrained(folder)
    Hub.files = {repo: {name: name.encode() for name in names.split()} for repo, names in REPOS.items()}
    Hub.files["me/gated"] = Hub.files["full/disk"] = Hub.files["me/bin"]
    Hub.files["me/model"] = {file.name: file.read_bytes() for file in folder.iterdir()}
    server = serve(Hub)
    yield url_of(server)
    server.shutdown()


@pytest.fixture
def run_download(url, tmp_path, monkeypatch, capsys):
    """Returns a function that runs download.py against the server, in tmp_path: (exit status, lines of stderr)."""
    use_hub(monkeypatch, url)
    monkeypatch.chdir(tmp_path)

    def run_download(*arguments):
        monkeypatch.setattr(sys, "argv", ["download.py", "--repo_id", *arguments])
        try:
            run_script(main)
            status = 0
        except SystemExit as e:
            status = e.code
        return status, capsys.readouterr().err.splitlines()

    return run_download


def got(folder):
    return {p.name for p in folder.iterdir()} - {".cache"}


def test_only_the_files_that_are_needed(run_download, tmp_path):
    home, good = tmp_path / "checkpoints/me", ("--hf_token", "good")
    for arguments in (["me/safetensors"], ["me/bin", *good], ["me/gated", *good], ["me/bin"]):
        assert run_download(*arguments) == (0, [])
    wanted = set(REPOS["me/safetensors"].split()) - {"README.md", "consolidated.safetensors", "pytorch_model.bin"}
    assert got(home / "safetensors") == {name for name in wanted if "/" not in name}
    assert got(home / "bin") == got(home / "gated") == set(REPOS["me/bin"].split()) - {"training_args.bin"}
    assert (home / "bin/tokenizer.model").read_bytes() == b"tokenizer.model"
    status, lines = run_download("me/tinyllamas/stories15M")
    assert (status, got(home / "tinyllamas/stories15M")) == (0, {"stories15M.pt"})
    assert len(lines) == 1 and "me/tinyllamas has no tokenizer; put its tokenizer.model" in lines[0]


def test_mistakes_are_one_line_and_exit_2(run_download, tmp_path, url, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/full").write_text("not a folder")
    no_model = "holds no config.json with model.safetensors or pytorch_model.bin, nor a .pt"
    for arguments, line in {
        ("me/mispelt",): f"{url} has no me/mispelt, or it is private: check the spelling, or give --hf_token",
        ("me/bin", "--hf_token", "bad"): f"{url} answers 401 for me/bin: check the token (--hf_token or HF_TOKEN)",
        ("me/gated",): f"me/gated is gated: accept its terms at {url}/me/gated and give your --hf_token",
        ("me/broken",): f"{url} answers 503 for me/broken: try again later",
        ("me/tinyllamas",): "me/tinyllamas holds stories15M.pt, stories42M.pt: choose one, as in --repo_id "
        "me/tinyllamas/stories15M",
        ("me/tinyllamas/stories1M",): "me/tinyllamas holds no stories1M.pt",
        ("me/gguf",): f"me/gguf {no_model}",
        ("me/consolidated",): f"me/consolidated {no_model}",
        ("gpt2",): "--repo_id must be OWNER/NAME, as in meta-llama/Llama-3.2-1B, not 'gpt2'",
        ("../../etc",): "--repo_id must be OWNER/NAME, as in meta-llama/Llama-3.2-1B, not '../../etc'",
    }.items():
        assert run_download(*arguments) == (2, [f"download.py: {line}"])
    status, lines = run_download("full/disk")
    assert status == 2 and len(lines) == 1 and "cannot download full/disk" in lines[0] and "Not a directory" in lines[0]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and ".cache" not in p.parts and p.name != "full"]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    status, lines = run_download("me/bin")
    assert status == 2 and len(lines) == 1 and "cannot download me/bin from http://127.0.0.1:9: " in lines[0]


def test_prepare_downloads_converts_and_quantizes(url, tmp_path):
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "quantize.py").write_text("import sys; print(*sys.argv)")
    prepare, path = tmp_path / "scripts/prepare.sh", f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "HF_ENDPOINT": url, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "no_proxy": "*"}
    usage = subprocess.run([prepare], env=env, capture_output=True, text=True)
    assert usage.returncode == 2 and usage.stderr.startswith("usage: ") and usage.stderr.count("\n") == 1
    done = subprocess.run([prepare], env=env | {"MODEL_REPO": "me/model"}, capture_output=True, text=True, check=True)
    model = "checkpoints/me/model/model.pth"
    assert done.stdout.splitlines()[1:] == [f"wrote {model}", f"quantize.py --checkpoint_path {model} --mode int8"]
    assert (tmp_path / model).is_file()
