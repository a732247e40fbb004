"""Attention maps and features as matplotlib figures. matplotlib is an extra; pyplot is avoided: it has global state."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from attnserve_client._patches import strongest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attnserve_client._map_data import MapData
    from attnserve_client._patches import Panel
    from attnserve_client._tokens import Token

_INSTALL: Final = "plot() needs matplotlib: pip install 'attnserve[plot]'"
_MOST_LABELS: Final = 80
_LONGEST_LABEL: Final = 24
_LONGEST_TITLE: Final = 120
_MOST_PANELS: Final = 24
_PANELS_A_LINE: Final = 6
_OUTSIDE: Final = "#d9dce1"
"""Colour of keys outside a query's window, which have no weight, as opposed to a weight of 0."""


def figure(attention: MapData, head: int | None) -> Figure:
    """Draw a heatmap with the tokens along both sides; for a map over image patches, a panel for each token.

    Args:
        attention: The map.
        head: Number of one head; None for the mean over the map's heads.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The map has no such head, or holds scores.
    """
    drawn = _empty_figure()
    which = "" if head is None else f", head {head}"
    title = _plain(attention.title + which, _LONGEST_TITLE)
    panels = attention.over_patches(head)
    if panels:
        label = "looks at" if attention.key_axis in attention.grids else "is looked at from"
        _draw_panels(drawn, panels, title, label)
        return drawn
    weights = attention.head_weights(head)
    rows, columns = weights.shape
    drawn.set_size_inches(_inches(columns) + 1.6, _inches(rows) + 1.2)
    axes = drawn.add_subplot()
    outside = attention.outside
    if outside is not None:
        axes.set_facecolor(_OUTSIDE)
        weights = np.ma.masked_array(weights, mask=outside)
    image = axes.imshow(weights, cmap="magma_r", vmin=0.0, aspect="equal", interpolation="nearest")
    drawn.colorbar(image, ax=axes, label="weight", shrink=0.8)
    _label(axes.set_xticks, attention.key_tokens, rotation=60.0, ha="left", rotation_mode="anchor")
    _label(axes.set_yticks, attention.query_tokens)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9)
    axes.set_ylabel("looks ...")
    axes.set_xlabel("... at")
    axes.set_title(title, fontsize=10)
    return drawn


def heads_figure(
    means: npt.NDArray[np.float32], layers: Sequence[int], heads: Sequence[int], name: str, model: str
) -> Figure:
    """Draw one feature as a heatmap: a row for each site, a column for each head, each the mean over the queries.

    Args:
        means: (sites, heads); NaN for a head that a site does not have.
        layers: Positions of the sites in the model's list.
        heads: Number of each column.
        name: Name of the feature.
        model: Name of the model.

    Raises:
        ImportError: matplotlib is missing.
    """
    drawn = _empty_figure()
    rows, columns = means.shape
    drawn.set_size_inches(_inches(columns) + 1.6, _inches(rows) + 1.2)
    axes = drawn.add_subplot()
    axes.set_facecolor(_OUTSIDE)
    masked = np.ma.masked_invalid(means)
    image = axes.imshow(masked, cmap="magma_r", vmin=0.0, aspect="equal", interpolation="nearest")
    drawn.colorbar(image, ax=axes, label=_plain(name.replace("_", " ")), shrink=0.8)
    axes.set_yticks(range(rows), labels=[str(layer) for layer in layers])
    axes.set_xticks(range(columns), labels=[str(head) for head in heads])
    axes.tick_params(length=0, labelsize=9)
    axes.set_ylabel("layer")
    axes.set_xlabel("head")
    axes.set_title(_plain(f"{model}, mean over the queries", _LONGEST_TITLE), fontsize=10)
    return drawn


def _empty_figure() -> Figure:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError:
        raise ImportError(_INSTALL) from None
    return Figure(layout="constrained")


def _draw_panels(figure: Figure, panels: list[Panel], title: str, label: str) -> None:
    """Draw a panel of image patches for each unit, on one scale; of many units, those with the greatest weights."""
    shown = strongest(panels, _MOST_PANELS)
    columns = min(_PANELS_A_LINE, len(shown))
    lines = math.ceil(len(shown) / columns)
    height, width = shown[0].weights.shape
    figure.set_size_inches(1.6 * columns + 1.4, 1.6 * lines * min(2.0, max(0.5, height / width)) + 0.3 * lines + 0.9)
    greatest = max(float(np.nanmax(panel.weights, initial=0.0)) for panel in shown) or 1.0
    places = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in places:
        axes.set_axis_off()
    for axes, panel in zip(places, shown, strict=False):
        image = axes.imshow(panel.weights, cmap="magma_r", vmin=0.0, vmax=greatest, interpolation="nearest")
        axes.set_title(f"{_plain(panel.token.text)} {label} ...", fontsize=8)
    figure.colorbar(image, ax=places, label="weight", shrink=0.8)
    counted = f" ({len(shown)} of {len(panels)})" if len(shown) < len(panels) else ""
    figure.suptitle(title + counted, fontsize=10)


def _inches(units: int) -> float:
    return min(24.0, max(3.0, 0.28 * units))


def _label(place: object, tokens: tuple[Token, ...], **style: object) -> None:
    assert callable(place)
    if len(tokens) <= _MOST_LABELS:
        place(range(len(tokens)), labels=[_plain(token.text) for token in tokens], **style)


def _plain(text: str, longest: int = _LONGEST_LABEL) -> str:
    """Return text for a label: `$` escaped, because it starts mathematics; control characters replaced; cut to size."""
    shown = "".join(" " if unicodedata.category(letter)[0] == "C" else letter for letter in text)
    cut = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    return cut.replace("$", r"\$")
