"""Heatmaps and image panels of attention maps for a terminal of 80 columns or more.

Columns are numbered, and split into blocks where they do not fit. Row labels carry the same numbers, so that in
self-attention the number above a column identifies its row. A map of scores raises ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len
from rich.color import Color
from rich.color_triplet import ColorTriplet
from rich.console import Console
from rich.style import Style
from rich.text import Text

from attnserve_client import AttentionMap, Token
from attnserve_client._patches import Panel, strongest
from attnserve_client.cli._text import clean, fitted

MAX_ROWS: Final = 40
"""Most rows of a heatmap, about a screen. Of longer maps, only the rows with the strongest weights are shown."""
MAX_PANELS: Final = 12
"""Most image panels, about a screen."""
_SHADES: Final = " .:-=+*#%@"
_RAMP: Final = ((44, 36, 88), (99, 43, 134), (184, 61, 124), (240, 116, 62), (255, 220, 134))
_GAMMA: Final = 0.6
"""Exponent of the colour scale; below 1, so that weak weights differ visibly from 0."""
_LONGEST_LABEL: Final = 18

Weights = npt.NDArray[Any]


def heatmap(attention: AttentionMap, weights: Weights, console: Console) -> Iterator[Text]:
    """Yield the lines of a heatmap of weights (L, S); of a map over image patches, those of its panels."""
    panels = attention.over_patches()
    if panels:
        yield from _panels(panels, console)
        return
    rows = _strongest_rows(weights)
    query_width = len(str(max((token.index for token in attention.query_tokens), default=0)))
    longest = max((cell_len(clean(attention.query_tokens[row].text)) for row in rows), default=0)
    label_width = query_width + 1 + min(_LONGEST_LABEL, longest) + 1
    room = max(8, console.width - label_width - 1)
    columns = len(attention.key_tokens)
    # Two terminal cells make a square. One is still visible, and fits twice as many columns.
    cell = 2 if columns * 2 <= room else 1
    greatest = float(weights.max(initial=0.0)) or 1.0
    colours = console.color_system is not None
    outside = attention.outside
    if attention.query_axis != attention.key_axis:
        yield _legend(attention.key_tokens)
    for start in range(0, columns, room // cell):
        block = range(start, min(columns, start + room // cell))
        yield from _header([attention.key_tokens[column].index for column in block], label_width, cell)
        for row in rows:
            token = attention.query_tokens[row]
            line = Text(f"{token.index:>{query_width}} {fitted(token.text, label_width - query_width - 2)} ")
            for column in block:
                if outside is not None and outside[row, column]:
                    line.append("·".rjust(cell), Style(dim=True))
                else:
                    line.append(*_cell(float(weights[row, column]) / greatest, cell, colours=colours))
            yield line
    if len(rows) < len(weights):
        yield Text(f"{len(rows)} of {len(weights)} rows, those with the strongest links", style="dim")
    yield _scale(greatest, colours=colours)
    if outside is not None:
        yield Text("· outside the window", style="dim")


def shade(share: float) -> tuple[str, Style]:
    """Return one terminal cell for a share of the greatest value, from 0 to 1, as a character without colours."""
    return _cell(share, 1, colours=False)


def _panels(panels: list[Panel], console: Console) -> Iterator[Text]:
    """Yield one panel of image patches for each unit, side by side as far as they fit, each under its text."""
    shown = strongest(panels, MAX_PANELS)
    greatest = max(float(np.nanmax(panel.weights, initial=0.0)) for panel in shown) or 1.0
    colours = console.color_system is not None
    height, width = shown[0].weights.shape
    room = max(2 * width, _LONGEST_LABEL)
    for start in range(0, len(shown), a_line := max(1, console.width // (room + 2))):
        block = shown[start : start + a_line]
        yield Text("  ".join(fitted(panel.token.text, room) for panel in block))
        for row in range(height):
            line = Text()
            for panel in block:
                for weight in panel.weights[row]:
                    line.append(*_cell(0.0 if np.isnan(weight) else float(weight) / greatest, 2, colours=colours))
                line.append(" " * (room - 2 * width + 2))
            yield line
    if len(shown) < len(panels):
        yield Text(f"{len(shown)} of {len(panels)} units, those with the strongest links", style="dim")
    yield _scale(greatest, colours=colours)


def _strongest_rows(weights: Weights) -> list[int]:
    if len(weights) <= MAX_ROWS:
        return list(range(len(weights)))
    order = np.argsort(-weights.max(axis=1), kind="stable")[:MAX_ROWS]
    return sorted(order.tolist())


def _header(numbers: list[int], label_width: int, cell: int) -> Iterator[Text]:
    """Yield the column numbers, written downwards."""
    digits = len(str(max(numbers)))
    for place in range(digits):
        written = "".join(f"{number:>{digits}}"[place].rjust(cell) for number in numbers)
        yield Text(" " * label_width + written, style="dim")


def _legend(tokens: tuple[Token, ...]) -> Text:
    return Text("columns: " + "  ".join(f"{token.index} {clean(token.text)}" for token in tokens), style="dim")


def _cell(share: float, width: int, *, colours: bool) -> tuple[str, Style]:
    bright = min(1.0, max(0.0, share)) ** _GAMMA
    if not colours:
        return _SHADES[round(bright * (len(_SHADES) - 1))] * width, Style.null()
    if bright < 0.02:  # a weight of about 0 keeps the terminal's background, light or dark
        return " " * width, Style.null()
    return " " * width, Style(bgcolor=Color.from_triplet(_blend(bright)))


def _blend(bright: float) -> ColorTriplet:
    place = bright * (len(_RAMP) - 1)
    low = min(int(place), len(_RAMP) - 2)
    red, green, blue = (
        round(start + (end - start) * (place - low)) for start, end in zip(_RAMP[low], _RAMP[low + 1], strict=True)
    )
    return ColorTriplet(red, green, blue)


def _scale(greatest: float, *, colours: bool) -> Text:
    line = Text("0 ", style="dim")
    for step in range(20):
        line.append(*_cell((step + 1) / 20, 1, colours=colours))
    return line.append(f" {greatest:.3f}", style="dim")
