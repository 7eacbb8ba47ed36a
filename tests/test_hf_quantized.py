"""Quantized Hugging Face checkpoints keep their values. The tests quantize tiny models into each format themselves."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint import read_checkpoint
from converters.model_tensors import NORM_BEFORE
from kernels.formats import parse_formats
from model import empty_model
from tests.tiny import FAMILIES, convert, make_hf, refused, same_logits

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
EXPERT_SIZES = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 256}
IS_LINEAR = re.compile(r"\.layers\.\d+\..*(_proj|\.w[123])\.weight$")

# ---- The formats, as their projects describe them -------------------------------------------------------------------


@dataclass
class Rounded:
    """w = (q - zero) * scale, rounded here: q [N, K], scales and zeros [N, n_groups], g_idx [K]."""

    q: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor

    def dequantize(self) -> Tensor:
        return (self.q - self.zeros[:, self.g_idx]) * self.scales.float()[:, self.g_idx]


def round_weight(
    w: Tensor, bits: int, group_size: int, symmetric: bool, act_order: int = 0, scale_dtype=torch.float16
) -> Rounded:
    """act_order: 0: none; weights with the same number have the same."""
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
    """int32 words of 32 / bits numbers along dim, the first one in the lowest bits; order: which is the first, ..."""
    per_word = 32 // bits
    numbers = numbers.movedim(dim, -1).long().unflatten(-1, (-1, per_word))[..., order or list(range(per_word))]
    words = (numbers << torch.arange(0, 32, bits)).sum(-1)
    return (words - (words >> 31 << 32)).to(torch.int32).movedim(-1, dim).contiguous()


def gptq(name: str, w: Tensor, version: int, **how) -> tuple[dict[str, Tensor], Tensor]:
    """Version 1 stores zero points minus one: the subtraction goes over whole words."""
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
    """compressed-tensors' pack-quantized."""
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


