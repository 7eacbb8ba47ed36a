"""TokenHistory: the token ids of each sequence's text, on the device, for sampling options that depend on the text."""

import copy

import torch
from torch import Tensor


class TokenHistory:
    """The token ids of batch_size texts of up to max_seq_len tokens, by position. Like a KVCache it does not track how
    many tokens it holds: a step stores its tokens at their positions. Rejected tokens of a speculation stay,
    harmlessly: every mask ends at the last real token, and the next step writes over them."""

    def __init__(self, batch_size: int, max_seq_len: int, device: torch.device):
        self.ids = torch.zeros(batch_size, max_seq_len, dtype=torch.long, device=device)

    def store(self, tokens: Tensor, start_pos: Tensor):
        """Stores tokens [B, T], the first of each sequence at start_pos [B]."""
        positions = start_pos[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self.ids.scatter_(1, positions, tokens)

    def seen_token_mask(self, last_positions: Tensor, vocab_size: int) -> Tensor:
        """Whether each token of the vocabulary occurs in the text up to each of last_positions [B, n]: bool [B, n, V].
        All tokens of the text up to there must have been stored."""
        is_later = torch.arange(self.ids.shape[1], device=self.ids.device) > last_positions[..., None]  # [B, n, S]
        ids = self.ids[:, None].masked_fill(is_later, vocab_size)
        seen = torch.zeros(*last_positions.shape, vocab_size + 1, dtype=torch.bool, device=self.ids.device)
        return seen.scatter_(-1, ids, True)[..., :vocab_size]

    def narrow_batch(self, start: int, n: int) -> "TokenHistory":
        """A view of n sequences, the first of which is number start."""
        view = copy.copy(self)
        view.ids = self.ids[start : start + n]
        return view

    def copy_sequence(self, source: int, target: int, n: int):
        """Copies the first n tokens of sequence source to sequence target."""
        self.ids[target, :n] = self.ids[source, :n]

    def swap_sequences(self, i: int, j: int, n: int):
        """Exchanges the first n tokens of sequences i and j."""
        self.ids[[i, j], :n] = self.ids[[j, i], :n]
