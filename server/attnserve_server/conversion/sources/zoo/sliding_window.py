"""Sliding-window self-attention with global tokens: each token looks at its neighbours, and some at everything.

Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer", sections 3.1 and 3.2. Every token sees the
keys up to `window` places before and behind it, and the first `global_tokens` of the sequence, which in turn see every
key. Queries are cut into blocks of `window`, each of which needs the keys of its own block and of the two beside it.
With T tokens, time O(T * window * d_model) and memory O(H * T * window): both in proportion to T.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnserve_server.conversion.sources.zoo.skeleton import ZooAttention, softmax_weights

WINDOW = 8
GLOBAL_TOKENS = 1


class SlidingWindowAttention(ZooAttention):
    """Two sites: the band of every token but the global ones (whose rows of it are empty), and the global tokens' rows.

    Both need `global_tokens`, of which there is at least one, and at most as many as `window`.
    """

    def __init__(self, width: int, heads: int, window: int = WINDOW, global_tokens: int = GLOBAL_TOKENS) -> None:
        super().__init__(width, heads)
        if not 1 <= global_tokens <= window:
            raise ValueError(f"{global_tokens} global tokens are not from 1 to the window's {window}")
        self.window, self.global_tokens = window, global_tokens

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """(B, H, T, D)."""
        length = query.shape[2]
        weights = softmax_weights(self._blocks(query), self._banded(key), self._allowed(mask))
        banded = (weights @ self._banded(value)).flatten(2, 3)
        everything = softmax_weights(self._first(query), key, mask[:, None, None, :]) @ value
        return torch.cat([everything, banded[:, :, self.global_tokens :]], dim=2)[:, :, :length]

    def weights_of(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """The band over all keys, (B, H, T, T), and the rows of the global tokens, (B, H, global_tokens, T)."""
        place = torch.arange(query.shape[2])
        near = (place[:, None] - place[None, :]).abs() <= self.window
        seen = (near | (place < self.global_tokens)[None, :]) & (place >= self.global_tokens)[:, None]
        band = softmax_weights(query, key, mask[:, None, None, :] & seen)
        return band, softmax_weights(self._first(query), key, mask[:, None, None, :])

    def _blocks(self, hidden: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, H, blocks, window, D), the last one filled up."""
        batch, heads, length, width = hidden.shape
        blocks = (length + self.window - 1) // self.window
        filled = pad(hidden, (0, 0, 0, blocks * self.window - length))
        return filled.reshape(batch, heads, blocks, self.window, width)

    def _first(self, hidden: Tensor) -> Tensor:
        """The global tokens' vectors, (B, H, global_tokens, D), whatever T is."""
        return pad(hidden, (0, 0, 0, self.global_tokens))[:, :, : self.global_tokens]

    def _banded(self, hidden: Tensor) -> Tensor:
        """For each block of queries the vectors of its keys: (B, H, T, D) -> (B, H, blocks, global + 3 * window, D)."""
        own = self._blocks(hidden)
        before = pad(own, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        after = pad(own, (0, 0, 0, 0, 0, 1))[:, :, 1:]
        first = self._first(hidden).unsqueeze(2).expand(-1, -1, own.shape[2], -1, -1)
        return torch.cat([first, before, own, after], dim=3)

    def _allowed(self, mask: Tensor) -> Tensor:
        """Which columns of the band each query may see, bool (B, 1, blocks, window, global + 3 * window)."""
        places = torch.arange(mask.shape[1])[None, None, :, None]
        queries = self._blocks(places)
        keys = mask[:, None, :, None] * (places + 1)  # 0 is what blocks are filled up with: no key
        keys = self._banded(keys).transpose(-2, -1) - 1
        column = torch.arange(keys.shape[-1])
        near = (queries - keys).abs() <= self.window
        seen = (column < self.global_tokens) | (near & (keys >= self.global_tokens))
        return seen & (keys >= 0) & (queries >= self.global_tokens)
