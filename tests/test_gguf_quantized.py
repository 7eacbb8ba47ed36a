"""convert_gguf.py --keep: quantized weights stay as exact as our formats allow, and the file grows little."""

import re
from collections import Counter
from math import prod

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType

from checkpoint import read_checkpoint
from converters.convert_gguf import convert_gguf
from converters.gguf_blocks import decode_mxfp4, decode_rows
from converters.gguf_file import GGUFTensor, read_gguf
from converters.gguf_quantized import (
    INT4,
    SIZE_LIMIT,
    SMALLER_INT4,
    SMALLER_INT8,
    SMALLEST_INT8,
    RoundingErrors,
    TargetWeight,
    choose_formats,
    convert_groups,
    keeps_q,
)
from converters.write_model import StackedTensor
from formats import MXFP4, GroupedInt8, Unquantized
from layers.kv_cache import KVCache
from layers.linear import quantizable_linears
from loading import load_model
from tests.tiny import make_hf
from tests.tiny_gguf import make_llama, random_blocks, write_gguf
from utils.errors import UsageError

INT8_G16, INT8_G32 = GroupedInt8(16, torch.float16), GroupedInt8(32, torch.float16)
F16 = 2.0**-11  # the largest relative error of rounding to float16
# How far each type may be off, in steps of a code. A zero is rounded to sixteenths of a step, with 5 bits to eighths. A
# product of scales is rounded to float16, and its error is multiplied by the distance of a code from the zero, which is
# at most 32 (16 and 16, for 4 and 5 bits, as random_blocks makes them).
BOUNDS = {
    "Q4_0": 0, "Q5_0": 0, "Q8_0": 0, "Q4_1": 1 / 32, "Q5_1": 1 / 16, "Q4_K": 1 / 32 + 32 * F16,
    "Q5_K": 1 / 16 + 64 * F16, "Q6_K": 32 * F16,
}
FLOAT32 = 1e-4  # of a step, for the float32 arithmetic of the comparison


def random_rows(name: str, n: int = 20, k: int = 512) -> torch.Tensor:
    return torch.tensor(random_blocks(GGMLType[name], (n, k), np.random.default_rng(0)))


def theirs_of(rows: torch.Tensor, name: str) -> torch.Tensor:
    return torch.tensor(gguf.dequantize(rows.numpy(), GGMLType[name]))


@pytest.mark.parametrize("name", BOUNDS)
def test_codes_are_kept(name):
    """Blocks decode to the values that the gguf package computes, and our formats come as close as they can."""
    rows = random_rows(name)
    rows[0] = 0  # scales and minima of 0
    if name in ("Q4_1", "Q5_1"):  # a group of one number
        rows[1, :4] = torch.tensor([0.0, -0.5], dtype=torch.float16).view(torch.uint8)
        rows[2, :4] = torch.tensor([0.0, 0.5], dtype=torch.float16).view(torch.uint8)
    groups, expected = decode_rows(rows, GGMLType[name]), theirs_of(rows, name)
    steps = groups.expand(groups.scales.abs()).clamp(min=1e-9)
    assert ((groups.dequantize() - expected).abs() <= FLOAT32 * steps).all()
    for format in (INT4, INT8_G32, INT8_G16):
        if keeps_q(groups.block_type, format):
            tensors, is_kept = convert_groups(groups, format)
            ours = format.dequantize(tensors, torch.float32)
            deviation = RoundingErrors()
            deviation.add(groups, format, tensors, is_kept)
            assert ((ours - expected).abs() <= (BOUNDS[name] + FLOAT32) * steps).all()
            assert is_kept[1 if name in ("Q4_1", "Q5_1") else 0 :].all() and BOUNDS[name] < 0.1
            assert deviation.largest <= BOUNDS[name] + FLOAT32
            said = "exact" if BOUNDS[name] == 0 else r"within 0\.0\d of a step"
            assert re.match(said, str(deviation))


