"""Linear attention: softmax is replaced by a kernel, so that keys and values are summed up once for all queries.

Source: Katharopoulos et al. 2020, "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
eq. 5, with the feature map phi(x) = elu(x) + 1. With T tokens, time and memory O(T * d_model * D): no T x T weights
exist. They are implied all the same, A[i, j] = phi(q_i) . phi(k_j) / sum over j' of phi(q_i) . phi(k_j'); to ask for
them costs O(H * T^2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import elu

from attnserve_server.conversion.sources.zoo.skeleton import ZooAttention


class LinearAttention(ZooAttention):
    """phi(Q) (phi(K)^T V), divided by phi(Q) . sum of phi(K)."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """(B, H, T, D)."""
        query_features, key_features = features(query, key, mask)
        summary = key_features.transpose(-2, -1) @ value
        total = key_features.sum(-2, keepdim=True).transpose(-2, -1)
        # Features are 0 where elu is -1 in float32: without a bound, such a row would be NaN.
        normaliser = (query_features @ total).clamp(min=torch.finfo(query.dtype).tiny)
        return (query_features @ summary) / normaliser

    def weights_of(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """One site, (B, H, T, T)."""
        query_features, key_features = features(query, key, mask)
        products = query_features @ key_features.transpose(-2, -1)
        return (products / products.sum(-1, keepdim=True),)


def features(query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both feature maps, (B, H, T, D), all positive; those of masked keys are 0, so that they add nothing anywhere."""
    return elu(query) + 1, (elu(key) + 1) * mask[:, None, :, None].to(key.dtype)
