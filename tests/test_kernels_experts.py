"""The C++ kernels for feed-forwards, experts and routers against plain PyTorch."""

import math
from dataclasses import replace

import pytest
import torch

from config import ModelConfig
from formats import Unquantized
from layers.backend import CPU_BACKEND
from layers.experts import ExpertsDown, ExpertsGateUp, route, route_torch
from layers.linear import activate, activate_torch
from model import DTYPES, FeedForward
from scripts.kernel_checks import error_bounds as bounds
from scripts.kernel_checks.exact_results import (
    CPU_FORMATS,
    format_label,
    make_linear,
    make_norm,
    with_activation,
)
from tests.cpu_kernels import built, packed, quantizes_activations

pytestmark = pytest.mark.usefixtures("threads")


def check_near(ours: torch.Tensor, expected: torch.Tensor, format):
    """Checks a result that is two matmuls deep. The bound is a few roundings of the dtype and, if activations are
    rounded to int8, 0.7 % of an activation, twice: a step is 1/127 of the largest activation in a group, which is about
    three times as large as a typical one, and the error is at most half a step."""
    error = (ours.double() - expected.double()).norm() / expected.double().norm()
    assert error < (3e-2 if quantizes_activations(format, ours.dtype) else 16 * bounds.U[ours.dtype])


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_feed_forward(format, dtype):
    torch.manual_seed(0)
    for ffn_dim, bias, activation, gated in [
        (48, False, "silu", True), (48, True, "silu", True),
        (40, True, "silu", True),  # not whole blocks of gate and up
        (40, True, "relu2", False), (48, True, "gelu", False),
    ]:
        config = ModelConfig(64, 1, 4, 2, 16, ffn_dim, 64, 64, activation=activation, gated=gated, ffn_bias=bias)
        f, norm = FeedForward(config), make_norm(64, dtype)
        f.gate_up_proj = make_linear(
            sum(config.gate_up_dims), 64, format, dtype, bias=bias, activation=activation, gated=gated
        )
        f.down_proj = make_linear(64, ffn_dim, format, dtype, bias=bias)
        xs = [torch.randn(1, rows, 64).to(dtype) for rows in (1, 3, 8)]
        expected = [f(x, norm=norm, residual=x) for x in xs]
        packed(f)
        for x, y in zip(xs, expected, strict=True):
            check_near(f(x, norm=norm, residual=x), y, format)


