"""gpt-oss as published: its experts stay in MXFP4, with the values that transformers reads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from converters.hf_quantized_floats import mxfp4_weight
from tests.quantized_folders import dequantized
from tests.tiny import assert_refused, convert, make_hf, same_logits


@pytest.fixture
def mxfp4(tmp_path):
    """A folder with a tiny gpt-oss as published, its tensors, and the same model in transformers."""
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    theirs = make_hf("gpt-oss", **sizes)
    make_hf("gpt-oss", **sizes).bfloat16().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    tensors, generator = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, p in theirs.named_parameters():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            p.data.copy_(p.bfloat16())
            continue
        n_experts, n_inputs, n_outputs = p.shape
        shape = n_experts, n_outputs, n_inputs // 32  # a scale for every 32 inputs; a byte holds two
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 127, shape, generator=generator, dtype=torch.uint8)
        p.data.copy_(convert_moe_packed_tensors(blocks, scales))
        del tensors[name]
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, tensors, theirs


def test_mxfp4(mxfp4):
    folder, _, theirs = mxfp4
    path = convert(folder)
    assert path == folder / "model_mxfp4.pth"
    ours = dequantized(path)
    for i, layer in enumerate(theirs.model.layers):
        gate_up, down = layer.mlp.experts.gate_up_proj.mT, layer.mlp.experts.down_proj.mT
        gate_up = torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], dim=1)
        assert torch.equal(ours[f"layers.{i}.feed_forward.gate_up_proj.weight"], gate_up)
        assert torch.equal(ours[f"layers.{i}.feed_forward.down_proj.weight"], down)
    same_logits(path, theirs)


def test_mxfp4_of_every_byte_and_scale():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 250, 16, 16)
    scales = torch.arange(250, dtype=torch.uint8).view(1, 250, 1).expand(1, 250, 16)  # with the next, 6 * 2^126, inf
    ours = mxfp4_weight("experts", blocks[0], scales[0]).dequantize()
    assert torch.equal(ours, convert_moe_packed_tensors(blocks, scales)[0].mT)


def test_wrong_mxfp4_is_named(mxfp4):
    folder, tensors, _ = mxfp4
    name = "model.layers.1.mlp.experts.down_proj"
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    wrong = {
        f"no tensor {name}_scales": {n: t for n, t in tensors.items() if n != f"{name}_scales"},
        "no tensor model.layers.1.mlp.experts.0.down_proj": {n: t for n, t in tensors.items() if n != f"{name}_blocks"},
        f"the checkpoint has {name} twice": tensors | {name: torch.ones(6, 48, 48)},
        f"{name}_blocks and {name}_scales are not MXFP4": tensors | {f"{name}_scales": scales[:, 1:].clone()},
        f"{name}_blocks and .* are not MXFP4": tensors | {f"{name}_blocks": blocks.float()},
        f"tensors {name}_blocks .* are not MXFP4": tensors | {f"{name}_blocks": blocks[0].clone()},
        f"{name}_scales holds scales that are not finite": tensors | {f"{name}_scales": scales.clone().fill_(255)},
    }
    for match, content in wrong.items():
        save_file(content, folder / "model.safetensors")
        assert_refused(folder, match)
