"""Remembers of which files a folder's model.pth was made, so that it is made again when they are replaced.

    found = describe_sources(files)             # before the conversion
    remember_sources(folder, found, model)      # after it: in folder/model.sources.json
    have_changed(folder, files)
    is_stale(folder / "model_int8.pth")         # was it made of earlier files?

A file with the same size and time is the same. Otherwise its time cannot tell: `cp -p` and `rsync -a` give a new file
an old one, and a folder's copy gets new ones. Then a file is known by samples of its content.
"""

import glob
import hashlib
import json
import re
from pathlib import Path

from errors import UsageError
from files import read_json

MEMORY = "model.sources.json"
STALE = "stale models"  # in MEMORY, beside the sources: name, size and time of models made of earlier ones
MODELS = "model*.pth"
GGUF_PART = r"(.*)-(\d{5})-of-(\d{5})"  # how the files of a split GGUF are called, without .gguf
# The files from which model.pth is made. Without weights nothing can be made.
SETTINGS = ("config.json", "generation_config.json", "params.json")
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "consolidated.*.pth")
SAMPLES, SAMPLE_BYTES = 64, 4096  # at equal distances: one falls into any 63rd of the file


def find_files(folder: Path, patterns: tuple[str, ...] | list[str]) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())


def find_weights(folder: Path) -> list[Path]:
    return find_files(folder, WEIGHTS) or find_files(folder, ["*.pt"])


def find_gguf_parts(file: Path) -> list[Path]:
    """All parts of a GGUF that is split, and of which file is one part. Otherwise file alone."""
    match = re.fullmatch(GGUF_PART, file.stem)
    if match is None:
        return [file]
    return find_files(file.parent, [f"{glob.escape(match[1])}-?????-of-{match[3]}.gguf"])


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


def remember_sources(folder: Path, described: dict[str, dict], model: Path):
    """Remembers what describe_sources said of the files from which model was made. The folder's other models become
    stale if they were made of other files."""
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
    """Whether one of files is not what folder's last model was made of. False also if nothing is remembered."""
    if not (folder / MEMORY).is_file():
        return False
    remembered = read_memory(folder)
    return remembered is None or not all(is_same(file, remembered) for file in files)


def is_stale(model: Path) -> bool:
    """Whether model was made of files that have been replaced since."""
    stale = (read_memory(model.parent) or {}).get(STALE, {})
    return stale.get(model.name) == size_and_time(model)  # quantize.py may have made it again, with the same content


def read_memory(folder: Path) -> dict[str, dict] | None:
    """What remember_sources has written; None if there is nothing, or if someone has changed it."""
    try:
        remembered = read_json(folder / MEMORY)
        described = [*remembered.values(), *remembered.get(STALE, {}).values()]
        return remembered if all(isinstance(description, dict) for description in described) else None
    except (UsageError, AttributeError):
        return None


def is_same(file: Path, described: dict[str, dict]) -> bool:
    """Whether file is what described says about the file of its name."""
    description = described.get(file.name, {})
    try:
        if size_and_time(file).items() <= description.items():
            return True
        return hash_samples(file) == description.get("samples")
    except OSError as e:
        raise UsageError(f"cannot read {e.filename}: {e.strerror}") from None
