"""What every family of architectures says about its models: how they are called, and what they answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

TRACE_LENGTHS = (11, 7, 4)
"""Lengths of the sequences that are traced. A tracer given a mask of ones would drop it, so two of three are padded."""


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

    @abstractmethod
    def outputs(self, answer: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the graph answers, (B, ...) each."""

    @abstractmethod
    def weights(self, answer: Any) -> Sequence[torch.Tensor | None]:
        """Each site's weights (B, H, L, S), in the order in which the graph computes the sites."""

    def example(self) -> tuple[torch.Tensor, ...]:
        """Inputs to trace with: three sequences, two of them padded."""
        return tuple(_example(spec) for spec in self.inputs)


def _example(spec: InputTensor) -> torch.Tensor:
    rows, longest = len(TRACE_LENGTHS), max(TRACE_LENGTHS)
    shape = (rows, *(longest if isinstance(extent, str) else extent for extent in spec.shape))
    if spec.content == "numbers":
        return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    if spec.content == "zeros":
        return torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, length in enumerate(TRACE_LENGTHS):
        mask[row, :length] = 1
    if spec.content == "mask":
        return mask
    return (torch.arange(mask.numel()).reshape(shape) % (spec.vocabulary_size - 1) + 1) * mask
