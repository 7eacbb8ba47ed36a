"""quantize.py: each format rounds to the nearest value, its file loads as the model that it describes, and mistakes are
refused."""

import copy
import resource
import subprocess
import sys

import pytest
import torch

import formats
import gptq
import quantize
from checkpoint import read_checkpoint, save_checkpoint
from cli.script import run_script
from formats import MXFP4, Float8, GroupedInt8, Int4, Int8, QuantizationConfig, Unquantized, format_from_dict
from formats.floats import E2M1_VALUES, round_mxfp4
from formats.integers import GroupwiseAffine, split_groups
from layers.kv_cache import KVCache
from layers.linear import quantizable_linears
from loading import load_model
from scripts.kernel_checks import exact_results
from scripts.kernel_checks.exact_results import format_label
from tests.tiny import convert, write_folder
from text.tokenizer import load_tokenizer
from utils.errors import UsageError
from utils.files import ROOT


class Int4HQQ(Int4):
    """Int4, rounded as by --mode int4-hqq."""

    def quantize_rows(self, w):
        return quantize.hqq_quantize_rows(self, w)


def is_made(format) -> bool:
    """Whether quantize.py makes files of this format, and not just the converters."""
    return type(format) in formats.FORMAT_BY_MODE.values() and format == type(format).from_options(format.group_size)


QUANTIZED = [format for format in exact_results.CPU_FORMATS if format.is_quantized]
FORMATS = {format.name: format for format in QUANTIZED if is_made(format)}
FORMATS |= {"int4.g64": Int4(64), "int4-hqq.g32": Int4HQQ(32)}
IMPORTED = {repr(format): format for format in [*QUANTIZED, Int4(64, torch.float16)] if not is_made(format)}
EVERY = FORMATS | IMPORTED
INTEGERS = {name: format for name, format in EVERY.items() if isinstance(format, Int8 | GroupwiseAffine)}
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 10
FLOAT_ERROR = 1e-5  # of a few float32 operations, relative to their result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """family -> a folder with model.pth and a tokenizer"""
    made = {}

    def make(family: str):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            write_folder(family, made[family])
            convert(made[family])
        return made[family]

    return make


def run_quantize(monkeypatch, path, *args: str):
    monkeypatch.setattr(sys, "argv", ["quantize.py", f"--checkpoint_path={path}", *args])
    quantize.main()


