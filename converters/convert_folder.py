"""Converts a folder with a checkpoint of any supported format to model.pth.

    path = convert_folder(Path("checkpoints/meta-llama/Llama-3.2-1B"))

A file in the folder tells the format:

    config.json     Hugging Face's format
    params.json     Meta's format
    a single .pt    a model of karpathy/tinyllamas
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from config import ModelConfig
from converters.canonical_checkpoint import CanonicalCheckpoint, SourceTensors
from converters.hf_config import config_from_hf, find_family
from converters.hf_quantized import collect_quantized, read_quantization
from converters.hf_tensors import to_canonical_layout, with_norm_biases
from converters.lora import Adapter, read_adapter
from converters.meta import PARAMS, read_meta, read_tinyllamas
from converters.source_files import ADAPTER_CONFIG, SETTINGS, describe_sources, find_files, find_weights, record_sources
from converters.write_model import Announcement, write_model
from text.tokenizer_files import TOKENIZER_FILES, TOKENIZERS
from utils.errors import UsageError
from utils.files import load_safetensors, load_torch_state_dict, read_json

AUTO_GPTQ_FILE = "gptq_model-*.safetensors"  # early versions put bits and group size into the name


def convert_folder(folder: Path, lora: Path | None = None, announce: Announcement | None = None) -> Path:
    """Writes model.pth into folder and returns its path. If weights are quantized, the name tells their format.

    lora: the folder of an adapter. Then the merged model.pth goes there. announce: see write_model."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    target = folder if lora is None else lora
    sources = describe_sources([*find_weights(target), *find_files(target, SETTINGS)])
    checkpoint = read_folder(folder) if lora is None else merge_folders(folder, lora)
    path = write_model(target / "model.pth", checkpoint, announce)
    if checkpoint.note:
        print(checkpoint.note, file=sys.stderr)
    record_sources(target, sources, path)
    return path


def read_folder(folder: Path) -> CanonicalCheckpoint:
    if (folder / "config.json").is_file():
        return read_hf(folder)
    if (folder / PARAMS).is_file():
        return read_meta(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(f"{folder} holds an adapter, not a model: {how_to_merge(folder)}")
    return read_tinyllamas(folder)


def how_to_merge(lora: Path) -> str:
    config = read_json(lora / ADAPTER_CONFIG)
    base = isinstance(config, dict) and config.get("base_model_name_or_path") or "its base model"
    return f"merge it with `scripts/convert_hf_checkpoint.py --checkpoint_dir (the folder of {base}) --lora {lora}`"


def read_hf(folder: Path, adapter: Adapter | None = None) -> CanonicalCheckpoint:
    hf_config = read_json(folder / "config.json")
    if adapter is not None:
        check_not_quantized(folder, hf_config)
    config, note = read_config(folder, hf_config)
    tensors, family = read_tensors(folder, hf_config, config), find_family(hf_config)
    read = to_canonical_layout(tensors, config, family, adapter)
    return CanonicalCheckpoint(with_norm_biases(config) if family.norm_bias else config, tensors, read, note=note)


def read_config(folder: Path, hf_config: dict) -> tuple[ModelConfig, str]:
    """Returns the config without bos and end tokens that the vocabulary lacks, and a note about these tokens.
    hf_config: the contents of config.json."""
    config = config_from_hf(hf_config, read_json(folder / "generation_config.json", {}))
    known = range(config.vocab_size)
    note, unknown = "", [i for i in (config.bos_id, *config.eos_ids) if i is not None and i not in known]
    if unknown:
        numbers = ", ".join(map(str, unknown))
        what = f"{folder}: bos_token_id or eos_token_id {numbers} is ignored"
        note = f"{what}: the vocabulary has {config.vocab_size} tokens"
    bos_id = config.bos_id if config.bos_id in known else None
    return replace(config, bos_id=bos_id, eos_ids=tuple(i for i in config.eos_ids if i in known)), note


def read_tensors(folder: Path, hf_config: dict, config: ModelConfig) -> SourceTensors:
    """Returns all tensors of the folder, memory-mapped, with a QuantizedWeight for each quantized one."""
    tensors = read_state_dict(folder)
    quantization = read_quantization(folder, hf_config, tensors)
    if quantization is not None:
        collect_quantized(tensors, quantization, config)
    return tensors


def merge_folders(folder: Path, lora: Path) -> CanonicalCheckpoint:
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json: --lora needs a model in Hugging Face's format")
    if lora.resolve() == folder.resolve():
        raise UsageError("put the adapter into a folder of its own: model.pth goes there, and the base has one, too")
    checkpoint = read_hf(folder, read_adapter(lora))
    if not any((lora / name).is_file() for name in TOKENIZERS):
        missing = [name for name in TOKENIZER_FILES if (folder / name).is_file() and not (lora / name).exists()]
        checkpoint.tokenizer_files = {name: (folder / name).read_bytes() for name in missing}
    return checkpoint


def check_not_quantized(folder: Path, hf_config: dict):
    """Raises UsageError if the base model is quantized. gpt-oss (mxfp4) is an exception: its adapters change attention,
    and attention is not quantized."""
    quantization = hf_config.get("quantization_config") if isinstance(hf_config, dict) else None
    if quantization and not (isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"):
        what = f"{folder} is quantized (config.json: quantization_config), and an adapter cannot be merged into that"
        raise UsageError(f"{what}: give the model that it was made from")


# ---- Weights of Hugging Face: safetensors or pytorch_model.bin, in one file or many ---------------------------------


def read_state_dict(folder: Path) -> SourceTensors:
    for load, whole in ((load_safetensors, "model.safetensors"), (load_torch_state_dict, "pytorch_model.bin")):
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
    """Returns the tensors of all files in an index. If two files hold the same tensor, file_of decides."""
    tensors = {}
    for file in sorted(set(file_of.values())):
        for name, tensor in load(index.parent / file).items():
            if name in tensors and name not in file_of:
                raise UsageError(f"{file} and another file both have the tensor {name}, which {index} does not name")
            if name not in tensors or file_of[name] == file:
                tensors[name] = tensor
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """Returns the weight_map of an index: the file of each tensor."""
    content = read_json(index)
    file_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise UsageError(f"{index} has no weight_map of file names")
    for file in file_of.values():
        if Path(file).name != file:
            raise UsageError(f"{index} names {file!r}, which is not a file of the folder itself")
    return file_of
