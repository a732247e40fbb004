"""Causal self-attention: every token over itself and those before it.

Source: Vaswani et al. 2017, section 3.2.3. With T tokens, time O(T^2 * d_model), of which a kernel could save half, and
memory O(T^2), as for scaled dot-product attention; the mask joins the causal frontier with the padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnserve_server.conversion.sources.zoo.skeleton import ZooAttention, softmax_weights


class CausalAttention(ZooAttention):
    """Softmax attention in which query i sees keys up to i."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """(B, H, T, D)."""
        return scaled_dot_product_attention(query, key, value, attn_mask=allowed(mask))

    def weights_of(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """One site, (B, H, T, T)."""
        return (softmax_weights(query, key, allowed(mask)),)


def allowed(mask: Tensor) -> Tensor:
    """Keys up to the query's own position that the mask keeps: bool (B, 1, T, T) from (B, T)."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    frontier = positions.unsqueeze(-1) >= positions
    return frontier & mask[:, None, None, :]
