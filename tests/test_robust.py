"""The commands survive kill -9 and Ctrl-C at any moment, lack of memory, many prompts in a row, and closed pipes."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from cli.script import MATMUL_CACHES, run_script
from kernels import build
from tests.forks import finish, start, stop
from tests.hub import Hub, serve, url_of, use_hub
from tests.tiny import convert, make_hf, write_folder
from tests.tiny_gguf import make_llama, write_gguf
from utils.files import ROOT

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # a second thread slows models this small


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A folder with a model of 120 MB: as on the hub, in model.pth and as a GGUF."""
    folder = tmp_path_factory.mktemp("big")
    write_folder("llama2", folder)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 7}
    make_hf("llama2", **sizes, vocab_size=320, bos_token_id=256, eos_token_id=257).save_pretrained(folder)
    write_gguf(folder / "m.gguf", make_llama(**sizes))
    convert(folder)
    (folder / "text").write_text("It was the best of times, it was the worst of times. " * 5)
    build.load_cpp_kernels()  # before stop() measures the time of a run
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write_folder("llama3", folder)
    convert(folder)
    return folder


def arguments(command: str, big: Path, folder: Path) -> list:
    """Returns the arguments of a command that reads big and writes to folder."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(big / name)
    (folder / "q.pth").symlink_to(big / "model.pth")
    path = ["--checkpoint_path", big / "model.pth", "--device=cpu"]
    return {
        "convert": ["--checkpoint_dir", folder],
        "gguf": [big / "m.gguf", "--checkpoint_dir", folder],
        "quantize": ["--checkpoint_path", folder / "q.pth", "--mode=int4"],
        "generate": [*path, "--prompt=It was", "--max_new_tokens=60", "--ignore_eos", "--json"],
        "eval": [*path, "--text_file", big / "text", "--kernels=off"],
    }[command]


# ---- Stopped --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("convert", ["model.pth"]),
        ("gguf", ["model.pth", "tokenizer.json", "tokenizer_config.json"]),
        ("quantize", ["q_int4.g32.pth"]),
    ],
)
def test_kill_leaves_whole_files(big, tmp_path, command, names):
    args, files = arguments(command, big, tmp_path), [tmp_path / name for name in names]
    statuses, new = [], None
    for status in stop(signal.SIGKILL, command, args, tmp_path / "err"):
        statuses.append(status)
        now = [file.read_bytes() for file in files]
        new = new or now
        assert all(a in (b, b"old") for a, b in zip(now, new, strict=True))
        assert now[0] == b"old" or now == new  # a new model.pth has its tokenizer
        for file in files:
            file.unlink()  # not through a link
            file.write_bytes(b"old")
    assert statuses[0] == statuses[-1] == 0 and statuses[1:-1] == [-signal.SIGKILL] * (len(statuses) - 2)
    assert len(statuses) > 4 and now == new and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("command", ["convert", "gguf", "quantize", "generate", "eval"])
def test_interrupt_exits_130(big, tmp_path, command):
    args, err, statuses = arguments(command, big, tmp_path), tmp_path / "err", []
    for status in stop(signal.SIGINT, command, args, err):
        statuses.append(status)
        assert status in (0, 130) and "Traceback" not in err.read_text()
        assert not list(tmp_path.glob("*.tmp"))
    assert statuses.count(130) > 2


def test_sigterm_leaves_no_temporary_file(big, tmp_path):
    args, err, statuses = arguments("convert", big, tmp_path), tmp_path / "err", []
    for status in stop(signal.SIGTERM, "convert", args, err):
        statuses.append(status)
        # -SIGTERM: before run_script, or after it. 130: load_safetensors cannot tell which signal came
        assert status in (0, -signal.SIGTERM, 143, 130) and not err.read_text().strip()
        assert not list(tmp_path.glob("*.tmp"))
    assert statuses.count(143) > 2


SCRIPTS = ["generate.py", "quantize.py", "eval.py", *(f"scripts/{file.name}" for file in ROOT.glob("scripts/*.py"))]
SCRIPTS = [script for script in SCRIPTS if "    exit_on_interrupt()" in (ROOT / script).read_text()]
SLOW_IMPORT = "import time; print('loading', flush=True); time.sleep(60)"


@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupt_while_imports_run(script, tmp_path):
    """Ctrl-C ends a command during the long imports of torch and huggingface_hub. Modules that take even longer replace
    them here."""
    for name in ("torch", "huggingface_hub"):
        (tmp_path / f"{name}.py").write_text(SLOW_IMPORT)
    env, pipe = os.environ | {"PYTHONPATH": str(tmp_path)}, subprocess.PIPE
    with subprocess.Popen([sys.executable, ROOT / script, "--help"], stdout=pipe, stderr=pipe, env=env) as process:
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGINT)
        assert (*process.communicate(), process.returncode) == (b"", b"", 130)


def test_interrupt_while_torch_is_loaded():
    assert {"generate.py", "quantize.py", "eval.py", "scripts/convert_gguf.py", "scripts/download.py"} < {*SCRIPTS}
    command, pipe = [sys.executable, ROOT / "generate.py", "--help"], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        while "/libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert (*process.communicate(), process.returncode) == (b"", b"", 130)


class SlowHub(Hub):
    """A hub that takes half a second for each file, and can send the rest of one."""

    def answer(self, status, headers, content=b""):
        first = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if status == 200 and first:
            status, headers = 206, headers | {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
        self.start(status, headers, len(content) - first)
        step = 2**16 if len(content) > 2**16 else 2**20
        for i in range(first, len(content) if self.command == "GET" else 0, step):
            self.wfile.write(content[i : min(i + step, len(content))])
            time.sleep(0.5 * step / max(len(content), step))


@pytest.mark.parametrize(("sig", "expected"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_download_that_is_stopped_goes_on(tmp_path, monkeypatch, sig, expected):
    content = os.urandom(2**20)
    SlowHub.files = {"me/model": {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": content}}
    server = serve(SlowHub)
    use_hub(monkeypatch, url_of(server))
    monkeypatch.chdir(tmp_path)
    file, statuses = tmp_path / "checkpoints/me/model/model.safetensors", []
    for i in range(50):
        process = start("download", ["--repo_id", "me/model"], tmp_path / "err")
        time.sleep(0.1 + 0.1 * i)
        os.kill(process.pid, sig)
        statuses.append(finish(process))
        assert not file.exists() or file.read_bytes() == content
        assert "Traceback" not in (tmp_path / "err").read_text()
        if statuses[-1] == 0:
            break
    server.shutdown()
    assert statuses[:-1] == [expected] * (len(statuses) - 1) and len(statuses) > 2
    assert statuses[-1] == 0 and file.read_bytes() == content


# ---- Memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["convert", "quantize", "generate", "eval"])
def test_lack_of_memory_is_one_line(big, tmp_path, command):
    args, err = arguments(command, big, tmp_path), tmp_path / "err"
    for memory in (2**20, 2**25, 2**27):
        assert finish(start(command, args, err, memory=memory)) in (0, 2)
        said = err.read_text()
        assert said == "" or (said.count("\n") == 1 and "memory" in said and " GB" in said), said
    assert finish(start(command, args, err, memory=2**25)) == 2
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("word", "lengths", "first"), [("word ", 20, 100), ("a ", 110, 200)])
def test_many_prompts_take_no_more_memory_than_the_first(small, tmp_path, word, lengths, first):
    """Prompts have a few lengths first, and then every length that the context allows. The heap grows by some
    megabytes, because caches of compiled matmuls hold all lengths, and stops growing when matmuls are compiled again
    and again."""
    (tmp_path / "prompts").write_text("".join(f"{word * (i * 37 % lengths)}{i % 10}\n" for i in range(500)))
    env = ONE_THREAD | dict.fromkeys(MATMUL_CACHES, "1024")
    command = [sys.executable, ROOT / "generate.py", "--checkpoint_path", small / "model.pth", "--device=cpu"]
    command += [f"--prompt_file={tmp_path / 'prompts'}", "--max_new_tokens=8", "--ignore_eos", "--json"]
    out = subprocess.run(command, capture_output=True, check=True, env=env).stdout
    peaks = [json.loads(line)["peak_memory_bytes"] for line in out.splitlines()]
    assert len(peaks) == 500 and peaks[-1] - peaks[first - 1] < 2**20


def test_compiled_products_are_few_unless_the_user_says_so(monkeypatch):
    def main():
        assert (os.environ[unset], os.environ[set_by_user]) == ("128", "7")

    unset, set_by_user = MATMUL_CACHES
    monkeypatch.delenv(unset, raising=False)
    monkeypatch.setenv(set_by_user, "7")
    run_script(main)


def test_pytorchs_compiler_is_imported_only_where_it_is_needed(small):
    """The compiler of PyTorch, whose import takes a second and 150 MB, is not imported for the kernels."""
    options = ["--checkpoint_path", str(small / "model.pth"), "--device=cpu", "--max_new_tokens=3"]
    code = f"""
