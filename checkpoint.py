"""model.pth: one file that describes itself, and the way every script here reports a user's mistake.

    {"format": "gpt-fast/1", "config": {...}, "quantization": None or {...}, "tensors": {name: tensor}}

It loads with torch.load(mmap=True, weights_only=True), so nothing in it can run code. It is written tensor by tensor
to a temporary name and renamed at the end: whatever interrupts, the file under its real name is whole. Of two runs that
write the same file the one that started last wins, and the other fails.
"""

import contextlib
import ctypes
import glob
import json
import math
import os
import pickle
import re
import resource
import secrets
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data
from tqdm import tqdm

from model import ModelConfig, UsageError

FORMAT = "gpt-fast/1"


def save_checkpoint(
    path: Path,
    config: ModelConfig,
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    quantization: dict | None = None,
):
    """Writes a checkpoint whose tensors, named in shapes as (shape, dtype), come one at a time and in any order from
    tensors; one tensor is in memory at a time. Raises UsageError if they are not exactly those, leaving path alone."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    header = {"format": FORMAT, "config": asdict(config), "quantization": quantization}
    try:
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):  # by a run that was killed
            left.unlink(missing_ok=True)
        with open(temporary, "w+b") as f:
            with FakeTensorMode():
                table = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
            with skip_data(materialize_fake_tensors=True):
                torch.save(header | {"tensors": table}, f)  # lays the file out, without the tensors' bytes ...
            f.seek(0)
            with FakeTensorMode():
                table = torch.load(f, weights_only=True)["tensors"]  # ... and this tells where they go
            for name, tensor in tqdm(tensors, "write", len(shapes), disable=None, leave=False):
                place = table.pop(name, None)
                if place is None:
                    raise UsageError(f"{name} was not expected, or came twice")
                if (tensor.shape, tensor.dtype) != (place.shape, place.dtype):
                    wrong = f"{name} is {list(tensor.shape)} {tensor.dtype}, not {list(place.shape)} {place.dtype}"
                    raise UsageError(wrong)
                tensor = tensor.contiguous()
                f.seek(place.untyped_storage()._checkpoint_offset)
                f.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
            if table:
                raise UsageError(f"no tensor for {', '.join(list(table)[:3])}")
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise UsageError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> tuple[ModelConfig, dict | None, dict[str, torch.Tensor]]:
    """(config, quantization, tensors), the tensors memory-mapped on the CPU. Raises UsageError for anything else."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the model.pth in it, which scripts/convert_hf_checkpoint.py makes")
    data = load_pickle(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UsageError(f"{path} is not a {FORMAT} checkpoint; make one with scripts/convert_hf_checkpoint.py")
    tensors = data.get("tensors")
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise UsageError(f"{path} holds no table of tensors; convert it again")
    return ModelConfig.from_dict(data.get("config")), data.get("quantization"), tensors


def load_pickle(path: Path, legacy: bool = False) -> dict:
    """torch.load of weights and nothing else, memory-mapped; legacy: except for files from before PyTorch 1.6, which
    cannot be. Raises UsageError."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file")
    for mmap in (True, False):
        try:
            with warnings.catch_warnings():  # of odd tensors, which are refused
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        except Exception as e:  # torch.load raises a dozen types on broken input
            if legacy and mmap and "mmap can only be used" in str(e):
                continue
            if lacks_memory(e):
                raise
            if isinstance(e, UnicodeEncodeError):
                raise UsageError(f"{path} has a name that this locale cannot write; set PYTHONUTF8=1") from None
            if isinstance(e, pickle.UnpicklingError) and "Unsupported operand" not in str(e):
                raise UsageError(f"{path} holds more than weights, so it is not opened: pickles can run code") from None
            scripts = {".gguf": "convert_gguf.py", ".safetensors": "convert_hf_checkpoint.py"}
            if script := scripts.get(path.suffix):
                raise UsageError(f"{path} is not a {FORMAT} checkpoint; scripts/{script} makes one of it") from None
            raise UsageError(f"{path} is truncated or not a PyTorch file ({type(e).__name__})") from None


def read_text(path: Path) -> str:
    """The UTF-8 text in path. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8-sig")  # which drops the mark that Windows puts before a text
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"cannot read {path} as UTF-8 text: {e}") from None


def read_json(path: Path, default=None):
    """The JSON in path; default, if given, where there is no such file. Raises UsageError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is None:
            raise UsageError(f"{path} does not exist") from None
        return default
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(f"{path} is not readable JSON: {str(e).splitlines()[0]}") from None


def free_memory() -> float:
    """Bytes that this process can still take: of the machine, of its control group and under `ulimit -v`; infinite
    where the system does not tell (it is Linux that kills a process without a word)."""
    read = lambda path: Path(path).read_text().split()  # noqa: E731
    limits = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        meminfo = read("/proc/meminfo")
        limits.append(sum(int(meminfo[meminfo.index(f"{x}:") + 1]) for x in ("MemAvailable", "SwapFree")) * 1024)
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(read("/sys/fs/cgroup/memory.max")[0]) - int(read("/sys/fs/cgroup/memory.current")[0]))
    if (soft := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits.append(soft - int(read("/proc/self/statm")[0]) * resource.getpagesize())
    return min(limits)


def need_memory(n_bytes: int, what: str, less: str):
    """Raises UsageError where the machine's memory cannot hold n_bytes more; less says what takes less."""
    if n_bytes > (free := free_memory()):
        raise UsageError(f"{what} takes {n_bytes / 1e9:.2f} GB of memory, of which {free / 1e9:.2f} are free; {less}")


def lacks_memory(e: Exception) -> bool:
    return isinstance(e, MemoryError) or (  # PyTorch's allocators raise RuntimeError
        isinstance(e, RuntimeError) and bool(re.search("out of memory|allocate memory|bad_alloc", str(e)))
    )


def run(main: Callable[[], None], less: str = "end other programs, or take a smaller model"):
    """Calls a script's main. A UsageError becomes one line on stderr and exit status 2, and so does a lack of memory,
    with what helps against it (less); Ctrl-C exits with 130."""
    name, why = Path(sys.argv[0]).name, None
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # closed: >&-
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character still gets the rest
    before = signal.getsignal(signal.SIGINT)  # the script's own: for loading torch, and for the end
    try:
        try:
            if callable(before):
                signal.signal(signal.SIGINT, signal.default_int_handler)
            main()
        finally:  # inside, for it may be interrupted too
            if callable(before):
                signal.signal(signal.SIGINT, before)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except UsageError as e:
        why = str(e)
    except (MemoryError, RuntimeError) as e:
        if isinstance(e.__context__, KeyboardInterrupt):  # in torch.save, which closes its file and finds it short
            print(file=sys.stderr)
            sys.exit(130)
        if not lacks_memory(e):
            raise
        told = re.search(r"(?i)(tried|unable) to (allocate|mmap) [\d.]+ \w+(.*? is free)?", str(e))
        told = told[0] if told else "there is no more"
        free = "" if "is free" in told else f", {free_memory() / 1e9:.2f} GB free"
        why = f"out of memory ({told}{free}): {less}"
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print has no place to go
        if isinstance(e, BrokenPipeError):  # as in `| head`: the reader has gone, having seen enough
            return
        why = str(e)
    if why is not None:
        print(f"{name}: {' '.join(why.split())}", file=sys.stderr)
        sys.exit(2)
