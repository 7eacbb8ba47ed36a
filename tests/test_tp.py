"""Several ranks compute what one process computes. Few jobs with many cases each: starting the processes takes longest.

This file is also what torchrun runs: the functions below that begin with rank_.
"""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import eval as evaluation  # noqa: E402
import generate  # noqa: E402
import quantize  # noqa: E402
import tp  # noqa: E402
from checkpoint import read_checkpoint  # noqa: E402

SIZES = dict(hidden_size=64, intermediate_size=160)  # 160 / 4: cuts go through int4's groups
CASES = {  # family, sizes, quantization, ranks
    "dense": ("llama3", {}, [], (2, 4)),
    "biases": ("llama-bias", {}, [], (2, 4)),
    "qwen2": ("qwen2", {}, [], (2,)),
    "q and k norms": ("qwen3", {}, [], (4,)),
    "window": ("mistral-window", {}, [], (2,)),
    "mixtral": ("mixtral", {}, [], (2, 4)),
    "qwen3-moe": ("qwen3-moe", {}, [], (2,)),
    "one kv head": ("qwen2", dict(num_key_value_heads=1), [], (4,)),
    "int8": ("llama3", {}, ["int8"], (2, 4)),
    "int4 g32": ("llama-bias", {}, ["int4", "--groupsize", "32"], (4,)),
    "int4 g64": ("llama3", {}, ["int4-hqq", "--groupsize", "64"], (2, 4)),
    "int4 g128": ("qwen3", {}, ["int4", "--groupsize", "128"], (2, 4)),
    "int8 mixtral": ("mixtral", {}, ["int8"], (2,)),
    "int4 qwen3-moe": ("qwen3-moe", {}, ["int4", "--groupsize", "32"], (4,)),
}
GREEDY, SPECULATE = ["--temperature", "0"], ["--ignore_eos", "--prompt", "ab ab ab", "--temperature", "0"]
COMMANDS = {  # what generate.py gets beside the checkpoint, and standard input
    "rows": (["--json", "--batch_size", "3", "--ignore_eos", *GREEDY], None),
    "sampling": (["--json", "--num_samples", "3", "--top_p", "0.9"], None),
    "lookup": (["--json", "--prompt_lookup", *SPECULATE], None),
    "draft": (["--json", "--draft_checkpoint_path", "DRAFT", *SPECULATE], None),
    "whole draft": (["--json", "--draft_checkpoint_path", "DRAFT", "--draft_tp", "off", "--ignore_eos"], None),
    "conversation": (["--interactive", *GREEDY], "Hello\n/reset\nHow are you?\n"),
    "text": (["--batch_size", "2", "--profile", "PROFILE"], None),
}


