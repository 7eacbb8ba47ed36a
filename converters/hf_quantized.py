"""Finds the quantized layers of a Hugging Face checkpoint, for folder.py. Weights keep their values: nothing is rounded
again.

    quantization = read_quantization(hf_config)         # hf_config: the contents of config.json
    collect_quantized(tensors, quantization, config)    # X.qweight, X.scales, ... -> X.weight, a LazyWeight

The tensors say which layers are quantized. If config.json says something else, that is an error. hf_integers.py and
hf_floats.py read the formats; docs/quantized_checkpoints.md lists the formats.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from config import ModelConfig
from converters.hf_floats import float8_weight, split_mxfp4
from converters.hf_integers import awq_weight, gptq_weight, int8_weight, packed_weight
from converters.quantized_weight import LazyWeight, SourceLayer
from utils.errors import UsageError, convert_type_errors

PLACE = "config.json: quantization_config"
AWQ_VERSIONS = ("gemm",)
GPTQ_FORMATS = ("gptq", "gptq_v2")
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
MIXED = "mixed-precision"  # each of config_groups has its own format
# Names of scales for activations and for the KV cache. Here activations and the KV cache keep 16 bits.
ACTIVATION_SCALES = re.compile(r"\.(input|output|activation|kv|[qkv])_(global_)?(scale|zero_point|scale_ub)$")
OF_WEIGHT = re.compile(r"(qweight|qzeros|scales|g_idx|weight(_\w+)?)$")


def read_quantization(hf_config: dict) -> dict | None:
    """Returns quantization_config of config.json, or None if there is none. Checks that the method is supported."""
    quantization = hf_config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise UsageError("config.json: quantization_config must be an object")
    with convert_type_errors(PLACE):
        check_supported(quantization)
    return quantization


def check_supported(quantization: dict):
    method = quantization.get("quant_method")
    if method == "bitsandbytes" or quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        what = "its weights are in bitsandbytes' own formats"
        raise UsageError(f"config.json: quant_method bitsandbytes is not supported: {what}; take the 16-bit checkpoint")
    if method not in METHODS:
        raise UsageError(f"config.json: quant_method {method!r} is not supported; {', '.join(METHODS)} are")
    if method == "gptq":
        check_one_of("checkpoint_format", quantization.get("checkpoint_format", "gptq"), GPTQ_FORMATS)
    if method == "awq":
        check_one_of("version", str(quantization.get("version", "gemm")).lower(), AWQ_VERSIONS)
    if method == "compressed-tensors":
        schemes = list(quantization.get("config_groups", {}).values())
        for format in [quantization.get("format"), *(scheme.get("format") for scheme in schemes)]:
            if format is not None:
                check_one_of("format", format, (*COMPRESSED_FORMATS, MIXED))


def check_one_of(field: str, value, supported: tuple[str, ...]):
    if value not in supported:
        raise UsageError(f"config.json: quantization_config's {field} {value!r} is not one of {', '.join(supported)}")


def collect_quantized(tensors: dict[str, Tensor | LazyWeight], quantization: dict, config: ModelConfig):
    """Replaces the tensors of every quantized layer by one LazyWeight, in place. Removes the scales of activations
    and of the KV cache. Raises UsageError if quantization contradicts the tensors, or if no layer is quantized."""
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
    if not any(isinstance(tensor, LazyWeight) for tensor in tensors.values()):
        method = quantization["quant_method"]
        raise UsageError(f"config.json says quant_method {method}; none of the checkpoint's {n_before} tensors is that")


def find_layers(tensors: dict[str, Tensor]) -> list[SourceLayer]:
    """Finds the quantized layers, each with the tensors of its weight."""
    layers: dict[str, SourceLayer] = {}
    for name, tensor in tensors.items():
        layer_name, _, kind = name.rpartition(".")
        if OF_WEIGHT.fullmatch(kind):
            layers.setdefault(layer_name, SourceLayer(layer_name, {})).tensors[kind] = tensor
    return [layer for layer in layers.values() if is_quantized(layer.tensors)]


def is_quantized(tensors: dict[str, Tensor]) -> bool:
    if "weight" in tensors:
        return tensors["weight"].dtype.itemsize == 1
    return "qweight" in tensors or "weight_packed" in tensors


def read_float8(layer: SourceLayer, quantization: dict) -> LazyWeight:
    return float8_weight(layer, quantization.get("weight_block_size"))


def read_compressed(layer: SourceLayer, quantization: dict) -> LazyWeight:
    """Reads a weight of compressed-tensors. quantization: config.json's quantization_config."""
    scheme = find_scheme(layer.name, quantization)
    is_float = "weight" in layer.tensors and layer.tensors["weight"].dtype != torch.int8
    layer.expect("type", "float" if is_float else "int", scheme.get("type"))
    if is_float:
        has_blocks = scheme.get("strategy") == "block"
        return float8_weight(layer, scheme["block_structure"] if has_blocks else None)
    return packed_weight(layer, scheme) if "weight_packed" in layer.tensors else int8_weight(layer, scheme)


def find_scheme(name: str, quantization: dict) -> dict:
    """Returns the scheme that config_groups gives for the weight of the layer called name. A group's targets are names
    of layers, regular expressions after "re:", and types of layers. A name or a regular expression takes precedence
    over a type."""
    schemes = [scheme for scheme in quantization["config_groups"].values() if scheme.get("weights")]
    for scheme in schemes:
        if any(matches_target(name, target) for target in scheme["targets"]):
            return scheme["weights"]
    for scheme in schemes:
        if "Linear" in scheme["targets"]:
            return scheme["weights"]
    raise UsageError(f"config.json: no target of config_groups is {name}, whose weight is quantized")


def matches_target(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


# quant_method -> the function that reads a layer. mxfp4 is not here, since a tensor holds many layers: split_mxfp4.
LAYER_READERS: dict[str, Callable[[SourceLayer, dict], LazyWeight]] = {
    "awq": awq_weight,
    "compressed-tensors": read_compressed,
    "fbgemm_fp8": read_float8,
    "fp8": read_float8,
    "gptq": gptq_weight,
}
METHODS = (*LAYER_READERS, "mxfp4")
