"""benchmark.py has the published shapes and computes bytes as the config does. Its commands do what their help says, as
far as a CPU can show."""

import contextlib
import importlib
import io
import json
import pickle
import re
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoint import Checkpoint, empty_model
from config import ModelConfig
from converters.hf_config import config_from_hf
from formats import MXFP4, Float8, GroupedInt8, Int4, Int8, QuantizationConfig, Unquantized
from layers.linear import RMSNorm
from layers.rope import alibi_slopes
from loading import load_model, quantized_tensor_names
from model import DTYPES
from scripts import benchmark
from scripts.benchmarking import gpu_jobs, real_models
from scripts.benchmarking import speed as benchmark_speed
from scripts.kernel_checks import command as check_command
from scripts.kernel_checks.all_checks import all_checks, gpu_sizes, name_of
from scripts.kernel_checks.check_linear import check_linear, check_rms_norm
from scripts.kernel_checks.exact_results import Comparison
from tests.cpu_kernels import stored_rows
from tests.tiny import call_main, convert, write_folder
from utils.errors import UsageError
from utils.files import ROOT

PUBLISHED = {  # parameters; a tied head counts once
    "SmolLM2-135M": 134515008,
    "Qwen2.5-0.5B": 494032768,
    "TinyLlama-1.1B": 1100048384,
    "Llama-3.2-1B": 1235814400,
    "Llama-2-7B": 6738415616,
    "Mistral-7B": 7241732096,
    "Llama-3.1-8B": 8030261248,
    "Qwen3-8B": 8190735360,
    "Qwen3-30B-A3B": 30532122624,
    "Mixtral-8x7B": 46702792704,
    "Llama-3-70B": 70553706496,
    "Llama-3.1-405B": 405853388800,
}
DENSE = dict(
    architectures=["LlamaForCausalLM"], hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=600, tie_word_embeddings=True,
)
MOE = dict(architectures=["MixtralForCausalLM"], num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False)


CPU = torch.device("cpu")


@pytest.fixture
def config_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(DENSE))
    return path


def report(capsys, *arguments) -> dict:
    """Returns the JSON that benchmark.py prints at the end."""
    call_main(benchmark.main, *arguments)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---- Random weights -------------------------------------------------------------------------------------------------


def test_shapes_have_the_published_number_of_parameters():
    counts = {}
    for name, config in benchmark_speed.CONFIGS.items():
        model = benchmark_speed.random_model(config, Unquantized(), torch.device("meta"), torch.bfloat16)
        counts[name] = sum(t.numel() for t in benchmark_speed.checkpoint_tensors(model).values())
    assert counts == PUBLISHED


@pytest.mark.parametrize("format", [Unquantized(), Int8(), Int4(32), GroupedInt8(32), Float8(), Float8(128), MXFP4()])
def test_random_weights_keep_the_size_of_activations(format):
    """Random weights have mean 0 and variance 1 / inputs in every format."""
    w = benchmark_speed.random_linear((200, 600), format, CPU, torch.bfloat16).dequantize(torch.float32).float()
    assert w.shape == (200, 600)
    assert abs(w.mean().item()) < 0.05 * 600**-0.5
    assert w.std().item() == pytest.approx(600**-0.5, rel=0.1)


@pytest.mark.parametrize("format", [Unquantized(), Int8(), Int4(32)])
@pytest.mark.parametrize("moe", [False, True])
def test_random_model_is_what_a_checkpoint_would_hold(format, moe, tmp_path):
    config = config_from_hf(DENSE | (MOE if moe else {}) | {"tie_word_embeddings": not moe})
    model = benchmark_speed.random_model(config, format, CPU, torch.float16)
    on_meta = empty_model(config, QuantizationConfig(format))
    needed, quantized_names = on_meta.state_dict(), quantized_tensor_names(on_meta)
    held = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    dtypes = {name: t.dtype if name in quantized_names else torch.float16 for name, t in needed.items()}
    assert held == {name: (t.shape, dtypes[name]) for name, t in needed.items()}
    is_tied = model.lm_head.weight is model.embed_tokens.weight
    assert is_tied == (not moe and format == Unquantized())
    left_out = needed.keys() - benchmark_speed.checkpoint_tensors(model).keys()
    assert left_out == ({"lm_head.weight"} if is_tied else set())
    benchmark_speed.save_random_checkpoint(tmp_path / "model.pth", config, torch.float16)
    assert load_model(tmp_path / "model.pth", use_kernels=False).config == config


