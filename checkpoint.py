"""model.pth: one file that describes itself, and the way every script here reports a user's mistake.

    {"format": "gpt-fast/1", "config": {...}, "quantization": None or {...}, "tensors": {name: tensor}}

It loads with torch.load(mmap=True, weights_only=True), so nothing in it can run code. It is written tensor by tensor
to a temporary name and renamed at the end: whatever interrupts, the file under its real name is whole. Of two runs that
write the same file the one that started last wins, and the other fails.
"""

import ctypes
import json
import os
import pickle
import secrets
import sys
from collections.abc import Callable, Iterable
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
    header = {"format": FORMAT, "config": config.to_dict(), "quantization": quantization}
    try:
        for left in path.parent.glob(f"{path.name}.*.tmp"):  # by a run that was killed
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
    data = load_pickle(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UsageError(f"{path} is not a {FORMAT} checkpoint; make one with scripts/convert_hf_checkpoint.py")
    tensors = data.get("tensors")
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise UsageError(f"{path} holds no table of tensors; convert it again")
    return ModelConfig.from_dict(data.get("config")), data.get("quantization"), tensors


def load_pickle(path: Path) -> dict:
    """torch.load of weights and nothing else, memory-mapped where the file allows. Raises UsageError."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file")
    for mmap in (True, False):  # files from before PyTorch 1.6 cannot be mapped
        try:
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        except Exception as e:  # torch.load raises a dozen types on broken input
            if mmap and "mmap can only be used" in str(e):
                continue
            if isinstance(e, pickle.UnpicklingError) and "Unsupported operand" not in str(e):
                raise UsageError(f"{path} holds more than weights, so it is not opened: pickles can run code") from None
            raise UsageError(f"{path} is truncated or not a PyTorch file ({type(e).__name__})") from None


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


def run(main: Callable[[], None]):
    """Calls a script's main. A UsageError becomes one line on stderr and exit status 2, Ctrl-C exits with 130."""
    try:
        main()
    except UsageError as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print has no place to go
        if not isinstance(e, BrokenPipeError):  # as in `| head`: the reader has gone, having seen enough
            print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
            sys.exit(2)