def random_matrix(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def rounded(format, w: torch.Tensor) -> torch.Tensor:
    """Returns w quantized and dequantized."""
    return format.dequantize(format.quantize(w), torch.float32)


def shapes_of(tensors: dict) -> dict:
    return {name: (t.shape, t.dtype) for name, t in tensors.items()}


@torch.inference_mode()
def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the logits [B, T, V] of tokens [B, T]."""
    start_pos = torch.zeros(len(tokens), dtype=torch.long)
    return model(tokens, start_pos, KVCache(model, *tokens.shape))


@pytest.mark.parametrize("k", [8, 24, 64, 72, 200])
@pytest.mark.parametrize("format", INTEGERS.values(), ids=INTEGERS)
def test_every_weight_is_rounded_to_the_nearest_the_format_has(format, k):
    w = random_matrix(50, k)
    w[7] = 0
    w[8] = w[8].abs() + 5  # all on one side of zero
    tensors = format.quantize(w)
    assert shapes_of(tensors) == shapes_of(format.allocate(w.shape, w.dtype, "cpu"))
    error = (format.dequantize(tensors, torch.float32) - w).abs()
    assert not error[7].any()
    if isinstance(format, Int8):
        steps = tensors["scales"][:, None]
        levels = torch.arange(-127, 128) * steps[..., None]  # [N, 1, 255]
    else:
        steps, zeros = (tensors[n].float().repeat_interleave(format.group_size, -1)[:, :k] for n in ("scales", "zeros"))
        q = torch.arange(256 if isinstance(format, GroupedInt8) else 16)
        levels = (q - zeros[..., None] / 2**format.zero_fraction_bits) * steps[..., None]  # [N, K, len(q)]
    nearest = (levels - w[..., None]).abs().amin(-1)
    tolerance = FLOAT_ERROR * w.abs().amax(-1, keepdim=True)
    assert (error <= nearest + tolerance).all()
    # A range that spans a group leaves no weight farther off than half a step. With hqq, it may leave some out.
    reach = 2.0 if isinstance(format, Int4HQQ) else 0.5
    assert (error <= reach * steps + tolerance).all()


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_stored_weights_quantize_to_themselves(format):
    """Dequantized weights quantize to the same codes, since their minimum and maximum give the same range."""
    w = rounded(format, random_matrix(20, 96))
    assert torch.equal(rounded(format, w), w)


@pytest.mark.parametrize("format", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("start, length", [(0, 80), (80, 80), (128, 32), (8, 8)])
def test_a_shard_means_its_part_of_the_weight(format, start, length):
    w = random_matrix(6, 160)
    tensors, shard_format = format.quantize(w), format.shard_format(length)
    shard = {name: format.shard_inputs(name, t, start, length) for name, t in tensors.items()}
    assert shapes_of(shard) == shapes_of(shard_format.allocate(torch.Size((6, length)), w.dtype, "cpu"))
    expected = format.dequantize(tensors, torch.float32)[:, start : start + length]
    assert torch.equal(shard_format.dequantize(shard, torch.float32), expected)


def test_every_format_is_tested():
    for tested in ([Unquantized(), *EVERY.values()], exact_results.CPU_FORMATS):
        assert {type(format) for format in tested} >= set(formats.FORMATS)
    assert quantize.MODES.keys() == {name.partition(".")[0] for name in FORMATS} | {"int4-gptq"}


@pytest.mark.parametrize("format", [Unquantized(), *FORMATS.values(), *IMPORTED.values()], ids=format_label)
def test_a_header_names_its_format(format):
    parsed = format_from_dict(format.to_dict())
    assert parsed.to_dict() == format.to_dict() and parsed.name == format.name
    assert QuantizationConfig.from_dict({"mode": "int8", "layers": {"a": format.to_dict()}}).of_layer("a") == parsed


def test_a_mode_names_one_class():
    assert len({format_class.mode for format_class in formats.FORMATS}) == len(formats.FORMATS)


@pytest.mark.parametrize(
    "quantization",
    [
        "int4", {}, {"mode": "int2"}, {"mode": "int4"}, {"mode": "int4", "groupsize": 16},
        {"mode": "int4", "groupsize": 32, "scale_dtype": "float32"},
        {"mode": "int4", "groupsize": 32, "scale_dtype": ["float16"]},
        {"mode": "int4", "groupsize": 32, "scale_dtype": None},
        {"mode": "int8", "groupsize": 32},
        {"mode": "int8-grouped", "groupsize": 8}, {"mode": "int8-grouped", "groupsize": None},
        {"mode": "int8-grouped", "groupsize": [32]}, {"mode": "int8-grouped", "groupsize": 32, "scale_dtype": "int8"},
        {"mode": "int8", "scale_dtype": "float16"},
    ],
    ids=str,
)
def test_a_header_that_names_none(quantization):
    with pytest.raises(UsageError, match="the checkpoint is quantized as .*, which this version does not read"):
        format_from_dict(quantization)


E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # all values of e4m3, and two NaN
E2M1 = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])


@pytest.mark.parametrize("format", [Float8(), Float8(32), MXFP4()], ids=lambda format: format.name)
def test_floats_are_rounded_to_the_nearest_the_format_has(format):
    w = random_matrix(50, 96)
    w[7] = 0
    w[8] *= 1e-30
    w[9] *= torch.logspace(-30, 30, 96)
    tensors = format.quantize(w)
    assert shapes_of(tensors) == shapes_of(format.allocate(w.shape, w.dtype, "cpu"))
    error = (format.dequantize(tensors, torch.float32) - w).abs()
    assert not error[7].any()
    if isinstance(format, MXFP4):
        values, steps = E2M1, (tensors["scales"].float() - 127).exp2()
    else:
        values, steps = E4M3[~E4M3.isnan()], tensors["scales"]
        assert torch.equal(steps.max(1).values, w.abs().amax(1).div(448).clamp(min=2.0**-126))  # 448 is e4m3's largest
    levels = steps.repeat_interleave(format.effective_group_size(96), 1)[..., None] * values  # [N, K, values]
    nearest = (levels - w[..., None]).abs().amin(-1)
    assert (error <= nearest * (1 + FLOAT_ERROR) + 1e-37).all()


def test_ties_and_exponents_of_mxfp4():
    """Ties go to the even mantissa. The exponent is that of the standard or the next one, whichever errs less."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    w = torch.cat([ties, -ties, 4 * torch.ones(16)])[None]
    assert torch.equal(MXFP4().dequantize(MXFP4().quantize(w), torch.float32)[0, :16], torch.cat([even, -even]))
    assert MXFP4().quantize(w)["scales"].item() == 127
    w = random_matrix(500, 32)
    q, scales = round_mxfp4(w)
    error = (MXFP4().dequantize(MXFP4().quantize(w), torch.float32) - w).square().sum(-1)
    standard = w.abs().amax(-1).log2().floor() - 2
    losses = []
    for exponents in (standard, standard + 1):
        levels = exponents.exp2()[:, None, None] * E2M1
        losses.append((levels - w[..., None]).abs().amin(-1).square().sum(-1))
    torch.testing.assert_close(error, torch.minimum(*losses))
    takes_next = scales == standard + 128
    assert takes_next.any() and (takes_next | (scales == standard + 127)).all()


def test_hqq_and_fitted_scales_beat_the_plain_range():
    w = random_matrix(256, 128) ** 3  # heavy tails
    plain, hqq = rounded(Int4(64), w), rounded(Int4HQQ(64), w)
    assert (hqq - w).abs().sqrt().sum() < 0.97 * (plain - w).abs().sqrt().sum()
    groups = split_groups(w, 64)
    fitted_range = gptq.fit_scales_and_zeros(groups, torch.ones(1, 2, 64))
    fitted = Int4(64).dequantize(Int4(64).round_groups(groups, *fitted_range, 128), torch.float32)
    assert (fitted - w).square().sum() < 0.9 * (plain - w).square().sum()


@pytest.mark.parametrize("family", ["llama2", "llama3", "llama-bias", "qwen3-moe"])
@pytest.mark.parametrize("name", FORMATS)
def test_file_loads_as_the_model_it_describes(family, name, folder, monkeypatch, tmp_path):
    format, path = FORMATS[name], folder(family) / "model.pth"
    mode, _, group_size = name.partition(".g")
    options = [f"--groupsize={group_size}"] if group_size else []
    run_quantize(monkeypatch, path, f"--mode={mode}", *options)
    (folder(family) / f"model_{name}.pth").rename(tmp_path / "any name")
    config, quantization, tensors = read_checkpoint(tmp_path / "any name")
    assert quantization == ({"mode": "int4", "groupsize": int(group_size)} if group_size else {"mode": name})

    ours, plain = (load_model(p, "cpu", torch.float32, use_kernels=False) for p in (tmp_path / "any name", path))
    quantized = dict(quantizable_linears(plain))
    plain.embed_tokens = copy.deepcopy(plain.embed_tokens)  # a tied one is the head, whose weight changes below
    for linear_name, linear in quantized.items():
        module = ours.get_submodule(linear_name)
        assert module.weight.itemsize == 1 and not linear_name.endswith("router")
        expected = format.quantize(linear.weight.data)
        assert module.tensors().keys() == expected.keys()
        for kind, tensor in expected.items():
            assert torch.equal(module.tensors()[kind], tensor)
        linear.set_tensor("weight", module.dequantize(torch.float32))

    _, _, before = read_checkpoint(path)
    for other in before.keys() - {f"{linear_name}.weight" for linear_name in quantized}:
        assert torch.equal(tensors[other], before[other])  # norms, biases, routers and the embedding, tied or not
    tokens = torch.randint(0, config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of(ours, tokens), logits_of(plain, tokens))


def test_hessians_are_of_the_inputs_of_each_layer(folder):
    """The Hessian of a layer is a sum over its own inputs: for an expert, those that the router sends there."""
    model = load_model(folder("qwen3-moe") / "model.pth", "cpu", torch.float32, use_kernels=False)
    tokens = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    layer, kv_cache = model.layers[0], KVCache(model, 1, 12)
    feed_forward, seen = layer.feed_forward, {}

    def keep(name, hook_input):
        def hook(module, args, kwargs):
            seen[name] = hook_input(args, kwargs)

        return hook

    feed_forward.router.register_forward_pre_hook(
        keep("normed", lambda args, kwargs: kwargs["norm"](args[0])[0]), with_kwargs=True
    )
    feed_forward.down_proj.register_forward_pre_hook(
        keep("down", lambda args, kwargs: (args[0][0], kwargs["topk_ids"][0])), with_kwargs=True
    )
    with torch.inference_mode():
        start_pos = torch.zeros(1, dtype=torch.long)
        inputs = [model.embed(tokens)]
        hessians = gptq.compute_hessians(model, 0, inputs, start_pos, kv_cache.layers[0])
    hidden, topk_ids = seen["down"]  # [T, top_k, F], [T, top_k]
    names = ("attention.qkv_proj", "attention.o_proj", "feed_forward.gate_up_proj", "feed_forward.down_proj")
    assert hessians.keys() == {f"layers.0.{name}" for name in names}
    for e in range(model.config.moe.n_experts):
        x = seen["normed"][(topk_ids == e).any(-1)]
        torch.testing.assert_close(hessians["layers.0.feed_forward.gate_up_proj"][e], x.T @ x)
        h = hidden[topk_ids == e]
        torch.testing.assert_close(hessians["layers.0.feed_forward.down_proj"][e], h.T @ h)


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_gptq_from_the_command_line(family, folder, monkeypatch, tmp_path, capsys):
    text, path = tmp_path / "text.txt", folder(family) / "model.pth"
    text.write_text(TEXT)
    calibration = ["--mode=int4-gptq", "--device=cpu", f"--calibration_text={text}"]
    run_quantize(monkeypatch, path, *calibration, "--calibration_seq_length=2", "--calibration_limit=1", "--label=.")
    assert ("of the experts got no token" in capsys.readouterr().err) == (family == "mixtral")
    run_quantize(monkeypatch, path, *calibration, "--calibration_seq_length=64")
    assert path.with_name("model.int4-gptq.g32.pth").is_file()
    run_quantize(monkeypatch, path, "--mode=int4")
    tokens = torch.tensor([load_tokenizer(path.parent).encode("the age of foolishness, the epoch of belief")])
    exact, plain, calibrated = (
        logits_of(load_model(path.with_name(name), "cpu", torch.float32, use_kernels=False), tokens)
        for name in ("model.pth", "model_int4.g32.pth", "model_int4-gptq.g32.pth")
    )
    assert (calibrated - exact).square().mean() < 0.8 * (plain - exact).square().mean()


def test_calibration_windows_come_from_all_over(folder):
    tokenizer = load_tokenizer(folder("llama3"))
    text = "".join(chr(ord("A") + i % 26) for i in range(859))  # 21 windows and a rest
    windows = gptq.calibration_windows(tokenizer, text, 40, 4)
    assert [tokenizer.decode(w.tolist()) for w in windows] == [text[40 * i : 40 * i + 40] for i in (0, 5, 10, 15)]
    assert len(gptq.calibration_windows(tokenizer, text, 40, 99)) == 21
    with pytest.raises(UsageError, match="shorter than one window"):
        gptq.calibration_windows(tokenizer, "a" * 39, 40, 4)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--mode=int3"], "int4-gptq"),
        (["--mode=int4", "--groupsize=48"], "32, 64, 128, 256"),
        (["--mode=int4-gptq"], "--calibration_text"),
        (["--mode=int4-gptq", "--calibration_text=nowhere"], "nowhere"),
        (["--label=a/b"], "--label"),
        (["--calibration_text=TEXT"], "--calibration_text belongs to int4-gptq"),
        (["--calibration_tasks", "hellaswag"], "--calibration_tasks belongs to int4-gptq"),
        (["--calibration_limit=64"], "--calibration_limit belongs to int4-gptq"),
        (["--calibration_seq_length=9", "--mode=int4"], "--calibration_seq_length belongs to int4-gptq"),
        (["--percdamp=0.1"], "--percdamp belongs to int4-gptq"),
        (["--blocksize=128", "--mode=int4-hqq"], "--blocksize belongs to int4-gptq"),
        (["--act_order"], "--act_order belongs to int4-gptq"),
        (["--no-act_order", "--mode=mxfp4"], "--no-act_order belongs to int4-gptq"),
        (["--device=cpu", "--mode=fp8"], "--device belongs to int4-gptq"),
        (["--checkpoint_path=."], "holds no model"),
        (["--percdamp=0", "--mode=int4-gptq"], "--percdamp must be"),
        (["--percdamp=nan", "--mode=int4-gptq"], "--percdamp must be"),
        (["--percdamp=1e308", "--mode=int4-gptq"], "--percdamp must be"),
        (["--mode=int8", "--groupsize=64"], "--groupsize belongs to int4"),
        (["--mode=fp8", "--groupsize=64"], "--groupsize belongs to int4"),
        (["--mode=mxfp4", "--groupsize=32"], "--groupsize belongs to int4"),
        (["--threads=0"], "--threads must be 1 to"),
    ],
)
def test_wrong_arguments_are_named(args, message, folder, monkeypatch):
    before = sorted(folder("llama3").iterdir())
    with pytest.raises(UsageError, match=message) as e:
        run_quantize(monkeypatch, folder("llama3") / "model.pth", *args)
    assert "\n" not in str(e.value) and sorted(folder("llama3").iterdir()) == before


