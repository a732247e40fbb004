"""Multi-scale self-attention: groups of heads see the sequence at several resolutions.

Keys and values are pooled with strides of 1, 2 and 4, and each stride has heads of its own. Source: Fan et al. 2021,
"Multiscale Vision Transformers" (pooling attention), and Ren et al. 2022, "Shunted Self-Attention via Multi-Scale Token
Aggregation" (a group of heads for each resolution). With T tokens, a stride of s takes time O(T^2 * D / s) and memory
O(T^2 / s) a head, and so do its weights, if asked for: three strides cost 7/12 of what one resolution costs.
"""

from __future__ import annotations

from torch import Tensor, cat, nn, split
from torch.nn.functional import avg_pool1d, pad, scaled_dot_product_attention

from attnserve_server.conversion.sources.zoo.skeleton import ZooAttention, every_query, softmax_weights

STRIDES = (1, 2, 4)


class Scale(nn.Module):
    """One stride: attention over keys and values that are means of `stride` neighbours."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """(B, H, L, D) from keys (B, H, S, D), of which ceil(S / stride) are seen."""
        keys, kept = self.pooled(key, mask)
        values, _ = self.pooled(value, mask)
        return scaled_dot_product_attention(query, keys, values, attn_mask=every_query(query, kept))

    def pooled(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Means over kept members (B, H, ceil(S / stride), D), and which of them have one, (B, ceil(S / stride))."""
        if self.stride == 1:
            return hidden, mask
        kept = mask.to(hidden.dtype)[:, None, :]
        channels = (hidden * kept[..., None]).transpose(-2, -1).flatten(1, 2)
        sums, counts = (avg_pool1d(pad(each, (0, self.stride - 1)), self.stride) for each in (channels, kept))
        means = sums / counts.clamp(min=1 / (2 * self.stride))
        return means.reshape(*hidden.shape[:2], hidden.shape[3], -1).transpose(-2, -1), counts[:, 0] > 0


class MultiScaleAttention(ZooAttention):
    """Softmax attention, its heads divided among the strides; one site a stride."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        if heads < len(STRIDES):
            raise ValueError(f"{heads} heads are less than one for each of {len(STRIDES)} strides")
        self.scales = nn.ModuleDict({f"stride_{stride}": Scale(stride) for stride in STRIDES})
        each, more = divmod(heads, len(STRIDES))
        self.groups = [each + (position < more) for position in range(len(STRIDES))]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """(B, H, T, D)."""
        parts = (split(part, self.groups, dim=1) for part in (query, key, value))
        scales = zip(self.scales.values(), *parts, strict=True)
        return cat([scale(*heads, mask) for scale, *heads in scales], dim=1)

    def weights_of(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """A site for each stride, (B, heads of the stride, T, ceil(T / stride))."""
        weights = []
        parts = (split(part, self.groups, dim=1) for part in (query, key))
        for scale, queries, keys in zip(self.scales.values(), *parts, strict=True):
            assert isinstance(scale, Scale)
            pooled, kept = scale.pooled(keys, mask)
            weights.append(softmax_weights(queries, pooled, kept[:, None, None, :]))
        return tuple(weights)
