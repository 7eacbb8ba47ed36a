"""Remembers of which files a folder's model.pth was made, so that it is made again when they are replaced.

    found = describe_sources(files)             # before the conversion
    remember_sources(folder, found)             # after it: in folder/model.sources.json
    have_changed(folder, files)

A file with the same size and time is the same. Otherwise its time cannot tell: `cp -p` and `rsync -a` give a new file
an old one, and a folder's copy gets new ones. Then a file is known by samples of its content.
"""

import hashlib
import json
from pathlib import Path

from checkpoint import read_json
from config import UsageError

MEMORY = "model.sources.json"
# The files from which model.pth is made. Without weights nothing can be made.
SETTINGS = ("config.json", "generation_config.json", "params.json")
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "consolidated.*.pth")
SAMPLES, SAMPLE_BYTES = 64, 4096  # at equal distances: one falls into any 63rd of the file


def find_files(folder: Path, patterns: tuple[str, ...] | list[str]) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())


def find_weights(folder: Path) -> list[Path]:
    return find_files(folder, WEIGHTS) or find_files(folder, ["*.pt"])


def describe_sources(files: list[Path]) -> dict[str, dict]:
    """For each file's name its size and time, and a hash of its size and samples. Raises UsageError."""
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


def remember_sources(folder: Path, described: dict[str, dict]):
    try:
        (folder / MEMORY).write_text(json.dumps(described, indent=2))
    except OSError as e:
        raise UsageError(f"cannot write {folder / MEMORY}: {e.strerror}") from None


def have_changed(folder: Path, files: list[Path]) -> bool:
    """Whether one of files is not what folder's model was made of. False also if nothing is remembered."""
    if not (folder / MEMORY).is_file():
        return False
    try:
        remembered = dict(read_json(folder / MEMORY))
        return any(not is_same(file, dict(remembered.get(file.name, {}))) for file in files)
    except (UsageError, TypeError, ValueError):
        return True  # someone has changed the memory
    except OSError as e:
        raise UsageError(f"cannot read {e.filename}: {e.strerror}") from None


def is_same(file: Path, remembered: dict) -> bool:
    if size_and_time(file).items() <= remembered.items():
        return True
    return hash_samples(file) == remembered.get("samples")
