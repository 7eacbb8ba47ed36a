"""The KV cache: what earlier tokens leave behind for attention.

    kv_cache = KVCache(model, batch_size=1, max_seq_len=300)    # allocated once, passed to every forward
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from layers.rope import rope_tables
from utils.errors import UsageError
from utils.machine import check_memory


class LayerCache(NamedTuple):
    """The keys and values of earlier tokens in a layer, and RoPE's table. The table belongs to the cache, not to the
    model: with RoPE of type dynamic or longrope, the angles depend on the cache's length."""

    k: Tensor  # [B, G, S, D]
    v: Tensor  # [B, G, S, D]
    cos_sin: Tensor  # [S or more, D/2, 2] float32: cos and sin of RoPE's angles at every position


class KVCache:
    """Keys, values and token ids of batch_size sequences of up to max_seq_len tokens. The cache does not count its
    tokens: every step passes the position of each sequence's first new token. Rejected draft tokens stay in the cache.
    Later steps overwrite them, and nothing reads beyond a sequence's last token.

    layers: the LayerCache of each layer.
    token_ids [B, S]: the tokens, for the repetition penalty. engine/sampler.py: adjust_logits stores them, and only
        while an option needs them."""

    def __init__(self, model: nn.Module, batch_size: int, max_seq_len: int):
        """model: a Transformer, whose device and dtype the cache gets. Raises UsageError if max_seq_len exceeds the
        model's context, and OutOfMemoryError if the device is a CPU with too little memory."""
        if max_seq_len > model.config.max_seq_len:
            raise UsageError(f"{max_seq_len} tokens do not fit the model's context of {model.config.max_seq_len}")
        if model.device.type == "cpu":
            n_bytes = batch_size * max_seq_len * kv_bytes_per_token(model)
            check_memory(n_bytes, f"the KV cache of {batch_size} x {max_seq_len} tokens")
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.device = model.device
        self.layers = []
        cos_sin_tables = rope_tables(model.config, max_seq_len, self.device)
        for block, cos_sin in zip(model.layers, cos_sin_tables, strict=True):
            shape = (batch_size, block.attention.n_kv_heads, max_seq_len, block.attention.head_dim)
            k, v = (torch.zeros(shape, dtype=model.dtype, device=self.device) for _ in range(2))
            self.layers.append(LayerCache(k, v, cos_sin))
        self.token_ids = torch.zeros(batch_size, max_seq_len, dtype=torch.long, device=self.device)

    def view_positions(self, n: int) -> "KVCache":
        """A view of the first n positions. Attention in plain PyTorch computes scores for every position of the cache,
        so a shorter view costs less."""
        view = copy.copy(self)
        view.max_seq_len = n
        view.layers = [cache._replace(k=cache.k[:, :, :n], v=cache.v[:, :, :n]) for cache in self.layers]
        view.token_ids = self.token_ids[:, :n]
        return view

    def view_sequences(self, start: int, n: int) -> "KVCache":
        """A view of n sequences, the first of which is number start."""
        if n == self.batch_size:  # always, except in a scheduler's steps
            return self
        view = copy.copy(self)
        rows = slice(start, start + n)
        view.batch_size = n
        view.layers = [cache._replace(k=cache.k[rows], v=cache.v[rows]) for cache in self.layers]
        view.token_ids = self.token_ids[rows]
        return view

    def copy_sequence(self, source: int, target: int, n: int):
        """Copies the first n tokens of sequence source to sequence target."""
        for cache in self.layers:
            cache.k[target, :, :n] = cache.k[source, :, :n]
            cache.v[target, :, :n] = cache.v[source, :, :n]
        self.token_ids[target, :n] = self.token_ids[source, :n]

    def swap_sequences(self, i: int, j: int, n: int):
        """Exchanges the first n tokens of sequences i and j."""
        for cache in self.layers:
            for tensor in (cache.k[:, :, :n], cache.v[:, :, :n]):
                tensor[[i, j]] = tensor[[j, i]]
        self.token_ids[[i, j], :n] = self.token_ids[[j, i], :n]

    def clear_sequence(self, i: int):
        for cache in self.layers:
            cache.k[i].zero_()
            cache.v[i].zero_()


def kv_bytes_per_token(model: nn.Module) -> int:
    """Bytes of keys and values for one token of one sequence, on this rank."""
    n_elements = sum(2 * block.attention.n_kv_heads * block.attention.head_dim for block in model.layers)
    return n_elements * model.dtype.itemsize
