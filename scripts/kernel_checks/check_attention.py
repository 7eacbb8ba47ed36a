"""Checks attention. all_checks.py lists the sizes and options."""

import torch

from config import ModelConfig
from layers.backend import TRITON_BACKEND
from layers.kv_cache import LayerCache
from layers.rope import alibi_slopes, rope_table
from scripts.kernel_checks.exact_results import Comparison, attend, exact_attention, exact_cache, make_norm

ATTENTION_OPTIONS = ("sinks", "scale", "softcap", "wide_norms", "alibi")


def check_attention(dtype: torch.dtype, heads: tuple, window: int, caches: list, options: tuple):
    """Checks attention of sequences at different positions. The cache is a view of a longer cache, and holds NaN where
    nothing has been written yet. Compares the output and the whole longer cache: only new tokens may change it.

    caches: tuples (number of new tokens, position of the first new token in every sequence, max_seq_len)."""
    n_heads, n_kv_heads, head_dim = heads
    norms, arguments = make_options(options, heads, dtype)
    config = ModelConfig(64, 1, n_heads, n_kv_heads, head_dim, 64, 64, max_seq_len=10_000)
    for query_len, starts, length in caches:
        n_sequences, full_length = len(starts), length + 40
        cos_sin, start_pos = rope_table(config, full_length), torch.tensor(starts)
        qkv = torch.randn(n_sequences, query_len, (n_heads + 2 * n_kv_heads) * head_dim).to(dtype)
        k, v = torch.randn(2, n_sequences, n_kv_heads, full_length, head_dim).to(dtype).unbind()
        for b, start in enumerate(starts):
            k[b, :, start:], v[b, :, start:] = torch.nan, torch.nan
        before = LayerCache(k.clone(), v.clone(), cos_sin)
        view = before._replace(k=k[:, :, :length], v=v[:, :, :length])
        ours = attend(qkv, view, start_pos, n_heads, TRITON_BACKEND, window, *norms, **arguments)
        case = f"{heads}, window {window}, {query_len} tokens from {starts} on, options {options}"
        y, error = exact_attention(qkv, before, start_pos, n_heads, window, norms, **arguments)
        yield Comparison("attend", case, ours, y, error)
        exact_k, exact_v, k_error = exact_cache(qkv, before, start_pos, n_heads, norms)
        yield Comparison("attend", f"{case}: keys", k.nan_to_num(9), exact_k.nan_to_num(9), k_error)
        yield Comparison("attend", f"{case}: values", v.nan_to_num(9), exact_v.nan_to_num(9), torch.zeros(()))


def make_options(options: tuple, heads: tuple, dtype: torch.dtype) -> tuple[list, dict]:
    """Makes the norms of queries and keys, and the other arguments of attention. The first sink is so large that it
    takes nearly all of the softmax."""
    n_heads, n_kv_heads, head_dim = heads
    norms, arguments = [None, None], {}
    if "head_norms" in options:
        norms = [make_norm(head_dim, dtype) for _ in "qk"]
    if "wide_norms" in options:
        norms = [make_norm(n * head_dim, dtype) for n in (n_heads, n_kv_heads)]
    if "sinks" in options:
        arguments["sinks"] = torch.cat([torch.tensor([9.0]), torch.randn(n_heads - 1)]).to(dtype)
    arguments |= {name: value for name, value in (("scale", 0.3), ("softcap", 1.5)) if name in options}
    if "alibi" in options:
        arguments["alibi_slopes"] = alibi_slopes(n_heads)
    return norms, arguments
