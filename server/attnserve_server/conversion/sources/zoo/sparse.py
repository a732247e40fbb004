"""Sparse self-attention: each token attends to some keys only, near ones or those with the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnserve_server.conversion.sources.zoo.skeleton import ZooAttention, softmax_weights

WINDOW = 8
GLOBAL_TOKENS = 1
KEPT = 8
"""Keys that each query of top-k attention keeps. Further keys with the score of the last one are kept too."""


class SlidingWindowAttention(ZooAttention):
    """Attention to near keys, with global tokens at the start of the sequence.

    Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer", sections 3.1 and 3.2. Every token attends
    to the keys up to `window` positions before and behind it, and to the first `global_tokens` of the sequence. Those
    attend to every key. Queries are split into blocks of `window`, each of which needs the keys of that block and the
    two beside it. With T tokens, time O(T * window * d_model) and memory O(H * T * window): both are linear in T.

    Two sites: the global tokens' rows, and the band of every other token (the global tokens' rows of it are empty).
    Both need `global_tokens`, from 1 to `window`, or ValueError is raised.
    """

    def __init__(self, width: int, heads: int, window: int = WINDOW, global_tokens: int = GLOBAL_TOKENS) -> None:
        super().__init__(width, heads)
        if not 1 <= global_tokens <= window:
            raise ValueError(f"{global_tokens} global tokens are not from 1 to the window's {window}")
        self.window, self.global_tokens = window, global_tokens

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return (B, H, T, D)."""
        length = query.shape[2]
        weights = softmax_weights(self._blocks(query), self._banded(key), self._allowed(mask))
        banded = (weights @ self._banded(value)).flatten(2, 3)
        everything = softmax_weights(self._first(query), key, mask[:, None, None, :]) @ value
        return torch.cat([everything, banded[:, :, self.global_tokens :]], dim=2)[:, :, :length]

    def weights_of(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the global tokens' rows, (B, H, global_tokens, T), and the band over all keys, (B, H, T, T)."""
        place = torch.arange(query.shape[2])
        near = (place[:, None] - place[None, :]).abs() <= self.window
        allowed = (near | (place < self.global_tokens)[None, :]) & (place >= self.global_tokens)[:, None]
        band = softmax_weights(query, key, mask[:, None, None, :] & allowed)
        return softmax_weights(self._first(query), key, mask[:, None, None, :]), band

    def _blocks(self, hidden: Tensor) -> Tensor:
        """Split (B, H, T, D) into (B, H, blocks, window, D); zeros fill the last block."""
        batch, heads, length, width = hidden.shape
        blocks = (length + self.window - 1) // self.window
        filled = pad(hidden, (0, 0, 0, blocks * self.window - length))
        return filled.reshape(batch, heads, blocks, self.window, width)

    def _first(self, hidden: Tensor) -> Tensor:
        """Return the global tokens' vectors, (B, H, global_tokens, D), for any T."""
        return pad(hidden, (0, 0, 0, self.global_tokens))[:, :, : self.global_tokens]

    def _banded(self, hidden: Tensor) -> Tensor:
        """Return the keys of each block of queries: (B, H, T, D) -> (B, H, blocks, global + 3 * window, D)."""
        own = self._blocks(hidden)
        before = pad(own, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        after = pad(own, (0, 0, 0, 0, 0, 1))[:, :, 1:]
        first = self._first(hidden).unsqueeze(2).expand(-1, -1, own.shape[2], -1, -1)
        return torch.cat([first, before, own, after], dim=3)

    def _allowed(self, mask: Tensor) -> Tensor:
        """Return the columns of the band that each query may attend to, bool (B, 1, blocks, window, columns)."""
        places = torch.arange(mask.shape[1])[None, None, :, None]
        queries = self._blocks(places)
        keys = mask[:, None, :, None] * (places + 1)  # 0 marks the filling of a block: no key
        keys = self._banded(keys).transpose(-2, -1) - 1
        column = torch.arange(keys.shape[-1])
        near = (queries - keys).abs() <= self.window
        allowed = (column < self.global_tokens) | (near & (keys >= self.global_tokens))
        return allowed & (keys >= 0) & (queries >= self.global_tokens)


class TopKAttention(ZooAttention):
    """Softmax over the keys whose score is at least the query's k-th greatest.

    Source: Zhao et al. 2019, "Explicit Sparse Transformer: Concentrated Attention Through Explicit Selection". With T
    tokens, time O(T^2 * (d_model + H * log k)) and memory O(H * T^2), because selecting the k greatest scores needs all
    of them. The weights are sparse; the work is not.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return (B, H, T, D)."""
        return self._weights(query, key, mask) @ value

    def weights_of(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the weights of one site, (B, H, T, T)."""
        return (self._weights(query, key, mask),)

    def _weights(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        lowest = torch.finfo(query.dtype).min
        scores = torch.matmul(query, key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask[:, None, None, :], lowest)
        # k more columns of the lowest score guarantee that there are k to select.
        columns = torch.nn.functional.pad(scores, (0, KEPT), value=lowest)
        threshold = columns.topk(KEPT, dim=-1).values[..., -1:]
        weights: Tensor = scores.masked_fill(scores < threshold, lowest).softmax(-1)
        return weights
