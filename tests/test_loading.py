"""load_model: which tensors a checkpoint must have, and which parameters are one."""

import pytest
import torch

import machine
import quantize
from checkpoint import read_checkpoint, save_checkpoint
from config import UsageError
from generate import load_model
from tests.byte_models import random_folder
from tests.tiny import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose embedding is its head too, in 32 and in 8 bits."""
    folder = random_folder(tmp_path_factory.mktemp("tied"), max_seq_len=64, tie_embeddings=True)
    call(quantize.main, "--checkpoint_path", folder / "model.pth", "--mode", "int8")
    return folder


def rewrite(path, to, change):
    config, quantization, tensors = read_checkpoint(path)
    change(tensors)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    save_checkpoint(to, config, shapes, tensors.items(), quantization)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_kernels", [True, False])
def test_tied_embeddings_are_one_parameter(folder, use_kernels, dtype):
    model = load_model(folder / "model.pth", dtype=dtype, use_kernels=use_kernels)
    assert model.lm_head.weight is model.embed_tokens.weight and model.lm_head.weight.dtype == dtype
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_quantized_head_is_not_tied(folder):
    model = load_model(folder / "model_int8.pth")
    assert model.lm_head.weight.data_ptr() != model.embed_tokens.weight.data_ptr()
    assert model.format.name == "int8" and model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.lm_head.scales.dtype == torch.float32


def test_a_head_of_its_own_counts(folder, tmp_path):
    head = torch.randn(260, 32)
    rewrite(folder / "model.pth", tmp_path / "model.pth", lambda tensors: tensors.update({"lm_head.weight": head}))
    model = load_model(tmp_path / "model.pth", dtype=torch.float32, use_kernels=False)
    assert torch.equal(model.lm_head.weight, head) and not torch.equal(model.embed_tokens.weight, head)


@pytest.mark.parametrize(
    "name, dtype",
    [("lm_head.scales", torch.float64), ("lm_head.weight", torch.int32), ("norm.weight", torch.int8)],
)
def test_types_of_a_quantized_checkpoint(folder, tmp_path, name, dtype):
    path = tmp_path / "model.pth"
    rewrite(folder / "model_int8.pth", path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(UsageError, match=f"tensor {name} is missing, left over or of the wrong shape"):
        load_model(path)


def test_a_file_just_read_takes_no_room_in_a_container(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\ninactive_anon 20\ninactive_file 500\nactive_file 100\n")
    assert machine.free_in_container(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    with pytest.raises(ValueError):  # there is no limit
        machine.free_in_container(tmp_path)
