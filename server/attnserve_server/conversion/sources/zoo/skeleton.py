"""Parts that the zoo's models share: sizes, embeddings, layers around any attention, an encoder, seeded weights.

The zoo is a set of models that are generated from a seed. Sizes that do not fit, such as a width that is no
multiple of the heads, fail in torch; `zoo_model` refuses them before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

VOCABULARY_SIZE = 259
"""The zoo's tokenizer has padding, two special tokens and every byte."""
PADDING_ID = 0


@dataclass(frozen=True, slots=True)
class ZooSize:
    """Size of a model of the zoo. `width` is d_model, a multiple of `heads`."""

    layers: int
    heads: int
    width: int


SIZES = {"tiny": ZooSize(2, 4, 32), "small": ZooSize(4, 8, 128), "base": ZooSize(12, 12, 768)}


class ZooAttention(nn.Module, ABC):
    """Multi-head attention of queries (B, L, d_model) over the keys (B, S, d_model) that a mask (B, S) keeps.

    A pattern of attention implements `attend`, which the graph is traced from, and `weights_of`, its definition.
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Return the attended values, (B, L, d_model). `mask` is bool (B, S), true for keys that may be attended to."""
        attended = self.attend(
            self.split(self.query(queries)), self.split(self.key(keys)), self.split(self.value(keys)), mask
        )
        projected: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return projected

    def weights(self, queries: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return each site's weights (B, H, L, S) by definition, in the order in which the graph computes them."""
        return self.weights_of(self.split(self.query(queries)), self.split(self.key(keys)), mask)

    def split(self, hidden: Tensor) -> Tensor:
        """Reshape (B, T, H * D) to (B, H, T, D)."""
        return hidden.reshape(*hidden.shape[:2], self.heads, -1).transpose(1, 2)

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return (B, H, L, D) from query (B, H, L, D), key and value (B, H, S, D) and mask (B, S)."""

    @abstractmethod
    def weights_of(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the weights (B, H, L, S) of each site, by definition."""


AttentionClass = Callable[[int, int], ZooAttention]
"""Creates the attention of one layer from d_model and the number of heads."""


def softmax_weights(query: Tensor, key: Tensor, allowed: Tensor) -> Tensor:
    """Return the softmax over the allowed keys; a fully masked row is 0.

    Args:
        query: (B, H, L, D).
        key: (B, H, S, D).
        allowed: bool, broadcasts to (B, H, L, S).

    Returns:
        Weights (B, H, L, S). Source: Vaswani et al. 2017, eq. 1.
    """
    scores = torch.matmul(query, key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    weights: Tensor = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights


def every_query(query: Tensor, mask: Tensor) -> Tensor:
    """Expand a mask of keys (B, S) to (B, 1, L, S), because the runtime's kernel does not broadcast over queries."""
    return mask[:, None, None, :].expand(-1, -1, query.shape[2], -1)


class Embedding(nn.Module):
    """Token embedding plus sine positions, which have no greatest length. Source: Vaswani et al. 2017, section 3.5."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY_SIZE, width)
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        self.register_buffer("frequencies", 10_000.0**-exponents)

    def forward(self, ids: Tensor) -> Tensor:
        """Return vectors (B, T, d_model) for ids (B, T)."""
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        angles = positions.unsqueeze(-1) * self.frequencies
        vectors: Tensor = self.table(ids)
        return vectors + torch.cat([angles.sin(), angles.cos()], dim=-1)


class Layer(nn.Module):
    """Attention, optional cross-attention and a feed-forward network, each with a residual and layer normalization."""

    def __init__(self, width: int, attention: ZooAttention, cross_attention: ZooAttention | None = None) -> None:
        super().__init__()
        self.attention, self.attention_norm = attention, nn.LayerNorm(width)
        self.cross_attention = cross_attention
        self.cross_norm = nn.LayerNorm(width) if cross_attention is not None else None
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(
        self, hidden: Tensor, mask: Tensor, memory: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """Return (B, L, d_model) from hidden states (B, L, d_model) and an optional memory (B, S, d_model)."""
        hidden = self.attention_norm(hidden + self.attention(hidden, hidden, mask))
        if self.cross_attention is not None and self.cross_norm is not None:
            hidden = self.cross_norm(hidden + self.cross_attention(hidden, memory, memory_mask))
        scaled: Tensor = self.feed_forward_norm(hidden + self.feed_forward(hidden))
        return scaled


class ZooModule(nn.Module):
    """A model of the zoo. `shapes`: axis symbols and fixed sizes of each input by name, without the batch axis."""

    shapes: Mapping[str, tuple[str | int, ...]]


class Encoder(ZooModule):
    """A text encoder around one pattern of attention."""

    shapes: Mapping[str, tuple[str | int, ...]] = {"input_ids": ("seq",), "attention_mask": ("seq",)}

    def __init__(self, size: ZooSize, attention: AttentionClass) -> None:
        super().__init__()
        self.embedding = Embedding(size.width)
        self.layers = nn.ModuleList(Layer(size.width, attention(size.width, size.heads)) for _ in range(size.layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states (B, T, d_model) and their mean over unpadded positions (B, d_model)."""
        hidden, mask = self.embedding(input_ids), attention_mask.bool()
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden, mean_of(hidden, mask)


def mean_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over kept positions, (B, d_model) from (B, T, d_model)."""
    kept = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * kept).sum(1) / kept.sum(1).clamp(min=1.0)


def draw_weights(module: nn.Module, seed: int) -> None:
    """Draw the weights of a module from a seed, in place.

    Scores get a standard deviation of about 2, so that attention is uneven enough to show. With the usual
    initialisation, an untrained model attends to all keys almost equally.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if parameter.ndim < 2:
                if not name.endswith("norm.weight"):
                    parameter.normal_(0.0, 0.1, generator=generator)
                continue
            sharpened = 1.5 if ".query." in name or ".key." in name else 1.0
            fan_in = 1 if name.endswith("table.weight") else parameter[0].numel()
            parameter.normal_(0.0, sharpened * fan_in**-0.5, generator=generator)
