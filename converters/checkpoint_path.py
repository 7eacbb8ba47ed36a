"""Finds the model.pth for --checkpoint_path: a model.pth, a folder that holds a model, or a GGUF file.

    path = ensure_converted(Path("checkpoints/meta-llama/Llama-3.2-1B"))    # model.pth in the folder, made if missing

The converters are imported only when something has to be converted.
"""

import re
import sys
from functools import partial
from pathlib import Path

from converters.source_files import (
    GGUF_PART,
    MODELS,
    SETTINGS,
    find_files,
    find_gguf_parts,
    find_weights,
    have_changed,
    hint_at_subfolder,
    is_stale,
)
from layers.collectives import call_on_rank_0
from utils.errors import UsageError


def ensure_converted(path: Path | str) -> Path:
    """Returns the model.pth for a folder or a .gguf, and any other path unchanged. Converts if model.pth is missing,
    older than its sources, or made from other files. Rank 0 converts while the other ranks wait."""
    path = Path(path)
    if path.is_dir():
        return Path(call_on_rank_0(partial(model_of_folder, path)))
    if path.suffix == ".gguf":
        return Path(call_on_rank_0(partial(model_of_gguf, path)))
    return path


def model_of_folder(folder: Path) -> str:
    weights = find_weights(folder)
    model = find_model(folder, [*weights, *find_files(folder, SETTINGS)] if weights else [])
    if model is not None:
        return str(model)
    ggufs = [file for file in find_files(folder, ["*.gguf"]) if file == find_gguf_parts(file)[0]]
    if ggufs and not weights:
        return model_of_gguf(require_single(ggufs))
    if not weights and not any((folder / name).is_file() for name in SETTINGS):
        what = "config.json and weights of Hugging Face, params.json and weights of Meta, .gguf, or model.pth"
        raise UsageError(f"{folder} holds no model: it needs {what}{hint_at_subfolder(folder)}")
    from converters.convert_folder import convert_folder  # here, because few calls convert

    return str(convert_folder(folder, announce=partial(announce_conversion, folder, folder)))


def model_of_gguf(file: Path) -> str:
    """Returns the model.pth of a GGUF. It is in a folder next to the GGUF, with the tokenizer."""
    if not file.is_file():
        raise UsageError(f"{file} does not exist")
    match = re.fullmatch(GGUF_PART, file.stem)
    folder = file.with_name(f"{match[1] if match else file.stem}-gguf")
    model = find_model(folder, find_gguf_parts(file))
    if model is not None:
        return str(model)
    try:
        from converters.convert_gguf import convert_gguf  # here: only GGUF needs the packages gguf and protobuf
    except ImportError as e:
        raise UsageError(f"reading {file} needs `pip install gguf protobuf` ({e})") from None

    return str(convert_gguf(file, folder, announce=partial(announce_conversion, file, folder)))


def find_model(folder: Path, sources: list[Path]) -> Path | None:
    """Returns the model.pth in folder. Without a model.pth, returns the only model_FORMAT.pth (quantized weights), or
    None. A model does not count if it is older than any of sources, or was made from other files."""
    if have_changed(folder, sources):
        return None
    newest = max((file.stat().st_mtime for file in sources), default=0)
    models = [model for model in find_files(folder, [MODELS]) if model.stat().st_mtime >= newest]
    if sources:
        models = [model for model in models if not is_stale(model)]
    if folder / "model.pth" in models:
        return folder / "model.pth"
    return require_single(models) if models else None


def require_single(files: list[Path]) -> Path:
    if len(files) > 1:
        raise UsageError(f"{files[0].parent} holds {', '.join(file.name for file in files)}: choose one of them")
    return files[0]


def announce_conversion(source: Path, folder: Path):
    print(f"Converting {source}, once: the result stays in {folder}.", file=sys.stderr, flush=True)
