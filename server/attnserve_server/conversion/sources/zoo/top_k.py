"""Top-k sparse self-attention: every token over the k keys that it scores highest.

Source: Zhao et al. 2019, "Explicit Sparse Transformer: Concentrated Attention Through Explicit Selection". With T
tokens, time O(T^2 * (d_model + H * log k)) and memory O(H * T^2): the scores must all be known before the k greatest
are. What is sparse is what a token looks at, not the work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnserve_server.conversion.sources.zoo.skeleton import ZooAttention

KEPT = 8
"""Keys that each query keeps; all of them where there are no more. Keys of one score are kept or left out together."""


class TopKAttention(ZooAttention):
    """Softmax over the keys whose score is at least the query's k-th greatest."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """(B, H, T, D)."""
        return self._weights(query, key, mask) @ value

    def weights_of(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """One site, (B, H, T, T)."""
        return (self._weights(query, key, mask),)

    def _weights(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        lowest = torch.finfo(query.dtype).min
        scores = torch.matmul(query, key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask[:, None, None, :], lowest)
        # With k columns of the lowest score behind them, there are always k to choose from.
        columns = torch.nn.functional.pad(scores, (0, KEPT), value=lowest)
        threshold = columns.topk(KEPT, dim=-1).values[..., -1:]
        weights: Tensor = scores.masked_fill(scores < threshold, lowest).softmax(-1)
        return weights
