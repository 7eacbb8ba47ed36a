"""kernels/capture.py: a replay gives the same bits as the step, and a computation that a graph cannot hold raises."""

import signal
import sys
import threading
from dataclasses import replace

import pytest
import torch

import kernels.build
from config import ModelConfig, MoEConfig
from formats import Float8, Int4, Int8, Unquantized
from kernels.capture import MAX_CPU_GRAPHS, call_between_op_lists, capture, graph_num_threads
from kernels.schema import CAPTURABLE, MAX_CPU_TOKENS
from layers.backend import CPU_BACKEND, TORCH_BACKEND, TRITON_BACKEND
from layers.experts import ExpertsDown, ExpertsGateUp, route
from layers.kv_cache import KVCache, LayerCache
from layers.linear import add, quantizable_linears
from layers.packing import can_capture, pack_model
from layers.rope import rope_table
from layers.weight import WeightMatrix
from model import Transformer
from scripts.kernel_checks.exact_results import (
    attend,
    format_label,
    make_linear,
    make_norm,
    set_weight,
)
from tests.cpu_kernels import built, make_embedding, packed
from utils.signals import defer_signals

pytestmark = pytest.mark.usefixtures("library")
FAMILIES = {
    "plain": {"embed_scale": 48**0.5},
    "window and biases": {"qkv_bias": True, "o_proj_bias": True, "ffn_bias": True, "sliding_window": 5},
    "q and k norms": {"qk_norm": True, "tie_embeddings": True},
    "experts": {"moe": MoEConfig(6, 3)},
    "odd width": {"ffn_dim": 40},
    "no gate": {"activation": "relu2", "gated": False, "ffn_dim": 40, "ffn_bias": True, "head_bias": True},
    "experts without gates": {"activation": "relu2", "gated": False, "moe": MoEConfig(6, 3)},
    "act-order": {"act_order": True},
    "experts of odd width": {"moe": MoEConfig(6, 3, norm_topk_prob=False), "ffn_dim": 40},
}


def make_model(format, dtype: torch.dtype, act_order: bool = False, **config) -> Transformer:
    torch.manual_seed(0)
    sizes = dict(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=48, vocab_size=97, max_seq_len=64)
    model = Transformer(ModelConfig(**sizes | config))
    for name, p in model.named_parameters():
        p.data = (torch.rand(p.shape) if "norm" in name else torch.randn(p.shape) * 0.2).to(dtype)
    for _, w in quantizable_linears(model):
        set_weight(w, w.weight.data, format)
        if act_order:
            w.set_tensor("input_order", torch.randperm(w.in_features).int())
    if model.config.tie_embeddings:
        model.tie_embedding()
    pack_model(model)
    return packed(model)


@built
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", [Unquantized(), Int8(), Int4(32), Float8()], ids=format_label)
def test_replay_equals_the_step(format, dtype, family):
    """A replay equals the step, with one thread or two, for one token and for several, at any start_pos, and when
    shapes alternate."""
    model = make_model(format, dtype, **FAMILIES[family])
    caches = [KVCache(model, 2, 40) for _ in range(2)]
    captured = capture(lambda tokens, start_pos: model(tokens, start_pos, caches[1]))
    generator = torch.Generator().manual_seed(1)
    steps = [(1, 3, [0, 0]), (2, 1, [3, 3]), (2, 4, [4, 1]), (1, 1, [8, 5]), (2, 3, [30, 37]), (2, 32, [7, 0])]
    with torch.inference_mode():
        for threads, query_len, start_pos in steps:
            assert can_capture(model, 2, query_len)
            torch.set_num_threads(threads)
            tokens = torch.randint(0, 97, (2, query_len), generator=generator)
            expected = model(tokens, torch.tensor(start_pos), caches[0])
            assert torch.equal(captured(tokens, torch.tensor(start_pos)), expected)
    torch.set_num_threads(1)
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(ours.k, theirs.k) and torch.equal(ours.v, theirs.v)