def int_quantized(name: str, w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rounded = round_weight(w, 8, -1, symmetric=True, scale_dtype=torch.bfloat16)
    tensors = {f"{name}.weight": (rounded.q - 128).to(torch.int8), f"{name}.weight_scale": rounded.scales}
    return tensors | {f"{name}.input_scale": torch.ones(1)}, rounded.dequantize()


def float8(name: str, w: Tensor, rows: int | None, columns: int | None, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """One scale for each block of rows x columns. None: all of them."""
    n, k = w.shape
    is_one = rows is columns is None
    rows, columns = rows or n, columns or k
    scales = torch.empty(math.ceil(n / rows), math.ceil(k / columns))
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            scales[i, j] = w[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].abs().max() / 448
    by_element = scales.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    weight = (w / by_element).to(torch.float8_e4m3fn)
    stored = scales.flatten() if is_one else scales
    return {f"{name}.weight": weight, f"{name}.{kind}": stored}, weight.float() * by_element


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def compressed(format: str, weights: dict) -> dict:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


def write_quantized(folder: Path, family: str, config: dict, quantize: Callable, is_linear: re.Pattern = IS_LINEAR):
    """Writes a tiny model with each linear layer of its blocks quantized. Returns transformers' model with the weights
    that the formats' projects would compute with, float32. quantize(name, w) -> (tensors, w dequantized)."""
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
    """Every tensor of a checkpoint, the quantized weights dequantized, float32. Inputs with an order of their own are
    put back into the model's."""
    config, quantization, tensors = read_checkpoint(path)
    for name, linear in empty_model(config, parse_formats(quantization)).quantizable_linears():
        if linear.format.is_quantized:
            parts = {kind: tensors.pop(f"{name}.{kind}") for kind in linear.tensors()}
            tensors[f"{name}.weight"] = linear.format.dequantize(parts, torch.float32)
        if linear.input_order is not None:
            positions = tensors.pop(f"{name}.input_order").argsort()  # of the inputs
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:, positions]
            layer, _, module = re.fullmatch(r"((layers\.\d+\.)?)(.*)", name).groups()
            norm = f"{layer}{NORM_BEFORE.get(module)}.weight"
            if norm in tensors:
                tensors[norm] = tensors[norm][positions]
    return {name: t.float() for name, t in tensors.items()}


def half_step(w: Tensor) -> Tensor:
    """Half the distance of two bfloat16 numbers around w: they have 8 bits of mantissa."""
    _, exponent = w.frexp()
    return torch.ldexp(torch.full_like(w, 0.5), exponent - 8)


def check_weights(path: Path, reference: Path, is_exact: bool):
    """Whether every weight is the reference's, or within half a step of bfloat16 of it."""
    ours, theirs = dequantized(path), dequantized(convert(reference))
    assert ours.keys() == theirs.keys()
    for name, w in theirs.items():
        difference = (ours[name] - w).abs()
        assert not difference.any() if is_exact else (difference <= half_step(w)).all(), name


def formats_of(path: Path) -> dict[str, str | None]:
    """The names of the formats of layer 0's linear layers and of the head."""
    config, quantization, _ = read_checkpoint(path)
    linears = empty_model(config, parse_formats(quantization)).quantizable_linears()
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


def float_case(family: str, name: str, config: dict, rows: int | None, columns: int | None, kind: str = "weight_scale"):
    return family, name, config, lambda module, w: float8(module, w, rows, columns, kind)


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
SMALL_BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 32]}
CHANNELS = {"num_bits": 8, "type": "float", "strategy": "channel"}
TENSOR = CHANNELS | {"strategy": "tensor"}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
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
    "int8": ("llama2", "int8", compressed("int-quantized", INT8), int_quantized),
    "fp8 blocks": float_case("qwen3-moe", "fp8.g128", BLOCKS, 128, 128, "weight_scale_inv"),
    "fp8 tensor": float_case("mixtral", "fp8", {"quant_method": "fp8"}, None, None),
    "float tensor": float_case("phi3", "fp8", compressed("float-quantized", TENSOR), None, None),
    "float channel": float_case("qwen2", "fp8", compressed("float-quantized", CHANNELS), 1, None),
    "float blocks": float_case("llama2", "fp8.g32", compressed("float-quantized", SMALL_BLOCKS), 64, 32),
    "fbgemm": float_case("gemma2", "fp8", {"quant_method": "fbgemm_fp8"}, 1, None),
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_kept(case, tmp_path):
    family, name, config, quantize = CASES[case]
    theirs = write_quantized(tmp_path / "m", family, config, quantize)
    path = convert(tmp_path / "m")
    assert path.name == f"model_{name}.pth"
    assert read_checkpoint(path)[1].get("layers") == {"lm_head": None}
    check_weights(path, path.parent / "reference", is_exact=True)
    same_logits(path, theirs)


