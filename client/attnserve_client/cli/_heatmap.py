"""Heatmaps and image panels of attention maps for a terminal of 80 columns or more.

Columns are numbered, and split into blocks where they do not fit. Row labels carry the same numbers, so that in
self-attention the number above a column identifies its row. A map of scores raises ValueError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

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
from attnserve_client._svg import RAMP
from attnserve_client.cli._text import clean, fitted

MAX_ROWS: Final = 40
"""Most rows of a heatmap, about a screen. Of longer maps, only the rows with the strongest weights are shown."""
MAX_PANELS: Final = 12
"""Most image panels, about a screen."""
_SHADES: Final = " .:-=+*#%@"
_DARK: Final = ((23, 26, 32), (44, 36, 88), (99, 43, 134), (184, 61, 124), (240, 116, 62), (255, 220, 134))
"""The colours of the page on a dark background, from weight 0 to the greatest, as `RAMP` has them on a light one."""
_LIGHT_256: Final = (231, 223, 216, 209, 203, 168, 125, 89, 53)
_DARK_256: Final = (233, 53, 54, 90, 126, 167, 209, 215, 222)
"""The same for terminals of 256 colours: the nearest colours would not always get darker, or lighter."""
_GAMMA: Final = 0.6
"""Exponent of the colour scale; below 1, so that weak weights differ visibly from 0."""
_LONGEST_LABEL: Final = 18
_LUMINANCE: Final = (0.299, 0.587, 0.114)
_DARK_BACKGROUNDS: Final = ("0", "1", "2", "3", "4", "5", "6", "8")

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
    # Three terminal cells hold a percentage, two make a square, and one is still visible and fits most columns.
    cell = next((width for width in (3, 2) if columns * width <= room), 1)
    greatest = float(weights.max(initial=0.0)) or 1.0
    ink = Ink.of(console)
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
                    weight = float(weights[row, column])
                    percent = f"{100 * weight:.0f}".rjust(cell - 1).rjust(cell) if cell == 3 else ""
                    line.append(*ink.cell(weight / greatest, cell, percent))
            yield line
    if len(rows) < len(weights):
        yield Text(f"{len(rows)} of {len(weights)} rows, those with the strongest links", style="dim")
    yield _scale(greatest, ink, "percent of a row" if cell == 3 else "")
    if outside is not None:
        yield Text("· outside the window", style="dim")


def shade(share: float) -> tuple[str, Style]:
    """Return one terminal cell for a share of the greatest value, from 0 to 1, as a character without colours."""
    return Ink(None).cell(share, 1)


def _panels(panels: list[Panel], console: Console) -> Iterator[Text]:
    """Yield one panel of image patches for each unit, side by side as far as they fit, each under its text."""
    shown = strongest(panels, MAX_PANELS)
    greatest = max(float(np.nanmax(panel.weights, initial=0.0)) for panel in shown) or 1.0
    ink = Ink.of(console)
    height, width = shown[0].weights.shape
    room = max(2 * width, _LONGEST_LABEL)
    for start in range(0, len(shown), a_line := max(1, console.width // (room + 2))):
        block = shown[start : start + a_line]
        yield Text("  ".join(fitted(panel.token.text, room) for panel in block))
        for row in range(height):
            line = Text()
            for panel in block:
                for weight in panel.weights[row]:
                    line.append(*ink.cell(0.0 if np.isnan(weight) else float(weight) / greatest, 2))
                line.append(" " * (room - 2 * width + 2))
            yield line
    if len(shown) < len(panels):
        yield Text(f"{len(shown)} of {len(panels)} units, those with the strongest links", style="dim")
    yield _scale(greatest, ink)


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


@dataclass(frozen=True, slots=True)
class Ink:
    """How a terminal shows a weight.

    Every cell has a background, that of weight 0 too, so that a map looks the same on any terminal: as on the page, a
    greater weight is darker, and on a dark terminal lighter.

    Attributes:
        colours: `truecolor`, `256`, or None for characters.
        dark: Whether the terminal's background is dark.
    """

    colours: Literal["truecolor", "256"] | None
    dark: bool = False

    @classmethod
    def of(cls, console: Console) -> Ink:
        """Return the ink of a console. The variable `COLORFGBG`, which many terminals set, names the background."""
        colours: Literal["truecolor", "256"] | None = None
        if console.color_system in ("truecolor", "windows"):
            colours = "truecolor"
        elif console.color_system == "256":
            colours = "256"
        background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
        return cls(colours, background in _DARK_BACKGROUNDS)

    def cell(self, share: float, width: int, text: str = "") -> tuple[str, Style]:
        """Return terminal cells for a share of the greatest weight, from 0 to 1, with a text on them."""
        bright = min(1.0, max(0.0, share)) ** _GAMMA
        if self.colours is None:
            return text or _SHADES[round(bright * (len(_SHADES) - 1))] * width, Style.null()
        back = self.background(bright)
        black = sum(part * share for part, share in zip(back.get_truecolor(), _LUMINANCE, strict=True)) > 140
        return text or " " * width, Style(color=Color.from_ansi(16 if black else 231), bgcolor=back)

    def background(self, bright: float) -> Color:
        """Return the colour at a place of the ramp, from 0 to 1."""
        if self.colours == "256":
            numbers = _DARK_256 if self.dark else _LIGHT_256
            return Color.from_ansi(numbers[round(bright * (len(numbers) - 1))])
        ramp = _DARK if self.dark else RAMP
        place = bright * (len(ramp) - 1)
        low = min(int(place), len(ramp) - 2)
        red, green, blue = (
            round(start + (end - start) * (place - low)) for start, end in zip(ramp[low], ramp[low + 1], strict=True)
        )
        return Color.from_triplet(ColorTriplet(red, green, blue))


def _scale(greatest: float, ink: Ink, note: str = "") -> Text:
    line = Text("0 ", style="dim")
    for step in range(20):
        line.append(*ink.cell((step + 1) / 20, 1))
    return line.append(f" {greatest:.3f}{'  ' * bool(note)}{note}", style="dim")
