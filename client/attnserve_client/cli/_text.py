"""Text for a terminal, without control characters and at a fixed width."""

from __future__ import annotations

import unicodedata

from rich.cells import cell_len, set_cell_size


def clean(text: str) -> str:
    """Replace control and format characters by spaces, so that no escape sequence or change of direction remains."""
    return "".join(" " if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") else letter for letter in text)


def fitted(text: str, width: int) -> str:
    """Return clean text of exactly `width` cells: cut with an ellipsis, or padded with spaces."""
    shown = clean(text)
    if cell_len(shown) > width:
        shown = set_cell_size(shown, width - 1) + "…"
    return set_cell_size(shown, width)


def size_text(count: float) -> str:
    """Return a number of bytes in KiB, MiB or GiB, with at most one decimal: `48 MiB`."""
    size, unit = float(count), "bytes"
    for name in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, name
    return f"{size:.1f}".removesuffix(".0") + f" {unit}"