def test_random_model_has_alibis_slopes():
    config = ModelConfig(64, 2, 6, 2, 16, 48, 97, 64, alibi=True, sinks=True)
    for layer in benchmark_speed.random_model(config, Unquantized(), CPU, torch.bfloat16).layers:
        assert torch.equal(layer.attention.alibi_slopes, alibi_slopes(6)) and layer.attention.sinks.isfinite().all()


# ---- Speed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(["config", "active", "stored"], [(DENSE, 1, 1), (DENSE | MOE, 2, 8)], ids=["dense", "moe"])
def test_report_is_consistent(config, active, stored, config_json, capsys):
    config_json.write_text(json.dumps(config))
    flags = "--json --device cpu --prompt_tokens 4 --max_new_tokens 3".split()
    r = report(capsys, "--config", config_json, *flags)

    attention, router = 32 * (32 + 16 + 16 + 32), 32 * stored * (stored > 1)
    router_padding = 32 * (stored_rows(stored, torch.bfloat16) - stored) * (stored > 1)  # packed, which a step reads
    layer, expert, table, norms = attention + router, 3 * 32 * 48, 64 * 32, 5 * 32
    tables = 1 if config["tie_word_embeddings"] else 2
    assert r["model_bytes"] == 2 * (2 * (layer + router_padding + active * expert) + table + norms)  # the head's table
    assert r["weights_bytes"] == 2 * (2 * (layer + stored * expert) + tables * table + norms)
    assert r["kv_bytes"] == 2 * 2 * 2 * 2 * 8 * 7  # k and v, bytes, layers, heads, head_dim, start_pos
    assert r["peak_over_weights_and_kv_bytes"] == r["peak_memory_bytes"] - r["weights_bytes"] - r["kv_bytes"]
    step_bytes = r["model_bytes"] + r["kv_bytes"] / 7 * 5.5  # 5 tokens to look at in the first step, 6 in the second
    assert r["decode_gb_per_sec"] == pytest.approx(step_bytes * r["decode_tokens_per_sec"] / 1e9)
    best = max(r["read_gb_per_sec_before"], r["read_gb_per_sec_after"])
    assert r["decode_share_of_read"] == pytest.approx(r["decode_gb_per_sec"] / best)
    flops = 2 * 512 * 2 * (layer + active * expert) + 2 * table + 2 * 4 * 32 * 512 * 513 // 2
    assert r["prefill_512_tflop_per_sec"] == pytest.approx(r["prefill_512_tokens_per_sec"] / 512 * flops / 1e12)
    assert r["verify_5_over_1"] > 0
    assert "prefill_2048_tokens_per_sec" not in r  # beyond this model's context
    committed = json.loads((ROOT / "benchmarks/cpu_2_cores_zen4_SmolLM2-135M_speed.json").read_text())
    assert {key for key in committed if "2048" not in key} <= r.keys()  # tables.py reads old files and new ones