import sys, generate
for more in ([], ["--compile"]):
    sys.argv[1:] = {options} + more
    generate.main()
    assert "torch._dynamo" not in sys.modules, more
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=ONE_THREAD)


def test_the_summary_takes_no_memory(small):
    """It measures bandwidth on memory that is already in use."""
    options = ["--checkpoint_path", str(small / "model.pth"), "--device=cpu", "--max_new_tokens=3"]
    code = f"""
import sys, generate
from utils import machine
machine.cache_bytes = lambda: 0
for more in (["--json"], []):
    before = machine.peak_memory(machine.pick_device("cpu"))
    sys.argv[1:] = {options} + more
    generate.main()
assert machine.peak_memory(machine.pick_device("cpu")) - before < 2**25
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0 and "this machine reads" in done.stderr, done.stderr


class InductorError(RuntimeError):
    """Stands in for the error of torch.compile, which would take ten seconds."""

    __module__ = "torch._inductor.exc"


@pytest.mark.parametrize("why", ["No space left on device", "failed to map segment from shared object"])
def test_no_room_for_compiled_code(why, capsys):
    def main():
        raise InductorError(f"OSError: {why}\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")

    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--compile cannot use its folder (OSError: " in said and why[:20] in said


# ---- Pipes and terminals --------------------------------------------------------------------------------------------


def test_streams_that_the_shell_has_closed(small):
    command = f"{sys.executable} generate.py --checkpoint_path {small / 'model.pth'} --device cpu --max_new_tokens 3"
    env, pipe, processes = ONE_THREAD | {"WORLD_SIZE": "2"}, subprocess.PIPE, {}
    for closed in ("<&-", "2>&-", ">&-"):  # in parallel, because each loads torch
        processes[closed] = subprocess.Popen(
            f"{command} {closed}", shell=True, cwd=ROOT, env=env, stdout=pipe, stderr=pipe
        )
    for closed, process in processes.items():
        out, err = process.communicate()
        assert process.returncode == 0 and (out or closed == ">&-"), err


def test_same_seed_same_text_however_it_is_shown(small, tmp_path):
    """A seed gives one text, streamed or as JSON, up to the end of the context."""
    out, err = tmp_path / "out", tmp_path / "err"
    options = ["--checkpoint_path", small / "model.pth", "--device=cpu", "--prompt=Hello", "--max_new_tokens=251"]

    def generated(*more) -> str:
        assert finish(start("generate", [*options, "--ignore_eos", "--seed=7", *more], err, out)) == 0, err.read_text()
        return out.read_bytes().decode()

    shown = json.loads(generated("--json"))
    assert shown["finish_reason"] == ["length"] and shown["generated_tokens"] == 251
    assert json.loads(generated("--json"))["tokens"] == shown["tokens"]
    assert generated() == shown["text"][0] + "\n"


@pytest.mark.parametrize(("command", "bar"), [("convert", "write"), ("quantize", "write"), ("eval", "windows")])
def test_bars_are_for_terminals(big, tmp_path, command, bar):
    args, err = arguments(command, big, tmp_path), tmp_path / "err"
    assert finish(start(command, args, err)) == 0 and err.read_text() == ""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    assert finish(start(command, args, Path(os.ttyname(theirs)))) == 0
    os.set_blocking(ours, False)
    assert bar in os.read(ours, 2**16).decode()
