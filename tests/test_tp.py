"""Several ranks compute the same as one process. To save time, there are few jobs, with many cases each. tp_ranks.py is
the program of a rank."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import quantize
import tp
from config import ModelConfig
from formats import Int4, Unquantized
from tests import test_grok_and_baichuan
from tests.tiny import convert, give_input_orders, make_hf, quantize_embedding, write_folder
from tests.tp_ranks import CASES, COMMANDS, run_command, run_commands
from utils.errors import UsageError
from utils.files import ROOT

RANKS = ROOT / "tests/tp_ranks.py"
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}  # 160 / 4: cuts go through int4's groups

# In float32, ranks only add in another order. A sum of K terms is rounded K times, by up to 1 / 2^24 up or down; such
# errors grow like the square root of K. The longest sums have 160 terms, and there are 11 products on the way to the
# logits: 4 and an attention in each layer, and the head.
FLOAT32_ERROR = 11 * math.sqrt(160) / 2**24


def torchrun(n: int, *command) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONFAULTHANDLER": "1"}  # if a signal ends a rank, it prints where
    return subprocess.run(torchrun_command(n, *command), capture_output=True, text=True, timeout=300, env=env)


def torchrun_command(n: int, *command) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *map(str, command)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a checkpoint for every case, and one with a tokenizer, whose model often ends."""
    folder = tmp_path_factory.mktemp("tp")
    for name, (family, sizes, mode, _) in CASES.items():
        if family == "baichuan 13B":
            path = test_grok_and_baichuan.write_folder(family, folder / name)
        else:
            make_hf(family, **SIZES | sizes).save_pretrained(folder / name)
            path = convert(folder / name)
        if mode:
            run_command(quantize.main, ["--checkpoint_path", path, "--mode", *mode])
            next(p for p in path.parent.glob("model_*.pth")).replace(path)
        if name == "quantized embedding":
            quantize_embedding(path, path)
        if name.startswith("act-order"):
            give_input_orders(path, path)
    write_folder("llama3", folder / "whole")
    (folder / "whole/generation_config.json").write_text(json.dumps({"eos_token_id": list(range(32))}))
    shutil.copytree(folder / "whole", folder / "unconverted")
    convert(folder / "whole")
    return folder


@dataclass
class Job:
    found: dict  # the results of compare
    returncode: int
    stderr: str


@pytest.fixture(scope="module")
def jobs(files) -> dict[int, Job]:
    """n -> the finished job of n ranks. At its end, rank 1 dies."""
    results = {}
    for n in (2, 4):
        out = files / f"{n}.json"
        done = torchrun(n, RANKS, "compare", files, out)
        assert out.exists(), done.stderr
        results[n] = Job(json.loads(out.read_text()), done.returncode, done.stderr)
    return results


@pytest.fixture(scope="module")
def alone(files):
    stdin, argv = sys.stdin, list(sys.argv)
    yield run_commands(files)
    sys.stdin, sys.argv[:] = stdin, argv


def error_growth(n_ranks: int, n_alone: int) -> float:
    """Returns the factor by which the bfloat16 error of ranks may exceed that of one process.

    Squares of independent errors add up. In units of the squared error of rounding a whole product, a sum over n
    ranks has

        the n products, each rounded by a rank                      1 together
        the sums of k = 2 ... n products, each rounded              k / n each
        the residual, added                                         1

    One process rounds n_alone times there. Everywhere else ranks and one process round alike.

    The test compares medians of 24 tokens, whose errors differ by some 40 %. The standard error of a median is 1.25 *
    40 % over the square root of 24: 10 %, and of the quotient of two medians 15 %."""
    in_sums = sum(k / n_ranks for k in range(2, n_ranks + 1))
    return 1.15 * math.sqrt((1 + in_sums + 1) / n_alone)


@pytest.mark.parametrize("name, n", [(name, n) for name, case in CASES.items() for n in case[3]])
def test_ranks_compute_the_same(jobs, name, n):
    r = jobs[n].found[name]
    assert r["same"] and r["agreed"] and r["error"] < FLOAT32_ERROR
    errors = r["errors in bfloat16"]
    # Kernels round once, after the residual. PyTorch rounds before and after it. Ranks use kernels for some operations,
    # and PyTorch for others.
    assert errors["ranks"] < error_growth(n, n_alone=1) * errors["kernels"]
    assert errors["ranks"] < error_growth(n, n_alone=2) * max(errors["kernels"], errors["PyTorch"])
    every_rank_has_all = name in ("olmo2", "act-order olmo2")
    assert r["kv heads"] == (4 if name == "one kv head" else n if every_rank_has_all else max(1, n / 2))


