"""CASES: tiny quantized checkpoints, in the formats of other projects, with the values of the weights."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint import empty_model, read_checkpoint
from converters.write_model import NORM_BEFORE
from formats import QuantizationConfig
from layers.linear import Linear, quantizable_linears
from tests.tiny import FAMILIES, convert, make_hf

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
EXPERT_SIZES = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 256}
IS_LINEAR = re.compile(r"\.layers\.\d+\..*(_proj|\.w[123])\.weight$")

# ---- The formats, as their projects describe them -------------------------------------------------------------------


@dataclass
class Rounded:
    """A rounded weight, w = (q - zero) * scale: q [N, K], scales and zeros [N, n_groups], g_idx [K]."""

    q: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor

    def dequantize(self) -> Tensor:
        return (self.q - self.zeros[:, self.g_idx]) * self.scales.float()[:, self.g_idx]


def round_weight(
    w: Tensor, bits: int, group_size: int, symmetric: bool, act_order: int = 0, scale_dtype=torch.float16
) -> Rounded:
    """Rounds w [N, K] to the nearest values of a format with a scale and a zero point for every group.

    act_order: the seed of a random order of inputs, which weights with the same seed share, or 0 for none."""
    k = w.shape[1]
    group_size = k if group_size == -1 else group_size
    g_idx = torch.arange(k) // group_size
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(act_order))]
    top, scales, zeros = 2**bits - 1, [], []
    for g in range(math.ceil(k / group_size)):
        low, high = w[:, g_idx == g].aminmax(dim=1)
        scale = torch.maximum(-low, high) / (top // 2) if symmetric else (high.clamp(min=0) - low.clamp(max=0)) / top
        scale = scale.to(scale_dtype)
        scales.append(scale)
        zeros.append(torch.full_like(low, top // 2 + 1) if symmetric else (-low / scale.float()).round().clamp(0, top))
    scales, zeros = torch.stack(scales, 1), torch.stack(zeros, 1)
    q = (w / scales.float()[:, g_idx] + zeros[:, g_idx]).round().clamp(0, top)
    return Rounded(q.int(), scales, zeros.int(), g_idx)


def pack(numbers: Tensor, bits: int, dim: int, order=None) -> Tensor:
    """Packs 32 / bits numbers along dim into an int32 word. Number order[0] of a word gets the lowest bits, and so on;
    by default order is 0, 1, 2 ..."""
    per_word = 32 // bits
    numbers = numbers.movedim(dim, -1).long().unflatten(-1, (-1, per_word))[..., order or list(range(per_word))]
    words = (numbers << torch.arange(0, 32, bits)).sum(-1)
    return (words - (words >> 31 << 32)).to(torch.int32).movedim(-1, dim).contiguous()


def gptq(name: str, w: Tensor, version: int, **how) -> tuple[dict[str, Tensor], Tensor]:
    """Writes w as GPTQ does. Version 1 stores zero points minus one, and subtracts from whole words, with borrows."""
    rounded, bits = round_weight(w, **how), how["bits"]
    qzeros = pack(rounded.zeros.T, bits, 1)
    if version == 1:
        qzeros = qzeros - (0x11111111 if bits == 4 else 0x01010101)
    tensors = {
        "qweight": pack(rounded.q.T, bits, 0),
        "qzeros": qzeros,
        "scales": rounded.scales.T.contiguous(),
        "g_idx": rounded.g_idx.int(),
    }
    return {f"{name}.{kind}": t for kind, t in tensors.items()}, rounded.dequantize()


def awq(name: str, w: Tensor, group_size: int) -> tuple[dict[str, Tensor], Tensor]:
    rounded, order = round_weight(w, 4, group_size, symmetric=False), [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        "qweight": pack(rounded.q.T, 4, 1, order),
        "qzeros": pack(rounded.zeros.T, 4, 1, order),
        "scales": rounded.scales.T.contiguous(),
    }
    return {f"{name}.{kind}": t for kind, t in tensors.items()}, rounded.dequantize()


def packed(name: str, w: Tensor, zeros_dtype=torch.int32, **how) -> tuple[dict[str, Tensor], Tensor]:
    """pack-quantized of compressed-tensors"""
    rounded, bits = round_weight(w, **how), how["bits"]
    tensors = {
        "weight_packed": pack(rounded.q, bits, 1),
        "weight_scale": rounded.scales,
        "weight_shape": torch.tensor(w.shape),
    }
    if how.get("act_order"):
        tensors["weight_g_idx"] = rounded.g_idx.int()
    if not how["symmetric"]:
        is_packed = zeros_dtype == torch.int32
        middle = 2 ** (bits - 1)
        signed = (rounded.zeros - middle).to(torch.int8)
        tensors["weight_zero_point"] = pack(rounded.zeros, bits, 0) if is_packed else signed
    return {f"{name}.{kind}": t for kind, t in tensors.items()}, rounded.dequantize()


def int_quantized(
    name: str, w: Tensor, bits: int = 8, group_size: int = -1, symmetric: bool = True, has_one_scale: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """int-quantized of compressed-tensors: numbers of 8 bits or fewer as int8"""
    rows = w.reshape(1, -1) if has_one_scale else w
    rounded, middle = round_weight(rows, bits, group_size, symmetric, scale_dtype=torch.bfloat16), 2 ** (bits - 1)
    tensors = {
        "weight": (rounded.q - middle).to(torch.int8).reshape(w.shape),
        "weight_scale": rounded.scales[0] if has_one_scale else rounded.scales,
        "input_scale": torch.ones(1),
    }
    if not symmetric:
        zeros = (rounded.zeros - middle).to(torch.int8)
        tensors["weight_zero_point"] = zeros[0] if has_one_scale else zeros
    return {f"{name}.{kind}": t for kind, t in tensors.items()}, rounded.dequantize().reshape(w.shape)


def float8(
    name: str, w: Tensor, rows: int | None, columns: int | None, kind: str, scale_dtype=torch.float32, dims: int = 2
) -> tuple[dict[str, Tensor], Tensor]:
    """Rounds w to float8, with one scale for each block of rows x columns, of which None means all. dims: the number of
    dimensions of the scales, which is 4 in ModelOpt."""
    n, k = w.shape
    is_one = rows is columns is None
    rows, columns = rows or n, columns or k
    scales = torch.empty(math.ceil(n / rows), math.ceil(k / columns))
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            scales[i, j] = w[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].abs().max() / 448
    if scale_dtype == torch.float8_e8m0fnu:
        scales = scales.log2().ceil().exp2()
    by_element = scales.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    weight = (w / by_element).to(torch.float8_e4m3fn)
    stored = scales.flatten() if is_one else scales[:, None, :, None] if dims == 4 else scales
    stored = stored.to(scale_dtype)
    return {f"{name}.weight": weight, f"{name}.{kind}": stored}, weight.float() * by_element


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def compressed(format: str, weights: dict) -> dict:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


def write_quantized(folder: Path, family: str, config: dict, quantize: Callable, is_linear: re.Pattern = IS_LINEAR):
    """Writes a tiny model in which each linear layer of the blocks is quantized. quantize(name, w) -> (tensors, w
    dequantized). Returns a model of transformers with the dequantized weights, float32."""
    theirs = make_hf(family, **sizes_of(family))
    folder.mkdir(parents=True)
    theirs.save_pretrained(folder)
    stored, dense = {}, load_file(folder / "model.safetensors")
    for name, w in dense.items():
        if is_linear.search(name):
            tensors, dense[name] = quantize(name.removesuffix(".weight"), w)
            stored |= tensors
        else:
            stored[name] = w
    reference = folder / "reference"
    reference.mkdir()
    (reference / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(dense, reference / "model.safetensors", {"format": "pt"})
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / "model.safetensors")
    set_quantization(folder, config)
    return type(theirs).from_pretrained(reference, dtype=torch.float32, attn_implementation="eager").eval()


def sizes_of(family: str) -> dict:
    changes = FAMILIES[family][1]
    return SIZES | {name: size for name, size in EXPERT_SIZES.items() if name in changes}


def set_quantization(folder: Path, config: dict):
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"quantization_config": config}))


def dequantized(path: Path) -> dict[str, Tensor]:
    """Returns every tensor of a checkpoint in float32, with quantized weights dequantized, and columns in the order
    that they have without input_order."""
    config, quantization, tensors = read_checkpoint(path)
    for name, linear in quantizable_linears(empty_model(config, QuantizationConfig.from_dict(quantization))):
        if linear.format.is_quantized:
            parts = {kind: tensors.pop(f"{name}.{kind}") for kind in linear.tensors()}
            tensors[f"{name}.weight"] = linear.format.dequantize(parts, torch.float32)
        if isinstance(linear, Linear) and linear.input_order is not None:
            positions = tensors.pop(f"{name}.input_order").argsort()  # of the inputs
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:, positions]
            layer, _, module = re.fullmatch(r"((layers\.\d+\.)?)(.*)", name).groups()
            norm = f"{layer}{NORM_BEFORE.get(module)}.weight"
            if norm in tensors:
                tensors[norm] = tensors[norm][positions]
    return {name: t.float() for name, t in tensors.items()}


def half_step(w: Tensor) -> Tensor:
    """Returns half the distance between two adjacent bfloat16 numbers near w, as bfloat16 has 8 bits of mantissa."""
    _, exponent = w.frexp()
    return torch.ldexp(torch.full_like(w, 0.5), exponent - 8)


def check_weights(path: Path, reference: Path, is_exact: bool):
    """Checks that every weight equals that in reference, or differs by at most half a step of bfloat16."""
    ours, theirs = dequantized(path), dequantized(convert(reference))
    assert ours.keys() == theirs.keys()
    for name, w in theirs.items():
        difference = (ours[name] - w).abs()
        assert not difference.any() if is_exact else (difference <= half_step(w)).all(), name


def formats_of(path: Path) -> dict[str, str | None]:
    """Returns the names of the formats of the head and of the linear layers in layer 0."""
    config, quantization, _ = read_checkpoint(path)
    linears = quantizable_linears(empty_model(config, QuantizationConfig.from_dict(quantization)))
    return {name.split(".")[-1]: linear.format.name for name, linear in linears if "layers.1." not in name}


# ---- Every format ---------------------------------------------------------------------------------------------------


def gptq_case(family: str, name: str, version: int = 1, bits: int = 4, group_size: int = 32, symmetric: bool = True):
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": symmetric}
    config["checkpoint_format"] = "gptq_v2" if version == 2 else "gptq"
    how = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    return family, name, config, lambda module, w: gptq(module, w, version, **how)


def awq_case(family: str, name: str, group_size: int):
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return family, name, config, lambda module, w: awq(module, w, group_size)


def packed_case(family: str, name: str, bits: int, group_size: int, symmetric: bool, **how):
    how |= {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "channel", "group_size": None}
    if group_size > 0:
        weights |= {"strategy": "group", "group_size": group_size}
    return family, name, compressed("pack-quantized", weights), lambda module, w: packed(module, w, **how)


def int_case(family: str, name: str, weights: dict, **how):
    return family, name, compressed("int-quantized", weights), lambda module, w: int_quantized(module, w, **how)


def float_case(
    family: str, name: str, config: dict, rows: int | None, columns: int | None, kind: str = "weight_scale", **how
):
    return family, name, config, lambda module, w: float8(module, w, rows, columns, kind, **how)


def auto_round_case(packed_like: tuple, **fields):
    """A case of AutoRound, which packs its weights like packed_like, a case of another project."""
    family, name, config, quantize = packed_like
    config = {field: value for field, value in config.items() if field in ("bits", "group_size", "sym")}
    config |= {"quant_method": "auto-round", "data_type": "int", "extra_config": {"lm_head": {"bits": 16}}}
    return family, name, config | fields, quantize


def modelopt_case(family: str, name: str, algorithm: str, rows: int | None, columns: int | None, **how):
    """In ModelOpt, config_groups repeats what quant_algo says."""
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}
    config = {"quant_method": "modelopt", "quant_algo": algorithm, "config_groups": {"group_0": scheme}}

    def quantize(module: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, dense = float8(module, w, rows, columns, "weight_scale", **how)
        scales = ["input_scale"] + [f"{part}_scale" for part in "kv" if module.endswith(f"{part}_proj")]
        return tensors | {f"{module}.{scale}": torch.tensor(0.5) for scale in scales}, dense

    return family, name, config | {"ignore": ["lm_head"]}, quantize


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
POWERS_OF_TWO = BLOCKS | {"scale_fmt": "ue8m0"}
OLDER_BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "64x32"}
SMALL_BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 32]}
CHANNELS = {"num_bits": 8, "type": "float", "strategy": "channel"}
TENSOR = CHANNELS | {"strategy": "tensor"}
FLOAT_GROUPS = CHANNELS | {"strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
ONE_ZERO = INT8 | {"strategy": "tensor", "symmetric": False}
INT4 = {"num_bits": 4, "type": "int", "group_size": 64}  # compressed-tensors infers the strategy
CASES = {
    "gptq": gptq_case("llama2", "int4.g32"),
    "gptq v2": gptq_case("phi3", "int4.g64", version=2, group_size=64),
    "gptq asymmetric": gptq_case("mixtral", "int4.g32", symmetric=False),
    "gptq v2 asymmetric": gptq_case("qwen2", "int4.g128", version=2, group_size=128, symmetric=False),
    "gptq channel": gptq_case("llama-bias", "int4.g128", group_size=-1),
    "gptq 8 bits": gptq_case("qwen2-moe", "int8.g64", bits=8, group_size=64, symmetric=False),
    "gptq 8 bits channel": gptq_case("gemma2", "int8", version=2, bits=8, group_size=-1),
    "awq": awq_case("qwen3", "int4.g64", 64),
    "awq of experts": awq_case("qwen3-moe", "int4.g128", 128),
    "packed": packed_case("mistral-nemo", "int4.g128", 4, 128, True, scale_dtype=torch.bfloat16),
    "packed asymmetric": packed_case("glm", "int4.g32", 4, 32, False, scale_dtype=torch.bfloat16),
    "packed asymmetric, older": packed_case("phi3", "int4.g32", 4, 32, False, zeros_dtype=torch.int8),
    "packed channel": packed_case("olmo2", "int4.g128", 4, -1, False),
    "packed 8 bits": packed_case("llama3", "int8.g64", 8, 64, False),
    "packed 8 bits channel": packed_case("qwen3", "int8", 8, -1, True, scale_dtype=torch.float32),
    "int8": int_case("llama2", "int8", INT8),
    "int8 tensor asymmetric": int_case("qwen2", "int8.g128", ONE_ZERO, symmetric=False, has_one_scale=True),
    "int8 of 4 bits": int_case("qwen3-moe", "int4.g64", INT4, bits=4, group_size=64),
    "fp8 blocks": float_case("qwen3-moe", "fp8.g128", BLOCKS, 128, 128, "weight_scale_inv"),
    "fp8 tensor": float_case("mixtral", "fp8", {"quant_method": "fp8"}, None, None),
    "float tensor": float_case("phi3", "fp8", compressed("float-quantized", TENSOR), None, None),
    "float channel": float_case("qwen2", "fp8", compressed("float-quantized", CHANNELS), 1, None),
    "float groups": float_case("qwen3", "fp8.g32", compressed("float-quantized", FLOAT_GROUPS), 1, 32),
    "float blocks": float_case("llama2", "fp8.g32", compressed("float-quantized", SMALL_BLOCKS), 64, 32),
    "float blocks, older": float_case("phi3", "fp8.g32", compressed("float-quantized", OLDER_BLOCKS), 64, 32),
    "fp8 blocks, 8-bit scales": float_case(
        "llama2", "fp8.g128", POWERS_OF_TWO, 128, 128, "weight_scale_inv", scale_dtype=torch.float8_e8m0fnu
    ),
    "modelopt": modelopt_case("llama3", "fp8", "FP8", None, None),
    "modelopt channel": modelopt_case("qwen2", "fp8", "FP8_PER_CHANNEL_PER_TOKEN", 1, None),
    "modelopt blocks": modelopt_case("qwen3-moe", "fp8.g128", "fp8_pb_wo", 128, 128, dims=4),
    "auto-round": auto_round_case(gptq_case("qwen3", "int4.g32"), packing_format="auto_round:auto_gptq"),
    "auto-round, older": auto_round_case(
        gptq_case("llama2", "int4.g32", version=2, symmetric=False), quant_method="intel/auto-round", backend="marlin"
    ),
    "auto-round as awq": auto_round_case(awq_case("qwen2", "int4.g64", 64), packing_format="auto_round:auto_awq"),
    "fbgemm": float_case("gemma2", "fp8", {"quant_method": "fbgemm_fp8"}, 1, None),
}
