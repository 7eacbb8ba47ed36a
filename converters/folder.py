"""A folder with a checkpoint to model.pth, whatever its format is. This file has no command line.

    path = convert_folder(Path("checkpoints/meta-llama/Llama-3.2-1B"))

config.json tells Hugging Face's format, params.json Meta's; a single .pt is one of tinyllamas.
"""

import sys
from pathlib import Path

from checkpoint import read_json
from config import ModelConfig, UsageError
from converters.families import config_from_hf, find_family
from converters.hf_files import read_folder
from converters.hf_quantized import collect_quantized, read_quantization
from converters.hf_tensors import to_llama_layout
from converters.lora import ADAPTER_CONFIG, read_adapter
from converters.meta import PARAMS, read_meta, read_tinyllamas
from converters.model_tensors import HFTensors, convert, write_folder
from tokenizer import TOKENIZER_FILES, TOKENIZERS


def convert_folder(folder: Path, lora: Path | None = None) -> Path:
    """Writes model.pth of a checkpoint's folder into it or, with an adapter in the folder lora, of both into that.
    Returns the path of what it has written: quantized weights are in a file of another name."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    if lora is not None:
        return merge_folders(folder, lora)
    if (folder / "config.json").is_file():
        config, hf_config = read_configs(folder)
        tensors = read_tensors(folder, hf_config, config)
        read = to_llama_layout(tensors, config, find_family(hf_config))
    elif (folder / PARAMS).is_file():
        config, tensors, read, files, note = read_meta(folder)
        path = write_folder(folder, config, tensors, read, files)
        if note:
            print(note, file=sys.stderr)
        return path
    elif (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(f"{folder} holds an adapter, not a model: {how_to_merge(folder)}")
    else:
        config, tensors, read = read_tinyllamas(folder)
    return convert(folder / "model.pth", config, tensors, read)


def how_to_merge(lora: Path) -> str:
    config = read_json(lora / ADAPTER_CONFIG)
    base = isinstance(config, dict) and config.get("base_model_name_or_path") or "its base model"
    return f"merge it with `scripts/convert_hf_checkpoint.py --checkpoint_dir (the folder of {base}) --lora {lora}`"


def read_configs(folder: Path) -> tuple[ModelConfig, dict]:
    """The model's config, and config.json, from which it is."""
    generation = read_json(folder / "generation_config.json", {})
    hf_config = read_json(folder / "config.json")
    return config_from_hf(hf_config, generation), hf_config


def read_tensors(folder: Path, hf_config: dict, config: ModelConfig) -> HFTensors:
    """All tensors, memory-mapped, and the quantized weights. hf_config: config.json."""
    quantization = read_quantization(hf_config)
    tensors = read_folder(folder)
    if quantization is not None:
        collect_quantized(tensors, quantization, config)
    return tensors


def merge_folders(folder: Path, lora: Path) -> Path:
    """Writes model.pth of the model in folder and the adapter in lora, into lora."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json: --lora needs a model in Hugging Face's format")
    if lora.resolve() == folder.resolve():
        raise UsageError("put the adapter into a folder of its own: model.pth goes there, and the base has one, too")
    adapter = read_adapter(lora)
    check_not_quantized(folder)
    config, hf_config = read_configs(folder)
    tensors = read_tensors(folder, hf_config, config)
    read = to_llama_layout(tensors, config, find_family(hf_config), adapter)
    files = {}
    if not any((lora / name).is_file() for name in TOKENIZERS):
        of_base = [name for name in TOKENIZER_FILES if (folder / name).is_file() and not (lora / name).exists()]
        files = {name: (folder / name).read_bytes() for name in of_base}
    return write_folder(lora, config, tensors, read, files)


def check_not_quantized(folder: Path):
    """Raises UsageError for a base of quantized weights; not for gpt-oss, whose attention is not."""
    hf_config = read_json(folder / "config.json")
    quantization = hf_config.get("quantization_config") if isinstance(hf_config, dict) else None
    if quantization and not (isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"):
        what = f"{folder} is quantized (config.json: quantization_config), and an adapter cannot be merged into that"
        raise UsageError(f"{what}: give the model that it was made from")