@built
@pytest.mark.parametrize("activation, gated", [("silu", True), ("relu2", False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_without_a_kernel(dtype, activation, gated):
    """The kernel multiplies, and PyTorch computes the activation."""
    torch.manual_seed(0)
    backend = replace(CPU_BACKEND, activations=CPU_BACKEND.activations - {activation})
    x, norm, topk_ids = torch.randn(1, 3, 64).to(dtype), make_norm(64, dtype), torch.tensor([[[0, 1], [1, 2], [2, 0]]])
    linear = packed(make_linear(64, 64, Unquantized(), dtype, bias=True))
    experts = packed(make_linear(64, 64, Unquantized(), dtype, bias=True, n_experts=3, kind=ExpertsGateUp))
    linear.backend = experts.backend = backend
    activated = with_activation(linear, activation, gated)
    assert torch.equal(activated(x, norm=norm), activate_torch(linear(x, norm=norm), activation, gated))
    y = experts(x, topk_ids=topk_ids, norm=norm)
    activated = with_activation(experts, activation, gated)
    assert torch.equal(activated(x, topk_ids=topk_ids, norm=norm), activate_torch(y, activation, gated))
    assert torch.equal(activate(y, activation, gated, backend), activate_torch(y, activation, gated))


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(format, dtype):
    torch.manual_seed(0)
    for ffn_dim, bias, activation, gated in [
        (48, False, "silu", True), (40, False, "silu", True), (48, True, "clamped_silu", True),
        (40, True, "gelu_tanh", True), (40, True, "relu2", False), (48, False, "silu", False),
    ]:
        norm = make_norm(64, dtype)
        n = 2 * ffn_dim if gated else ffn_dim
        gate_up = make_linear(
            n, 64, format, dtype, n_experts=6, bias=bias, kind=ExpertsGateUp, activation=activation, gated=gated
        )
        down = make_linear(64, ffn_dim, format, dtype, n_experts=6, bias=bias, kind=ExpertsDown)
        cases = []
        for rows in (1, 3, 8, 33, 64, 65):  # the last goes to PyTorch, from packed weights
            x = torch.randn(1, rows, 64).to(dtype)
            topk_weights, topk_ids = route_torch(torch.randn(1, rows, 6) * 2, 3, True)
            if rows == 64:  # more than 64 times the same expert
                topk_ids[:, :40] = 5
            hidden = gate_up(x, topk_ids=topk_ids, norm=norm)
            routed = {"topk_ids": topk_ids, "topk_weights": topk_weights}
            cases.append((x, routed, hidden, down(hidden, **routed, residual=x)))
        packed(gate_up), packed(down)
        for x, routed, hidden, expected in cases:
            ours = gate_up(x, topk_ids=routed["topk_ids"], norm=norm)
            check_near(ours, hidden, format)
            check_near(down(ours, **routed, residual=x), expected, format)
            check_near(down(ours, **routed), expected.double() - x.double(), format)


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
def test_experts_of_a_prompt(format):
    """A token of a prompt has the same bits as alone, if activations are rounded to int8."""
    if not quantizes_activations(format, torch.bfloat16):
        pytest.skip("PyTorch multiplies prompts")
    torch.manual_seed(0)
    gate_up = make_linear(
        96, 64, format, torch.bfloat16, n_experts=6, kind=ExpertsGateUp, activation="silu", gated=True
    )
    down = make_linear(64, 48, format, torch.bfloat16, n_experts=6, kind=ExpertsDown)
    any_tokens = CPU_BACKEND.with_limits(experts_gate_up=math.inf, experts_down=math.inf)
    packed(gate_up).backend = packed(down).backend = any_tokens
    x = torch.randn(1, 200, 64).bfloat16()
    topk_weights, topk_ids = route_torch(torch.randn(1, 200, 6), 3, True)
    topk_ids[:, 20:] = torch.tensor([5, 0, 2])  # 180 times the same experts

    def forward(tokens):
        routed = {"topk_ids": topk_ids[:, tokens], "topk_weights": topk_weights[:, tokens]}
        return down(gate_up(x[:, tokens], topk_ids=routed["topk_ids"]), **routed, residual=x[:, tokens])

    alone = torch.cat([forward(slice(i, i + 1)) for i in range(200)], 1)
    assert torch.equal(forward(slice(0, 200)), alone)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_route(norm_topk_prob):
    torch.manual_seed(0)
    for rows, n_experts, top_k in [(1, 8, 2), (5, 128, 8), (8, 6, 6)]:
        logits = torch.randn(1, rows, n_experts) * 3
        topk_weights, topk_ids = route_torch(logits, top_k, norm_topk_prob)
        ours = route(logits, top_k, norm_topk_prob, 0, CPU_BACKEND)
        assert torch.equal(ours[1], topk_ids)
        bounds.check(ours[0], topk_weights, (n_experts + 32) * bounds.U[torch.float32] * topk_weights.double())


@built
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_route_to_shared_experts(norm_topk_prob):
    torch.manual_seed(0)
    for rows, n_experts, top_k, n_shared_experts in [(1, 8, 2, 1), (5, 60, 4, 4), (8, 6, 6, 2)]:
        logits = torch.randn(1, rows, n_experts + 1) * 3
        ours = route(logits, top_k, norm_topk_prob, n_shared_experts, CPU_BACKEND)
        topk_weights, topk_ids = route_torch(logits, top_k, norm_topk_prob, n_shared_experts)
        assert torch.equal(ours[1], topk_ids)
        assert (topk_ids[..., top_k:] == torch.arange(n_experts, n_experts + n_shared_experts)).all()
        bounds.check(ours[0], topk_weights, (n_experts + 32) * bounds.U[torch.float32] * topk_weights.double())


@built
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("logits", [[torch.nan] * 6, [1.0, torch.nan, 3.0, 0.0, 2.0, 4.0]])
def test_router_of_nan(logits, norm_topk_prob):
    """With NaN logits the router returns valid, different experts, and weights that are not finite."""
    topk_weights, topk_ids = route(torch.tensor([logits]), 3, norm_topk_prob, 0, CPU_BACKEND)
    assert len({*topk_ids[0].tolist()} & {*range(6)}) == 3 and topk_weights.isnan().all()
