"""Reads text, JSON, safetensors and files of torch.save; a broken file raises UsageError. Also replaces small files
atomically."""

import contextlib
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from utils.errors import UsageError
from utils.machine import is_out_of_memory

ROOT = Path(__file__).resolve().parent.parent  # the project's folder
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig drops the byte order mark that Windows writes
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"cannot read {path} as UTF-8 text: {e}") from None


def read_json(path: Path, default=None):
    """Reads a JSON file. If it does not exist, returns default, or raises UsageError if default is None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is None:
            raise UsageError(f"{path} does not exist") from None
        return default
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(f"{path} is not readable JSON: {str(e).splitlines()[0]}") from None


def replace_file(path: Path, content: bytes):
    """Writes content to a temporary file and renames it to path, so that no other process sees a half-written file.
    Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        delete_if_possible(temporary)  # after an error, such as a full disk


def delete_if_possible(path: Path):
    """Deletes path if possible. Ignores an OSError, as in a read-only folder: callers clean up after another error, and
    must not hide that error."""
    with contextlib.suppress(OSError):
        path.unlink()


def load_torch_file(path: Path, legacy: bool = False):
    """Reads a file of torch.save, with memory-mapped tensors. Refuses a pickle that holds more than weights, because it
    could run code.

    legacy: also read files of PyTorch before 1.6, whose tensors cannot be mapped."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file")
    refuse_lfs_pointer(path)
    mmap = not legacy or zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():  # torch.load warns about unusual kinds of tensors; callers refuse them
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as e:  # torch.load raises a dozen types on broken input
        if is_out_of_memory(e):
            raise
        raise UsageError(explain_load_error(path, e)) from None


def load_torch_state_dict(file: Path) -> dict[str, Tensor]:
    tensors = load_torch_file(file, legacy=True)
    if not is_state_dict(tensors):
        raise UsageError(f"{file} is not a table of tensors")
    return tensors


def load_safetensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UsageError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}")
    refuse_lfs_pointer(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{file} is truncated or not safetensors: {e}") from None
    except ValueError as e:
        if "UntypedStorage" in str(e):  # what PyTorch makes of about every second Ctrl-C or SIGTERM in load_file
            raise KeyboardInterrupt from None
        raise


def refuse_lfs_pointer(path: Path):
    """Raises UsageError if path is the stub that `git clone` without Git LFS leaves instead of a large file."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror}") from None
    if is_pointer:
        raise UsageError(f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder")


def explain_load_error(path: Path, e: Exception) -> str:
    if isinstance(e, UnicodeEncodeError):
        return f"{path} has a name that this locale cannot write; set PYTHONUTF8=1"
    if isinstance(e, pickle.UnpicklingError) and "Unsupported operand" not in str(e):
        return f"{path} holds more than weights, so it is not opened: pickles can run code"
    converters = {".gguf": "convert_gguf.py", ".safetensors": "convert_hf_checkpoint.py"}
    if path.suffix in converters:
        return f"{path} is not a model.pth; scripts/{converters[path.suffix]} makes one of it"
    return f"{path} is truncated or not a PyTorch file ({type(e).__name__})"


def is_state_dict(tensors) -> bool:
    if not isinstance(tensors, dict):
        return False
    return all(isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items())
