"""What a map is made of: tokens, links between them, and weights as they came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Token:
    """One unit of an axis: a token, a word, or a position of a tensor.

    Attributes:
        index: Its place on the axis, special tokens counted.
        text: The token as the vocabulary spells it, the word as it stands in the text, or else its index.
        start: Its first character in the caller's text, in Unicode code points; 0 for special tokens.
        end: The character behind its last.
        special: Whether it is a special token.
        segment: Which of the caller's texts it is from: 0, or 1 for the second of a pair.
    """

    index: int
    text: str
    start: int = 0
    end: int = 0
    special: bool = False
    segment: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """One weight with its ends: `query` looks at `key`. `head` is None where heads were joined."""

    query: str
    key: str
    weight: float
    head: int | None
    query_token: Token
    key_token: Token


@dataclass(frozen=True, slots=True, eq=False)
class RawLinks:
    """The kept weights as they came, row after row. Row r is (head h, query q) with r = h * queries + q.

    Attributes:
        row_offsets: int64 (H * L + 1): row r's links are the entries from `row_offsets[r]` to `row_offsets[r + 1]`.
        keys: int32 (N): the key's index on its axis, special tokens counted.
        weights: (N), in the dtype asked for.
    """

    row_offsets: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int32]
    weights: Array


def as_float32(weights: Array) -> npt.NDArray[np.float32]:
    """Weights of any shape in float32; uint8 ones were written as the weight times 255. float32 ones come as a view."""
    if weights.dtype == np.uint8:
        return np.divide(weights, np.float32(255), dtype=np.float32)
    return weights.astype(np.float32, copy=False).view()


def plain_token(token: Token) -> dict[str, Any]:
    """A token in plain types, ready for JSON."""
    return {
        "index": token.index,
        "text": token.text,
        "start": token.start,
        "end": token.end,
        "special": token.special,
        "segment": token.segment,
    }