def test_wrong_checkpoints_are_named(folder, monkeypatch, tmp_path, capsys):
    path = folder("llama2") / "model.pth"
    run_quantize(monkeypatch, path, "--mode=int8", "--label=**")
    run_quantize(monkeypatch, path, "--mode=int8", "--label=.")
    with pytest.raises(UsageError, match="quantized already"):
        run_quantize(monkeypatch, path.with_name("model.int8.pth"))
    config, _, tensors = read_checkpoint(path)
    name = "layers.1.attention.o_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 4] = torch.nan
    save_checkpoint(tmp_path / "model.pth", config, tensors)
    for mode in ("int8", "int4", "fp8", "mxfp4"):
        with pytest.raises(SystemExit) as e:
            run_script(lambda mode=mode: run_quantize(monkeypatch, tmp_path / "model.pth", f"--mode={mode}"))
        assert e.value.code == 2 and f"{name} holds NaN" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["model.pth"]


def test_formats_of_four_bits_take_inputs_in_eights_or_32s():
    weights = {"lm_head": torch.zeros(3, 12)}
    for format in (Int8(), Float8()):
        quantize.check_input_widths(weights, format)
    for format, multiple in ((Int4(32), "int4 needs a multiple of 8"), (MXFP4(), "mxfp4 needs a multiple of 32")):
        with pytest.raises(UsageError, match=f"lm_head.weight has 12 inputs; {multiple}: use --mode int8"):
            quantize.check_input_widths(weights, format)


