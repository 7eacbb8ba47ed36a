"""Remembers from which files a folder's model.pth was made, so that it is made again when the files are replaced.

    found = describe_sources(files)             # before the conversion
    remember_sources(folder, found, model)      # after it: in folder/model.sources.json
    have_changed(folder, files)
    is_stale(folder / "model_int8.pth")         # was it made from earlier files?

A file with the same size and time counts as the same file. A different time does not tell: `cp -p` and `rsync -a` give
a new file an old time, and copying a folder gives old files new times. Then samples of the content decide.
"""

import glob
import hashlib
import json
import re
from pathlib import Path

from errors import UsageError
from files import read_json

MEMORY = "model.sources.json"
STALE = "stale models"  # a key of MEMORY, beside the sources: models made from earlier files, with size and time
MODELS = "model*.pth"
GGUF_PART = r"(.*)-(\d{5})-of-(\d{5})"  # the name of one part of a split GGUF, without .gguf
# The files from which model.pth is made; WEIGHTS are needed, the others depend on the format.
SETTINGS = ("config.json", "generation_config.json", "params.json")
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "consolidated.*.pth")
SAMPLES, SAMPLE_BYTES = 64, 4096  # at equal distances: every 63rd of the file has one


def find_files(folder: Path, patterns: tuple[str, ...] | list[str]) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())


def find_weights(folder: Path) -> list[Path]:
    return find_files(folder, WEIGHTS) or find_files(folder, ["*.pt"])


def find_gguf_parts(file: Path) -> list[Path]:
    """Returns all parts of a split GGUF of which file is one part, or file alone if the GGUF is not split."""
    match = re.fullmatch(GGUF_PART, file.stem)
    if match is None:
        return [file]
    return find_files(file.parent, [f"{glob.escape(match[1])}-?????-of-{match[3]}.gguf"])


def describe_sources(files: list[Path]) -> dict[str, dict]:
    """Returns size, time, and a hash of size and samples of each file, by the file's name."""
    try:
        return {file.name: size_and_time(file) | {"samples": hash_samples(file)} for file in files}
    except OSError as e:
        raise UsageError(f"cannot read {e.filename}: {e.strerror}") from None


def size_and_time(file: Path) -> dict[str, int]:
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def hash_samples(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as content:
        for i in range(SAMPLES):
            content.seek(i * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
            digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()


def remember_sources(folder: Path, described: dict[str, dict], model: Path):
    """Writes MEMORY: what describe_sources returned for the files from which model was made. The folder's other models
    become stale if they were made from other files."""
    remembered = read_memory(folder) or {}
    stale = dict(remembered.get(STALE, {}))
    if remembered and any(remembered.get(name, {}).get("samples") != described[name]["samples"] for name in described):
        stale = {file.name: size_and_time(file) for file in find_files(folder, [MODELS])}
    stale.pop(model.name, None)
    try:
        (folder / MEMORY).write_text(json.dumps(described | {STALE: stale}, indent=2))
    except OSError as e:
        raise UsageError(f"cannot write {folder / MEMORY}: {e.strerror}") from None


def have_changed(folder: Path, files: list[Path]) -> bool:
    """Returns whether one of files has changed since folder's last model was made. Returns False if nothing is
    remembered."""
    if not (folder / MEMORY).is_file():
        return False
    remembered = read_memory(folder)
    return remembered is None or not all(is_same(file, remembered) for file in files)


def is_stale(model: Path) -> bool:
    """Returns whether model was made from files that have been replaced since."""
    stale = (read_memory(model.parent) or {}).get(STALE, {})
    return stale.get(model.name) == size_and_time(model)  # quantize.py may have made it again, with the same content


def read_memory(folder: Path) -> dict[str, dict] | None:
    """Reads what remember_sources has written. Returns None if there is nothing, or if someone has edited it."""
    try:
        remembered = read_json(folder / MEMORY)
        described = [*remembered.values(), *remembered.get(STALE, {}).values()]
        return remembered if all(isinstance(description, dict) for description in described) else None
    except (UsageError, AttributeError):
        return None


def is_same(file: Path, described: dict[str, dict]) -> bool:
    """Returns whether file is the one that described has under this name."""
    description = described.get(file.name, {})
    try:
        if size_and_time(file).items() <= description.items():
            return True
        return hash_samples(file) == description.get("samples")
    except OSError as e:
        raise UsageError(f"cannot read {e.filename}: {e.strerror}") from None
