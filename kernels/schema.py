"""The kernels as PyTorch operations: for each, the schema, and a function that allocates the result (define).

C++ implements an operation as torch.ops.gptfast_cpu.NAME (kernels/csrc/), Triton as torch.ops.gptfast_triton.NAME. Both
implement the same schema, so a changed schema changes both. layers/ describes the operations.

Some arguments come in bundles: WeightArguments, Epilogue, AttentionParams and TokenFilters. A schema lists the fields
of a bundle one by one, because PyTorch passes no NamedTuple to an operation. This is the whole schema of fused_linear:

    fused_linear(Tensor x, *,                                                          by position; the rest by name
        Tensor weight, Tensor? scales, Tensor? zeros, str format, int n, int group_size,        WEIGHT
        Tensor? bias, Tensor? norm_weight, float eps, Tensor? residual,
        str? activation, bool gated, float out_scale, float softcap, float clip,                EPILOGUE
        ScalarType out_dtype) -> Tensor

Names keep two numbers from changing places. But C++ gets all arguments by position, so a test compares the parameters
in csrc/ops.cpp with the schemas. Triton's functions get the six arguments of WEIGHT as one argument, w.

format is the name of a class in formats/, such as "Int4". activation is one of config.py: ACTIVATIONS.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

# Namespaces of torch.ops
CPU_NAMESPACE = "gptfast_cpu"
TRITON_NAMESPACE = "gptfast_triton"
NAMESPACES = (CPU_NAMESPACE, TRITON_NAMESPACE)
# The largest number of tokens of a step on a CPU, of all sequences together. C++ has arrays of this size for the sums
# of a matmul. It cuts more tokens into batches
MAX_CPU_TOKENS = 64
# The largest number of tokens of a step for Triton, of all sequences together. A program of a matmul holds the sums of
# all tokens in registers
MAX_TRITON_TOKENS = 64
# A program of Triton's attention holds the new tokens and the queries in registers
MAX_TRITON_QUERY_LEN = 16  # the new tokens of a sequence
MAX_TRITON_QUERIES = 64  # the queries of a key/value head
# What sample returns for a sequence whose logits are not all finite: weights with NaN, or overflow in 16 bits. sample
# cannot raise an error, because it does not wait for the device. Whoever reads the token on the host raises it
INVALID_TOKEN = -1
SMALLEST_TEMPERATURE = 1e-30  # of sample; a smaller divisor could round to 0 in float32
SCHEMAS: dict[str, str] = {}  # name of an operation -> schema
CAPTURABLE: set[str] = set()  # the operations that a CPU graph can hold
# The two parameters of clamped_silu, gpt-oss's swiglu_alpha and swiglu_limit
CLAMPED_SILU_ALPHA = 1.702  # sigmoid(alpha * gate)
CLAMPED_SILU_LIMIT = 7.0  # gate is at most the limit, up between -limit and limit


# ---- Bundles of arguments -------------------------------------------------------------------------------------------


class WeightArguments(NamedTuple):
    """A weight, as the arguments of a kernel."""

    weight: Tensor  # weight, scales and zeros are packed for the backend
    scales: Tensor | None
    zeros: Tensor | None
    format: str
    n: int  # N
    group_size: int  # inputs of an output that share a scale


class Epilogue(NamedTuple):
    """What fused_linear does to y = x W^T + bias, in this order. The default of a field leaves its step out."""

    activation: str | None = None
    gated: bool = False  # y is gate and up, and becomes activation(gate) * up, of half the width
    out_scale: float = 1.0  # y * out_scale
    softcap: float = 0.0  # softcap * tanh(y / softcap)
    clip: float = 0.0  # y, clamped to [-clip, clip]


class AttentionParams(NamedTuple):
    """What attention does besides softmax(q k^T) v. The default of a field leaves its step out."""

    n_heads: int  # H, the heads of queries
    scale: float  # multiplies the scores
    window: int = 0  # the number of tokens that a token sees, including itself; 0 means all
    softcap: float = 0.0  # scores, after scale, become softcap * tanh(score / softcap)
    q_norm_weight: Tensor | None = None  # of norms before RoPE: [D] norms each head, [H D] all heads together
    k_norm_weight: Tensor | None = None  # [D] or [G D]
    eps: float = 0.0  # eps of both norms
    sinks: Tensor | None = None  # [H], the scores of an additional key, whose value is zero
    alibi_slopes: Tensor | None = None  # [H] float32: slope * (position of key - position of query) is added to scores


class TokenFilters(NamedTuple):
    """The options of engine/sampling_params.py that exclude tokens. The default of a field excludes none."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


