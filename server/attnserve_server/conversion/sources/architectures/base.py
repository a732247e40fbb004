"""What every family of architectures says about its models: how they are called, and what they answer."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from attnserve_server.conversion.sources.source_model import Grid

_TRACE_LENGTHS = (11, 7, 4)
"""Lengths of the sequences that are traced. A tracer given a mask of ones would drop it, so two of three are padded."""
_APART = 2
"""By how much axes differ while they are traced: what a tracer sees at one length it may take for one axis."""


@dataclass(frozen=True, slots=True)
class InputTensor:
    """One input. `shape` leaves out the batch axis; `vocabulary_size` is given for `ids` alone."""

    name: str
    shape: tuple[str | int, ...]
    content: Literal["ids", "mask", "zeros", "numbers"]
    vocabulary_size: int = 0


class Family(ABC):
    """How the models of one family are called, and what they answer. Holds the loaded source."""

    def __init__(self, source: Any) -> None:
        self.source = source

    @property
    @abstractmethod
    def inputs(self) -> tuple[InputTensor, ...]:
        """In the order in which the graph takes them."""

    @property
    @abstractmethod
    def output_names(self) -> tuple[str, ...]:
        """In the order in which `outputs` gives them."""

    @property
    @abstractmethod
    def max_lengths(self) -> dict[str, int]:
        """The greatest length of each dynamic axis, by its symbol."""

    @property
    def padding_id(self) -> int:
        """What pads token ids."""
        return int(getattr(self.source.config, "pad_token_id", None) or 0)

    def call(self, tensors: Mapping[str, torch.Tensor], *, weights: bool) -> Any:
        """The source's own answer; with `weights` it holds its attention weights too."""
        asked = {"output_attentions": True} if weights else {}
        return self.source(**tensors, **asked)

    @property
    def pair_start(self) -> int | None:
        """The token behind which a decoder's text starts; None where there is no decoder beside an encoder."""
        return None

    @property
    def grids(self) -> dict[int, Grid]:
        """The patch grid of each fixed axis that runs over one, by the axis's length."""
        return {}

    @abstractmethod
    def outputs(self, answer: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the graph answers, (B, ...) each."""

    @abstractmethod
    def weights(self, answer: Any) -> Sequence[torch.Tensor | None]:
        """Each site's weights (B, H, L, S), in the order in which the graph computes the sites."""

    def tracing(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts, the source is in a form that exporters can follow."""
        return contextlib.nullcontext()

    def example(self) -> tuple[torch.Tensor, ...]:
        """Inputs to trace with: three sequences, two of them padded, no two axes of one length."""
        symbols = list(self.max_lengths)
        return tuple(_example(spec, symbols) for spec in self.inputs)


def _example(spec: InputTensor, symbols: Sequence[str]) -> torch.Tensor:
    longer = {symbol: _APART * position for position, symbol in enumerate(symbols)}
    rows = len(_TRACE_LENGTHS)
    extents = [max(_TRACE_LENGTHS) + longer[axis] if isinstance(axis, str) else axis for axis in spec.shape]
    shape = (rows, *extents)
    if spec.content == "numbers":
        return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    if spec.content == "zeros":
        return torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, length in enumerate(_TRACE_LENGTHS):
        mask[row, : length + longer.get(str(spec.shape[0]), 0)] = 1
    if spec.content == "mask":
        return mask
    return (torch.arange(mask.numel()).reshape(shape) % (spec.vocabulary_size - 1) + 1) * mask
