"""Scaled dot-product self-attention: every token over every other.

Source: Vaswani et al. 2017, "Attention Is All You Need". With T tokens, time O(T^2 * d_model) and memory O(T^2): a
kernel that keeps its weights to itself holds H * T^2 of them for a moment, and the mask is T^2 bytes. Weights that
are asked for cost O(H * T^2) more.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnserve_server.conversion.sources.zoo.skeleton import ZooAttention, every_query, softmax_weights


class DenseAttention(ZooAttention):
    """softmax(Q K^T / sqrt(D)) V over all keys that the mask keeps; queries and keys may be of two sequences."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """(B, H, L, D)."""
        return scaled_dot_product_attention(query, key, value, attn_mask=every_query(query, mask))

    def weights_of(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """One site, (B, H, L, S)."""
        return (softmax_weights(query, key, mask[:, None, None, :]),)
