"""model.pth: one file that holds a model and describes it.

    config, quantization, tensors = read_checkpoint(Path("checkpoints/M/model.pth"))

It is what torch.save makes of

    {"format": "gpt-fast/2", "config": {...}, "quantization": None or {...}, "tensors": {name: tensor}}

and torch.load(mmap=True, weights_only=True) opens it, so nothing in it can run code. It is written tensor by tensor
under a temporary name and renamed at the end: whatever interrupts, the file under its real name is whole. Of two
processes that write the same file, the one that started last wins, and the other fails.
"""

import ctypes
import glob
import json
import os
import pickle
import secrets
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data
from tqdm import tqdm

from config import ModelConfig, UsageError
from machine import lacks_memory

FORMAT = "gpt-fast/2"

# The format of earlier versions differs in some names: parts of tensors' names, and the fields of config["moe"].
FORMAT_1 = "gpt-fast/1"
TENSORS_OF_FORMAT_1 = {
    ".wqkv.": ".qkv_proj.", ".wo.": ".o_proj.", ".gate.": ".router.", ".experts.": ".",
    ".w13.": ".gate_up_proj.", ".w2.": ".down_proj.",
}  # fmt: skip
MOE_OF_FORMAT_1 = {"n_active": "top_k", "normalize": "norm_topk_prob"}

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
NamedTensor = tuple[str, Tensor]


# ---- Writing --------------------------------------------------------------------------------------------------------


def save_checkpoint(
    path: Path, config: ModelConfig, shapes: Shapes, tensors: Iterable[NamedTensor], quantization: dict | None = None
):
    """Writes a checkpoint of the tensors that shapes names, each with its (shape, dtype). They come from an iterator,
    in any order, so that only one of them need be in memory at a time. Raises UsageError if they are not exactly those;
    then, as after any other failure, the file that was at path is still there."""
    header = {"format": FORMAT, "config": asdict(config), "quantization": quantization}
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        for left_over in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):  # by a process that was killed
            left_over.unlink(missing_ok=True)
        with open(temporary, "w+b") as file:
            places = lay_out(file, header, shapes)
            write_tensors(file, places, tensors)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise UsageError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        temporary.unlink(missing_ok=True)


def lay_out(file: BinaryIO, header: dict, shapes: Shapes) -> dict[str, Tensor]:
    """Writes a checkpoint with holes where the tensors' bytes go. Returns fake tensors: they have no bytes, but they
    have the shape, the dtype and the offset in the file of the tensors to come."""
    with FakeTensorMode():
        fakes = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    with skip_data(materialize_fake_tensors=True):
        torch.save(header | {"tensors": fakes}, file)
    file.seek(0)
    with FakeTensorMode():  # in which torch.load notes the offsets
        return torch.load(file, weights_only=True)["tensors"]


def write_tensors(file: BinaryIO, places: dict[str, Tensor], tensors: Iterable[NamedTensor]):
    """Fills the holes that lay_out has left."""
    missing = dict(places)
    for name, tensor in tqdm(tensors, "write", len(places), disable=None, leave=False):
        place = missing.pop(name, None)
        if place is None:
            raise UsageError(f"{name} was not expected, or came twice")
        if (tensor.shape, tensor.dtype) != (place.shape, place.dtype):
            expected = f"{list(place.shape)} {place.dtype}"
            raise UsageError(f"{name} is {list(tensor.shape)} {tensor.dtype}, not {expected}")
        tensor = tensor.contiguous()
        file.seek(place.untyped_storage()._checkpoint_offset)
        file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))  # of any dtype, without a copy
    if missing:
        raise UsageError(f"no tensor for {', '.join(list(missing)[:3])}")


# ---- Reading --------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> tuple[ModelConfig, dict | None, dict[str, Tensor]]:
    """(config, quantization, tensors), the tensors memory-mapped on the CPU. Raises UsageError for anything else."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the model.pth in it, which scripts/convert_hf_checkpoint.py makes")
    data = load_pickle(path)
    if not isinstance(data, dict) or data.get("format") not in (FORMAT, FORMAT_1):
        raise UsageError(f"{path} is not a {FORMAT} checkpoint; make one with scripts/convert_hf_checkpoint.py")
    config, tensors = data.get("config"), data.get("tensors")
    if not is_table(tensors):
        raise UsageError(f"{path} holds no table of tensors; convert it again")
    if data["format"] == FORMAT_1:
        config, tensors = from_format_1(config, tensors)
    return ModelConfig.from_dict(config), data.get("quantization"), tensors


def is_table(tensors) -> bool:
    """Whether tensors is a dict of them by name."""
    if not isinstance(tensors, dict):
        return False
    return all(isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items())


def from_format_1(config, tensors: dict[str, Tensor]):
    """Both with today's names. Whether config is one at all, ModelConfig.from_dict finds out."""
    if isinstance(config, dict) and isinstance(config.get("moe"), dict):
        moe = {MOE_OF_FORMAT_1.get(field, field): value for field, value in config["moe"].items()}
        config = config | {"moe": moe}
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in TENSORS_OF_FORMAT_1.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return config, renamed


def load_pickle(path: Path, legacy: bool = False):
    """What torch.save has written to a file, as long as it is weights and nothing that could run code. Its tensors are
    memory-mapped. legacy: files from before PyTorch 1.6, which cannot be mapped, are read too. Raises UsageError."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file")
    mmap = not legacy or zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():  # of odd tensors, which are refused later
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as e:  # torch.load raises a dozen types on broken input
        if lacks_memory(e):
            raise
        raise UsageError(explain_load_error(path, e)) from None


def explain_load_error(path: Path, e: Exception) -> str:
    if isinstance(e, UnicodeEncodeError):
        return f"{path} has a name that this locale cannot write; set PYTHONUTF8=1"
    if isinstance(e, pickle.UnpicklingError) and "Unsupported operand" not in str(e):
        return f"{path} holds more than weights, so it is not opened: pickles can run code"
    converters = {".gguf": "convert_gguf.py", ".safetensors": "convert_hf_checkpoint.py"}
    if path.suffix in converters:
        return f"{path} is not a {FORMAT} checkpoint; scripts/{converters[path.suffix]} makes one of it"
    return f"{path} is truncated or not a PyTorch file ({type(e).__name__})"


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
