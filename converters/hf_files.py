"""Opens Hugging Face's weights, safetensors or pytorch_model.bin, in one file or many. folder.py calls read_folder.

    tensors = read_folder(Path("checkpoints/meta-llama/Llama-3.2-1B"))    # memory-mapped: nothing is read yet
"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from converters.model_tensors import SourceTensors
from utils.errors import UsageError
from utils.files import is_state_dict, load_torch_file, read_json


def read_folder(folder: Path) -> SourceTensors:
    """Returns all tensors of a folder, memory-mapped."""
    load, files = load_safetensors, list_files(folder, "model.safetensors")
    if files is None:
        load, files = load_bin, list_files(folder, "pytorch_model.bin")
    if files is None:
        raise UsageError(f"{folder} holds neither model.safetensors nor pytorch_model.bin (nor their index.json)")
    tensors = {}
    for file in files:
        tensors.update(load(folder / file))
    return tensors


def list_files(folder: Path, whole: str) -> list[str] | None:
    """Returns the names of a checkpoint's files: whole, the name of a checkpoint in one file, or else the files that
    the index names. Returns None if the folder has neither."""
    if (folder / whole).is_file():
        return [whole]
    index = folder / f"{whole}.index.json"
    if not index.is_file():
        return None
    content = read_json(index)
    file_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise UsageError(f"{index} has no weight_map of file names")
    files = sorted(set(file_of.values()))
    for file in files:
        if Path(file).name != file:
            raise UsageError(f"{index} names {file!r}, which is not a file of the folder itself")
    return files


def load_safetensors(file: Path) -> SourceTensors:
    if not file.is_file():
        raise UsageError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{file} is truncated or not safetensors: {e}") from None
    except ValueError as e:
        if "UntypedStorage" in str(e):  # PyTorch makes this of about every second Ctrl-C in load_file
            raise KeyboardInterrupt from None
        raise


def load_bin(file: Path) -> SourceTensors:
    tensors = load_torch_file(file, legacy=True)
    if not is_state_dict(tensors):
        raise UsageError(f"{file} is not a table of tensors")
    return tensors
