"""What --checkpoint_path may be besides a model.pth: a folder that holds a model, or a GGUF file.

    path = model_file(Path("checkpoints/meta-llama/Llama-3.2-1B"))    # its model.pth, which is made if it is not there

Conversion is imported only where something has to be converted.
"""

import re
import sys
from functools import partial
from pathlib import Path

from cli.ranks import call_on_rank_0
from config import UsageError

# Files from which model.pth is made; without weights there is nothing to make it from.
SETTINGS = ("config.json", "params.json")
WEIGHTS = ("*.safetensors", "*.bin", "consolidated.*.pth", "*.pt")
PART, LATER_PART = r"-\d{5}-of-\d{5}$", r"-(?!00001)\d{5}-of-\d{5}$"  # the end of the name of a split GGUF's file


def model_file(path: Path | str) -> Path:
    """Of a folder or a .gguf its model.pth, which is converted now if it is missing or older than what it is made from.
    Any other path stays as it is. Raises UsageError.

    With several ranks, one converts while the others wait."""
    path = Path(path)
    if path.is_dir():
        return Path(call_on_rank_0(partial(model_of_folder, path)))
    if path.suffix == ".gguf":
        return Path(call_on_rank_0(partial(model_of_gguf, path)))
    return path


def model_of_folder(folder: Path) -> str:
    model, weights = folder / "model.pth", find_files(folder, WEIGHTS)
    if is_newest(model, [*weights, *find_files(folder, SETTINGS)]) or (model.is_file() and not weights):
        return str(model)
    if not weights:
        models = find_files(folder, ["model*.pth"])
        ggufs = [file for file in find_files(folder, ["*.gguf"]) if not re.search(LATER_PART, file.stem)]
        if len(models) == 1:
            return str(models[0])
        if len(models or ggufs) > 1:
            names = ", ".join(file.name for file in models or ggufs)
            raise UsageError(f"{folder} holds {names}: choose one of them")
        if ggufs:
            return model_of_gguf(ggufs[0])
    from converters.folder import convert_folder  # here, since it is seldom needed

    if find_files(folder, (*SETTINGS, "*.pt")):  # else convert_folder says what the folder lacks
        say_that_it_converts(folder, model)
    return str(convert_folder(folder))


def model_of_gguf(file: Path) -> str:
    """In a folder beside the file, since a tokenizer comes with it."""
    if not file.is_file():
        raise UsageError(f"{file} does not exist")
    name = re.sub(PART, "", file.stem)
    model = file.with_name(f"{name}-gguf") / "model.pth"
    if is_newest(model, [file]):
        return str(model)
    try:
        from converters.gguf_tensors import convert_gguf  # here, since it needs packages that others do without
    except ImportError as e:
        raise UsageError(f"reading {file} needs `pip install gguf protobuf` ({e})") from None

    say_that_it_converts(file, model)
    convert_gguf(file, model.parent)
    return str(model)


def find_files(folder: Path, patterns: tuple[str, ...] | list[str]) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())


def is_newest(model: Path, sources: list[Path]) -> bool:
    """Whether model is there and was written after all of sources."""
    return bool(sources) and model.is_file() and model.stat().st_mtime >= max(file.stat().st_mtime for file in sources)


def say_that_it_converts(source: Path, model: Path):
    print(f"Converting {source} to {model}, once.", file=sys.stderr, flush=True)
