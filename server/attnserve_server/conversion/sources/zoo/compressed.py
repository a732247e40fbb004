"""Attention over compressed keys and values: pooled by a stride (multi-scale), or summed once (linear)."""

from __future__ import annotations

import torch
from torch import Tensor, cat, nn, split
from torch.nn.functional import avg_pool1d, elu, pad, scaled_dot_product_attention

from attnserve_server.conversion.sources.zoo.skeleton import ZooAttention, every_query, softmax_weights

STRIDES = (1, 2, 4)


class LinearAttention(ZooAttention):
    """phi(Q) (phi(K)^T V), divided by phi(Q) . sum of phi(K): keys and values are summed once for all queries.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    eq. 5, with the feature map phi(x) = elu(x) + 1. With T tokens, time and memory O(T * d_model * D): no T x T weights
    are computed. They are implied, A[i, j] = phi(q_i) . phi(k_j) / sum over j' of phi(q_i) . phi(k_j'), and cost
    O(H * T^2) if requested.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return (B, H, T, D)."""
        query_features, key_features = _features(query, key, mask)
        summary = key_features.transpose(-2, -1) @ value
        total = key_features.sum(-2, keepdim=True).transpose(-2, -1)
        # Features are 0 where elu is -1 in float32: without a bound, such a row would be NaN.
        normaliser = (query_features @ total).clamp(min=torch.finfo(query.dtype).tiny)
        return (query_features @ summary) / normaliser

    def weights_of(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the weights of one site, (B, H, T, T)."""
        query_features, key_features = _features(query, key, mask)
        products = query_features @ key_features.transpose(-2, -1)
        return (products / products.sum(-1, keepdim=True),)


def _features(query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return both feature maps, (B, H, T, D), non-negative; those of masked keys are 0, so that they add nothing."""
    return elu(query) + 1, (elu(key) + 1) * mask[:, None, :, None].to(key.dtype)


class Scale(nn.Module):
    """One stride of multi-scale attention: keys and values are means of `stride` neighbours."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return (B, H, L, D) from keys (B, H, S, D), which are pooled to ceil(S / stride)."""
        keys, kept = self.pooled(key, mask)
        values, _ = self.pooled(value, mask)
        return scaled_dot_product_attention(query, keys, values, attn_mask=every_query(query, kept))

    def pooled(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return means over kept members, (B, H, ceil(S / stride), D), and which have any, (B, ceil(S / stride))."""
        if self.stride == 1:
            return hidden, mask
        kept = mask.to(hidden.dtype)[:, None, :]
        channels = (hidden * kept[..., None]).transpose(-2, -1).flatten(1, 2)
        sums, counts = (avg_pool1d(pad(each, (0, self.stride - 1)), self.stride) for each in (channels, kept))
        means = sums / counts.clamp(min=1 / (2 * self.stride))
        return means.reshape(*hidden.shape[:2], hidden.shape[3], -1).transpose(-2, -1), counts[:, 0] > 0


class MultiScaleAttention(ZooAttention):
    """Softmax attention in which groups of heads attend at several resolutions; one site for each stride.

    Keys and values are pooled with strides of 1, 2 and 4, and each stride has its own heads. Source: Fan et al. 2021,
    "Multiscale Vision Transformers" (pooling attention), and Ren et al. 2022, "Shunted Self-Attention via Multi-Scale
    Token Aggregation" (a group of heads for each resolution). With T tokens, a stride of s takes time O(T^2 * D / s)
    and memory O(T^2 / s) a head, and so do its weights, if requested: three strides cost 7/12 of one resolution. Fewer
    heads than strides raise ValueError.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        if heads < len(STRIDES):
            raise ValueError(f"{heads} heads are fewer than the {len(STRIDES)} strides, which need one head each")
        self.scales = nn.ModuleDict({f"stride_{stride}": Scale(stride) for stride in STRIDES})
        each, more = divmod(heads, len(STRIDES))
        self.groups = [each + (position < more) for position in range(len(STRIDES))]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return (B, H, T, D)."""
        parts = (split(part, self.groups, dim=1) for part in (query, key, value))
        scales = zip(self.scales.values(), *parts, strict=True)
        return cat([scale(*heads, mask) for scale, *heads in scales], dim=1)

    def weights_of(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the weights of a site for each stride, (B, heads of the stride, T, ceil(T / stride))."""
        weights = []
        parts = (split(part, self.groups, dim=1) for part in (query, key))
        for scale, queries, keys in zip(self.scales.values(), *parts, strict=True):
            assert isinstance(scale, Scale)
            pooled, kept = scale.pooled(keys, mask)
            weights.append(softmax_weights(queries, pooled, kept[:, None, None, :]))
        return tuple(weights)