def torchrun(n: int, *command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(torchrun_command(n, *command), capture_output=True, text=True, timeout=300, **options)


def torchrun_command(n: int, *command) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *map(str, command)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a checkpoint for every case and one with a tokenizer, whose model ends often."""
    from tests.tiny import convert, make_hf, write_folder

    folder = tmp_path_factory.mktemp("tp")
    for name, (family, sizes, mode, _) in CASES.items():
        make_hf(family, **SIZES | sizes).save_pretrained(folder / name)
        path = convert(folder / name)
        if mode:
            command(quantize.main, ["--checkpoint_path", path, "--mode", *mode])
            next(p for p in path.parent.glob("model_*.pth")).replace(path)
    write_folder("llama3", folder / "whole")
    (folder / "whole/generation_config.json").write_text(json.dumps({"eos_token_id": list(range(32))}))
    convert(folder / "whole")
    return folder


def command(main, arguments: list, stdin: str | None = None) -> str:
    """What main prints."""
    out = io.StringIO()
    sys.argv[1:], sys.stdin = map(str, arguments), io.StringIO(stdin)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        main()
    return out.getvalue()


def commands(folder: Path) -> dict[str, str]:
    """What COMMANDS print, and a perplexity."""
    path, results = folder / "whole/model.pth", {}
    files = {"PROFILE": folder / "trace.json", "DRAFT": path}
    common = ["--checkpoint_path", path, "--precision", "float32", "--max_new_tokens", 24, "--device", "cpu"]
    for name, (arguments, stdin) in COMMANDS.items():
        results[name] = command(generate.main, [*common, *(files.get(a, a) for a in arguments)], stdin)
    text = ["--text_file", path.parent / "config.json", "--max_seq_length", 128]
    results["perplexity"] = command(evaluation.main, [*common[:4], *text, "--device", "cpu"])
    return results


def greedy(model, prompt: torch.Tensor, n: int, compile: bool = False) -> list[list[int]]:
    steps = generate.build_steps(model, {"temperature": 0}, compile, False)
    return list(generate.generate(*steps, prompt, 0, n))


class BytesRead(TorchDispatchMode):
    """Counts the bytes that operations copy out of some tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.storages, self.total = {t.untyped_storage().data_ptr() for t in tensors}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        pointer = lambda t: t.untyped_storage().data_ptr()  # noqa: E731
        if args and isinstance(args[0], torch.Tensor) and pointer(args[0]) in self.storages:
            self.total += out.nbytes if isinstance(out, torch.Tensor) and pointer(out) not in self.storages else 0
        return out


def rank_cases(folder: Path) -> dict:
    """For every case how far the logits of all ranks are from one process's, whether the tokens are the same, ..."""
    results = {}
    for name, (_, _, _, sizes) in CASES.items():
        if tp.world_size() in sizes:
            results[name] = rank_case(folder / name / "model.pth", name == "mixtral" and tp.world_size() == 2)
    return results


@torch.inference_mode()
def rank_case(path: Path, compile: bool) -> dict:
    load = lambda **how: generate.load_model(path, torch.device("cpu"), torch.float32, **how)  # noqa: E731
    one, ours = load(shared=False), load()
    prompt = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    one.setup_caches(3, 32), ours.setup_caches(3, 32)
    at = torch.arange(12)
    error = (one(prompt, at) - ours(prompt, at)).abs().max().item()
    expected = greedy(one, prompt, 20)
    tokens = [greedy(ours, prompt, 20, c) for c in ([False, True] if compile else [False])]
    torch.manual_seed(tp.dist.get_rank())
    steps = generate.build_steps(ours, {"temperature": 1.0}, False, False)
    sampled = list(generate.generate(*steps, prompt, 0, 20))
    # Ranks take some of the kernels' operations and some of PyTorch's, so one process does without kernels too
    ways = {"kernels": (False, True), "PyTorch": (False, False), "ranks": (True, True)}  # shared, fast
    errors = {name: error_in_bfloat16(path, *way, one, prompt[:, :8]) for name, way in ways.items()}
    return {
        "error": max(tp.everywhere(error)),
        "errors in bfloat16": errors | {"ranks": max(tp.everywhere(errors["ranks"]))},
        "same": all(t == expected for t in tokens),
        "agreed": len(set(map(str, tp.everywhere(sampled)))) == 1,
        "kv heads": ours.caches[0][0].shape[1] * tp.world_size() / one.caches[0][0].shape[1],
        **rank_bytes(path),
    }


def error_in_bfloat16(path: Path, shared: bool, fast: bool, exact, tokens: torch.Tensor) -> float:
    """How far the logits of decode steps are from exact's, relative to their size."""
    model = generate.load_model(path, torch.device("cpu"), torch.bfloat16, fast, shared)
    model.setup_caches(3, 32)
    steps = [(tokens[:, i : i + 1], torch.tensor([i])) for i in range(tokens.shape[1])]
    expected, logits = (torch.cat([m(*step) for step in steps], dim=1) for m in (exact, model))
    return ((logits - expected).norm() / expected.norm()).item()


def rank_bytes(path: Path) -> dict:
    """What is read of the file for this rank's part, and how much that must be."""
    config, quantization, tensors = read_checkpoint(path)
    tensors.setdefault("output.weight", tensors["tok_embeddings.weight"])
    with torch.device("meta"):
        model = generate.Transformer(config)
    quantize.prepare(model, quantization)
    cut = tp.shard(model, quantization, torch.device("cpu"))
    with BytesRead(tensors.values()) as read:
        parts = {name: cut(name, t) for name, t in tensors.items()}
    held = sum(t.nbytes for name, t in parts.items() if t is not tensors[name])
    cut_whole = sum(t.nbytes for name, t in tensors.items() if parts[name] is not t)
    return {"read": read.total, "held": held, "cut": cut_whole}


def rank_dies():
    if tp.dist.get_rank() == 1:
        raise RuntimeError("this rank dies")
    rank_waits()


def rank_waits():
    print("pid", tp.everywhere(os.getpid()), flush=True)
    while True:
        tp.everywhere(0)


@pytest.fixture(scope="module")
def jobs(files):
    """ranks -> what the job with so many found."""
    results = {}
    for n in (2, 4):
        done = torchrun(n, __file__, files, files / f"{n}.json")
        assert done.returncode == 0, done.stderr[-3000:]
        results[n] = json.loads((files / f"{n}.json").read_text())
    return results


@pytest.mark.parametrize("name, n", [(name, n) for name, case in CASES.items() for n in case[3]])
def test_ranks_compute_the_same(jobs, name, n):
    r = jobs[n][name]
    assert r["same"] and r["agreed"] and r["error"] < 1e-4
    errors = r["errors in bfloat16"]
    assert errors["ranks"] < 2 * errors["kernels"]
    assert errors["ranks"] < 1.5 * max(errors["kernels"], errors["PyTorch"])
    assert r["kv heads"] == (4 if name == "one kv head" else max(1, n / 2))


@pytest.mark.parametrize("name, n", [("dense", 4), ("int8", 2), ("int4 g64", 2), ("mixtral", 4)])
def test_a_rank_reads_its_part(jobs, name, n):
    r = jobs[n][name]
    assert r["read"] <= r["held"] <= r["cut"] / n * 1.1


@pytest.mark.parametrize("name", [*COMMANDS, "perplexity"])
def test_commands(files, jobs, name, alone):
    ours, theirs = jobs[2]["commands"][name], alone[name]
    if "--json" in COMMANDS.get(name, ([],))[0]:
        ours, theirs = json.loads(ours), json.loads(theirs)
        assert ours["world_size"] == 2 and len(ours["rank_peak_memory_bytes"]) == 2
        assert 0 < ours["communication_share"] < 1
        same = "text tokens finish_reason generated_tokens accept_counts".split()
        ours, theirs = ({k: r[k] for k in same} for r in (ours, theirs))
    assert ours == theirs and ours
    if name == "text":
        assert {p.name for p in files.glob("trace*")} == {"trace.json", "trace.rank0.json", "trace.rank1.json"}


@pytest.fixture(scope="module")
def alone(files):
    stdin, argv = sys.stdin, list(sys.argv)
    yield commands(files)
    sys.stdin, sys.argv[:] = stdin, argv


def test_a_mistake_is_one_line(files):
    done = torchrun(3, ROOT / "generate.py", "--checkpoint_path", files / "whole/model.pth")
    lines = [line for line in done.stderr.splitlines() if line.startswith("generate.py: ")]
    assert done.returncode != 0 and len(lines) == 1 and not done.stdout
    assert "cannot be cut into 3 equal parts, but into 2 or 4" in lines[0]
    assert set(re.findall(r"exitcode *: (-?\d+)", done.stderr)) <= {"2", "-15"}


def test_a_rank_that_dies_ends_the_job():
    done = torchrun(2, __file__, "dies")
    assert done.returncode != 0 and "RuntimeError: this rank dies" in done.stderr


def test_ctrl_c_leaves_no_process():
    with subprocess.Popen(torchrun_command(2, __file__, "waits"), stdout=subprocess.PIPE, text=True) as job:
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


if __name__ == "__main__":
    arguments = sys.argv[1:]
    with tp.ranks():
        torch.set_num_threads(1)
        if len(arguments) == 1:
            {"dies": rank_dies, "waits": rank_waits}[arguments[0]]()
        folder, out = map(Path, arguments)
        results = rank_cases(folder)
        if tp.world_size() == 2:
            results["commands"] = commands(folder)
        if tp.dist.get_rank() == 0:
            out.write_text(json.dumps(results))