@built
@pytest.mark.parametrize("format", [Unquantized(), Int8()], ids=format_label)
def test_every_argument_is_captured(format):
    """A replay on other inputs equals the step, with arguments that no family above uses."""
    torch.manual_seed(0)
    n_heads, n_kv_heads, d, dim, n_experts = 4, 2, 16, 64, 5
    embedding = make_embedding(97, dim, format, torch.float32)
    norm, sinks = make_norm(dim, torch.float32), torch.randn(n_heads)
    q_norm, k_norm = make_norm(n_heads * d, torch.float32), make_norm(n_kv_heads * d, torch.float32)
    norm.backend = CPU_BACKEND
    config = ModelConfig(dim, 1, n_heads, n_kv_heads, d, 48, 97, 64)
    qkv_proj = make_linear(128, dim, format, torch.float32, clip=2.0)
    head = make_linear(97, dim, format, torch.float32, out_scale=0.1, softcap=5.0)
    router = make_linear(n_experts - 1, dim, Unquantized(), torch.float32)  # 3 experts and the 2 shared ones' logit
    gate_up = make_linear(
        96, dim, format, torch.float32, n_experts=n_experts, bias=True, kind=ExpertsGateUp,
        activation="clamped_silu", gated=True,
    )
    down = make_linear(dim, 48, format, torch.float32, n_experts=n_experts, bias=True, kind=ExpertsDown)
    packed(torch.nn.ModuleList([embedding, qkv_proj, head, router, gate_up, down]))
    cos_sin, slopes = rope_table(config, 40), torch.rand(n_heads)
    caches = [LayerCache(*torch.zeros(2, 2, n_kv_heads, 40, d).unbind(), cos_sin) for _ in range(2)]

    def step(tokens, start_pos, cache):
        x = embedding.embedding(tokens, 8.0, torch.float32)
        y = attend(
            qkv_proj(x), cache, start_pos, n_heads, CPU_BACKEND, 0, q_norm, k_norm, sinks, scale=0.3,
            softcap=2.0, alibi_slopes=slopes,
        )
        x = norm(y, residual=x)
        topk_weights, topk_ids = route(router(x), 2, True, 2, CPU_BACKEND)
        hidden = gate_up(x, topk_ids=topk_ids)
        return head(down(hidden, topk_ids=topk_ids, topk_weights=topk_weights, residual=x), out_dtype=torch.float32)

    captured = capture(lambda tokens, start_pos: step(tokens, start_pos, caches[1]))
    with torch.inference_mode():
        for threads, starts in [(1, [0, 0]), (2, [1, 1]), (1, [2, 30])]:
            torch.set_num_threads(threads)
            tokens, start_pos = torch.randint(0, 97, (2, 1)), torch.tensor(starts)
            assert torch.equal(captured(tokens, start_pos), step(tokens, start_pos, caches[0]))
    torch.set_num_threads(1)


@built
def test_capture_computes_nothing_and_results_are_overwritten():
    model = make_model(Unquantized(), torch.float32)
    kv_cache = KVCache(model, 1, 8)
    calls = []

    def step(tokens, start_pos):
        calls.append(1)
        return model(tokens, start_pos, kv_cache)

    captured, position = capture(step), torch.zeros(1, dtype=torch.long)
    first = captured(torch.tensor([[5]]), position)
    before = first.clone()
    assert captured(torch.tensor([[6]]), position) is first and not torch.equal(first, before)
    assert torch.equal(captured(torch.tensor([[5]]), position), before) and len(calls) == 1


@built
def test_threads_capture_at_the_same_time():
    """Two threads can each capture a step of two OpLists at the same time."""

    def add_thrice(x):
        twice = call_between_op_lists(lambda t: t + 0, add(x, x, CPU_BACKEND))
        return add(twice, x, CPU_BACKEND)

    def step(x):
        twice = add(x, x, CPU_BACKEND)
        thread = threading.Thread(target=lambda: others.append(capture(add_thrice)(y)))
        thread.start()
        thread.join()
        return add(call_between_op_lists(lambda t: t * 2, twice), x, CPU_BACKEND)

    x, y, others = torch.randn(2, 37), torch.randn(5), []
    assert torch.equal(capture(step)(x), x * 4 + x)
    assert torch.equal(others[0], y * 2 + y)


@built
def test_graphs_are_bounded():
    """Only the most recently used graphs are kept. A step whose graph is gone is captured again."""
    shapes = []

    def step(x):
        shapes.append(len(x))
        return add(x, x, CPU_BACKEND)

    captured, n = capture(step), MAX_CPU_GRAPHS
    for length in [*range(1, n + 1), 1, n + 1, 1, 2]:
        assert torch.equal(captured(torch.ones(length)), torch.full((length,), 2.0))
    assert shapes == [*range(1, n + 2), 2]


@built
@pytest.mark.parametrize("operation", [lambda x: x * 2, lambda x: x.clone(), torch.softmax, lambda x: x.sum().item()])
def test_other_operations_raise(operation):
    """An operation that an OpList cannot hold raises, and the next capture works."""
    model = make_model(Unquantized(), torch.float32)
    kv_cache, token, position = KVCache(model, 1, 8), torch.tensor([[5]]), torch.zeros(1, dtype=torch.long)

    def step(tokens, start_pos):
        logits = model(tokens, start_pos, kv_cache)
        return torch.softmax(logits, -1) if operation is torch.softmax else operation(logits)

    with pytest.raises(RuntimeError, match="cannot be captured: a CPU graph holds only kernels"):
        capture(step)(token, position)
    with torch.inference_mode():
        captured = capture(lambda *inputs: model(*inputs, kv_cache)[:, -1].view(-1))  # views may
        assert torch.equal(captured(token, position), model(token, position, kv_cache).flatten())