def test_mxfp4_is_kept():
    """Every code of MXFP4 is kept, with every scale that float32 can hold."""
    rows = torch.randint(0, 256, (250, 2 * 17), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    rows[:, ::17] = torch.arange(250, dtype=torch.uint8)[:, None]
    assert torch.equal(MXFP4().dequantize(decode_mxfp4(rows), torch.float32), theirs_of(rows, "MXFP4"))


def test_groups_far_from_zero_are_rounded_again():
    """A group with all values far from 0 is rounded again, because Int4 and GroupedInt8 have no zero point that far
    out."""
    rows = random_rows("Q4_1", n=4, k=64)
    rows[0, 2:4] = torch.tensor([2.0], dtype=torch.float16).view(torch.uint8)  # a minimum of some 200 steps
    groups, expected = decode_rows(rows, GGMLType.Q4_1), theirs_of(rows, "Q4_1")
    for format, n_codes in ((INT4, 15), (INT8_G32, 254), (INT8_G16, 254)):
        tensors, is_kept = convert_groups(groups, format)
        error = (format.dequantize(tensors, torch.float32) - expected).abs()
        assert not is_kept[0, 0] and is_kept.sum() == is_kept.numel() - 1
        assert error[0, :32].max() <= (0.5 + 16 * F16) * expected[0, :32].max() / n_codes * 1.01
        assert (error[1:] <= (BOUNDS["Q4_1"] + FLOAT32) * groups.expand(groups.scales)[1:]).all()
        deviation = RoundingErrors()
        deviation.add(groups, format, tensors, is_kept)
        assert re.search("within 0.0[34] of a step, but 1 of 8 groups are rounded again, by", str(deviation))


@pytest.mark.parametrize(
    ("name", "format", "largest"),
    [
        ("Q6_K", SMALLER_INT8, 0.25),
        ("Q6_K", SMALLEST_INT8, 0.5),
        ("Q6_K", INT4, 2.5),
        ("Q5_0", INT4, 1),
        ("Q4_0", SMALLER_INT4, 0.5),
    ],
)
def test_reported_rounding_error(name, format, largest):
    """The reported error is a step over the root of 12, for steps of a 254th, or a 15th, of the range of codes in a
    group."""
    groups = decode_rows(random_rows(name), GGMLType[name])
    tensors, is_kept = convert_groups(groups, format)
    deviation = RoundingErrors()
    deviation.add(groups, format, tensors, is_kept)
    assert not is_kept.any() and re.fullmatch(r"rounded again, by \d\.\d\d of a step on average", str(deviation))
    assert 0.05 < (deviation.squared_errors / deviation.squared_steps) ** 0.5 < largest


def make_stack(name: str, **parts: tuple[str, int, int]) -> TargetWeight:
    """Returns a stack of parts that have types, outputs and inputs, but no numbers."""
    shapes = [(GGMLType[kind], gguf.quant_shape_to_byte_shape((n, k), GGMLType[kind])) for kind, n, k in parts.values()]
    stored = [GGUFTensor(kind, np.broadcast_to(np.uint8(0), shape)) for kind, shape in shapes]
    shape = torch.Size([sum(part.shape()[0] for part in stored), stored[0].shape()[1]])
    return TargetWeight(name, StackedTensor(shape, torch.bfloat16, []), stored)


def size_limit(stacks: list[TargetWeight]) -> float:
    return SIZE_LIMIT * sum(part.data.nbytes for stack in stacks for part in stack.parts)


def test_which_weights_are_rounded_again():
    """In the sizes of Llama-3.1-8B, only value projections of Q4_K_M lose their 6 bits, and most weights of Q5_K_M
    become 4 bits. The result is at most 1.1 times as large as the GGUF."""
    stack = make_stack
    for default in ("Q4_K", "Q5_K"):
        stacks = [stack("embed_tokens", w=(default, 128256, 4096)), stack("lm_head", w=("Q6_K", 128256, 4096))]
        for i in range(32):
            more = "Q6_K" if i < 4 or i >= 28 or (i - 4) % 3 == 2 else default  # as llama.cpp mixes them
            qkv = {"q": (default, 4096, 4096), "k": (default, 1024, 4096), "v": (more, 1024, 4096)}
            stacks.append(stack(f"layers.{i}.attention.qkv_proj", **qkv))
            stacks.append(stack(f"layers.{i}.attention.o_proj", w=(default, 4096, 4096)))
            gate_up = {name: (default, 14336, 4096) for name in ("gate", "up")}
            stacks.append(stack(f"layers.{i}.feed_forward.gate_up_proj", **gate_up))
            stacks.append(stack(f"layers.{i}.feed_forward.down_proj", w=(more, 4096, 14336)))
        limit = size_limit(stacks)
        choose_formats(stacks, limit)
        assert 0.95 * limit < sum(stack.n_bytes[stack.format] for stack in stacks) <= limit
        with_loss = [stack for stack in stacks if stack.loss(stack.format) > 0.1 * prod(stack.stacked.shape)]
        if default == "Q4_K":
            assert 0 < len(with_loss) <= 16 and all(stack.name.endswith("qkv_proj") for stack in with_loss)
        else:
            assert len(with_loss) > 64


# With a tied head: layers, dim, rows of q, k and gate, vocabulary; the head's type, and what it becomes; how much of
# the layers is rounded again, at most. llama.cpp makes the head Q8_0 if dim is not a multiple of 256.
SMALL_MODELS = {
    "Llama-3.2-1B": (16, 2048, 2048, 512, 8192, 128256, "Q6_K", SMALLEST_INT8, 0.04),
    "Qwen3-0.6B": (28, 1024, 2048, 1024, 3072, 151936, "Q6_K", SMALLEST_INT8, 0.16),
    "Gemma-3-1b": (26, 1152, 1024, 256, 6912, 262144, "Q8_0", INT8_G32, 0),
}


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_tied_head_keeps_its_bits(name):
    """A tied head in Q6_K, as in a Q4_0 file, becomes 8 bits without groups. To stay within the size limit, a few 4-bit
    weights of the layers get larger groups."""
    n_layers, dim, n_q, n_k, n_ff, vocab_size, head_type, head_format, most_rounded = SMALL_MODELS[name]
    head, layers = make_stack("embed_tokens", w=(head_type, vocab_size, dim)), []
    for i in range(n_layers):
        qkv = {"q": ("Q4_0", n_q, dim), "k": ("Q4_0", n_k, dim), "v": ("Q4_0", n_k, dim)}
        layers.append(make_stack(f"layers.{i}.attention.qkv_proj", **qkv))
        layers.append(make_stack(f"layers.{i}.attention.o_proj", w=("Q4_0", dim, n_q)))
        gate_up = {part: ("Q4_0", n_ff, dim) for part in ("gate", "up")}
        layers.append(make_stack(f"layers.{i}.feed_forward.gate_up_proj", **gate_up))
        layers.append(make_stack(f"layers.{i}.feed_forward.down_proj", w=("Q4_0", dim, n_ff)))
    limit = size_limit([head, *layers])
    choose_formats([head, *layers], limit)
    assert sum(stack.n_bytes[stack.format] for stack in [head, *layers]) <= limit
    assert head.format == head_format
    rounded = [stack for stack in layers if stack.format != INT4]
    n_rounded, n_weights = (sum(prod(stack.stacked.shape) for stack in some) for some in (rounded, layers))
    assert n_rounded <= most_rounded * n_weights
    assert all(stack.format == SMALLER_INT4 for stack in rounded)


def test_formats_that_save_nothing():
    """A format that saves nothing is not chosen: with 32 inputs, groups of 128 have as many scales as groups of 32, and
    a float32 is larger than a float16."""
    stack = make_stack("lm_head", w=("Q8_0", 64, 32))
    assert stack.formats == [INT8_G32, INT4]
    choose_formats([stack], stack.n_bytes[INT4])
    assert stack.format == INT4


def test_8_bits_stay_if_no_format_fits():
    """If even 4 bits would exceed the size limit, weights of 8 bits stay 8 bits."""
    stack = make_stack("lm_head", w=("Q8_0", 64, 32))
    choose_formats([stack], 0)
    assert stack.format == INT8_G32


# ---- Files ----------------------------------------------------------------------------------------------------------

FOUR_LAYERS, SMALL = {"num_hidden_layers": 4}, {"hidden_size": 64, "intermediate_size": 64}
TIED = {"vocab_size": 1800, "tie_word_embeddings": True}
Q4_K_M = {"layers.0.self_attn.v": "Q6_K", "layers.0.mlp.down": "Q6_K", "lm_head": "Q6_K"}
# name -> (family, sizes, type of most matrices, types of others; formats of our weights; what is said; how far weights
# may be off, relatively). 0.1 of a step of 4 bits is some 0.02.
MIXTURES = {
    "Q4_0": ("llama", FOUR_LAYERS, "Q4_0", {"lm_head": "Q6_K"}, {INT4: 17, INT8_G16: 1},
             "Q4_0: 29 tensors to int4.g32, exact", 1e-3),
    "tied head": ("llama", FOUR_LAYERS | TIED, "Q4_0", {"embed": "Q6_K"}, {INT4: 14, SMALLER_INT4: 2, SMALLEST_INT8: 2},
                  r"Q4_0: \d tensors to int4.g128, .*\nQ4_0: \d+ tensors to int4.g32, exact\nQ6_K: 1 .* int8,", 0.1),
    "Q8_0": ("llama", FOUR_LAYERS, "Q8_0", {}, {INT8_G32: 18}, "Q8_0: 30 tensors to int8.g32, exact", 0),
    "Q4_1": ("llama", FOUR_LAYERS, "Q4_1", {"embed": "Q8_0"}, {INT4: 17, INT8_G32: 1},
             r"Q4_1: 29 tensors to int4.g32, within 0\.0\d of a step\nQ8_0", 0.02),
    "Q4_K_M": ("llama", FOUR_LAYERS, "Q4_K", Q4_K_M, {INT4: 16, SMALLEST_INT8: 2},
               r"Q4_K: \d+ tensors to int4.g32, within 0\.0\d of a step", 0.15),
    "Q5_K_M": ("llama", FOUR_LAYERS, "Q5_K", Q4_K_M, {INT4: 12, SMALLEST_INT8: 6},
               r"Q5_K: \d+ tensors to int4.g32, rounded again", 0.15),
    "Gemma 3": ("gemma3", SMALL | {"vocab_size": 4000}, "Q5_0", {"down": "Q8_0", "embed": "Q8_0"},
                {INT8_G32: 12, SMALLER_INT8: 2},
                r"Q5_0: 1 tensors to int8.g128, .*\n.* exact\nQ8_0: 1 .*\nQ8_0: 3 tensors to int8.g32, exact", 0.01),
    "experts": ("mixtral", SMALL, "Q4_0", {}, {INT4: 14}, r"Q4_0: \d+ tensors to int4.g32, exact", 0),
    "phi3": ("phi3", SMALL, "Q4_0", {}, {INT4: 14}, r"Q4_0: \d+ tensors to int4.g32, exact", 0),
    "MXFP4": ("gpt-oss", SMALL, "MXFP4", dict.fromkeys(("self_attn", "embed", "lm_head"), "Q8_0"),
              {MXFP4(): 6, INT8_G32: 8}, r"MXFP4: \d+ tensors to mxfp4, exact\nQ8_0: \d+ .* exact", 0),
    "floats": ("llama", {}, "Q4_0", {"o_proj": "F16", "layers.0.self_attn.v": "BF16"},
               {INT4: 7, Unquantized(): 3},
               "Q4_0: .* exact\nQ4_0: 2 tensors to floats", 1e-3),
    "q and k of 4 bits, v of 16": ("llama", FOUR_LAYERS, "Q4_0", {"self_attn.v": "BF16"},
                                   {INT4: 14, INT8_G32: 2, SMALLER_INT8: 2},
                                   r"to int8.g32, exact\nBF16: 2 .* int8.g128, rounded\nBF16: 2 .* int8.g32, rounded\n",
                                   0.01),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_files(name, tmp_path, capsys):
    """The weights are close to those of the same file in float32. The logits are those that transformers computes with
    our weights, dequantized."""
    family, sizes, default, others, formats, said, error = MIXTURES[name]
    theirs = make_llama(**sizes) if family == "llama" else make_hf(family, **sizes)
    file = write_gguf(tmp_path / "m.gguf", theirs, default, others=others)
    convert_gguf(file, tmp_path / "dense", torch.float32)
    assert capsys.readouterr().out == ""
    path = convert_gguf(file, tmp_path / "kept", torch.float32, keep=True)
    out = capsys.readouterr().out
    assert re.search(said, out), out
    dense = load_model(tmp_path / "dense/model.pth", dtype=torch.float32, use_kernels=False)
    ours = load_model(path, dtype=torch.float32, use_kernels=False)
    matrices = {"embed_tokens": ours.embed_tokens} | dict(quantizable_linears(ours))
    found = Counter(matrix.format for matrix in matrices.values())
    assert path.name == f"model_{ours.weight_format.name}.pth" and {*path.parent.glob("*.pth*")} == {path}
    assert found == formats
    for layer, matrix in matrices.items():
        expected = dense.get_submodule(layer).dequantize(torch.float32)
        difference = matrix.dequantize(torch.float32) - expected
        assert difference.norm() <= error * expected.norm(), layer
        dense.get_submodule(layer).weight.copy_(expected + difference)
    stored = sum(tensor.data.nbytes for tensor in read_gguf(file)[1].values())
    kept = sum(t.nbytes for t in read_checkpoint(path)[2].values())
    is_float = "floats" in name  # in float32 here
    assert is_float or kept <= SIZE_LIMIT * stored
    assert f"{kept / 1e6:.1f} MB, {kept / stored:.2f} times the GGUF's" in out
    assert ("would make it larger" in out) == ("rounded again" in re.sub("larger.*", "", out))
    tokens, start = torch.arange(3, 40)[None], torch.zeros(1, dtype=torch.long)
    with torch.inference_mode():
        on_kernels = load_model(path, dtype=torch.float32)
        logits = [model(tokens, start, KVCache(model, 1, 40)) for model in (ours, on_kernels, dense)]
    assert (logits[0] - logits[2]).norm() <= 1e-5 * logits[2].norm()  # both in float32
    torch.testing.assert_close(logits[0], logits[1], atol=1e-3, rtol=1e-3)


# ---- What cannot be kept --------------------------------------------------------------------------------------------


def test_broken_and_unknown_types_are_refused(tmp_path):
    """Broken and unknown types are refused in one line, and nothing is written."""
    theirs, file, out = make_llama(**SMALL), tmp_path / "m.gguf", tmp_path / "out"
    write_gguf(file, theirs, "Q8_0", others={"layers.1.mlp.down": "Q4_1"})
    good = file.read_bytes()
    _, stored = read_gguf(file)
    data = stored["blk.1.ffn_down.weight"].data
    start = good.index(data.tobytes())
    for number in (np.nan, np.inf):
        for offset in (0, 2):  # scale and minimum of the last block
            at = start + data.nbytes - 20 + offset
            file.write_bytes(good[:at] + np.float16(number).tobytes() + good[at + 2 :])
            with pytest.raises(UsageError, match="mlp.down_proj.weight holds scales that are not finite") as e:
                convert_gguf(file, out, keep=True)
            assert "\n" not in str(e.value) and not list(out.iterdir())
    file.unlink()
    write_gguf(file, make_llama(), "Q4_K")
    good = file.read_bytes()
    start = good.index(read_gguf(file)[1]["blk.1.ffn_down.weight"].data.tobytes())
    file.write_bytes(good[:start] + np.float16(6e4).tobytes() + good[start + 2 :])  # times 32 to 63
    with pytest.raises(UsageError, match="mlp.down_proj.weight holds scales that are too large for float16"):
        convert_gguf(file, out, keep=True)
    assert not list(out.iterdir())
    file.write_bytes(good[:-40])
    with pytest.raises(UsageError, match="truncated or not GGUF"):
        convert_gguf(file, out, keep=True)
    file.unlink()
    write_gguf(file, make_hf("gpt-oss", **SMALL), "MXFP4")
    good = file.read_bytes()
    start = good.index(read_gguf(file)[1]["blk.1.ffn_down_exps.weight"].data.tobytes())
    file.write_bytes(good[:start] + b"\xff" + good[start + 1 :])
    with pytest.raises(UsageError, match="experts.0.down_proj.weight holds scales that are not finite"):
        convert_gguf(file, out, keep=True)
    file.unlink()
    write_gguf(file, make_llama(), "Q4_0", others={"layers.1.mlp.down": "Q3_K"})
    with pytest.raises(UsageError, match="down_proj.weight is Q3_K, and --keep takes Q4_0, .*; leave it out"):
        convert_gguf(file, out, keep=True)
    assert not list(out.iterdir())
