"""Finds the quantized layers of a Hugging Face checkpoint, for convert_folder.py. Their weights keep their values.

    quantization = read_quantization(folder, hf_config, tensors)    # hf_config: the contents of config.json
    collect_quantized(tensors, quantization, config)    # X.qweight, X.scales, ... -> X.weight, a QuantizedWeight

The tensors decide which layers are quantized. docs/quantized_checkpoints.md lists the formats, and the contradictions
between config.json and the tensors that are errors. hf_quantized_integers.py and hf_quantized_floats.py read the
weights.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from config import ModelConfig
from converters.canonical_checkpoint import SourceTensors
from converters.hf_quantized_floats import float8_weight, split_mxfp4
from converters.hf_quantized_integers import GPTQ_VERSIONS, awq_weight, gptq_weight, int8_weight, packed_weight
from converters.quantized_weight import QuantizedLayer, QuantizedWeight
from utils.errors import UsageError, convert_type_errors
from utils.files import read_json

PLACE = "config.json: quantization_config"
AWQ_VERSIONS = ("gemm",)
MODELOPT_BLOCKS = "fp8_pb_wo"  # the quant_algo that has a scale for each block of MODELOPT_BLOCK_SHAPE
MODELOPT_BLOCK_SHAPE = [128, 128]
AUTO_ROUND = ("auto-round", "intel/auto-round")
# Files that early versions of AutoGPTQ, AutoAWQ and ModelOpt wrote instead of quantization_config -> their method
OLDER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# Fields that name a version of the format (they differ between programs) -> the supported versions
VERSIONS = {
    "gptq": {"checkpoint_format": GPTQ_VERSIONS, "format": GPTQ_VERSIONS},
    "awq": {"version": AWQ_VERSIONS, "checkpoint_format": AWQ_VERSIONS, "format": AWQ_VERSIONS},
    "modelopt": {"quant_algo": ("fp8", "fp8_per_channel_per_token", MODELOPT_BLOCKS)},
}
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
DENSE = "dense"  # no weight is quantized, though perhaps the KV cache is
TRANSFORMED_WEIGHTS = ("weight_input", "weight_output")  # locations in transform_config
MIXED = "mixed-precision"  # each of config_groups has a format of its own
# Names of scales for activations and the KV cache. Both keep 16 bits here
ACTIVATION_SCALES = re.compile(r"\.(input|output|activation|kv|[qkv])_(global_)?(scale|zero_point|scale_ub)$")
OF_WEIGHT = re.compile(r"(qweight|qzeros|scales|g_idx|weight(_\w+)?)$")


def read_quantization(folder: Path, hf_config: dict, tensors: SourceTensors) -> dict | None:
    """Returns the quantization_config of config.json, or None if no weight is quantized. Missing fields come from
    OLDER_FILES. Checks that the method is supported."""
    older, quantization = read_older_file(folder), hf_config.get("quantization_config")
    if quantization is None:
        layers = find_layers(tensors)
        if not layers:
            return None
        quantization = older or refuse_unknown_format(hf_config, layers[0])
    if not isinstance(quantization, dict):
        raise UsageError("config.json: quantization_config must be an object")
    with convert_type_errors(PLACE):
        if quantization.get("quant_method") == older.get("quant_method"):
            quantization = older | quantization
        if quantization.get("quant_method") in AUTO_ROUND:
            quantization = read_auto_round_config(quantization)
        check_supported(quantization)
    return quantization


def read_auto_round_config(quantization: dict) -> dict:
    """Returns a quantization_config of AutoRound as GPTQ or AWQ would write it. AutoRound packs weights in their
    formats. extra_config (fields of single layers, by name or regular expression) becomes the "dynamic" of GPTQ."""
    check_one_of("data_type", quantization.get("data_type", "int"), ("int",))
    packing = quantization.get("packing_format") or quantization.get("backend") or ""
    dynamic = {}
    for layer, fields in (quantization.get("extra_config") or {}).items():
        sign = "-:" if fields.get("bits") == 16 else "+:"
        dynamic[f"{sign}({layer})$"] = fields
    fields = {name: quantization[name] for name in ("bits", "group_size", "sym") if name in quantization}
    return fields | {"quant_method": "awq" if "awq" in packing else "gptq", "dynamic": dynamic}


def read_older_file(folder: Path) -> dict:
    """Returns the contents of the first of OLDER_FILES in folder, with quant_method, or {} if there is none."""
    for file, method in OLDER_FILES.items():
        fields = read_json(folder / file, {})
        if isinstance(fields, dict) and method == "modelopt":
            fields = fields.get("quantization", {})
        if not isinstance(fields, dict):
            raise UsageError(f"{folder / file} must hold an object")
        if fields:
            return {"quant_method": method} | fields
    return {}


def refuse_unknown_format(hf_config: dict, layer: QuantizedLayer) -> NoReturn:
    """Refuses a checkpoint that has quantized weights, such as layer, but no quantization_config."""
    what = f"{layer.name} is quantized, and config.json has no quantization_config"
    if "compression_config" in hf_config:
        raise UsageError(f"{what}; rename its compression_config, an older name of compressed-tensors")
    raise UsageError(f"{what}, which names the format")


def check_supported(quantization: dict):
    method = quantization.get("quant_method")
    if method == "bitsandbytes" or quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        what = "its weights are in bitsandbytes' own formats"
        raise UsageError(f"config.json: quant_method bitsandbytes is not supported: {what}; take the 16-bit checkpoint")
    if method not in METHODS:
        raise UsageError(f"config.json: quant_method {method!r} is not supported; {', '.join(METHODS)} are")
    for field, versions in VERSIONS.get(method, {}).items():
        if quantization.get(field) is not None:
            check_one_of(field, str(quantization[field]).lower(), versions)
    if quantization.get("is_marlin_format"):
        raise UsageError("config.json: quantization_config's is_marlin_format is not supported; take the GPTQ weights")
    if method == "compressed-tensors":
        schemes = list(quantization.get("config_groups", {}).values())
        for format in [quantization.get("format"), *(scheme.get("format") for scheme in schemes)]:
            if format is not None:
                check_one_of("format", format, (*COMPRESSED_FORMATS, MIXED, DENSE))
        check_transforms(quantization.get("transform_config") or {})


def check_transforms(transforms: dict):
    """Refuses rotations of activations. Those of weights are already part of the stored weights."""
    for scheme in (transforms.get("config_groups") or {}).values():
        for place in scheme["apply"]:
            if place["location"] not in TRANSFORMED_WEIGHTS:
                what = f"transform_config rotates activations (location {place['location']!r})"
                raise UsageError(f"config.json: {what}: not supported; rotations of weights alone are")


def check_one_of(field: str, value, supported: tuple[str, ...]):
    if value not in supported:
        raise UsageError(f"config.json: quantization_config's {field} {value!r} is not one of {', '.join(supported)}")


def collect_quantized(tensors: SourceTensors, quantization: dict, config: ModelConfig):
    """Replaces the tensors of each quantized layer by one QuantizedWeight, in place. Removes the scales of activations
    and the KV cache. Raises UsageError if quantization contradicts the tensors, or if no layer is quantized."""
    n_before = len(tensors)
    if quantization["quant_method"] == "mxfp4":
        split_mxfp4(tensors)
    else:
        for name in [name for name in tensors if ACTIVATION_SCALES.search(name)]:
            del tensors[name]
        for layer in find_layers(tensors):
            with convert_type_errors(PLACE):
                weight = LAYER_READERS[quantization["quant_method"]](layer, quantization)
                layer.check_all_taken()
            for kind in layer.tensors:
                del tensors[f"{layer.name}.{kind}"]
            tensors[f"{layer.name}.weight"] = weight
    if not is_only_kv_cache(quantization) and not any(isinstance(t, QuantizedWeight) for t in tensors.values()):
        method = quantization["quant_method"]
        raise UsageError(f"config.json says quant_method {method}; none of the checkpoint's {n_before} tensors is that")


def is_only_kv_cache(quantization: dict) -> bool:
    """Whether compressed-tensors quantizes only the KV cache, and no weight."""
    is_compressed = quantization["quant_method"] == "compressed-tensors"
    return is_compressed and not quantization.get("config_groups") and bool(quantization.get("kv_cache_scheme"))


def find_layers(tensors: dict[str, Tensor]) -> list[QuantizedLayer]:
    layers: dict[str, QuantizedLayer] = {}
    for name, tensor in tensors.items():
        layer_name, _, kind = name.rpartition(".")
        if OF_WEIGHT.fullmatch(kind):
            layers.setdefault(layer_name, QuantizedLayer(layer_name, {})).tensors[kind] = tensor
    return [layer for layer in layers.values() if is_quantized(layer.tensors)]


def is_quantized(tensors: dict[str, Tensor]) -> bool:
    if "weight" in tensors:
        return tensors["weight"].dtype.itemsize == 1
    return "qweight" in tensors or "weight_packed" in tensors


def read_float8(layer: QuantizedLayer, quantization: dict) -> QuantizedWeight:
    return float8_weight(layer, quantization.get("weight_block_size"))


def read_modelopt(layer: QuantizedLayer, quantization: dict) -> QuantizedWeight:
    has_blocks = str(quantization.get("quant_algo")).lower() == MODELOPT_BLOCKS
    return float8_weight(layer, MODELOPT_BLOCK_SHAPE if has_blocks else None)


def read_compressed(layer: QuantizedLayer, quantization: dict) -> QuantizedWeight:
    for ignored in quantization.get("ignore") or []:
        if matches_target(layer.name, ignored):
            layer.refuse("a quantized weight", f"that {ignored!r} (ignore) is not quantized")
    scheme = find_scheme(layer.name, quantization)
    is_float = "weight" in layer.tensors and layer.tensors["weight"].dtype != torch.int8
    layer.expect("type", "float" if is_float else "int", scheme.get("type"))
    if is_float:
        strategy = scheme.get("strategy")
        block_shape = [1, scheme["group_size"]] if strategy == "group" else read_block_shape(scheme)
        return float8_weight(layer, block_shape if strategy in ("block", "group") else None)
    return packed_weight(layer, scheme) if "weight_packed" in layer.tensors else int8_weight(layer, scheme)


def read_block_shape(scheme: dict) -> list[int] | None:
    """Returns [rows, columns]. Early versions of compressed-tensors wrote "128x128"."""
    shape = scheme.get("block_structure")
    return [int(size) for size in shape.split("x")] if isinstance(shape, str) else shape


def find_scheme(name: str, quantization: dict) -> dict:
    """Returns the scheme in config_groups for the weight of the layer called name. The targets of a group are names of
    layers, regular expressions after "re:", and types of layers. As in compressed-tensors, a name takes precedence,
    then the alphabetically first regular expression, then the type."""
    schemes = [scheme for scheme in quantization["config_groups"].values() if scheme.get("weights")]
    scheme_of = {target: scheme["weights"] for scheme in schemes for target in scheme["targets"]}
    for target in sorted(scheme_of, key=lambda target: (target.startswith("re:"), target)):
        if matches_target(name, target):
            return scheme_of[target]
    layer_type = "Embedding" if name.endswith(".embed_tokens") else "Linear"
    if layer_type in scheme_of:
        return scheme_of[layer_type]
    raise UsageError(f"config.json: no target of config_groups is {name}, whose weight is quantized")


def matches_target(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


# quant_method -> the function that reads a layer. A tensor of mxfp4 holds many layers, so split_mxfp4 reads it.
LAYER_READERS: dict[str, Callable[[QuantizedLayer, dict], QuantizedWeight]] = {
    "awq": awq_weight,
    "compressed-tensors": read_compressed,
    "fbgemm_fp8": read_float8,
    "fp8": read_float8,
    "gptq": gptq_weight,
    "modelopt": read_modelopt,
}
METHODS = (*LAYER_READERS, "mxfp4", AUTO_ROUND[0])