def test_quantized_and_compiled_speed(config_json, capsys):
    flags = "--json --device cpu --max_new_tokens 3 --mode int4 --groupsize 64 --compile --decode_only".split()
    r = report(capsys, "speed", "--config", config_json, *flags)
    weights = {"qkv": (64, 32), "o": (32, 32), "gate_up": (96, 32), "down": (32, 48)}
    linears = 2 * sum(n * k // 2 + n * 3 for n, k in weights.values())  # one group of 64 a row: scale and zero point
    head, norms, embedding = 64 * 32 // 2 + 64 * 3, 5 * 32 * 2, 64 * 32 * 2
    assert r["weights_bytes"] == linears + head + norms + embedding
    assert r["mode"] == "int4" and r["groupsize"] == 64 and r["compile"] is True
    assert r["decode_tokens_per_sec"] > 0 and "verify_5_over_1" not in r


def test_parallel_speed(config_json, capsys):
    flags = "--json --device cpu --max_new_tokens 3 --mode int8 --parallel 1 5".split()
    r = report(capsys, "--config", config_json, *flags)
    assert r["parallel_1_tokens_per_sec"] > 0 and r["parallel_5_tokens_per_sec"] > 0 and "model_bytes" not in r


@pytest.mark.parametrize(
    ["flags", "words"],
    [
        ("--config nothing", "neither a config.json, a model.pth nor one of SmolLM2-135M"),
        ("--config TinyLlama-1.1B --cold_start --mode int8", "without --mode"),
        ("--config TinyLlama-1.1B --max_new_tokens 1", "--max_new_tokens 2"),
        ("--config TinyLlama-1.1B --prompt_tokens 2000", "exceed the context of 2048 tokens"),
        ("--config TinyLlama-1.1B --device cpu --tune", "--tune is for GPUs"),
        ("--config TinyLlama-1.1B --parallel 8 0", "--parallel must be at least 1"),
        ("--config TinyLlama-1.1B --busy 0", "--busy must be at least 1"),
        ("--config TinyLlama-1.1B --busy --parallel 8", "--busy is measured without --cold_start, --parallel"),
        ("--config TinyLlama-1.1B --busy --device cpu --max_new_tokens 1", "--max_new_tokens 2"),
    ],
)
def test_mistakes(flags, words):
    with pytest.raises(UsageError, match=words):
        call_main(benchmark.main, *flags.split())


def test_commands(capsys):
    """--help lists all commands, and an unknown command is refused."""
    for arguments, status in (("--help", 0), ("quantisation", 2), ("gpu --config x", 2)):
        with pytest.raises(SystemExit) as exit:
            call_main(benchmark.main, *arguments.split())
        assert exit.value.code == status
    printed = capsys.readouterr().out
    for command in ("speed", "check", "gpu", "hf_transformers", "quantization", "speculation"):
        assert re.search(rf"^    {command}\s", printed, re.MULTILINE)


# ---- GPUs -----------------------------------------------------------------------------------------------------------


def test_jobs_have_commands():
    """The arguments of every job parse, and name a known shape."""
    jobs = gpu_jobs.all_jobs(tune=True)
    for arguments in jobs.values():
        args = benchmark.build_parser().parse_args(arguments)
        if args.command is not check_command.check:
            benchmark_speed.find_config(args.config)
    assert "--tune" in jobs["ours Llama-2-7B int4"] and "--tune" not in jobs["plain Llama-2-7B int4"]


def test_jobs_are_processes(config_json, monkeypatch):
    speed = f"speed --config {config_json} --device cpu --max_new_tokens 3 --decode_only --json".split()
    end = time.monotonic() + 300
    assert gpu_jobs.run_job(speed, end)["decode_tokens_per_sec"] > 0
    error = gpu_jobs.run_job(["speed", "--config", "nothing"], end)["error"]
    assert "exit 2" in error and "neither a config.json" in error
    assert gpu_jobs.run_job(speed, time.monotonic() + 5) == {"error": "no time left"}
    monkeypatch.setattr(gpu_jobs, "LEAST_SECONDS", 0)
    assert gpu_jobs.run_job(speed, time.monotonic() + 0.1) == {"error": "out of time"}


def test_table_of_jobs():
    ours = {"decode_tokens_per_sec": 150.0, "decode_share_of_copy": 0.9, "verify_5_over_1": 1.05}
    jobs = {"check float16": {}, "ours Llama-3.1-8B bf16": ours, "plain Llama-3.1-8B bf16": {"error": "out of time"}}
    head, line = gpu_jobs.engines_table(jobs).splitlines()
    assert len(head) == len(line)
    assert line.split() == ["Llama-3.1-8B", "bf16", "150.0", "90%", "-", "-", "1.05", "0"]


def test_tune(tmp_path, monkeypatch):
    """--tune writes and uses the fastest tile sizes that also run with 8 tokens. The times are made up."""
    from kernels.triton import launch
    from kernels.triton.formats import kernel_format
    from scripts.benchmarking import tune_triton

    fastest = launch.TileConfig(32, 8, 64, 3)
    gated_times = {fastest: 1.0, (32, 4, 128, 3): 0.5}
    times = {fastest: 1.0, (32, 4, 128, 3): 2.0, (16, 4, 128, 3): 1.5}

    def time_products(x, weights):
        gated = weights[0].epilogue.gated
        assert len(weights) > 4 * 1000 // weights[0].weight.nbytes
        tiles = launch.choose_tiles(x, kernel_format("Int4"), weights[0].out_features, gated, 64)
        if tiles == fastest and x.shape[1] == 8:
            raise RuntimeError("out of resource: shared memory")
        return (gated_times if gated else times).get(tiles, 3.0)

    monkeypatch.setattr(tune_triton, "time_products", time_products)
    monkeypatch.setattr(tune_triton, "TUNED", tmp_path / "tuned.json")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    (tmp_path / "tuned.json").write_text('{"Another GPU": {}}')
    try:
        tune_triton.tune(config_from_hf(DENSE), Int4(64), CPU)
        table = json.loads((tmp_path / "tuned.json").read_text())
        assert table.keys() == {"Another GPU", "Some GPU"}
        gated, other = (launch.TileConfig(*sizes)._asdict() for sizes in ((32, 4, 128, 3), (16, 4, 128, 3)))
        # qkv and the head are of one shape
        products = {"64 x 32": other, "32 x 32": other, "96 x 32, gated": gated, "32 x 48": other}
        assert table["Some GPU"] == {f"int4, {product}": tiles for product, tiles in products.items()}
        x = torch.zeros(1, 32, dtype=torch.bfloat16)
        assert launch.choose_tiles(x, kernel_format("Int4"), 96, True, 64)._asdict() == gated
    finally:
        launch.gpu_info(CPU).tuned.clear()


def few_checks(dtype, sizes):
    """Returns checks of two operations, and one check with a mistake in its arguments."""
    rms_norms = [check for check in all_checks(dtype, sizes) if check.func is check_rms_norm]
    linear = partial(check_linear, dtype, Unquantized(), (64, 72, True, (1,)))
    return [*rms_norms, linear, partial(check_linear, dtype, Unquantized(), (64, 72, True, ("one",)))]


def test_check(monkeypatch, capsys):
    """The command "check" passes in the interpreter of Triton. Only a few checks run here; test_triton.py runs all."""
    monkeypatch.setattr(check_command, "all_checks", lambda dtype, sizes: few_checks(dtype, sizes)[:-1])
    result = report(capsys, "check", "--device", "cpu", "--precision", "bfloat16")
    assert result["failed"] == {}
    assert result["largest_errors"].keys() == {"rms_norm", "float32_linear", "linear", "gated_linear"}
    assert 0 < result["largest_errors"]["rms_norm"] < 2**-6


def test_check_that_fails(monkeypatch, capsys):
    """A wrong kernel, or one that raises, gives exit status 1, and the other checks go on."""
    rms_norm = RMSNorm.forward
    monkeypatch.setattr(check_command, "all_checks", few_checks)
    monkeypatch.setattr(RMSNorm, "forward", lambda *arguments: rms_norm(*arguments) * 1.1)
    with pytest.raises(SystemExit) as exit:
        call_main(benchmark.main, "check", "--device", "cpu", "--precision", "float32")
    assert exit.value.code == 1
    failed = json.loads(capsys.readouterr().out.splitlines()[-1])["failed"]
    assert failed.pop("rms_norm 8x64") == "error 1.0e-01"
    assert "TypeError" in failed.pop("check_linear(torch.float32, Unquantized(), (64, 72, True, ('one',)))")
    assert all(case.startswith("rms_norm") for case in failed)


def test_check_finds_nan():
    outcome = check_command.CheckResult()
    right = torch.ones(3)
    outcome.add(Comparison("linear", "NaN", right * torch.nan, right, right))
    assert outcome.failed == {"linear NaN": "error nan"}


def test_checks_of_a_gpu_can_be_sent_to_processes():
    for dtype in DTYPES:
        checks = all_checks(dtype, gpu_sizes(dtype))
        assert [name_of(pickle.loads(pickle.dumps(check))) for check in checks]


# ---- Of checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("M")
    write_folder("llama3", folder)
    return convert(folder)


@pytest.fixture
def calls_here(monkeypatch):
    """Replaces real_models.script_output by calls in this process, which are faster, and takes one round."""

    def call_here(script: str, *arguments) -> str:
        main = importlib.import_module(Path(script).stem).main
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            call_main(main, *arguments)
        return printed.getvalue()

    monkeypatch.setattr(real_models, "script_output", call_here)
    monkeypatch.setattr(real_models, "ROUNDS", 1)


def committed(name: str) -> dict:
    """Returns a measurement of SmolLM2-135M in benchmarks/, from any machine."""
    [path] = (ROOT / "benchmarks").glob(f"cpu_*_SmolLM2-135M_{name}.json")
    return json.loads(path.read_text())


def test_calls_are_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(real_models, "ROOT", tmp_path)
    (tmp_path / "echo.py").write_text("import sys\nprint(*sys.argv[1:])\nsys.exit('fail' in sys.argv)\n")
    assert real_models.script_output("echo.py", "--limit", 3) == "--limit 3\n"
    with pytest.raises(UsageError, match="echo.py failed; what it said is above"):
        real_models.script_output("echo.py", "fail")


def test_quantization(checkpoint, tmp_path, monkeypatch, calls_here, capsys):
    """With three modes, the result has the fields of the committed measurement."""
    modes = {name: real_models.QUANTIZE_FLAGS[name] for name in ("16 bits", "int8", "int4 g32")}
    monkeypatch.setattr(real_models, "QUANTIZE_FLAGS", modes)
    text, out = tmp_path / "text", tmp_path / "out.json"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 3)
    flags = ["--text_file", text, "--calibration_text", text, "--json_file", out]
    call_main(benchmark.main, "quantization", "--checkpoint_path", checkpoint, *flags)
    r = json.loads(out.read_text())
    assert r.keys() == committed("quantization").keys() and r["modes"].keys() == modes.keys()
    for row in r["modes"].values():
        assert row.keys() == committed("quantization")["modes"]["int8"].keys() and row["decode_tokens_per_sec"] > 0
    bits = [row["bits_per_weight"] for row in r["modes"].values()]
    # float32 checkpoint; of 64 inputs and 96: 32 bits of scale a row, 24 a group
    assert bits[0] == 32 and 8.3 < bits[1] < 8.5 and bits[2] == 4.75
    assert r["modes"]["16 bits"]["perplexity_change"] == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 3
    assert list(checkpoint.parent.glob("*.pth")) == [checkpoint]  # what was made is elsewhere


