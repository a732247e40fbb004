"""Weights between stretches of a text, such as names of several words: which units they cover, and their sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from attnserve_client._tokens import Token

Span: TypeAlias = tuple[int, int] | tuple[int, int, int]
"""Positions of the first character and after the last, in Unicode code points; and the segment, of a pair of texts."""


def between(
    weights: npt.NDArray[np.float32], rows: npt.NDArray[np.bool_], columns: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """Return the sum over the units of each column span, as the mean over the units of each row span.

    Args:
        weights: (L, S).
        rows: (N, L), the units of each span; at least one each.
        columns: (M, S), in the same way.

    Returns:
        float32 (N, M). Source: Clark et al. 2019, "What Does BERT Look At? An Analysis of BERT's Attention", section
        4.1, which joins tokens to words in this way.
    """
    exact = rows.astype(np.float64) @ weights.astype(np.float64) @ columns.T.astype(np.float64)
    return np.asarray(exact / rows.sum(axis=1, keepdims=True), dtype=np.float32)


def covered(tokens: Sequence[Token], spans: Sequence[Span], side: str) -> npt.NDArray[np.bool_]:
    """Return which units each span covers, wholly or in part, bool (N, units). Special tokens are in no span.

    Args:
        tokens: The units of one side of a map.
        spans: N spans. One without a segment is of the first text that the side has.
        side: Name of the side for an error.

    Raises:
        ValueError: A span has another form, or no unit.
    """
    first = min((token.segment for token in tokens if not token.special), default=0)
    starts, ends, segments = (
        np.array([(token.start, token.end, -1 if token.special else token.segment) for token in tokens], dtype=np.int64)
        .reshape(-1, 3)
        .T
    )
    inside = np.zeros((len(spans), len(tokens)), dtype=np.bool_)
    for row, span in enumerate(spans):
        if len(span) not in (2, 3):
            raise ValueError(f"{side}[{row}] is {span!r}; it must be (start, end) or (start, end, segment)")
        start, end, segment = span if len(span) == 3 else (*span, first)
        inside[row] = (segments == segment) & (np.maximum(starts, start) < np.minimum(ends, end))
        if not inside[row].any():
            problem = f"{side}[{row}] is {span!r}, where this map has no unit"
            raise ValueError(f"{problem}; the span is empty, or its part of the text was cut or not selected")
    return inside
