"""gptq.py rounds weights so that the outputs of a layer change less than by rounding to nearest."""


import pytest
import torch

import gptq
from formats import Int4
from layers.kv_cache import KVCache
from layers.linear import Linear, quantizable_linears
from tests.test_quantize import random_matrix, rounded, shapes_of
from tests.tiny import make_hf, to_ours


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("k, group_size", [(128, 32), (200, 64)])
def test_gptq_keeps_a_layers_outputs_closer_than_rounding(k, group_size, act_order):
    def inputs(seed: int) -> torch.Tensor:
        """Makes correlated inputs, near the same 24 directions."""
        return random_matrix(1000, 24, seed) @ random_matrix(24, k, 2) + 0.1 * random_matrix(1000, k, seed + 1)

    x, w, format = inputs(3), random_matrix(96, k), Int4(group_size)
    config = gptq.GPTQConfig(group_size, percdamp=0.01, blocksize=48, act_order=act_order)
    tensors = gptq.gptq_quantize(w, x.T @ x, config)
    assert shapes_of(tensors) == shapes_of(format.allocate(w.shape, w.dtype, "cpu"))
    fresh = inputs(5)
    ours, plain = (
        (fresh @ (matrix - w).T).square().sum() for matrix in (format.dequantize(tensors, w.dtype), rounded(format, w))
    )
    assert ours < 0.25 * plain


def test_gptq_of_experts_is_gptq_of_each_and_rounds_the_unseen():
    x = random_matrix(300, 64, 1) @ random_matrix(64, 64, 2)
    w = random_matrix(90, 64).view(3, 30, 64)
    hessian = torch.stack([x.T @ x, torch.zeros(64, 64), x[:40].T @ x[:40]])
    config, format = gptq.GPTQConfig(group_size=32, percdamp=0.1, blocksize=16, act_order=True), Int4(32)
    tensors = gptq.gptq_quantize(w, hessian, config)
    together = format.dequantize(tensors, torch.float32)
    for e in range(3):
        alone = format.dequantize(gptq.gptq_quantize(w[e], hessian[e], config), torch.float32)
        assert (together[e] == alone).float().mean() > 0.95  # the inverse is rounded otherwise in a batch
    scales, zeros = (tensors[name][1].float().repeat_interleave(32, -1) for name in ("scales", "zeros"))
    nearest = ((w[1] / scales + zeros / 16).round().clamp(0, 15) - zeros / 16) * scales
    torch.testing.assert_close(together[1], nearest)


def test_calibration_runs_the_model():
    """Calibration runs each layer with its own RoPE and window: with weights that rounding does not change, the model
    has the same outputs."""
    model = to_ours(make_hf("gemma3"), use_kernels=False)
    rounded = Int4(32)
    for _, linear in quantizable_linears(model):
        weight = rounded.dequantize(rounded.quantize(linear.weight), torch.float32)
        linear.set_tensor("weight", weight)
    windows = torch.randint(0, 97, (1, 24), generator=torch.Generator().manual_seed(0))
    outputs = []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
    with torch.inference_mode():
        model(windows, torch.zeros(1, dtype=torch.long), KVCache(model, 1, 24))
    expected, outputs[:] = list(outputs), []
    config = gptq.GPTQConfig(32, percdamp=0.1, blocksize=16, act_order=True)
    assert len(list(gptq.quantize_model(model, windows, torch.device("cpu"), config))) == 4 * len(model.layers) + 1
    for i, output in enumerate(expected):  # a layer runs twice: for the Hessians, and for the outputs
        torch.testing.assert_close(outputs[2 * i + 1], output, rtol=1e-3, atol=1e-3)


def test_gptq_of_inputs_that_are_all_zero(capsys):
    """Inputs that are all zero do not tell which columns matter, so weights are rounded to nearest."""
    torch.manual_seed(0)
    linear = Linear(64, 16)
    linear.weight.normal_()
    exact = linear.weight.clone()
    config = gptq.GPTQConfig(group_size=32, percdamp=0.1, blocksize=128, act_order=True)
    gptq.quantize_linear("lm_head", linear, torch.zeros(64, 64), config)
    assert capsys.readouterr().err == "lm_head: all inputs are 0, so it is rounded to nearest\n"
    plain = Int4(32).dequantize(Int4(32).quantize(exact), torch.float32)
    assert (linear.weight - exact).square().mean() <= (plain - exact).square().mean()