@pytest.fixture
def python_handles_sigint():
    """A shell starts background jobs with SIGINT ignored, and then Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@built
def test_ctrl_c_leaves_no_kernel_capturing(python_handles_sigint):
    """Ctrl-C at any call in capture.py or signals.py raises KeyboardInterrupt. Later kernels compute, and all signals
    have the handlers that they had before."""
    x, expected = torch.ones(37), torch.full((37,), 2.0)
    files = {function.__code__.co_filename for function in (capture, defer_signals.__wrapped__)}
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    n_left = 0  # calls and returns until Ctrl-C

    def step(x):
        return add(x, x, CPU_BACKEND)

    def interrupt(frame, event, arg):
        nonlocal n_left
        if frame.f_code.co_filename in files and event in ("call", "return"):
            n_left -= 1
            if n_left == 0:
                signal.raise_signal(signal.SIGINT)

    n_interrupts = 0
    while n_left <= 0:  # until a capture ends before Ctrl-C
        n_left, captured = n_interrupts + 1, capture(step)
        try:
            sys.setprofile(interrupt)
            captured(x)
        except KeyboardInterrupt:
            n_interrupts += 1
        finally:
            sys.setprofile(None)
        assert torch.equal(step(x), expected) and torch.equal(captured(x), expected)
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert n_interrupts > 10


def test_there_are_the_kernels_that_a_graph_needs():
    """On a CPU a graph needs those of all operations that it can hold. Limits of other operations do not count."""
    assert CAPTURABLE == CPU_BACKEND.required_in_graph <= CPU_BACKEND.token_limits.keys()
    assert TRITON_BACKEND.required_in_graph <= TRITON_BACKEND.token_limits.keys()
    assert all(CPU_BACKEND.kernel_for(name, 1) is not None for name in CPU_BACKEND.token_limits)
    for backend, needs_add in [(CPU_BACKEND, True), (TRITON_BACKEND, False)]:
        assert backend.with_limits(add=1).supports_step(2, 1, 1, "silu") != needs_add


def test_a_kernel_that_plain_pytorch_cannot_replace():
    """Such a kernel has no limit of tokens. A backend without kernels says that it has none."""
    assert CPU_BACKEND.kernel_for("embed", MAX_CPU_TOKENS + 1) is None
    assert CPU_BACKEND.op("embed") is torch.ops.gptfast_cpu.embed
    with pytest.raises(RuntimeError, match="the backend 'torch' has no kernels, so none for embed"):
        TORCH_BACKEND.op("embed")


@built
def test_a_step_with_an_activation_without_a_kernel_is_not_captured():
    """A CPU does not capture the step. A GPU does, since a CUDA graph can also hold operations of PyTorch."""
    model = make_model(Unquantized(), torch.float32)
    assert can_capture(model, 2, 1)
    for matrix in model.modules():
        if isinstance(matrix, WeightMatrix):
            matrix.backend = replace(matrix.backend, activations=matrix.backend.activations - {"silu"})
    assert not can_capture(model, 2, 1)
    assert TRITON_BACKEND.supports_step(2, 1, 1, "no kernel has this activation")


@built
def test_a_position_beyond_the_cache_is_refused_before_anything_is_written():
    model = make_model(Unquantized(), torch.float32)
    kv_cache = KVCache(model, 1, 4)
    captured = capture(lambda tokens, start_pos: model(tokens, start_pos, kv_cache))
    captured(torch.tensor([[5]]), torch.tensor([3]))
    for token, position, said in [(5, 4, "no room"), (5, -1, "no room"), (97, 0, "vocabulary"), (-1, 0, "vocabulary")]:
        before = kv_cache.layers[0].k.clone()
        with pytest.raises(RuntimeError, match=said):
            captured(torch.tensor([[token]]), torch.tensor([position]))
        assert torch.equal(kv_cache.layers[0].k, before)


def test_between_replays_pytorch_takes_the_graphs_threads(monkeypatch):
    """Between replays, PyTorch computes with as many threads as the graph, and afterwards with as many as the user has
    set, even after an error."""

    class Functions:
        op_list_threads = staticmethod(lambda: 2)

    monkeypatch.setattr(kernels.build, "loaded_cpp_kernels", lambda: Functions)
    torch.set_num_threads(3)
    try:
        with graph_num_threads():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), graph_num_threads():
            1 / 0  # noqa: B018
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


@built
def test_a_function_runs_between_two_op_lists():
    x, total = torch.zeros(2, 37), []

    def double(t):
        total.append(float(t.sum()))
        return t * 2

    step = capture(lambda t: add(call_between_op_lists(double, add(t, t, CPU_BACKEND)), t, CPU_BACKEND))
    for value in (1.0, 3.0):
        assert torch.equal(step(x + value), x + 5 * value)
    assert total[-2:] == [148.0, 444.0]  # of what the first OpList had just computed
    assert torch.equal(call_between_op_lists(double, x + 1), x + 2)


