"""Quantized Hugging Face checkpoints that are broken, or whose method is unknown, are refused."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.quantized_folders import CASES, set_quantization, write_quantized
from tests.tiny import assert_refused, make_hf


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
        "checkpoint_format 'gemv' is not one of gemm": {"quant_method": "awq", "checkpoint_format": "gemv"},
        "format 'gemv_fast' is not one of gemm": {"quant_method": "awq", "version": "gemm", "format": "gemv_fast"},
        "quant_algo 'nvfp4' is not one of fp8, fp8_per": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "data_type 'mx_fp' is not one of int": {"quant_method": "auto-round", "data_type": "mx_fp"},
        "something of the wrong kind .'str' object": {"quant_method": "auto-round", "extra_config": {"lm_head": "16"}},
        "is_marlin_format is not supported": {"quant_method": "gptq", "is_marlin_format": True},
        "rotates activations .location 'input'.: not": compressed_as | transform_at("weight_input", "input"),
        "says quant_method compressed-tensors; none": compressed_as | transform_at("weight_input", "weight_output"),
        "format 'nvfp4-pack-quantized' is not one of pack": compressed_as | {"format": "nvfp4-pack-quantized"},
        "says quant_method gptq; none of the checkpoint's 30 tensors": {"quant_method": "gptq", "bits": 4},
        "says quant_method mxfp4; none": {"quant_method": "mxfp4"},
        "something of the wrong kind": compressed_as | {"config_groups": [3]},
        "must be an object": [4],
    }
    for match, config in wrong.items():
        set_quantization(tmp_path, config)
        assert_refused(tmp_path, match)


def transform_at(*locations: str) -> dict:
    """Returns a transform_config of compressed-tensors with Hadamard rotations at these locations."""
    places = [{"targets": ["Linear"], "location": location, "inverse": False} for location in locations]
    return {"transform_config": {"config_groups": {"R": {"type": "hadamard", "apply": places}}}}


def broken_checkpoint(folder: Path, case: str) -> Callable:
    """Writes one of CASES to folder. Returns a function that checks that changed tensors or a changed config is
    refused."""
    family, _, config, quantize = CASES[case]
    write_quantized(folder, family, config, quantize)
    (folder / "model_old.pth").write_text("old")
    tensors = load_file(folder / "model.safetensors")

    def refuse(match: str, changes: dict | None = None, config_changes: dict | None = None):
        """changes: name -> a function of the tensor, a new tensor, or None to remove it, for the tensors of layer 1's
        k_proj."""
        changed = dict(tensors)
        for kind, tensor in (changes or {}).items():
            name = f"model.layers.1.self_attn.k_proj.{kind}"
            changed[name] = tensor(tensors[name].clone()) if callable(tensor) else tensor
        save_file({n: t.contiguous() for n, t in changed.items() if t is not None}, folder / "model.safetensors")
        set_quantization(folder, config | (config_changes or {}))
        assert_refused(folder, match)

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
    for field in ("bits", "group_size"):
        for value in ({}, "4.0", 4.0, True):
            refuse(f"quantization_config's {field} must be an integer, not {value!r}", config_changes={field: value})
    for pattern, (fields, match) in {
        ".*k_proj": ({"bits": 8}, "says bits 8; .*k_proj have bits 4"),
        "+:.*mlp": ({"group_size": 64}, "says group_size 64; .*mlp"),
        "-:.*q_proj": ({}, "says that '-:.*q_proj' .dynamic. is not quantized; .*q_proj have a quantized weight"),
        "(": ({}, "something of the wrong kind .missing \\)"),
        ".*v_proj": ([], "something of the wrong kind"),
    }.items():
        refuse(match, config_changes={"dynamic": {pattern: fields}})
    refuse("something of the wrong kind", config_changes={"dynamic": [1]})
    refuse("says sym true; .*k_proj have zero points other than 8", {"qzeros": with_first(0)})
    refuse(f"no tensor {k_proj}.scales", {"scales": None})
    refuse(f"no tensor {k_proj}.qzeros", {"qzeros": None})
    refuse(f"{k_proj}.scales holds scales that are not finite", {"scales": with_first(math.nan)})
    refuse(f"{k_proj}.scales holds scales that are not finite", {"scales": with_first(math.inf)})
    refuse(f"{k_proj}.scales is .* torch.int32; its format makes it .*float32, 2-D", {"scales": lambda t: t.int()})
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
    refuse(f"{k_proj}.g_idx names group -1", {"g_idx": lambda t: t.fill_(-1)})
    refuse(f"{k_proj}.g_idx does not make groups of 32", {"g_idx": with_first(1)})
    refuse(rf"{k_proj}.g_idx is \[127\]", {"g_idx": lambda t: t[1:]})
    refuse(f"{k_proj}.g_idx is missing, although", {"g_idx": None}, config_changes={"desc_act": True})
    file = tmp_path / "m/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(tmp_path / "m", "truncated")


def test_broken_awq_and_packed(tmp_path):
    refuse = broken_checkpoint(tmp_path / "awq", "awq")
    refuse("have 3 scales for 192 inputs", config_changes={"group_size": 128})
    refuse(r"qzeros is \[1, 4\]; .* \[2, 4\]", {"qzeros": lambda t: t[1:]})
    refuse("is AWQ of 8 bits; 4 are", {"scales": lambda t: t[:, ::2]}, {"bits": None})
    refuse("k_proj.g_idx has no place in this format, which has qweight, qzeros, scales", {"g_idx": torch.arange(128)})
    refuse = broken_checkpoint(tmp_path / "packed", "packed asymmetric")
    refuse("k_proj.weight_global_scale has no place in this format", {"weight_global_scale": torch.ones(1)})
    refuse(r"weight_shape is \[64, 128\], but weight_packed", {"weight_shape": with_first(64)})
    refuse(r"weight_shape is \[-1, 128\]", {"weight_shape": with_first(-1)})
    refuse("says num_bits 4; .* have num_bits 8", {"weight_shape": lambda t: t // torch.tensor([1, 2])})
    refuse("no tensor model.layers.1.self_attn.k_proj.weight_zero_point", {"weight_zero_point": None})
    refuse("k_proj.weight_g_idx names group -1", {"weight_g_idx": torch.arange(128) // 32 - 1})
    refuse(r"weight_zero_point is \[\d, 3\]", {"weight_zero_point": lambda t: t[:, 1:]})
    refuse("scales that are not finite", {"weight_scale": with_first(-math.inf)})
    stated = {"num_bits": 4, "strategy": "group", "group_size": 32}
    refuse("says that 're:.*k_proj' .ignore. is not quantized", config_changes={"ignore": ["re:.*k_proj"]})
    groups = {"group_0": {"targets": ["Linear"], "weights": stated | {"symmetric": True}}}
    refuse("says symmetric true; .* have zero points other than 8", config_changes={"config_groups": groups})
    groups = {"group_0": {"targets": ["re:.*(mlp|o_proj).*"], "weights": stated}}
    refuse("no target of config_groups is model.layers.0.self_attn.", config_changes={"config_groups": groups})
    groups["group_0"] |= {"targets": ["Linear"], "weights": {"num_bits": 8}}
    refuse("says num_bits 8; .* have num_bits 4", config_changes={"config_groups": groups})
    groups["group_0"]["weights"] = stated | {"type": "float"}
    refuse("says type float; .* have type int", config_changes={"config_groups": groups})
    groups["group_0"] |= {"targets": ["re:("]}
    refuse("something of the wrong kind", config_changes={"config_groups": groups})


def test_broken_auto_round(tmp_path):
    """Broken names in extra_config are refused. They are names of layers, or regular expressions for whole names."""
    refuse = broken_checkpoint(tmp_path / "m", "auto-round")
    k_proj = "model.layers.1.self_attn.k_proj"
    refuse("says that '-:.*' .dynamic. is not quantized; .*k_proj", None, {"extra_config": {k_proj: {"bits": 16}}})
    refuse("says bits 8; .*1.mlp.up_proj have bits 4", None, {"extra_config": {".*1.mlp.up_proj": {"bits": 8}}})
    refuse("says sym true; .*k_proj have zero points", {"qzeros": with_first(0)}, {"extra_config": {k_proj[:-1]: {}}})
    refuse("down_proj has 32 bits; 4 and 8 are supported", None, {"packing_format": "auto_round:auto_awq"})


def test_broken_int8(tmp_path):
    refuse = broken_checkpoint(tmp_path / "int4", "int8 of 4 bits")
    refuse("says num_bits 4; .*k_proj have numbers beyond -8 to 7 in weight", {"weight": with_first(8)})
    refuse("says num_bits 4; .*k_proj have numbers beyond -8 to 7 in weight", {"weight": with_first(-9)})
    zeros = torch.full((32, 2), -9, dtype=torch.int8)
    refuse("k_proj have numbers beyond -8 to 7 in weight_zero_point", {"weight_zero_point": zeros})
    refuse(r"weight_zero_point is \[32, 1\]; .* \[32, 2\]", {"weight_zero_point": zeros[:, 1:]})
    refuse(r"weight_zero_point is \[3\] for 32 outputs", {"weight_zero_point": zeros[:3, 0]})


def test_broken_float8(tmp_path):
    refuse = broken_checkpoint(tmp_path / "channels", "float channel")
    refuse("k_proj.weight_global_scale has no place in this format", {"weight_global_scale": torch.ones(1)})
    refuse("k_proj.weight_zero_point has no place in this format", {"weight_zero_point": torch.ones(64, 1)})
    refuse(r"k_proj.weight_scale(_inv)? has no place in this format", {"weight_scale_inv": torch.ones(64, 1)})
    refuse = broken_checkpoint(tmp_path / "blocks", "fp8 blocks")
    refuse(r"weight_scale_inv is \[1, 1, 1\]", {"weight_scale_inv": lambda t: t[None]})
    refuse(r"blocks that make them \[2, 4\]; .* scales \[1, 1\]", config_changes={"weight_block_size": [64, 32]})
    refuse("wrong kind", config_changes={"weight_block_size": [64]})
    refuse("wrong kind", config_changes={"weight_block_size": [0, 128]})
    refuse("no tensor model.layers.1.self_attn.k_proj.weight_scale", {"weight_scale_inv": None})
    refuse("weight holds numbers that are not finite", {"weight": lambda t: t.float().fill_(math.nan).to(t.dtype)})
    refuse("float8_e5m2; its format makes it .*_e4m3fn", {"weight": lambda t: t.float().to(torch.float8_e5m2)})
    refuse("scales that are not finite", {"weight_scale_inv": with_first(math.nan)})
    refuse("scales that are not finite", {"weight_scale_inv": lambda t: (t * math.nan).to(torch.float8_e8m0fnu)})
    refuse = broken_checkpoint(tmp_path / "modelopt", "modelopt blocks")
    refuse(r"blocks that make them \[1, 1\]; .* scales \[1, 2\]", {"weight_scale": torch.ones(1, 1, 1, 2)})
    refuse("weight_scale is .* torch.float32; its format makes it .* 0-D or 1-D or 2-D", None, {"quant_algo": "FP8"})