# The fields of TokenFilters that a kernel of sample uses. While another field is active, PyTorch samples
CPU_FILTERS = ("top_k", "top_p", "min_p")
TRITON_FILTERS = ("top_p", "min_p")
KERNEL_FILTERS = tuple(name for name in TokenFilters._fields if name in CPU_FILTERS + TRITON_FILTERS)


def as_schema(bundle: type[NamedTuple], names: tuple[str, ...] | None = None) -> str:
    """The fields of a bundle, or those in names, as arguments of a schema."""
    types = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool"}
    types |= {str: "str", str | None: "str?"}
    return ", ".join(f"{types[bundle.__annotations__[name]]} {name}" for name in names or bundle._fields)


def active_fields(bundle: NamedTuple) -> set[str]:
    """The fields of a bundle that differ from their defaults, and those without a default."""
    defaults = bundle._field_defaults
    return {name for name, value in bundle._asdict().items() if name not in defaults or value != defaults[name]}


WEIGHT, EPILOGUE, ATTENTION = as_schema(WeightArguments), as_schema(Epilogue), as_schema(AttentionParams)
FILTERS = as_schema(TokenFilters, KERNEL_FILTERS)


# ---- Defining operations --------------------------------------------------------------------------------------------


def define(schema: str, capturable: bool = True, namespaces: tuple[str, ...] = NAMESPACES) -> Callable:
    """Decorator: defines the operation of schema, "NAME(arguments) -> results", in each namespace.

    The decorated function is empty_NAME. It allocates the results: Triton's kernels fill them, and PyTorch takes the
    function as the fake (meta) implementation. It gets the six arguments of WEIGHT as one argument, w.

    capturable: whether a CPU graph can hold the operation (capture.py)."""
    name = schema.partition("(")[0]

    def register(empty: Callable) -> Callable:
        assert empty.__name__ == f"empty_{name}"
        for namespace in namespaces:
            torch.library.define(f"{namespace}::{name}", schema.removeprefix(name))
            torch.library.register_fake(f"{namespace}::{name}", bundle_weight(empty))
        SCHEMAS[name] = schema
        if capturable:
            CAPTURABLE.add(name)
        return empty

    return register


def register_triton(function: Callable) -> Callable:
    """Decorator: makes function the implementation of torch.ops.gptfast_triton.NAME, where NAME is the function's name.
    CPU tensors are for Triton's interpreter. function gets the six arguments of WEIGHT as one argument, w."""
    torch.library.impl(f"{TRITON_NAMESPACE}::{function.__name__}", ("CUDA", "CPU"), bundle_weight(function))
    return function


def bundle_weight(function: Callable) -> Callable:
    """Wraps function: PyTorch passes the six arguments of WEIGHT by name, and function gets one argument, w."""

    @wraps(function)
    def call(*args, **kwargs):
        if "format" in kwargs:
            kwargs["w"] = WeightArguments(**{name: kwargs.pop(name) for name in WeightArguments._fields})
        return function(*args, **kwargs)

    return call


def output_width(n: int, gated: bool) -> int:
    """The number of outputs after the activation of n outputs."""
    return n // 2 if gated else n


# ---- The operations -------------------------------------------------------------------------------------------------
#
# A function names only the arguments that it needs. `_` takes the rest.