def test_version_of_gptq(tmp_path):
    """The zero points of symmetric weights say what it is, whatever config.json calls it."""
    for version in (1, 2):
        family, _, config, quantize = gptq_case("llama2", "int4.g32", version)
        for label in ({"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}):
            folder = tmp_path / f"{version}{label['checkpoint_format']}"
            write_quantized(folder, family, config | label, quantize)
            check_weights(convert(folder), folder / "reference", is_exact=True)


def test_biases_of_zeros(tmp_path):
    """AutoGPTQ writes them for layers that have no bias. Those that the family has stay, and others are refused."""
    family, name, config, quantize = gptq_case("qwen2", "int4.g32")

    def write(folder: Path, value: float):
        write_quantized(folder, family, config, quantize)
        tensors = load_file(folder / "model.safetensors")
        for weight in [n for n in tensors if n.endswith(".qweight")]:
            bias = weight.replace(".qweight", ".bias")
            tensors.setdefault(bias, torch.full((tensors[weight].shape[1],), value))
        save_file(tensors, folder / "model.safetensors")

    write(tmp_path / "zeros", 0.0)
    check_weights(convert(tmp_path / "zeros"), tmp_path / "zeros/reference", is_exact=True)
    write(tmp_path / "ones", 1.0)
    refused(tmp_path / "ones", "_proj.bias has no place in this model")


def test_zero_points_of_zero_minus_one(tmp_path):
    """Each borrows from the next one in its word. Weights that are all positive have them."""
    _, _, config, quantize = gptq_case("llama2", "int4.g32", symmetric=False)

    def quantize_positive(name: str, w: Tensor):
        w = w.clone()
        w[::3] = w[::3].abs()
        return quantize(name, w.abs() if name.endswith("o_proj") else w)

    write_quantized(tmp_path / "m", "llama2", config, quantize_positive)
    path = convert(tmp_path / "m")
    assert not read_checkpoint(path)[2]["layers.0.attention.o_proj.zeros"].any()
    check_weights(path, tmp_path / "m/reference", is_exact=True)


# (family, bits, group size): the layers with an order of inputs. If all inputs are one group there is nothing to order,
# and down_proj's inputs are ordered by the rows of gate_proj and up_proj
ACT_ORDER_CASES = {
    ("llama-bias", 4, 32): ["qkv_proj", "o_proj", "gate_up_proj"],
    ("phi3", 4, 64): ["qkv_proj", "o_proj", "gate_up_proj"],
    ("gemma2", 8, 32): ["qkv_proj", "o_proj", "gate_up_proj"],
    ("olmo2", 4, 32): ["qkv_proj", "o_proj", "gate_up_proj", "lm_head"],
    ("qwen3", 4, 128): [],
    ("llama2", 4, -1): [],
}


@pytest.mark.parametrize("case", ACT_ORDER_CASES, ids=str)
def test_act_order(case, tmp_path, capsys):
    """Every layer stays quantized and keeps its values; of one family the head is quantized, too."""
    family, bits, group_size = case
    ordered, is_linear = ACT_ORDER_CASES[case], IS_LINEAR
    how = {"bits": bits, "group_size": group_size, "symmetric": family == "olmo2", "act_order": 1}
    if family == "olmo2":
        _, _, config, quantize = packed_case(family, "", **how)
        is_linear = re.compile(rf"{IS_LINEAR.pattern}|^lm_head")
    else:
        _, _, config, _ = gptq_case(family, "", bits=bits, group_size=group_size)
        quantize = partial(gptq, version=1, **how)
    theirs = write_quantized(tmp_path / "m", family, config, quantize, is_linear)
    capsys.readouterr()
    path = convert(tmp_path / "m")
    assert not capsys.readouterr().err
    name = f"int{bits}.g{group_size if group_size > 0 else 128}"
    expected = dict.fromkeys(("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), name)
    assert formats_of(path) == expected | {"lm_head": name if family == "olmo2" else None}
    in_header = read_checkpoint(path)[1].get("act_order", [])
    assert {layer.split(".")[-1] for layer in in_header} == set(ordered)
    assert len(in_header) == sum(1 if layer == "lm_head" else 2 for layer in ordered)
    sort_feed_forward(tmp_path / "m")
    check_weights(path, tmp_path / "m/reference", is_exact=True)
    same_logits(path, theirs)
    same_logits(path, theirs, use_kernels=False)


@pytest.mark.parametrize("family", ["llama-bias", "mixtral", "qwen2-moe"])
def test_act_order_that_is_not_shared(family, tmp_path, capsys):
    """Layers that are one matrix here and have several orders become 16 bits, and so do gate and up of experts."""
    _, _, config, _ = gptq_case(family, "", group_size=64)
    how = {"bits": 4, "group_size": 64, "symmetric": False}

    def quantize(name: str, w: Tensor):
        return gptq(name, w, 1, act_order=2 if name.endswith("k_proj") else 1, **how)

    theirs = write_quantized(tmp_path / "m", family, config | {"desc_act": True}, quantize)
    capsys.readouterr()
    path = convert(tmp_path / "m")
    error = capsys.readouterr().err
    assert re.fullmatch(r"\d+ weights are not kept quantized, as .*_proj.weight: act-order .*\n", error)
    has_experts = family != "llama-bias"
    expected = {"qkv_proj": None, "o_proj": "int4.g64", "gate_up_proj": None if has_experts else "int4.g64"}
    assert formats_of(path) == expected | {"down_proj": "int4.g64", "lm_head": None}
    sort_feed_forward(tmp_path / "m")
    check_weights(path, tmp_path / "m/reference", is_exact=False)
    is_dense = re.compile(r"[qkv]_proj\.weight|experts?\..*(gate|up|gate_up)_proj\.weight|experts.gate_up_proj")
    for name, p in theirs.named_parameters():
        if is_dense.search(name):
            p.data.copy_(p.bfloat16())
    same_logits(path, theirs)


def sort_feed_forward(folder: Path):
    """Puts the neurons of the reference's feed-forwards in the order of down_proj's groups."""
    stored, file = load_file(folder / "model.safetensors"), folder / "reference/model.safetensors"
    dense = load_file(file)
    for name, g_idx in stored.items():
        match = re.fullmatch(r"(.*\.)(down_proj|w2)\.(?:weight_)?g_idx", name)
        if match is None:
            continue
        order, prefix = g_idx.argsort(stable=True), match[1]
        dense[f"{prefix}{match[2]}.weight"] = dense[f"{prefix}{match[2]}.weight"][:, order]
        for row_name in dense:
            if re.fullmatch(rf"{re.escape(prefix)}(gate_proj|up_proj|w1|w3)\.(weight|bias)", row_name):
                dense[row_name] = dense[row_name][order]
            if row_name == f"{prefix}gate_up_proj.weight":
                dense[row_name] = dense[row_name].unflatten(0, (2, -1))[:, order].flatten(0, 1)
    save_file({name: t.contiguous() for name, t in dense.items()}, file, {"format": "pt"})


def test_groups_without_a_format(tmp_path, capsys):
    """If nothing can stay quantized the file is one of 16 bits, and a line says so."""
    *_, config, quantize = gptq_case("llama2", "", group_size=24)
    write_quantized(tmp_path / "m", "llama2", config, quantize)
    capsys.readouterr()
    assert convert(tmp_path / "m").name == "model.pth"
    assert "14 weights are not kept quantized, as " in capsys.readouterr().err


def test_layers_that_differ(tmp_path, capsys):
    """What is stacked gets a format that holds all of it: smaller groups, more bits or, if there is none, 16 bits."""
    how = {"symmetric": False, "bits": 4, "group_size": 64}
    changes = {"v_proj": {"group_size": 32}, "gate_proj": {"bits": 8}, "down_proj": {"bits": 8, "group_size": -1}}

    def quantize(name: str, w: Tensor):
        part = name.split(".")[-1]
        if part == "o_proj" or (part, "layers.1" in name) == ("q_proj", True):  # modules_to_not_convert
            return {f"{name}.weight": w}, w
        return gptq(name, w, 1, **how | changes.get(part, {}))

    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": {"+:.*v_proj": {"group_size": 32}}}
    write_quantized(tmp_path / "m", "llama2", config, quantize)
    capsys.readouterr()
    path = convert(tmp_path / "m")
    error = capsys.readouterr().err
    why = "there is no format for them together with what they are stacked with"
    assert error == f"2 weights are not kept quantized, as model.layers.1.self_attn.k_proj.weight: {why}\n"
    expected = {"qkv_proj": "int4.g32", "o_proj": None, "gate_up_proj": "int8.g64", "down_proj": "int8.g128"}
    assert formats_of(path) == expected | {"lm_head": None}
    assert read_checkpoint(path)[1]["layers"]["layers.1.attention.qkv_proj"] is None
    check_weights(path, tmp_path / "m/reference", is_exact=False)


def test_a_stack_with_16_bits_has_their_dtype(tmp_path):
    """q of float16 above k and v that are quantized."""
    _, _, config, quantize_4 = gptq_case("llama2", "")

    def quantize(name: str, w: Tensor):
        return ({f"{name}.weight": w.half()}, w.half().float()) if "q_proj" in name else quantize_4(name, w)

    write_quantized(tmp_path / "m", "llama2", config, quantize)
    ours, theirs = (read_checkpoint(convert(tmp_path / folder))[2] for folder in ("m", "m/reference"))
    qkv, expected = (tensors["layers.0.attention.qkv_proj.weight"] for tensors in (ours, theirs))
    assert qkv.dtype == torch.float16 and torch.equal(qkv, expected.half())


def test_four_bits_in_groups_of_16(tmp_path):
    """Int4 has none; GroupedInt8 holds them exactly."""
    family, _, config, quantize = packed_case("llama2", "", 4, 16, False)
    write_quantized(tmp_path / "m", family, config, quantize)
    path = convert(tmp_path / "m")
    assert path.name == "model_int8.g16.pth"
    check_weights(path, tmp_path / "m/reference", is_exact=True)


def test_config_groups_that_differ(tmp_path):
    """A target that names layers counts more than their type. The head may be quantized, too."""
    _, _, four_bits, quantize_4 = packed_case("", "", 4, 32, False)
    _, _, eight_bits, quantize_8 = packed_case("", "", 8, -1, True)
    _, _, float8_bits, quantize_float8 = CASES["float channel"]
    four, eight, float8 = (config["config_groups"]["group_0"] for config in (four_bits, eight_bits, float8_bits))
    groups = {
        "group_0": four | {"format": "pack-quantized"},
        "group_1": eight | {"targets": ["re:.*down_proj$"], "format": "pack-quantized"},
        "group_2": float8 | {"targets": ["lm_head"], "format": "float-quantized"},
    }
    config = four_bits | {"format": "mixed-precision", "config_groups": groups}
    how = {"down_proj": quantize_8, "lm_head": quantize_float8}

    def quantize(name: str, w: Tensor):
        return how.get(name.split(".")[-1], quantize_4)(name, w)

    theirs = write_quantized(tmp_path / "m", "qwen3", config, quantize, re.compile(rf"{IS_LINEAR.pattern}|^lm_head"))
    path = convert(tmp_path / "m")
    of_others = dict.fromkeys(("qkv_proj", "o_proj", "gate_up_proj"), "int4.g32")
    assert formats_of(path) == of_others | {"down_proj": "int8", "lm_head": "fp8"}
    check_weights(path, tmp_path / "m/reference", is_exact=True)
    same_logits(path, theirs)


def test_scales_of_32_bits(tmp_path, capsys):
    """They become float16. Where they are too small for it, the weight becomes 16 bits."""
    how = {"bits": 4, "group_size": 32, "symmetric": True, "scale_dtype": torch.float32}
    family, _, config, _ = packed_case("llama2", "int4.g32", **how)

    def quantize(name: str, w: Tensor):
        return packed(name, w * 2**-20 if name.endswith("o_proj") else w, **how)

    write_quantized(tmp_path / "m", family, config, quantize)
    path = convert(tmp_path / "m")
    assert "as model.layers.0.self_attn.o_proj.weight: no format here has" in capsys.readouterr().err
    assert read_checkpoint(path)[2]["layers.0.attention.qkv_proj.scales"].dtype == torch.float16
    assert formats_of(path)["qkv_proj"] == "int4.g32" and formats_of(path)["o_proj"] is None
    check_weights(path, tmp_path / "m/reference", is_exact=False)


# ---- Broken files ---------------------------------------------------------------------------------------------------


def test_unsupported_methods_are_named(tmp_path):
    make_hf("llama2").save_pretrained(tmp_path)
    compressed_as = {"quant_method": "compressed-tensors", "config_groups": {}}
    wrong = {
        "quant_method 'hqq' is not supported; awq, compressed-tensors, .*gptq": {"quant_method": "hqq"},
        "quant_method bitsandbytes is not supported": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "quant_method bitsandbytes is": {"load_in_8bit": True},
        "quant_method None is not supported": {"bits": 4},
        "checkpoint_format .marlin. is not": {"quant_method": "gptq", "checkpoint_format": "marlin"},
        "version 'gemv' is not one of gemm": {"quant_method": "awq", "version": "GEMV"},
        "format 'nvfp4-pack-quantized' is not one of pack": compressed_as | {"format": "nvfp4-pack-quantized"},
        "says quant_method gptq; none of the checkpoint's 30 tensors": {"quant_method": "gptq", "bits": 4},
        "says quant_method mxfp4; none": {"quant_method": "mxfp4"},
        "something of the wrong kind": compressed_as | {"config_groups": [3]},
        "must be an object": [4],
    }
    for match, config in wrong.items():
        set_quantization(tmp_path, config)
        refused(tmp_path, match)


def broken_checkpoint(folder: Path, case: str) -> Callable:
    """Writes one of CASES to folder. Returns the function that checks that changed tensors or config are refused."""
    family, _, config, quantize = CASES[case]
    write_quantized(folder, family, config, quantize)
    (folder / "model_old.pth").write_text("old")
    tensors = load_file(folder / "model.safetensors")

    def refuse(match: str, changes: dict | None = None, config_changes: dict | None = None):
        """changes: of the tensors of layer 1's k_proj: a function of one, a new one or, to remove it, None."""
        changed = dict(tensors)
        for kind, tensor in (changes or {}).items():
            name = f"model.layers.1.self_attn.k_proj.{kind}"
            changed[name] = tensor(tensors[name].clone()) if callable(tensor) else tensor
        save_file({n: t.contiguous() for n, t in changed.items() if t is not None}, folder / "model.safetensors")
        set_quantization(folder, config | (config_changes or {}))
        refused(folder, match)

    return refuse


def with_first(value: float) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t.view(-1)[0] = value
        return t

    return change


def test_broken_gptq(tmp_path):
    refuse = broken_checkpoint(tmp_path / "m", "gptq")
    k_proj = "model.layers.1.self_attn.k_proj"
    refuse("config.json says bits 8; the tensors of model.layers.0.* have bits 4", config_changes={"bits": 8})
    refuse("says group_size 64; .* have 6 scales for 192 inputs", config_changes={"group_size": 64})
    refuse("says group_size -1; .* have 6 scales for 192 inputs", config_changes={"group_size": -1})
    refuse("says bits {}; ", config_changes={"bits": {}})
    refuse("config.json says bits '4'; .* have bits 4", config_changes={"bits": "4"})
    refuse(f"no tensor {k_proj}.scales", {"scales": None})
    refuse(f"no tensor {k_proj}.qzeros", {"qzeros": None})
    refuse(f"{k_proj}.scales holds scales that are not finite", {"scales": with_first(math.nan)})
    refuse(f"{k_proj}.scales holds scales that are not finite", {"scales": with_first(math.inf)})
    refuse(f"{k_proj}.scales is .* torch.int32, which is no part", {"scales": lambda t: t.int()})
    refuse(rf"{k_proj}.scales is \[0, 128\] ", {"scales": lambda t: t[:0]})
    refuse(rf"{k_proj}.qweight is \[16, 120\]; .* \[16, 128\]", {"qweight": lambda t: t[:, 8:]})
    refuse(rf"{k_proj}.qzeros is \[3, 16\]; .* \[4, 16\]", {"qzeros": lambda t: t[1:]})
    refuse("have 4 scales for 96 inputs", {"qweight": lambda t: t[4:], "g_idx": lambda t: t[32:]})
    fewer = dict.fromkeys(("qzeros", "scales"), lambda t: t[1:])
    fewer |= {"qweight": lambda t: t[4:], "g_idx": lambda t: t[:96]}
    refuse(rf"{k_proj}.weight is \[128, 96\]; the config makes it \[128, 128\]", fewer)
    refuse(f"{k_proj} has 3 bits; 4 and 8 are supported", {"qzeros": lambda t: t[:, 4:]})
    refuse(f"{k_proj}.g_idx names group 4; there are 4", {"g_idx": with_first(4)})
    refuse(f"{k_proj}.g_idx names group -1", {"g_idx": with_first(-1)})
    refuse(f"{k_proj}.g_idx does not make groups of 32", {"g_idx": with_first(1)})
    refuse(rf"{k_proj}.g_idx is \[127\]", {"g_idx": lambda t: t[1:]})
    refuse(f"{k_proj}.g_idx is missing, although", {"g_idx": None}, config_changes={"desc_act": True})
    file = tmp_path / "m/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path / "m", "truncated")


def test_broken_awq_and_packed(tmp_path):
    refuse = broken_checkpoint(tmp_path / "awq", "awq")
    refuse("have 3 scales for 192 inputs", config_changes={"group_size": 128})
    refuse(r"qzeros is \[1, 4\]; .* \[2, 4\]", {"qzeros": lambda t: t[1:]})
    refuse("is AWQ of 8 bits; 4 are", {"scales": lambda t: t[:, ::2]}, {"bits": None})
    refuse("k_proj.g_idx is no part of a weight", {"g_idx": torch.arange(128)})
    refuse = broken_checkpoint(tmp_path / "packed", "packed asymmetric")
    refuse("k_proj.weight_global_scale is no part of a weight", {"weight_global_scale": torch.ones(1)})
    refuse(r"weight_shape is \[64, 128\], but weight_packed", {"weight_shape": with_first(64)})
    refuse(r"weight_shape is \[-1, 128\]", {"weight_shape": with_first(-1)})
    refuse("says num_bits 4; .* have num_bits 8", {"weight_shape": lambda t: t // torch.tensor([1, 2])})
    refuse(r"weight_zero_point is \[\d, 3\]", {"weight_zero_point": lambda t: t[:, 1:]})
    refuse("scales that are not finite", {"weight_scale": with_first(-math.inf)})
    stated = {"num_bits": 4, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["re:.*(mlp|o_proj).*"], "weights": stated}}
    refuse("no target of config_groups is model.layers.0.self_attn.", config_changes={"config_groups": groups})
    groups["group_0"] |= {"targets": ["Linear"], "weights": {"num_bits": 8}}
    refuse("says num_bits 8; .* have num_bits 4", config_changes={"config_groups": groups})
    groups["group_0"]["weights"] = stated | {"type": "float"}
    refuse("says type float; .* have type int", config_changes={"config_groups": groups})
    groups["group_0"] |= {"targets": ["re:("]}
    refuse("something of the wrong kind", config_changes={"config_groups": groups})


def test_broken_float8(tmp_path):
    refuse = broken_checkpoint(tmp_path / "channels", "float channel")
    refuse("k_proj.weight_global_scale is no part of a weight", {"weight_global_scale": torch.ones(1)})
    refuse("k_proj.weight_zero_point is no part of a weight", {"weight_zero_point": torch.ones(64, 1)})
    refuse(r"k_proj.weight_scale(_inv)? is no part of a weight", {"weight_scale_inv": torch.ones(64, 1)})
    refuse = broken_checkpoint(tmp_path / "blocks", "fp8 blocks")
    refuse(r"weight_scale_inv is \[1, 1, 1\]", {"weight_scale_inv": lambda t: t[None]})
    refuse(r"blocks that make them \[2, 4\]; .* scales \[1, 1\]", config_changes={"weight_block_size": [64, 32]})
    refuse("wrong kind", config_changes={"weight_block_size": [64]})
    refuse("wrong kind", config_changes={"weight_block_size": [0, 128]})
    refuse("no tensor model.layers.1.self_attn.k_proj.weight_scale", {"weight_scale_inv": None})
    refuse("weight holds numbers that are not finite", {"weight": lambda t: t.float().fill_(math.nan).to(t.dtype)})
    refuse("float8_e5m2, which is no part", {"weight": lambda t: t.float().to(torch.float8_e5m2)})
    refuse("scales that are not finite", {"weight_scale_inv": with_first(math.nan)})
