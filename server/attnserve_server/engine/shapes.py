"""Fixed shapes of runs: the choice of shapes, and padding a run to one.

A provider that prepares each new shape of a run (a CUDA graph, a compiled kernel) serves few shapes fast, and many
slowly. Such a session pads its runs to shapes of a plan. The inputs of a planned model share one padded axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from attnserve_server.domain.values import Array
from attnserve_server.engine.cost import CostModel

_SHORTEST: Final = 8
"""Tokens of the shortest bucket, and the step of all: shorter sequences take about as long."""
_WASTE: Final = 1.25
"""Greatest ratio of the predicted times of two neighbouring lengths: padding costs a quarter at most, an eighth on
average."""
_ROWS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of rows of buckets: each is at most half as many again as the one before, after the first two."""


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """The shapes of a session's runs.

    Args:
        shapes: (rows, tokens) of the runs.
        padding: padding value by name of each input of shape (rows, tokens).
    """

    shapes: tuple[tuple[int, int], ...]
    padding: Mapping[str, float]

    def shape_of(self, feeds: Mapping[str, Array]) -> tuple[int, int] | None:
        """Return the smallest shape that holds a run; None if none does."""
        rows, tokens = next(array.shape for name, array in feeds.items() if name in self.padding)
        return shape_for(rows, tokens, self.shapes)

    def filled(self, feeds: Mapping[str, Array], shape: tuple[int, int]) -> dict[str, Array]:
        """Return the feeds of a run enlarged to `shape`. Inputs of taps, which list rows, stay as they are."""
        return {
            name: filled_up(array, shape, self.padding[name]) if name in self.padding else array
            for name, array in feeds.items()
        }

    def padded(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return the feeds enlarged to the smallest shape that holds them, or as they are if none does."""
        shape = self.shape_of(feeds)
        return feeds if shape is None else self.filled(feeds, shape)


def shape_for(rows: int, tokens: int, shapes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the smallest of `shapes` that holds `rows` rows of `tokens` tokens; None if none does."""
    holding = [shape for shape in shapes if shape[0] >= rows and shape[1] >= tokens]
    return min(holding, key=lambda shape: (shape[0] * shape[1], shape), default=None)


def filled_up(array: Array, shape: tuple[int, int], padding: float) -> Array:
    """Return `array` (rows, tokens) enlarged to `shape`: tokens are padded, new rows repeat the first row.

    Any model can run the first row, which rows of padding alone would not guarantee.
    """
    rows, tokens = array.shape
    full = np.full(shape, padding, array.dtype)
    full[:rows, :tokens] = array
    full[rows:] = full[0]
    return full


def buckets(
    cost: CostModel, max_rows: int, max_tokens: int, count: int, budget_s: float = float("inf")
) -> tuple[tuple[int, int], ...]:
    """Return (rows, tokens) of the runs to prepare, in order of their predicted time.

    Lengths grow by as much as adds a quarter to the predicted time of one row: by more where the overhead of a run
    dominates. The fastest shapes come first, because there the preparation takes the greatest share.

    Args:
        cost: of the model, as measured.
        max_rows: the most rows of a run.
        max_tokens: the greatest length.
        count: the most shapes.
        budget_s: the most seconds that one run of every shape may take, as predicted.
    """
    lengths = [min(_SHORTEST, max_tokens)]
    while lengths[-1] < max_tokens:
        longer = lengths[-1] + _SHORTEST
        while longer < max_tokens and cost.seconds(1, longer + _SHORTEST) <= _WASTE * cost.seconds(1, lengths[-1]):
            longer += _SHORTEST
        lengths.append(min(longer, max_tokens))
    rows = sorted({min(each, max_rows) for each in _ROWS})
    every = sorted((cost.seconds(each, tokens), each, tokens) for each in rows for tokens in lengths)
    kept: list[tuple[int, int]] = []
    for seconds, each, tokens in every[:count]:
        budget_s -= seconds
        if budget_s < 0:
            break
        kept.append((each, tokens))
    return tuple(kept)
