"""Embeddings of a text from its hidden states: pooling, dense layers and normalisation, as sentence-transformers does.

Source: `Pooling`, `Dense` and `Normalize` of sentence-transformers 5.7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from attnserve_server.conversion.sources.sentence_transformers import Dense, Modules

_FLOOR = 1e-9
"""Least divisor of a mean, so that a row without a token gives zeros."""


class Embedder:
    """Computes embeddings (B, D) from hidden states (B, L, D') and a mask (B, L), 1 for tokens and 0 for padding.

    A call with a mode of pooling that is none of `sentence_transformers.MODES` raises KeyError. An activation that
    torch.nn does not have raises AttributeError when the object is made.
    """

    def __init__(self, modules: Modules) -> None:
        self._modules = modules
        self._steps = [None if step is None else _layer(step) for step in modules.steps]

    def __call__(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the embedding of each row."""
        mask = attention_mask.to(hidden.dtype)
        pooled = torch.cat([_POOLED[mode](hidden, mask) for mode in self._modules.modes], dim=-1)
        for step in self._steps:
            pooled = torch.nn.functional.normalize(pooled, dim=-1) if step is None else step(pooled)
        return pooled


def _layer(dense: Dense) -> Callable[[Tensor], Tensor]:
    weight = torch.from_numpy(dense.weight)
    bias = None if dense.bias is None else torch.from_numpy(dense.bias)
    activation = getattr(torch.nn, dense.activation)()

    def layer(values: Tensor) -> Tensor:
        result: Tensor = activation(torch.nn.functional.linear(values, weight, bias))
        return result

    return layer


def _positions(mask: Tensor) -> Tensor:
    """Return 1, 2, ... along the tokens of each row, (B, L), and 0 for padding."""
    return mask * torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=mask.dtype)


def _at(hidden: Tensor, chosen: Tensor) -> Tensor:
    """Return the hidden state of the position where `chosen`, (B, L), is true."""
    return (hidden * chosen.to(hidden.dtype).unsqueeze(-1)).sum(1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, (torch.cumsum(mask, dim=1) * mask) == 1)


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    positions = _positions(mask)
    return _at(hidden, mask * (positions == positions.amax(1, keepdim=True)))


def _greatest(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1)


def _mean(hidden: Tensor, weights: Tensor) -> Tensor:
    return _sum(hidden, weights) / weights.sum(1, keepdim=True).clamp(min=_FLOOR)


def _sum(hidden: Tensor, weights: Tensor) -> Tensor:
    return (hidden * weights.unsqueeze(-1)).sum(1)


_POOLED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _greatest,
    "mean": _mean,
    "mean_sqrt_len_tokens": lambda hidden, mask: (
        _sum(hidden, mask) / mask.sum(1, keepdim=True).clamp(min=_FLOOR).sqrt()
    ),
    "weightedmean": lambda hidden, mask: _mean(hidden, _positions(mask)),
    "lasttoken": _last,
}
"""By mode: from hidden states (B, L, D) and a mask (B, L) of their dtype to (B, D)."""
