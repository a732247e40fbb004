"""Longformer: a text encoder whose tokens attend to near ones. Its attention is replaced while it is traced.

Its own attention creates chunks with strides and writes into slices, for which exporters freeze the traced length. It
also pads its input to a multiple of the window, which they cannot trace either. While it is traced, each layer computes
the same weights from whole blocks instead: queries of a block of half a window, keys of that block and of the two
beside it. Tokens with global attention are not traced: the model is called without a global mask.

Exceptions of torch and transformers pass through.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnserve_server.conversion.sources.architectures.text import Text


class Longformer(Text):
    """Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer", section 3.1."""

    HEADS = frozenset({"token_labels", "masked_tokens"})
    """Without the heads that set tokens with global attention, which are not traced."""

    def weights(self, answer: Any) -> Sequence[Tensor | None]:
        """Return each layer's weights over all keys; the model returns one column for each position of the window."""
        return [_over_keys(band) for band in answer.attentions]

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Attend by blocks, on a sequence of any length, for the duration of the context."""
        layers = [layer.attention.self for layer in self.source.base_model.encoder.layer]
        for layer in layers:
            layer.forward = MethodType(_attend, layer)
        self.source.base_model._pad_to_window_size = _unpadded  # noqa: SLF001 - where the model pads
        try:
            yield
        finally:
            del self.source.base_model._pad_to_window_size  # noqa: SLF001
            for layer in layers:
                del layer.forward


def _unpadded(**inputs: Any) -> tuple[Any, ...]:
    named = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    return (0, *(inputs[name] for name in named))


def _attend(layer: Any, hidden: Tensor, attention_mask: Tensor, **_: Any) -> tuple[Tensor]:
    """Compute one layer's attention without global tokens, (B, L, H * D) from (B, L, H * D).

    Args:
        layer: the model's own layer, of which only the projections are used.
        hidden: (B, L, H * D).
        attention_mask: (B, L), 0 for tokens and negative for padding.
        **_: arguments for global tokens, which are unused.
    """
    block = int(layer.one_sided_attn_window_size)
    rows, length, _width = hidden.shape

    def heads(projection: torch.nn.Module) -> Tensor:
        split: Tensor = projection(hidden).view(rows, length, layer.num_heads, layer.head_dim)
        return split.transpose(1, 2)

    missing = -length % block
    query = _blocks(pad(heads(layer.query) / math.sqrt(layer.head_dim), (0, 0, 0, missing)), block)
    key, value = (_banded(heads(projection), block, missing) for projection in (layer.key, layer.value))
    token = (attention_mask == 0).to(hidden.dtype)
    row, column = torch.arange(block)[:, None], torch.arange(3 * block)[None, :]
    near = (column - block - row).abs() <= block
    allowed = near & (_banded(token[:, None, :, None], block, missing).transpose(-1, -2) > 0)
    lowest = torch.finfo(hidden.dtype).min
    weights = (query @ key.transpose(-1, -2)).masked_fill(~allowed, lowest).softmax(dim=-1)
    padding = _blocks(pad(token, (0, missing))[:, None, :, None], block) == 0
    attended = (weights.masked_fill(padding, 0.0) @ value).flatten(2, 3)[:, :, :length]
    return (attended.transpose(1, 2).reshape(rows, length, -1),)


def _blocks(vectors: Tensor, block: int) -> Tensor:
    """Reshape (B, H, L, D) to (B, H, L / block, block, D)."""
    rows, heads, _length, width = vectors.shape
    return vectors.reshape(rows, heads, -1, block, width)


def _banded(vectors: Tensor, block: int, missing: int) -> Tensor:
    """Return the keys of each block of queries: (B, H, L, D) -> (B, H, blocks, 3 * block, D)."""
    blocks = _blocks(pad(vectors, (0, 0, block, block + missing)), block)
    return torch.cat([blocks[:, :, :-2], blocks[:, :, 1:-1], blocks[:, :, 2:]], dim=3)


def _over_keys(band: Tensor) -> Tensor:
    """Lay out (B, H, L, 2 * w + 1) as (B, H, L, L). Column c is the key c - w positions from the query."""
    length, reach = band.shape[2], band.shape[3] // 2
    places = torch.arange(length)
    offset = places[None, :] - places[:, None] + reach
    columns = offset.clamp(0, band.shape[3] - 1).expand(*band.shape[:2], length, length)
    near = (offset >= 0) & (offset < band.shape[3])
    return torch.where(near, band.gather(3, columns), 0.0)
