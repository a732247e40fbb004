"""Dense attention: scaled dot-product attention over all keys, and its causal form.

Source: Vaswani et al. 2017, "Attention Is All You Need", sections 3.2.1 and 3.2.3. With T tokens, time O(T^2 * d_model)
and memory O(T^2): a kernel that does not return its weights holds H * T^2 of them temporarily, and the mask has T^2
bytes. Requested weights cost O(H * T^2) more. A kernel could save half of the causal form.

It is for the zoo, a set of models that are generated from a seed. Tensors whose shapes do not fit fail in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnserve_server.conversion.sources.zoo.skeleton import ZooAttention, every_query, softmax_weights


class DenseAttention(ZooAttention):
    """softmax(Q K^T / sqrt(D)) V over all keys that the mask keeps. Queries and keys may belong to two sequences."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return (B, H, L, D)."""
        return scaled_dot_product_attention(query, key, value, attn_mask=every_query(query, mask))

    def weights_of(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the weights of one site, (B, H, L, S)."""
        return (softmax_weights(query, key, mask[:, None, None, :]),)


class CausalAttention(ZooAttention):
    """Softmax attention in which query i attends to keys up to i."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return (B, H, T, D)."""
        return scaled_dot_product_attention(query, key, value, attn_mask=_allowed(mask))

    def weights_of(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the weights of one site, (B, H, T, T)."""
        return (softmax_weights(query, key, _allowed(mask)),)


def _allowed(mask: Tensor) -> Tensor:
    """Return which keys each query may attend to, bool (B, 1, T, T), from a mask of keys, bool (B, T)."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    frontier = positions.unsqueeze(-1) >= positions
    return frontier & mask[:, None, None, :]
