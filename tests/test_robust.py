"""What nobody wants to happen: kill -9 and Ctrl-C at any moment, no memory, a thousand prompts in a row, a pipe for a
terminal. The commands run in forks of this process where they can, for torch takes seconds to load."""

import fcntl
import json
import multiprocessing
import os
import pty
import resource
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from tqdm import tqdm

import eval
import generate
import kernels
import quantize
from checkpoint import run
from tests.test_convert import make_llama, write_gguf
from tests.test_download import Hub
from tests.tiny import ROOT, convert, make_hf, write_folder

import convert_gguf  # isort: skip  (tests.tiny put scripts/ on the path)
import convert_hf_checkpoint  # isort: skip
import download  # isort: skip

MAINS = {"convert": convert_hf_checkpoint.main, "gguf": convert_gguf.main, "quantize": quantize.main,
         "generate": generate.main, "eval": eval.main, "download": download.main}  # fmt: skip


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A folder with a model of 120 MB, as the hub has it, in model.pth and as GGUF."""
    folder = tmp_path_factory.mktemp("big")
    write_folder("llama2", folder)
    sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=7, vocab_size=320)
    make_hf("llama2", **sizes, bos_token_id=256, eos_token_id=257).save_pretrained(folder)
    write_gguf(folder / "m.gguf", make_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=7))
    convert(folder)
    (folder / "text").write_text("It was the best of times, it was the worst of times. " * 5)
    kernels.build()  # now, or it would be a part of the run after which stop() times the others
    return folder


def arguments(command: str, big: Path, folder: Path) -> list:
    """Of a command on big; what it writes goes to folder."""
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


def start(command: str, args: list, err: Path, memory: int | None = None) -> multiprocessing.Process:
    """Runs a command in a fork, its stderr in a file, with only so much more memory."""

    def child():
        os.setpgid(0, 0)
        tqdm.set_lock(threading.RLock())  # its own is shared with forks, of which one may be killed while holding it
        for fd, path in ((1, os.devnull), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        sys.argv = [f"{command}.py", *map(str, args)]
        if memory is not None:
            in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (in_use + memory,) * 2)
        run(MAINS[command])

    process = multiprocessing.get_context("fork").Process(target=child)
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # as the scripts have it before run() and after
    process.start()
    signal.signal(signal.SIGINT, before)
    return process


def finish(process: multiprocessing.Process) -> int:
    process.join(300)
    assert not process.is_alive(), process.kill()
    return process.exitcode


def stop(sig: int, command: str, args: list, err: Path) -> Iterator[int]:
    """Runs the command twice, then again and again, sending it sig every time a little later on its way until it is
    through before. Yields exit statuses, all but the first, for which the machine may have been slower."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        status = finish(start(command, args, err))
        seconds.append(time.perf_counter() - began)
    yield status
    step, i = min(seconds) / 12, 0
    while i < 50:
        i += 1
        process = start(command, args, err)
        time.sleep(i * step)
        os.kill(process.pid, sig)
        status = finish(process)
        if status == 0 and i < 4 and step > 0.01:  # the machine had been slower still
            step, i = step / 4, 0
            continue
        yield status
        if status == 0:
            return


@pytest.mark.parametrize("command, names", [
    ("convert", ["model.pth"]), ("gguf", ["model.pth", "tokenizer.json", "tokenizer_config.json"]),
    ("quantize", ["q_int4.g32.pth"]),
])  # fmt: skip
def test_kill_leaves_whole_files(big, tmp_path, command, names):
    args, files = arguments(command, big, tmp_path), [tmp_path / name for name in names]
    statuses, new = [], None
    for status in stop(signal.SIGKILL, command, args, tmp_path / "err"):
        statuses.append(status)
        now = [file.read_bytes() for file in files]
        new = new or now
        assert all(a in (b, b"old") for a, b in zip(now, new, strict=True))
        assert now[0] == b"old" or now == new  # where model.pth is, its tokenizer is too
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


@pytest.mark.parametrize("script", ["generate.py", "quantize.py", "eval.py", "scripts/convert_hf_checkpoint.py",
                                    "scripts/convert_gguf.py", "scripts/download.py"])  # fmt: skip
def test_interrupt_while_torch_is_loaded(script):
    command, pipe = [sys.executable, ROOT / script, "--help"], subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe)
    while "/libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert (*process.communicate(), process.returncode) == (b"", b"", 130)


