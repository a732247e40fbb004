"""Texts on a terminal: nothing that came from elsewhere may steer it."""

from __future__ import annotations

import unicodedata

from rich.cells import cell_len, set_cell_size


def clean(text: str) -> str:
    """Text without control and format characters: no escape sequence and no change of direction is left."""
    return "".join(" " if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") else letter for letter in text)


def fitted(text: str, width: int) -> str:
    """Clean text of exactly `width` cells: cut with an ellipsis, or filled up."""
    shown = clean(text)
    if cell_len(shown) > width:
        shown = set_cell_size(shown, width - 1) + "…"
    return set_cell_size(shown, width)
