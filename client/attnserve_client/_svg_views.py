"""Attention maps as SVG: the choice of a view, and the heatmap. Lines and arcs are in `_svg_links`.

Units are words or tokens, as in the map. A map of scores raises ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from attnserve_client._map_data import MapData
from attnserve_client._patches import strongest
from attnserve_client._svg import (
    INK,
    LONGEST_LABEL,
    OUTSIDE,
    RAMP,
    SOFT,
    Drawing,
    Svg,
    colour,
    css,
    ink_on,
    number,
    plain,
    titled,
    widest,
)
from attnserve_client._svg_links import Made, Rule, arcs, bipartite
from attnserve_client._tokens import Token

View = Literal["heatmap", "bipartite", "arcs"]

MOST_CELLS: Final = 600 * 600
"""Cells of a heatmap: about 4 MB of text. A greater one is no help to a reader, either."""
_HOVERED_CELLS: Final = 400
_NUMBERED_COLUMNS: Final = 16
_LEVELS: Final = 64
_MOST_PANELS: Final = 24
_PANELS_A_LINE: Final = 6
_MOST_LABELS: Final = 100
"""Units of a side whose cells have a fixed size; more share 1,300 pixels, and not all have a label."""
_DESCRIBED_LINKS: Final = 10


def drawn(attention: MapData, view: View, head: int | None, rule: Rule, caption: str | None) -> Svg:
    """Draw one head of a map, or the mean over its heads.

    Args:
        attention: The map.
        view: The kind of drawing.
        head: Number of the head; None for the mean.
        rule: Which links are drawn.
        caption: The line above; None for the map's title, an empty one for none.

    Raises:
        ValueError: The view is unknown, or it is `arcs` and the map's sides differ; the map has no such head, holds
            scores, or has more cells than a heatmap can show.
    """
    if view not in get_args(View):
        raise ValueError(f"view is {view!r}; it must be one of {', '.join(get_args(View))}")
    one = _one_head(attention, head)
    shown = attention.title + ("" if head is None else f", head {head}")
    if head is None and not attention.is_joined and len(attention.heads) > 1:
        shown += ", their mean"
    title = f"{attention.model}: {shown}" if attention.model else shown
    made = {"heatmap": _heatmap, "bipartite": bipartite, "arcs": arcs}[view](attention, one, rule, title)
    drawing, width, height, what = made
    drawing.notes += _notes(attention)
    listed = rule.links(one, most=_DESCRIBED_LINKS)
    names = attention.names()
    strong = "; ".join(f"{names[a.query_token]} looks at {names[a.key_token]}, {a.weight:.3f}" for a in listed)
    description = f"{what} Strongest links: {strong or 'none'}."
    return drawing.finish(width, height, title if caption is None else caption, description)


def _one_head(attention: MapData, head: int | None) -> MapData:
    """Return a map of one head, dense, so that its links are those of the mean over the heads."""
    weights = attention.head_weights(head)
    heads = attention.heads if head is None else (head,)
    return replace(attention, raw=weights[None], heads=heads, band_keys=None, residual=None)


def _notes(attention: MapData) -> list[str]:
    if attention.residual is None:
        return []
    omitted = float(attention.residual.mean()) if attention.residual.size else 0.0
    return [f"Strongest links only; the omitted ones sum to {omitted:.1%} of a row on average."]


def _heatmap(attention: MapData, one: MapData, rule: Rule, title: str) -> Made:  # noqa: ARG001 - as the other views
    if one.grids:
        panels = one.over_patches()
        if panels:
            return _panels(attention, one, title)
    weights, outside = one.weights[0], attention.outside
    rows, columns = weights.shape
    if weights.size > MOST_CELLS:
        problem = f"a heatmap of {rows} x {columns} cells is beyond {MOST_CELLS}"
        raise ValueError(f"{problem}; select fewer `queries`, or words, or draw it with plot()")
    drawing = Drawing(title)
    cell = 30.0 if columns <= _NUMBERED_COLUMNS else 18.0 if max(rows, columns) <= 40 else 13.0
    if max(rows, columns) > _MOST_LABELS:
        cell = max(2.0, 1300 / max(rows, columns))
    size = min(12.0, max(10.0, cell - 2))
    every = math.ceil(size / cell)
    left_labels, top_labels = _labels(one.query_tokens), _labels(one.key_tokens)
    left, top = widest(left_labels, size) + 8, widest(top_labels, size) * math.sin(math.radians(60)) + 14
    greatest = float(np.abs(weights).max(initial=0.0)) or 1.0
    for row in range(0, rows, every):
        fill = SOFT if one.query_tokens[row].special else INK
        y = top + (row + 0.5) * cell + 0.35 * size
        drawing.text(left - 6, y, left_labels[row], anchor="end", size=size, fill=fill)
    for column in range(0, columns, every):
        fill = SOFT if one.key_tokens[column].special else INK
        drawing.text(left + (column + 0.6) * cell, top - 5, top_labels[column], size=size, fill=fill, rotate=-60)
    _cells(drawing, weights, outside, (left, top), cell, greatest)
    if columns <= _NUMBERED_COLUMNS:
        _percentages(drawing, weights, outside, (left, top), cell, greatest)
    if weights.size <= _HOVERED_CELLS:
        _hovered(drawing, one, weights, (left, top), cell)
    percent = "; numbers are percent of a row" if columns <= _NUMBERED_COLUMNS else ""
    drawing.notes.append(f"The word of a row looks at the word of a column{percent}.")
    _scale(drawing, (left, top + rows * cell + 14), float(weights.min(initial=0.0)), greatest)
    if outside is not None:
        drawing.notes.append("Grey: keys outside the window of a query, which have no weight.")
    overhang = widest(top_labels[-3:], size) * math.cos(math.radians(60))
    what = f"Heatmap of {rows} rows that look at {columns} columns; the greatest weight is {greatest:.3f}."
    return drawing, left + max(columns * cell + overhang, 200), top + rows * cell + 40, what


def _labels(tokens: Sequence[Token]) -> list[str]:
    return [plain(token.text, LONGEST_LABEL) for token in tokens]


def _cells(
    drawing: Drawing,
    weights: npt.NDArray[np.float32],
    outside: npt.NDArray[np.bool_] | None,
    at: tuple[float, float],
    cell: float,
    greatest: float,
) -> None:
    """Add the cells as one path for each colour, in units of a cell; equal neighbours in a row are one rectangle."""
    rows, columns = weights.shape
    place = f"translate({number(at[0])} {number(at[1])}) scale({number(cell)})"
    drawing.parts.append(f'<g transform="{place}" shape-rendering="crispEdges">')
    drawing.parts.append(f'<rect width="{columns}" height="{rows}" fill="{css(RAMP[0])}"/>')
    levels = np.rint(np.nan_to_num(weights) / greatest * _LEVELS).astype(np.int64)
    hidden = _LEVELS + 1
    if outside is not None:
        levels[outside] = hidden
    levels[np.isnan(weights)] = hidden
    paths: dict[int, list[str]] = {}
    for row, line in enumerate(levels if columns else ()):
        starts = np.flatnonzero(np.diff(line, prepend=line[:1] - 1)).tolist()
        for start, end in zip(starts, [*starts[1:], columns], strict=True):
            if line[start]:
                paths.setdefault(int(line[start]), []).append(f"M{start} {row}h{end - start}v1h-{end - start}z")
    for level, path in sorted(paths.items()):
        fill = OUTSIDE if level == hidden else css(colour(level / _LEVELS))
        drawing.parts.append(f'<path fill="{fill}" d="{"".join(path)}"/>')
    drawing.parts.append("</g>")


def _percentages(
    drawing: Drawing,
    weights: npt.NDArray[np.float32],
    outside: npt.NDArray[np.bool_] | None,
    at: tuple[float, float],
    cell: float,
    greatest: float,
) -> None:
    for row, column in np.argwhere(np.ones_like(weights) if outside is None else ~outside).tolist():
        weight = float(weights[row, column])
        x, y = at[0] + (column + 0.5) * cell, at[1] + (row + 0.5) * cell + 4
        ink = ink_on(colour(round(weight / greatest * _LEVELS) / _LEVELS))
        drawing.text(x, y, f"{100 * weight:.0f}", anchor="middle", size=11, fill=ink)


def _hovered(
    drawing: Drawing, one: MapData, weights: npt.NDArray[np.float32], at: tuple[float, float], cell: float
) -> None:
    """Add an invisible cell over each, which states its link where the pointer is on it."""
    names = one.names()
    size = f'width="{number(cell)}" height="{number(cell)}" fill-opacity="0"'
    for row, query in enumerate(one.query_tokens):
        for column, key in enumerate(one.key_tokens):
            place = f'x="{number(at[0] + column * cell)}" y="{number(at[1] + row * cell)}" {size}'
            words = f"{names[query]} looks at {names[key]}: {weights[row, column]:.4f}"
            drawing.parts.append(titled("rect", place, words))


def _scale(drawing: Drawing, at: tuple[float, float], least: float, greatest: float) -> None:
    """Add the colours from the least weight, at most 0, to the greatest."""
    low = min(0.0, least) / greatest
    steps = 24
    for step in range(steps):
        share = low + (1 - low) * (step + 0.5) / steps
        place = f'x="{number(at[0] + 24 + 4 * step)}" y="{number(at[1])}" width="4.5" height="10"'
        drawing.parts.append(f'<rect {place} fill="{css(colour(share))}"/>')
    drawing.text(at[0] + 20, at[1] + 9, f"{min(0.0, least):.3g}", anchor="end", size=11, fill=SOFT)
    drawing.text(at[0] + 28 + 4 * steps, at[1] + 9, f"{greatest:.3f} (weight)", size=11, fill=SOFT)


def _panels(attention: MapData, one: MapData, title: str) -> Made:
    """Draw the patches of an image in its rows and columns, once for each unit; of many, the strongest ones."""
    panels = one.over_patches()
    kept = strongest(panels, _MOST_PANELS)
    rows, columns = kept[0].weights.shape
    cell = max(3.0, min(14.0, 150 / max(rows, columns)))
    wide, tall = max(columns * cell, 110.0) + 14, rows * cell + 30
    greatest = max(float(np.nanmax(panel.weights, initial=0.0)) for panel in kept) or 1.0
    drawing = Drawing(title)
    for place, panel in enumerate(kept):
        x, y = (place % _PANELS_A_LINE) * wide, (place // _PANELS_A_LINE) * tall
        drawing.text(x, y + 12, plain(panel.token.text, 16))
        _cells(drawing, panel.weights, None, (x, y + 18), cell, greatest)
    lines = math.ceil(len(kept) / _PANELS_A_LINE)
    _scale(drawing, (0, lines * tall + 4), 0.0, greatest)
    direction = "looks at" if attention.key_axis in attention.grids else "is looked at from"
    drawing.notes.append(f"The word above a panel {direction} its patches.")
    if len(kept) < len(panels):
        drawing.notes.append(f"{len(kept)} of {len(panels)} units, those with the strongest links.")
    what = f"{len(kept)} panels of {rows} x {columns} patches; the greatest weight is {greatest:.3f}."
    return drawing, min(len(kept), _PANELS_A_LINE) * wide, lines * tall + 24, what
