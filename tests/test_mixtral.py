"""mixtral-moe/: the scripts run on a tiny random Mixtral, the arithmetic in its README is right, and long prompts take
little memory."""

import json
import os
import subprocess
import sys

import pytest
import torch

import tp
from config import ModelConfig, MoEConfig
from engine.memory_traffic import active_weight_bytes
from formats import Int4, Int8, Unquantized
from layers.linear import quantizable_linears
from model import Transformer
from tests.test_readme import TINY_MIXTRAL, calls_of_script, copy_of_scripts, run_python
from tests.tiny import convert, make_hf, write_folder
from utils.files import ROOT

MIXTRAL = ModelConfig(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, ffn_dim=14336, vocab_size=32000, max_seq_len=32768,
    moe=MoEConfig(n_experts=8, top_k=2),
)
README = (ROOT / "mixtral-moe/README.md").read_text()


def test_flow(tmp_path, monkeypatch, capsys):
    """The scripts prepare a model and run it in each format, as in the README, and two processes give the text of one.

    Only these two are started by the script. All other calls run in this process, because torch takes seconds to
    load."""
    copy_of_scripts(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(command: str) -> str:
        calls = calls_of_script(command, tmp_path)
        assert calls
        capsys.readouterr()
        for arguments in calls:
            run_python(arguments, less={})
        return capsys.readouterr().out

    run("MODES='int8 int4' ./mixtral-moe/prepare.sh")
    args = ["--prompt=Hello", "--max_new_tokens=8", "--temperature=0", "--precision=float32", "--device=cpu"]
    files = ("model.pth", "model_int8.pth", "model_int4.g32.pth")
    texts = {file: run(f"MODEL={file} ./mixtral-moe/generate.sh {' '.join(args)}") for file in files}
    assert all(text.strip() for text in texts.values())
    python = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    env = os.environ | TINY_MIXTRAL | {"OMP_NUM_THREADS": "1", "PATH": python, "NPROC": "2"}
    done = subprocess.run(["mixtral-moe/generate.sh", *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == texts["model_int8.pth"]


FORMATS = {
    "bfloat16": Unquantized(),
    "int8": Int8(),
    "int4, groups of 32": Int4(32),
    "int4, groups of 128": Int4(128),
}


@pytest.mark.parametrize("row", FORMATS)
def test_arithmetic_of_the_page(row):
    with torch.device("meta"):
        model = Transformer(MIXTRAL).bfloat16()
    for _, linear in quantizable_linears(model):
        linear.set_format(FORMATS[row])
    sharded = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"}
    assert sharded == tp.tp_plan(MIXTRAL).keys()
    bytes_of = {name: t.nbytes for name, t in model.state_dict().items()}
    shared = sum(n for name, n in bytes_of.items() if name.split(".")[-2] in sharded)
    whole = sum(bytes_of.values()) - shared
    expected = [whole + shared, active_weight_bytes(model)] + [whole + shared / n for n in (2, 4, 8)]
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {row} |"))
    assert [float(x) for x in line.split("|")[2:-1]] == [pytest.approx(n / 1e9, abs=0.051) for n in expected]


def test_prefill_memory_grows_with_the_tokens(tmp_path):
    """Memory does not grow with tokens times experts times weights: gathering the two experts of each token of a chunk
    would take 1.6 GB."""
    write_folder("mixtral", tmp_path)
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=1, max_position_embeddings=4096)
    make_hf("mixtral", vocab_size=320, bos_token_id=256, eos_token_id=257, **sizes).save_pretrained(tmp_path)
    path, peaks = convert(tmp_path), []
    for tokens in (512, 2560):
        command = [sys.executable, ROOT / "generate.py", "--checkpoint_path", path, "--device=cpu", "--json",
                   f"--prompt_tokens={tokens}", "--max_new_tokens=2"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, check=True, env=env)
        peaks.append(json.loads(done.stdout)["peak_memory_bytes"])
    assert peaks[1] - peaks[0] < 100e6 and peaks[0] < 800e6
