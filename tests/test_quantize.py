"""quantize.py and gptq.py: what the formats hold, the files, the models they load as, and every way to ask wrongly."""

import resource
import subprocess
import sys

import pytest
import torch

import gptq
import kernels
import quantize
from checkpoint import read_checkpoint, run
from generate import load_model
from model import UsageError
from tests.tiny import ROOT, convert, write_folder
from tokenizer import load_tokenizer

MODES = [("int8", None), ("int4", 32), ("int4", 64), ("int4-hqq", 32)]
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """family -> a folder with its model.pth and tokenizer."""
    made = {}

    def make(family: str):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            write_folder(family, made[family])
            convert(made[family])
        return made[family]

    return make


def cli(monkeypatch, path, *args: str):
    monkeypatch.setattr(sys, "argv", ["quantize.py", f"--checkpoint_path={path}", "--device=cpu", *args])
    quantize.main()


def weights(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def dequantize(parts, n: int, group: int) -> torch.Tensor:
    return kernels.dequantize(*(*parts, None)[:3], n, group, torch.float32)


@pytest.mark.parametrize("k", [8, 24, 64, 72, 200])
@pytest.mark.parametrize("mode, group", MODES)
def test_every_weight_is_rounded_to_the_nearest_the_format_has(mode, group, k):
    w = weights(50, k)
    w[7] = 0
    w[8] = w[8].abs() + 5  # all on one side of zero
    parts = quantize.quantize_plain("w", w, mode, group)
    for part, like in zip(parts, quantize.quantize_like(w, mode[:4], group), strict=True):
        assert (part.shape, part.dtype) == (like.shape, like.dtype)
    error = (dequantize(parts, 50, group) - w).abs()
    steps = parts[1].float()[:, None] if mode == "int8" else parts[1].float().repeat_interleave(group, -1)[:, :k]
    reach = 0.5 if mode == "int8" else 0.56 if mode == "int4" else 2.0  # a zero's sixteenths; hqq may leave some out
    assert (error <= reach * steps).all() and not error[7].any()


@pytest.mark.parametrize("mode, group", MODES)
def test_stored_weights_quantize_to_themselves(mode, group):
    w = dequantize(quantize.quantize_plain("w", weights(20, 72), mode, group), 20, group)
    again = dequantize(quantize.quantize_plain("w", w, mode, group), 20, group)
    torch.testing.assert_close(again, w, atol=0.03, rtol=0)  # int4's scale is a bfloat16


def test_hqq_and_fit_range_beat_the_plain_range():
    w = weights(256, 128) ** 3  # heavy tails
    plain, hqq = (dequantize(quantize.quantize_int4(w, 64, refine), 256, 64) for refine in (False, True))
    assert (hqq - w).abs().sqrt().sum() < 0.97 * (plain - w).abs().sqrt().sum()
    groups = quantize.split_groups(w, 64)
    scales, zeros = gptq.fit_range(groups, torch.ones(1, 2, 64))
    q = (groups / scales.float()[..., None] + zeros[..., None] / 16).round().clamp(0, 15)
    fitted = ((q - zeros[..., None] / 16) * scales.float()[..., None]).flatten(-2)
    assert (fitted - w).square().sum() < 0.9 * (plain - w).square().sum()


@pytest.mark.parametrize("family", ["llama2", "llama3", "llama-bias", "qwen3-moe"])
@pytest.mark.parametrize("mode, group", MODES)
def test_file_loads_as_the_model_it_describes(family, mode, group, folder, monkeypatch, tmp_path):
    path = folder(family) / "model.pth"
    cli(monkeypatch, path, f"--mode={mode}", *([f"--groupsize={group}"] if group else []))
    name = f"model_{mode}.pth" if mode == "int8" else f"model_{mode}.g{group}.pth"
    (folder(family) / name).rename(tmp_path / "any name")
    config, quantization, tensors = read_checkpoint(tmp_path / "any name")
    assert quantization == ({"mode": "int8"} if mode == "int8" else {"mode": "int4", "groupsize": group})
    ours, plain = (load_model(p, "cpu", torch.float32, fast=False) for p in (tmp_path / "any name", path))
    for name, linear in quantize.linears(plain):
        module = ours.get_submodule(name)
        assert module.weight.dtype in (torch.int8, torch.uint8) and not name.endswith("gate")
        parts = quantize.quantize_plain(name, linear.weight.data, mode, group)
        for kind, part in zip(quantize.KINDS, parts, strict=False):
            assert torch.equal(getattr(module, kind), part)
        linear.weight.data = module.matrix(torch.float32)
    _, _, before = read_checkpoint(path)
    for name in before.keys() - {f"{name}.weight" for name, _ in quantize.linears(plain)}:
        assert torch.equal(tensors[name], before[name])  # norms, biases, routers and the embedding, tied or not
    tokens = torch.randint(0, config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    for model in (ours, plain):
        model.setup_caches(2, 20)
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens, torch.arange(20)), plain(tokens, torch.arange(20)))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("k, group", [(128, 32), (200, 64)])
def test_gptq_keeps_a_layers_outputs_closer_than_rounding(k, group, act_order):
    x = weights(1000, 24, 1) @ weights(24, k, 2) + 0.1 * weights(1000, k, 3)  # correlated inputs
    w = weights(96, k)
    parts = gptq.solve(w, x.T @ x, group, damp=0.01, block=48, act_order=act_order)
    for part, like in zip(parts, quantize.quantize_like(w, "int4", group), strict=True):
        assert (part.shape, part.dtype) == (like.shape, like.dtype)
    fresh = weights(1000, 24, 4) @ weights(24, k, 2) + 0.1 * weights(1000, k, 5)
    ours, plain = (
        (fresh @ (dequantize(p, 96, group) - w).T).square().sum() for p in (parts, quantize.quantize_int4(w, group))
    )
    assert ours < 0.25 * plain