def test_format_headers_of_existing_files():
    """Words in the header of existing files must stay readable."""
    for format, quantization in [
        (Int8(), {"mode": "int8"}),
        (Int4(64), {"mode": "int4", "groupsize": 64}),
        (Int4(64, torch.float16), {"mode": "int4", "groupsize": 64, "scale_dtype": "float16"}),
        (GroupedInt8(16), {"mode": "int8-grouped", "groupsize": 16}),
        (Float8(), {"mode": "fp8"}),
        (Float8(128), {"mode": "fp8", "groupsize": 128}),
        (MXFP4(), {"mode": "mxfp4"}),
    ]:
        assert format_from_dict(quantization) == format and format.to_dict() == quantization
    for wrong in ({"mode": "fp8", "groupsize": 48}, {"mode": "fp4"}, {"mode": "mxfp4", "groupsize": 64}):
        with pytest.raises(UsageError, match="which this version does not read"):
            format_from_dict(wrong)


def test_a_full_disk_leaves_the_old_file(folder, tmp_path):
    path = folder("llama2") / "model.pth"
    old = path.with_name("model_int4.g128.pth")
    old.write_bytes(b"old")
    r = subprocess.run(
        [sys.executable, ROOT / "quantize.py", "--checkpoint_path", path, "--mode=int4", "--groupsize=128"],
        capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16)),
    )
    assert r.returncode == 2 and r.stderr.splitlines()[-1].startswith("quantize.py: cannot write"), r.stderr
    assert old.read_bytes() == b"old" and not list(path.parent.glob("*.tmp"))
