"""The parts of an attention map: tokens, links between them, and encoded weights.

They are made from responses that `_results` has checked, so nothing here fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Token:
    """One unit of an axis: a token, a word, or a position of a tensor.

    Attributes:
        index: Position on the axis, special tokens counted.
        text: The token as spelled in the vocabulary, the word as written in the text, or the index of a position.
        start: Position of its first character in the input text, in Unicode code points; 0 for special tokens.
        end: Position after its last character.
        special: Whether it is a special token.
        segment: The text that it belongs to: 0, or 1 for the second text of a pair.
    """

    index: int
    text: str
    start: int = 0
    end: int = 0
    special: bool = False
    segment: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """One weight of a map: `query` looks at `key`.

    Attributes:
        query: Text of the query.
        key: Text of the key.
        weight: The weight, from 0 to 1.
        head: Number of the head; None where heads are joined.
        query_token: The query.
        key_token: The key.
    """

    query: str
    key: str
    weight: float
    head: int | None
    query_token: Token
    key_token: Token


@dataclass(frozen=True, slots=True, eq=False)
class RawLinks:
    """Links as received, in the form of a compressed sparse row matrix. Row h * L + q is query q of head h.

    Attributes:
        row_offsets: int64 (H * L + 1); the links of row r are the entries `row_offsets[r]` to `row_offsets[r + 1] - 1`.
        keys: int32 (N), index of each link's key on its axis, special tokens counted.
        weights: (N), in the selected dtype.
    """

    row_offsets: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int32]
    weights: Array


def as_float32(weights: Array) -> npt.NDArray[np.float32]:
    """Return weights of any shape as float32: uint8 weights divided by 255, float32 weights as a view."""
    if weights.dtype == np.uint8:
        return np.divide(weights, np.float32(255), dtype=np.float32)
    return weights.astype(np.float32, copy=False).view()


def names_of(axes: Sequence[Sequence[Token]], texts: Sequence[str] = ()) -> dict[Token, str]:
    """Return the text of each unit, with its position where the text repeats on its axis.

    Args:
        axes: The units of each axis.
        texts: The input text, or both texts of a pair, for line and column.
    """
    names: dict[Token, str] = {}
    for tokens in axes:
        counts = Counter(token.text for token in tokens)
        for token in tokens:
            if counts[token.text] > 1:
                names[token] = token.text + _position(token, texts)
            else:
                names.setdefault(token, token.text)
    return names


def _position(token: Token, texts: Sequence[str]) -> str:
    text = texts[token.segment] if token.segment < len(texts) else ""
    if "\n" not in text or token.end <= token.start:
        return f" ({token.index})"
    before = text[: token.start]
    return f", line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def plain_token(token: Token) -> dict[str, Any]:
    """Return a token in plain types for JSON."""
    return {
        "index": token.index,
        "text": token.text,
        "start": token.start,
        "end": token.end,
        "special": token.special,
        "segment": token.segment,
    }