def test_gptq_of_experts_is_gptq_of_each_and_rounds_the_unseen():
    x, w = weights(300, 64, 1) @ weights(64, 64, 2), weights(90, 64).view(3, 30, 64)
    hessian = torch.stack([x.T @ x, torch.zeros(64, 64), x[:40].T @ x[:40]])
    options = dict(group=32, damp=0.1, block=16, act_order=True)
    together = gptq.solve(w, hessian, **options)
    for e in range(3):
        alone = gptq.solve(w[e], hessian[e], **options)
        difference = dequantize([p[e] for p in together], 30, 32) - dequantize(alone, 30, 32)
        assert (difference == 0).float().mean() > 0.95  # the inverse is rounded otherwise in a batch
    scales, zeros = (t.float().repeat_interleave(32, -1) for t in (together[1][1], together[2][1] / 16))
    nearest = ((w[1] / scales + zeros).round().clamp(0, 15) - zeros) * scales
    torch.testing.assert_close(dequantize([p[1] for p in together], 30, 32), nearest)


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_gptq_from_the_command_line(family, folder, monkeypatch, tmp_path, capsys):
    text, path = tmp_path / "text.txt", folder(family) / "model.pth"
    text.write_text(TEXT)
    calibration = ["--mode=int4-gptq", f"--calibration_text={text}"]
    cli(monkeypatch, path, *calibration, "--calibration_seq_length=2", "--calibration_limit=1", "--label=.")
    assert ("of the experts got no token" in capsys.readouterr().err) == (family == "mixtral")
    cli(monkeypatch, path, *calibration, "--calibration_seq_length=64")
    assert path.with_name("model.int4-gptq.g32.pth").is_file()
    cli(monkeypatch, path, "--mode=int4")
    names = ["model.pth", "model_int4.g32.pth", "model_int4-gptq.g32.pth"]
    tokens = torch.tensor([load_tokenizer(path.parent).encode("the age of foolishness, the epoch of belief")])
    logits = []
    for model in (load_model(path.with_name(n), "cpu", torch.float32, fast=False) for n in names):
        model.setup_caches(1, 64)
        with torch.inference_mode():
            logits.append(model(tokens, torch.arange(tokens.shape[1])))
    plain, calibrated = ((x - logits[0]).square().mean() for x in logits[1:])
    assert calibrated < 0.8 * plain


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
        (["--calibration_text=TEXT"], "needs no calibration"),
        (["--checkpoint_path=."], "is a folder"),
        (["--percdamp=0"], "--percdamp"),
    ],
)
def test_wrong_arguments_are_named(args, message, folder, monkeypatch):
    before = sorted(folder("llama3").iterdir())
    with pytest.raises(UsageError, match=message) as e:
        cli(monkeypatch, folder("llama3") / "model.pth", *args)
    assert "\n" not in str(e.value) and sorted(folder("llama3").iterdir()) == before


def test_wrong_checkpoints_are_named(folder, monkeypatch, tmp_path, capsys):
    path = folder("llama2") / "model.pth"
    cli(monkeypatch, path, "--mode=int8", "--label=**")
    cli(monkeypatch, path, "--mode=int8", "--label=.")
    with pytest.raises(UsageError, match="quantized already"):
        cli(monkeypatch, path.with_name("model.int8.pth"))
    config, _, tensors = read_checkpoint(path)
    tensors["layers.1.attention.wo.weight"] = tensors["layers.1.attention.wo.weight"].clone()
    tensors["layers.1.attention.wo.weight"][3, 4] = torch.nan
    shapes = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
    quantize.save_checkpoint(tmp_path / "model.pth", config, shapes, tensors.items())
    for mode in ("int8", "int4"):
        with pytest.raises(SystemExit) as e:
            run(lambda mode=mode: cli(monkeypatch, tmp_path / "model.pth", f"--mode={mode}"))
        assert e.value.code == 2 and "layers.1.attention.wo.weight holds NaN" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["model.pth"]


def test_a_full_disk_leaves_the_old_file(folder, tmp_path):
    path = folder("llama2") / "model.pth"
    old = path.with_name("model_int4.g128.pth")
    old.write_bytes(b"old")
    r = subprocess.run(
        [sys.executable, ROOT / "quantize.py", "--checkpoint_path", path, "--mode=int4", "--groupsize=128"],
        capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16)),
    )  # fmt: skip
    assert r.returncode == 2 and r.stderr.splitlines()[-1].startswith("quantize.py: cannot write"), r.stderr
    assert old.read_bytes() == b"old" and not list(path.parent.glob("*.tmp"))