@pytest.mark.parametrize("name, n", [("dense", 4), ("int8", 2), ("int4 g64", 2), ("mixtral", 4)])
def test_a_rank_reads_its_part(jobs, name, n):
    r = jobs[n].found[name]
    assert r["read"] <= r["held"] <= r["cut"] / n * 1.1


@pytest.mark.parametrize("name", [*COMMANDS, "perplexity"])
def test_commands(files, jobs, name, alone):
    ours, theirs = jobs[2].found["commands"][name], alone[name]
    if "--json" in COMMANDS.get(name, ([],))[0]:
        ours, theirs = json.loads(ours), json.loads(theirs)
        assert ours["world_size"] == 2 and len(ours["rank_peak_memory_bytes"]) == 2
        assert 0 < ours["communication_share"] < 1
        same = "text tokens finish_reason generated_tokens accept_counts".split()
        ours, theirs = ({k: r[k] for k in same} for r in (ours, theirs))
    assert ours == theirs and ours
    if name == "text":
        assert {p.name for p in files.glob("trace*")} == {"trace.json", "trace.rank0.json", "trace.rank1.json"}


def test_a_mistake_is_one_line(files):
    done = torchrun(3, ROOT / "generate.py", "--checkpoint_path", files / "whole/model.pth")
    lines = [line for line in done.stderr.splitlines() if line.startswith("generate.py: ")]
    assert done.returncode != 0 and len(lines) == 1 and not done.stdout
    assert "cannot be cut into 3 equal parts, but into 2 or 4" in lines[0]
    assert set(re.findall(r"exitcode *: (-?\d+)", done.stderr)) <= {"2", "-15"}


@pytest.mark.parametrize("n", [2, 4])
def test_a_rank_that_dies_ends_the_job(jobs, n):
    assert jobs[n].returncode != 0 and "RuntimeError: this rank dies" in jobs[n].stderr


def test_ctrl_c_leaves_no_process():
    with subprocess.Popen(torchrun_command(2, RANKS, "wait"), stdout=subprocess.PIPE, text=True) as job:
        line = next(line for line in job.stdout if line.startswith("pid"))
        job.send_signal(signal.SIGINT)
        job.wait(60)
    for pid in json.loads(line.removeprefix("pid")):
        for _ in range(100):
            if not Path(f"/proc/{pid}/cmdline").exists():
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"process {pid} is still there")


CONFIG = ModelConfig(
    dim=64, n_layers=1, n_heads=12, n_kv_heads=3, head_dim=16, ffn_dim=24, vocab_size=97, max_seq_len=64
)


def test_what_can_be_sharded():
    def possible(format, **changes) -> list[int]:
        config = ModelConfig(**vars(CONFIG) | changes)
        return [n for n in range(1, 13) if tp.can_shard(config, format, n)]

    assert possible(Unquantized()) == [1, 3, 6, 12]  # 2 and 4 ranks can neither divide nor share 3 key/value heads
    assert possible(Unquantized(), n_kv_heads=12) == [1, 2, 3, 4, 6, 12]
    assert possible(Unquantized(), n_kv_heads=12, vocab_size=4) == [1, 2, 3, 4]
    assert possible(Int4(32), n_kv_heads=12) == [1, 3]  # of which each has a width of 24 or 8
    message = "of which int4.g32 keeps 8 together, cannot be cut into 2 equal parts, but into 3"
    with pytest.raises(UsageError, match=message):
        tp.check_can_shard(CONFIG, Int4(32), 2)


@pytest.mark.parametrize("size, head_size, n", [(12, 1, 4), (97, 1, 4), (96, 16, 3), (32, 16, 4), (5, 1, 4)])
def test_shard_ranges_cover_everything(size, head_size, n):
    ranges = [tp.shard_range(size, head_size, rank, n) for rank in range(n)]
    assert len({length for _, length in ranges}) == 1
    assert all(start % head_size == length % head_size == 0 for start, length in ranges)
    covered = {i for start, length in ranges for i in range(start, start + length)}
    assert covered >= set(range(size))
