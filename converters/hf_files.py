"""Opens Hugging Face's weights, safetensors or pytorch_model.bin, in one file or many. folder.py calls read_folder.

    tensors = read_folder(Path("checkpoints/meta-llama/Llama-3.2-1B"))    # memory-mapped: nothing is read yet
"""

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from converters.model_tensors import SourceTensors
from utils.errors import UsageError
from utils.files import is_state_dict, load_torch_file, read_json, refuse_lfs_pointer

AUTO_GPTQ_FILE = "gptq_model-*.safetensors"  # early versions put bits and group size into the name


def read_folder(folder: Path) -> SourceTensors:
    """Returns all tensors of a folder, memory-mapped."""
    for load, whole in ((load_safetensors, "model.safetensors"), (load_bin, "pytorch_model.bin")):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return load(folder / whole)
        if index.is_file():
            return read_shards(read_index(index), index, load)
    older = list(folder.glob(AUTO_GPTQ_FILE))
    if len(older) == 1:
        return load_safetensors(older[0])
    raise UsageError(f"{folder} holds neither model.safetensors nor pytorch_model.bin (nor their index.json)")


def read_shards(file_of: dict[str, str], index: Path, load: Callable[[Path], SourceTensors]) -> SourceTensors:
    """Returns the tensors of all files of an index. If two files have a tensor, file_of decides."""
    tensors = {}
    for file in sorted(set(file_of.values())):
        for name, tensor in load(index.parent / file).items():
            if name in tensors and name not in file_of:
                raise UsageError(f"{file} and another file both have the tensor {name}, which {index} does not name")
            if name not in tensors or file_of[name] == file:
                tensors[name] = tensor
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """Returns the index's weight_map: the file of each tensor."""
    content = read_json(index)
    file_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise UsageError(f"{index} has no weight_map of file names")
    for file in file_of.values():
        if Path(file).name != file:
            raise UsageError(f"{index} names {file!r}, which is not a file of the folder itself")
    return file_of


def load_safetensors(file: Path) -> SourceTensors:
    if not file.is_file():
        raise UsageError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}")
    refuse_lfs_pointer(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{file} is truncated or not safetensors: {e}") from None
    except ValueError as e:
        if "UntypedStorage" in str(e):  # PyTorch makes this of about every second Ctrl-C or SIGTERM in load_file
            raise KeyboardInterrupt from None
        raise


def load_bin(file: Path) -> SourceTensors:
    tensors = load_torch_file(file, legacy=True)
    if not is_state_dict(tensors):
        raise UsageError(f"{file} is not a table of tensors")
    return tensors
