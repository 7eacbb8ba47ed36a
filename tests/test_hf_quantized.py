"""Quantized Hugging Face checkpoints keep their values when they are converted."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint import read_checkpoint
from converters.hf_quantized_integers import unpack_words
from tests.quantized_folders import (
    CASES,
    IS_LINEAR,
    check_weights,
    float8,
    formats_of,
    gptq,
    gptq_case,
    packed,
    packed_case,
    set_quantization,
    write_quantized,
)
from tests.tiny import assert_refused, convert, make_hf, same_logits
from utils.errors import UsageError


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
    """The zero points of symmetric weights, not config.json, decide the version of GPTQ."""
    for version in (1, 2):
        family, _, config, quantize = gptq_case("llama2", "int4.g32", version)
        for label in ({"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}):
            folder = tmp_path / f"{version}{label['checkpoint_format']}"
            write_quantized(folder, family, config | label, quantize)
            check_weights(convert(folder), folder / "reference", is_exact=True)


def test_version_of_gptq_in_other_places(tmp_path):
    """Asymmetric zero points of 4 bits decide the version of GPTQ, too. For 8 bits, all labels are read."""
    for bits in (4, 8):
        family, _, config, quantize = gptq_case("llama2", "", version=2, bits=bits, symmetric=False)
        version = {"checkpoint_format": config.pop("checkpoint_format")}
        labels = {"format": ({"format": "gptq_v2"}, {}), "file": ({}, version)}
        if bits == 4:
            labels["none"] = ({}, {})
        for label, (fields, in_file) in labels.items():
            folder = tmp_path / f"{bits}{label}"
            write_quantized(folder, family, config | fields, quantize)
            (folder / "quantize_config.json").write_text(json.dumps(config | in_file))
            check_weights(convert(folder), folder / "reference", is_exact=True)
    set_quantization(tmp_path / "4none", config | {"bits": 4, "checkpoint_format": "gptq"})
    assert_refused(tmp_path / "4none", "says checkpoint_format gptq; the tensors of .* have zero points of gptq_v2")


OLDER_FILES = [("gptq", "quantize_config.json"), ("awq", "quant_config.json"), ("modelopt", "hf_quant_config.json")]


@pytest.mark.parametrize("case, file", OLDER_FILES)
def test_the_files_of_older_programs(case, file, tmp_path):
    """The config files of AutoGPTQ, AutoAWQ and ModelOpt are read if config.json has no quantization_config."""
    folder = tmp_path / "m"
    family, _, config, quantize = CASES[case]
    write_quantized(folder, family, None, quantize)
    assert_refused(folder, "is quantized, and config.json has no quantization_config, which names the format")
    older = {"w_bit": 4, "q_group_size": "64", "version": "GEMM"} if case == "awq" else config | {"bits": "4"}
    older = {key: value for key, value in older.items() if key != "quant_method"}
    (folder / file).write_text(json.dumps({"quantization": older} if case == "modelopt" else older))
    if case == "gptq":
        (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    check_weights(convert(folder), folder / "reference", is_exact=True)
    (folder / file).write_text("[3]")
    with pytest.raises(UsageError, match=f"{file} must hold an object"):
        convert(folder)
    (folder / file).unlink()
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | {"compression_config": {}}))
    with pytest.raises(UsageError, match="rename its compression_config, an older name"):
        convert(folder)


def test_only_biases_of_zeros_may_be_left_over(tmp_path):
    """Biases of zeros that AutoGPTQ writes for layers without a bias are left out. Biases that the family has stay, and
    all others are refused."""
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
    assert_refused(tmp_path / "ones", "_proj.bias has no place in this model")


def test_zero_points_of_zero_minus_one(tmp_path):
    """A zero point of -1, which borrows from the next one in its word, is read correctly. A group of positive weights
    has one."""
    _, _, config, quantize = gptq_case("llama2", "int4.g32", symmetric=False)

    def quantize_positive(name: str, w: Tensor):
        w = w.clone()
        w[::3] = w[::3].abs()
        return quantize(name, w.abs() if name.endswith("o_proj") else w)

    write_quantized(tmp_path / "m", "llama2", config, quantize_positive)
    path = convert(tmp_path / "m")
    assert not read_checkpoint(path)[2]["layers.0.attention.o_proj.zeros"].any()
    check_weights(path, tmp_path / "m/reference", is_exact=True)


# (family, bits, group size): the layers with an order of inputs. One group of all inputs has nothing to order, and the
# rows of gate_proj and up_proj order the inputs of down_proj
ACT_ORDER_CASES = {
    ("llama-bias", 4, 32): ["qkv_proj", "o_proj", "gate_up_proj"],
    ("phi3", 4, 64): ["qkv_proj", "o_proj", "gate_up_proj"],
    ("arcee", 4, 32): ["qkv_proj", "o_proj", "gate_up_proj"],
    ("gemma2", 8, 32): ["qkv_proj", "o_proj", "gate_up_proj"],
    ("olmo2", 4, 32): ["qkv_proj", "o_proj", "gate_up_proj", "lm_head"],
    ("qwen3", 4, 128): [],
    ("llama2", 4, -1): [],
}


@pytest.mark.parametrize("case", ACT_ORDER_CASES, ids=str)
def test_act_order_keeps_values_and_formats(case, tmp_path, capsys):
    """With act-order every layer stays quantized and keeps its values. For one family the head is quantized, too."""
    family, bits, group_size = case
    ordered, is_linear = ACT_ORDER_CASES[case], IS_LINEAR
    how = {"bits": bits, "group_size": group_size, "symmetric": family == "olmo2", "act_order": 1}
    if family == "olmo2":
        _, _, config, quantize = packed_case(family, "", **how)
        config["ignore"] = []
        is_linear = re.compile(rf"{IS_LINEAR.pattern}|^lm_head")
    else:
        _, _, config, _ = gptq_case(family, "", bits=bits, group_size=group_size, symmetric=False)
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
    """Layers with several orders that are stacked into one matrix become 16 bits, and so do gate and up of experts."""
    _, _, config, _ = gptq_case(family, "", group_size=64, symmetric=False)
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
    """Sorts the neurons of each feed-forward in the reference in the order of the groups of down_proj."""
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


def test_layer_norms_need_16_bits(tmp_path):
    """A quantized checkpoint of a family with LayerNorms is refused, because their conversion changes the weights."""
    _, _, config, quantize = gptq_case("nemotron", "", bits=4, group_size=32)
    write_quantized(tmp_path / "m", "nemotron", config, quantize)
    assert_refused(tmp_path / "m", "is quantized, and this family's conversion changes it: take 16-bit weights")


def test_groups_without_a_format(tmp_path, capsys):
    """If no weight can stay quantized, the file has 16 bits, and a line says so."""
    *_, config, quantize = gptq_case("llama2", "", group_size=24)
    write_quantized(tmp_path / "m", "llama2", config, quantize)
    capsys.readouterr()
    assert convert(tmp_path / "m").name == "model.pth"
    assert "14 weights are not kept quantized, as " in capsys.readouterr().err


def test_stacked_weights_get_a_format_that_holds_all_values(tmp_path, capsys):
    """The format has smaller groups, more bits or, at worst, 16 bits."""
    how = {"symmetric": False, "bits": 4, "group_size": 64}
    changes = {"v_proj": {"group_size": 32}, "gate_proj": {"bits": 8}, "down_proj": {"bits": 8, "group_size": -1}}

    def quantize(name: str, w: Tensor):
        part = name.split(".")[-1]
        if part == "o_proj" or (part, "layers.1" in name) == ("q_proj", True):  # unquantized
            return {f"{name}.weight": w}, w
        return gptq(name, w, 1, **how | changes.get(part, {}))

    dynamic = {f"+:.*{part}": fields for part, fields in changes.items()} | {"-:.*o_proj": {}}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": dynamic}
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
    """A stack of a float16 q and quantized k and v becomes float16."""
    _, _, config, quantize_4 = gptq_case("llama2", "")

    def quantize(name: str, w: Tensor):
        return ({f"{name}.weight": w.half()}, w.half().float()) if "q_proj" in name else quantize_4(name, w)

    write_quantized(tmp_path / "m", "llama2", config, quantize)
    ours, theirs = (read_checkpoint(convert(tmp_path / folder))[2] for folder in ("m", "m/reference"))
    qkv, expected = (tensors["layers.0.attention.qkv_proj.weight"] for tensors in (ours, theirs))
    assert qkv.dtype == torch.float16 and torch.equal(qkv, expected.half())


def test_four_bits_in_groups_of_16(tmp_path):
    """GroupedInt8 holds 4-bit weights in groups of 16 exactly, with zero points that Int4 cannot hold."""
    family, _, config, quantize = packed_case("llama2", "", 4, 16, False)
    write_quantized(tmp_path / "m", family, config, quantize)
    path = convert(tmp_path / "m")
    assert path.name == "model_int8.g16.pth"
    check_weights(path, tmp_path / "m/reference", is_exact=True)


def test_config_groups_that_differ(tmp_path):
    """A target that names layers has precedence over one that names their type. The head may be quantized, too."""
    _, _, four_bits, quantize_4 = packed_case("", "", 4, 32, False)
    _, _, eight_bits, quantize_8 = packed_case("", "", 8, -1, True)
    _, _, float8_bits, quantize_float8 = CASES["float channel"]
    four, eight, float8 = (config["config_groups"]["group_0"] for config in (four_bits, eight_bits, float8_bits))
    groups = {
        "group_0": four | {"format": "pack-quantized"},
        "group_1": eight | {"targets": ["re:.*down_proj$"], "format": "pack-quantized"},
        "group_2": float8 | {"targets": ["lm_head"], "format": "float-quantized"},
    }
    config = four_bits | {"format": "mixed-precision", "config_groups": groups, "ignore": []}
    how = {"down_proj": quantize_8, "lm_head": quantize_float8}

    def quantize(name: str, w: Tensor):
        return how.get(name.split(".")[-1], quantize_4)(name, w)

    theirs = write_quantized(tmp_path / "m", "qwen3", config, quantize, re.compile(rf"{IS_LINEAR.pattern}|^lm_head"))
    path = convert(tmp_path / "m")
    of_others = dict.fromkeys(("qkv_proj", "o_proj", "gate_up_proj"), "int4.g32")
    assert formats_of(path) == of_others | {"down_proj": "int8", "lm_head": "fp8"}
    check_weights(path, tmp_path / "m/reference", is_exact=True)
    same_logits(path, theirs)


def test_the_target_that_counts(tmp_path):
    """Of several targets, compressed-tensors takes a name first, then the alphabetically first regular expression, then
    a type. The bits in the other schemes would contradict the tensors. A weight_g_idx of only -1 means that inputs have
    no order."""
    family, _, config, _ = packed_case("qwen3", "", 4, 32, False)
    four = config["config_groups"]["group_0"]["weights"] | {"actorder": "dynamic"}
    targets_of = {
        2: ["Linear", "re:.*self_attn", "re:.*mlp"],
        4: ["re:.*_proj$", "model.layers.1.mlp.up_proj"],
        8: ["re:.*mlp.up_proj"],
    }
    config["config_groups"] = {
        f"group_{bits}": {"targets": targets, "weights": four | {"num_bits": bits}}
        for bits, targets in targets_of.items()
    }
    config["config_groups"]["of_embedding"] = {"targets": ["Embedding"], "weights": four | {"symmetric": True}}
    config["ignore"] = ["lm_head", "re:.*layers.0.mlp"]

    def quantize_without_order(name: str, w: Tensor):
        if "layers.0.mlp" in name:
            return {f"{name}.weight": w}, w
        has_zeros = "embed_tokens" not in name  # 97 outputs fill no whole words of zero points
        tensors, dense = packed(name, w, bits=4, group_size=32, symmetric=not has_zeros)
        return tensors | {f"{name}.weight_g_idx": torch.full((w.shape[1],), -1)}, dense

    is_linear = re.compile(rf"{IS_LINEAR.pattern}|embed_tokens.weight$")
    theirs = write_quantized(tmp_path / "m", family, config, quantize_without_order, is_linear)
    path = convert(tmp_path / "m")
    assert read_checkpoint(path)[1]["layers"]["embed_tokens"]["mode"] == "int4"
    same_logits(path, theirs)


def test_a_quantized_router_becomes_16_bits(tmp_path, capsys):
    _, _, config, quantize = CASES["float channel"]
    is_linear = re.compile(rf"{IS_LINEAR.pattern}|mlp.*gate.weight")
    write_quantized(tmp_path / "m", "qwen2-moe", config, quantize, is_linear)
    capsys.readouterr()
    path = convert(tmp_path / "m")
    what = "4 weights are not kept quantized, as model.layers.0.mlp.gate.weight"
    assert capsys.readouterr().err == f"{what}: routers have 16 bits here\n"
    check_weights(path, tmp_path / "m/reference", is_exact=False)


def test_a_single_word_in_a_row():
    """Rows of a single word, such as zero points of up to 8 outputs, are read. PyTorch calls them contiguous whatever
    their stride."""
    words = torch.tensor([[0x76543210, 1]], dtype=torch.int32).T
    assert unpack_words(words, 4).tolist() == [list(range(8)), [1, *[0] * 7]]


def test_only_the_kv_cache_is_quantized(tmp_path):
    """With the format "dense" only the KV cache is quantized. Its scales are left out, because ours has 16 bits."""
    make_hf("llama2").save_pretrained(tmp_path)
    expected = read_checkpoint(convert(tmp_path))[2]
    tensors = load_file(tmp_path / "model.safetensors")
    scales = {f"model.layers.{i}.self_attn.{part}_scale": torch.ones(1) for i in range(3) for part in "kv"}
    save_file(tensors | scales, tmp_path / "model.safetensors")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": scheme}
    set_quantization(tmp_path, config)
    ours = read_checkpoint(convert(tmp_path))[2]
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], t) for name, t in expected.items())


def test_dense_weights_are_rounded_once(tmp_path):
    """A dequantized weight is computed with float32 scales, although our formats would round them to float16."""
    how = {"bits": 4, "symmetric": True, "scale_dtype": torch.float32}
    family, _, config, _ = packed_case("llama2", "", group_size=32, **how)
    eight = {"num_bits": 8, "type": "float", "strategy": "channel"}
    config["config_groups"]["group_1"] = {"targets": ["re:.*q_proj"], "weights": eight}

    def quantize(name: str, w: Tensor):
        if "q_proj" in name:
            return float8(name, w, 1, None, "weight_scale")
        return packed(name, w, group_size=32, **how)

    write_quantized(tmp_path / "m", family, config, quantize)
    ours, theirs = (read_checkpoint(convert(tmp_path / folder))[2] for folder in ("m", "m/reference"))
    for name in [name for name in theirs if "qkv_proj" in name]:
        assert torch.equal(ours[name], theirs[name].bfloat16())


def test_scales_of_32_bits(tmp_path, capsys):
    """Float32 scales become float16. If one is too small for that, the weight becomes 16 bits."""
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