@pytest.mark.parametrize("command", ["convert", "quantize", "generate", "eval"])
def test_lack_of_memory_is_one_line(big, tmp_path, command):
    args, err = arguments(command, big, tmp_path), tmp_path / "err"
    for memory in (2**20, 2**25, 2**27):
        assert finish(start(command, args, err, memory)) in (0, 2)
        said = err.read_text()
        assert said == "" or (said.count("\n") == 1 and "memory" in said and " GB" in said), said
    assert finish(start(command, args, err, 2**25)) == 2
    assert not list(tmp_path.glob("*.tmp"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write_folder("llama3", folder)
    convert(folder)
    return folder


def generated(small: Path, *args) -> str:
    """generate.py's standard output."""
    command = [sys.executable, ROOT / "generate.py", "--checkpoint_path", small / "model.pth", "--device=cpu", *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, check=True, env=env).stdout.decode()


@pytest.mark.parametrize("word, lengths, first", [("word ", 20, 100), ("a ", 110, 200)])
def test_a_thousand_prompts_take_no_more_memory_than_the_first(small, tmp_path, word, lengths, first):
    """Of few lengths, and of every length that the model has room for."""
    (tmp_path / "prompts").write_text("".join(f"{word * (i * 37 % lengths)}{i % 10}\n" for i in range(1000)))
    out = generated(small, f"--prompt_file={tmp_path / 'prompts'}", "--max_new_tokens=8", "--ignore_eos", "--json")
    peaks = [json.loads(line)["peak_memory_bytes"] for line in out.splitlines()]
    assert len(peaks) == 1000 and peaks[-1] - peaks[first - 1] < 3 * 2**20


@pytest.mark.parametrize("options", [[], ["--compile"]])
def test_pytorchs_compiler_is_imported_only_where_it_is_needed(small, options):
    """It takes a second and 150 MB, and kernels.cpp does without."""
    options = ["--checkpoint_path", str(small / "model.pth"), "--device=cpu", "--max_new_tokens=3", *options]
    code = f"import sys, generate; sys.argv[1:] = {options}; generate.main(); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("closed", ["<&-", "2>&-", ">&-"])
def test_what_the_shell_has_closed(small, closed):
    command = f"{sys.executable} generate.py --checkpoint_path {small / 'model.pth'} --device cpu --max_new_tokens 3"
    done = subprocess.run([f"WORLD_SIZE=2 {command} {closed}"], shell=True, cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and (done.stdout or closed == ">&-"), done.stderr


def test_same_seed_same_text_however_it_is_shown(small):
    """Streamed to a terminal or a pipe, or whole as JSON; to the very end of the context."""
    args = ["--prompt=Hello", "--max_new_tokens=251", "--ignore_eos", "--seed=7"]
    shown = json.loads(generated(small, *args, "--json"))
    assert shown["finish_reason"] == ["length"] and shown["generated_tokens"] == 251
    assert json.loads(generated(small, *args, "--json"))["tokens"] == shown["tokens"]
    assert generated(small, *args) == shown["text"][0] + "\n"


@pytest.mark.parametrize("command, bar", [("convert", "write"), ("quantize", "write"), ("eval", "windows")])
def test_bars_are_for_terminals(big, tmp_path, command, bar):
    args, err = arguments(command, big, tmp_path), tmp_path / "err"
    assert finish(start(command, args, err)) == 0 and err.read_text() == ""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    assert finish(start(command, args, Path(os.ttyname(theirs)))) == 0
    os.set_blocking(ours, False)
    assert bar in os.read(ours, 2**16).decode()


class SlowHub(Hub):
    """A hub that takes half a second for a file and can send the rest of one."""

    def answer(self, status, headers, content=b""):
        first = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if status == 200 and first:
            status, headers = 206, headers | {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content) - first)}).items():
            self.send_header(key, value)
        self.end_headers()
        step = 2**16 if len(content) > 2**16 else 2**20
        for i in range(first, len(content) if self.command == "GET" else 0, step):
            self.wfile.write(content[i : min(i + step, len(content))])
            time.sleep(0.5 * step / max(len(content), step))


@pytest.mark.parametrize("sig, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_download_that_is_stopped_goes_on(tmp_path, monkeypatch, sig, status):
    content = os.urandom(2**20)
    SlowHub.files = {"me/model": {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": content}}
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("no_proxy", "*")
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
    assert statuses[:-1] == [status] * (len(statuses) - 1) and len(statuses) > 2
    assert statuses[-1] == 0 and file.read_bytes() == content
