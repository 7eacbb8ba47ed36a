"""Finds the files from which a model.pth is made, and records their state. If one of these files is replaced,
checkpoint_path.py converts again.

    found = describe_sources(files)             # before the conversion
    record_sources(folder, found, model)        # after the conversion: writes folder/model.sources.json
    have_changed(folder, files)                 # whether files were replaced since
    is_stale(folder / "model_int8.pth")         # whether this model was made from earlier files

A file with the recorded size and time counts as unchanged. Otherwise a hash of samples of its content decides, because
times mislead. Copying a folder gives unchanged files new times, and `cp -p` and `rsync -a` give a new file an old time.
"""

import glob
import hashlib
import json
import re
from pathlib import Path

from utils.errors import UsageError
from utils.files import read_json, replace_file

SOURCES_FILE = "model.sources.json"
STALE = "stale models"  # a key in SOURCES_FILE, next to the sources: size and time of models from earlier files
MODELS = "model*.pth"
GGUF_PART = r"(.*)-(\d{5})-of-(\d{5})"  # the name of one part of a split GGUF, without .gguf
# The files from which model.pth is made. Every format has some of WEIGHTS. The others depend on the format.
ADAPTER_CONFIG = "adapter_config.json"
HF_SETTINGS = (
    "config.json", "generation_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json",
)
SETTINGS = (*HF_SETTINGS, "params.json", ADAPTER_CONFIG)
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "consolidated.*.pth")
SAMPLES, SAMPLE_BYTES = 64, 4096  # samples of a file, at equal distances


def find_files(folder: Path, patterns: tuple[str, ...] | list[str]) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())


def find_weights(folder: Path) -> list[Path]:
    return find_files(folder, WEIGHTS) or find_files(folder, ["*.pt"])


def hint_at_subfolder(folder: Path) -> str:
    """If a subfolder may hold the model that folder lacks, returns the end of an error message. In a repository of the
    hub, Meta's files are in the folder "original". The cache of the hub has a folder for each version."""
    names = ("config.json", "params.json")
    settings = find_files(folder, [f"{depth}/{name}" for depth in ("*", "*/*") for name in names])
    return f"; {settings[0].parent} may hold one" if settings else ""


def find_gguf_parts(file: Path) -> list[Path]:
    """Returns all parts if file is a part of a split GGUF, or else just file."""
    match = re.fullmatch(GGUF_PART, file.stem)
    if match is None:
        return [file]
    return find_files(file.parent, [f"{glob.escape(match[1])}-?????-of-{match[3]}.gguf"])


def describe_sources(files: list[Path]) -> dict[str, dict]:
    """Returns size, time, and a hash of size and samples of each file, by its name."""
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


def record_sources(folder: Path, described: dict[str, dict], model: Path):
    """Writes SOURCES_FILE. described: from describe_sources, for the files from which model was made. If SOURCES_FILE
    had other sources, or is broken, all other models in the folder become stale."""
    recorded = read_record(folder) or {}
    stale = dict(recorded.get(STALE, {}))
    has_record = (folder / SOURCES_FILE).exists()
    if has_record and any(recorded.get(name, {}).get("samples") != described[name]["samples"] for name in described):
        stale = {file.name: size_and_time(file) for file in find_files(folder, [MODELS])}
    stale.pop(model.name, None)
    try:
        replace_file(folder / SOURCES_FILE, json.dumps(described | {STALE: stale}, indent=2).encode())
    except OSError as e:
        raise UsageError(f"cannot write {folder / SOURCES_FILE}: {e.strerror}") from None


def have_changed(folder: Path, files: list[Path]) -> bool:
    """Whether one of files has changed since the last model in folder was made. Without SOURCES_FILE, none has."""
    if not (folder / SOURCES_FILE).is_file():
        return False
    recorded = read_record(folder)
    return recorded is None or not all(is_same(file, recorded) for file in files)


def is_stale(model: Path) -> bool:
    stale = (read_record(model.parent) or {}).get(STALE, {})
    return stale.get(model.name) == size_and_time(model)  # if quantize.py has made the model again, the time differs


def read_record(folder: Path) -> dict[str, dict] | None:
    """Returns what record_sources has written, or None if SOURCES_FILE is missing or broken."""
    try:
        recorded = read_json(folder / SOURCES_FILE)
        described = [*recorded.values(), *recorded.get(STALE, {}).values()]
        return recorded if all(isinstance(description, dict) for description in described) else None
    except (UsageError, AttributeError):
        return None


def is_same(file: Path, described: dict[str, dict]) -> bool:
    """Whether described contains file, by its name, with the same content."""
    description = described.get(file.name, {})
    try:
        if size_and_time(file).items() <= description.items():
            return True
        return hash_samples(file) == description.get("samples")
    except OSError as e:
        raise UsageError(f"cannot read {e.filename}: {e.strerror}") from None