@define(
    f"fused_linear(Tensor x, *, {WEIGHT}, Tensor? bias, Tensor? norm_weight, float eps, Tensor? residual, {EPILOGUE}, "
    "ScalarType out_dtype) -> Tensor"
)
def empty_fused_linear(x, *, w, gated, out_dtype, **_):
    return x.new_empty(*x.shape[:-1], output_width(w.n, gated), dtype=out_dtype)


@define("activate(Tensor x, str activation, bool gated) -> Tensor", namespaces=(CPU_NAMESPACE,))
def empty_activate(x, _, gated):
    return x.new_empty(*x.shape[:-1], output_width(x.shape[-1], gated))


@define("add(Tensor x, Tensor y) -> Tensor", namespaces=(CPU_NAMESPACE,))
def empty_add(x, y):
    return torch.empty_like(x)


@define("rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> Tensor")
def empty_rms_norm(x, *_):
    return torch.empty_like(x)


@define("permute_inputs(Tensor x, Tensor input_order) -> Tensor")
def empty_permute_inputs(x, input_order):
    return x.new_empty(*x.shape[:-1], len(input_order))


@define(f"embed(Tensor tokens, *, {WEIGHT}, int k, ScalarType dtype, float scale) -> Tensor")
def empty_embed(tokens, *, w, k, dtype, **_):
    return w.weight.new_empty(*tokens.shape, k, dtype=dtype)


# Not capturable: attention in PyTorch follows it, and a CPU graph cannot hold that
@define(
    "rope_and_cache(Tensor qkv, Tensor start_pos, Tensor(a!) k_cache, Tensor(b!) v_cache, *, Tensor cos_sin, "
    "int n_heads, Tensor? q_norm_weight, Tensor? k_norm_weight, float eps) -> Tensor",
    capturable=False, namespaces=(CPU_NAMESPACE,),
)
def empty_rope_and_cache(qkv, start_pos, k_cache, v_cache, *, n_heads, **_):
    return qkv.new_empty(*qkv.shape[:-1], n_heads, k_cache.shape[-1])


@define(
    "attend(Tensor qkv, Tensor start_pos, Tensor(a!) k_cache, Tensor(b!) v_cache, *, Tensor cos_sin, "
    f"{ATTENTION}) -> Tensor"
)
def empty_attend(qkv, start_pos, k_cache, v_cache, *, n_heads, **_):
    return qkv.new_empty(*qkv.shape[:-1], n_heads * k_cache.shape[-1])


@define("route(Tensor logits, *, int top_k, bool norm_topk_prob, int n_shared_experts) -> (Tensor, Tensor)")
def empty_route(logits, *, top_k, n_shared_experts, **_):
    shape = (*logits.shape[:-1], top_k + n_shared_experts)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


@define(
    f"experts_gate_up(Tensor x, *, {WEIGHT}, Tensor? bias, Tensor topk_ids, Tensor? norm_weight, float eps, "
    "str? activation, bool gated) -> Tensor"
)
def empty_experts_gate_up(x, *, w, topk_ids, gated, **_):
    return x.new_empty(*topk_ids.shape, output_width(w.n, gated))


@define(
    f"experts_down(Tensor hidden, *, {WEIGHT}, Tensor? bias, Tensor topk_ids, Tensor topk_weights, Tensor? residual)"
    " -> Tensor"
)
def empty_experts_down(hidden, *, w, topk_ids, **_):
    return hidden.new_empty(*topk_ids.shape[:-1], w.n)


# Not capturable: a matmul in PyTorch follows it, and a CPU graph cannot hold that
@define(f"dequantize(*, {WEIGHT}, int k, ScalarType dtype) -> Tensor", capturable=False)
def empty_dequantize(*, w, k, dtype):
    return w.weight.new_empty(w.n, k, dtype=dtype)


# Takes the logits that a CPU graph computes, so sample comes after the graph. Greedy sampling passes neither
# temperature nor rand.
@define(f"sample(Tensor logits, *, Tensor? temperature, Tensor? rand, {FILTERS}) -> Tensor", capturable=False)
def empty_sample(logits, **_):
    return logits.new_empty(len(logits), dtype=torch.int64)
