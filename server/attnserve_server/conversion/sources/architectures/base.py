"""The interface of a family of architectures: inputs, outputs and weights of its models, and how to trace them.

Exceptions of torch and transformers pass through.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from attnserve_server.conversion.learning.fixed_axes import PatchGrid

_TRACE_LENGTHS = (11, 7, 4)
"""Lengths of the traced sequences. Two of three are padded, because a tracer removes a mask of ones."""
_APART = 2
"""Difference of lengths between axes while they are traced, because a tracer may unify axes of equal length."""


@dataclass(frozen=True, slots=True)
class InputTensor:
    """One input. `shape` excludes the batch axis; `vocabulary_size` is 0 except for `ids`."""

    name: str
    shape: tuple[str | int, ...]
    content: Literal["ids", "mask", "zeros", "numbers"]
    vocabulary_size: int = 0


class Family(ABC):
    """The models of one family. Holds a loaded transformers model as `source`."""

    def __init__(self, source: Any) -> None:
        self.source = source

    @property
    @abstractmethod
    def inputs(self) -> tuple[InputTensor, ...]:
        """The inputs, in the order of the graph's inputs."""

    @property
    @abstractmethod
    def output_names(self) -> tuple[str, ...]:
        """The names of the outputs, in the order of `outputs`."""

    @property
    @abstractmethod
    def max_lengths(self) -> dict[str, int]:
        """The greatest length of each dynamic axis, by symbol."""

    @property
    def padding_id(self) -> int:
        """The id that pads token ids."""
        return int(getattr(self.source.config, "pad_token_id", None) or 0)

    def call(self, tensors: Mapping[str, torch.Tensor], *, weights: bool) -> Any:
        """Run the model, and return its own output object; `weights`: with attention weights."""
        options = {"output_attentions": True} if weights else {}
        return self.source(**tensors, **options)

    @property
    def pair_start(self) -> int | None:
        """The id before the text of a decoder; None for a model without both encoder and decoder."""
        return None

    @property
    def grids(self) -> dict[int, PatchGrid]:
        """The patch grid of each fixed axis over patches, by the length of the axis."""
        return {}

    @abstractmethod
    def outputs(self, answer: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the outputs of the graph, (B, ...) each, from an answer of `call` to `tensors`."""

    @abstractmethod
    def weights(self, answer: Any) -> Sequence[torch.Tensor | None]:
        """Return each site's weights (B, H, L, S), or None, in the order in which the graph computes the sites."""

    def tracing(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which exporters can trace the model."""
        return contextlib.nullcontext()

    def example(self) -> tuple[torch.Tensor, ...]:
        """Return example inputs for tracing: three sequences, two of them padded, and axes of different lengths."""
        symbols = list(self.max_lengths)
        return tuple(_example(spec, symbols) for spec in self.inputs)


@contextlib.contextmanager
def eager(source: Any) -> Iterator[None]:
    """Compute attention with a model's eager implementation for the duration of the context."""
    before = source.config._attn_implementation  # noqa: SLF001 - it has no public name
    source.set_attn_implementation("eager")
    try:
        yield
    finally:
        source.set_attn_implementation(before)


def _example(spec: InputTensor, symbols: Sequence[str]) -> torch.Tensor:
    longer = {symbol: _APART * position for position, symbol in enumerate(symbols)}
    rows = len(_TRACE_LENGTHS)
    sizes = [max(_TRACE_LENGTHS) + longer[axis] if isinstance(axis, str) else axis for axis in spec.shape]
    shape = (rows, *sizes)
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
