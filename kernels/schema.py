"""The operations of the kernels, as PyTorch knows them: torch.ops.gptfast.NAME in C++ (kernels/csrc/), on a CPU, and
torch.ops.gptfast_triton.NAME in Triton. Each has one schema and one function for the shape of its result, here.

A weight is what kernels/formats.py packs; kind is its Format.kind, n its outputs, group_size the inputs that share a
scale. activation is a number of ACTIVATIONS. A change here is a change of both implementations.
"""

import torch

NAMESPACES = ("gptfast", "gptfast_triton")
ACTIVATIONS = {None: 0, "silu": 1}  # also in reference.py, csrc/simd.h, triton_linear.py
WEIGHT = "Tensor weight, Tensor? scales, Tensor? zeros, int kind, int n, int group_size"
SCHEMAS = {  # the leaf operations
    "linear": f"(Tensor x, {WEIGHT}, Tensor? bias, Tensor? norm, float eps, Tensor? residual, int activation, "
    "bool float32_out) -> Tensor",
    "glu": "(Tensor gate_up, int activation) -> Tensor",
    "add": "(Tensor x, Tensor y) -> Tensor",
    "embed": "(Tensor tokens, Tensor weight) -> Tensor",
    "attend": "(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor rope, Tensor? q_norm, "
    "Tensor? k_norm, float eps, int n_heads, int window) -> Tensor",
    "route": "(Tensor logits, int top_k, bool normalize) -> (Tensor, Tensor)",
    "experts_gate_up": f"(Tensor x, {WEIGHT}, Tensor topk_ids, Tensor? norm, float eps, int activation) -> Tensor",
    "experts_down": f"(Tensor hidden, {WEIGHT}, Tensor topk_ids, Tensor topk_weights, Tensor? residual) -> Tensor",
}
DEQUANTIZE = f"({WEIGHT}, int k, ScalarType dtype) -> Tensor"  # for prefill, so it is no leaf


class Shapes:
    """What torch.compile has to know: an empty tensor like the one that an operation returns."""

    def linear(x, weight, scales, zeros, kind, n, group_size, bias, norm, eps, residual, activation, float32_out):
        dtype = torch.float32 if float32_out else x.dtype
        return x.new_empty(*x.shape[:-1], n // 2 if activation else n, dtype=dtype)

    def glu(gate_up, activation):
        return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    def add(x, y):
        return torch.empty_like(x)

    def embed(tokens, weight):
        return weight.new_empty(*tokens.shape, weight.shape[1])

    def attend(qkv, k_cache, v_cache, positions, rope, q_norm, k_norm, eps, n_heads, window):
        return qkv.new_empty(*qkv.shape[:-1], n_heads * k_cache.shape[-1])

    def route(logits, top_k, normalize):
        shape = (*logits.shape[:-1], top_k)
        return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)

    def experts_gate_up(x, weight, scales, zeros, kind, n, group_size, topk_ids, norm, eps, activation):
        return x.new_empty(*topk_ids.shape, n // 2 if activation else n)

    def experts_down(hidden, weight, scales, zeros, kind, n, group_size, topk_ids, topk_weights, residual):
        return hidden.new_empty(*topk_ids.shape[:-1], n)

    def dequantize(weight, scales, zeros, kind, n, group_size, k, dtype):
        return weight.new_empty(n, k, dtype=dtype)


for namespace in NAMESPACES:
    for name, schema in (SCHEMAS | {"dequantize": DEQUANTIZE}).items():
        torch.library.define(f"{namespace}::{name}", schema)
        torch.library.register_fake(f"{namespace}::{name}", vars(Shapes)[name])


def implement_in_triton(function):
    """Decorator: makes function the implementation of the operation of its name in torch.ops.gptfast_triton. On CPU
    tensors, too, where Triton's interpreter runs it."""
    name = f"gptfast_triton::{function.__name__}"
    torch.library.impl(name, ("CUDA", "CPU"), function)
    return function