def test_quantized_checkpoints_are_refused(checkpoint, monkeypatch):
    quantized = Checkpoint(None, {"mode": "int8"}, {})
    monkeypatch.setattr(real_models, "read_checkpoint", lambda path: quantized)
    flags = ["--checkpoint_path", checkpoint, "--text_file", "a", "--calibration_text", "b"]
    with pytest.raises(UsageError, match="is quantized already"):
        call_main(benchmark.main, "quantization", *flags)


@pytest.mark.parametrize("draft", [False, True])
def test_speculation(draft, checkpoint, tmp_path, monkeypatch, calls_here, capsys):
    monkeypatch.setattr(real_models, "PROMPTS", {"greedy": ("abcabcabc", 0.0), "drawn": ("Hello", 1.0)})
    out = tmp_path / "out.json"
    flags = ["--checkpoint_path", checkpoint, "--device", "cpu", "--precision", "float32", "--json_file", out]
    flags += ["--draft_checkpoint_path", checkpoint] if draft else []
    call_main(benchmark.main, "speculation", *flags)
    r = json.loads(out.read_text())
    assert r.keys() == committed("speculation").keys() and r["k"] == (5 if draft else 7)
    assert r["draft"] == (str(checkpoint) if draft else "prompt lookup")
    for row in r["prompts"].values():
        assert row.keys() == committed("speculation")["prompts"]["edit"].keys() and min(row.values()) > 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2


def test_tokens_per_step():
    assert real_models.tokens_per_step([3, 0, 1]) == (3 * 1 + 1 * 3) / 4
    assert real_models.tokens_per_step([0, 0]) == 0  # texts that ended with prefill's token
