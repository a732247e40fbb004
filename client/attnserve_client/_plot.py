"""An attention map as a matplotlib figure. matplotlib is an extra, and pyplot with its global state is not used."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attnserve_client._attention import AttentionMap
    from attnserve_client._tokens import Token

_INSTALL: Final = "plot() needs matplotlib: pip install 'attnserve[plot]'"
_MOST_LABELS: Final = 80
_LONGEST_LABEL: Final = 24
_LONGEST_TITLE: Final = 120
_OUTSIDE: Final = "#d9dce1"
"""A key outside a query's window has no weight, which is something else than a weight of 0."""


def figure(attention: AttentionMap, head: int | None) -> Figure:
    """A heatmap with the tokens along both sides, of one head or of the mean over the map's heads.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There is no such head in this map.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError:
        raise ImportError(_INSTALL) from None
    weights = attention.head_weights(head)
    rows, columns = weights.shape
    drawn = Figure(figsize=(_inches(columns) + 1.6, _inches(rows) + 1.2), layout="constrained")
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
    which = "" if head is None else f", head {head}"
    axes.set_title(_plain(attention.title + which, _LONGEST_TITLE), fontsize=10)
    return drawn


def _inches(units: int) -> float:
    return min(24.0, max(3.0, 0.28 * units))


def _label(place: object, tokens: tuple[Token, ...], **style: object) -> None:
    assert callable(place)
    if len(tokens) <= _MOST_LABELS:
        place(range(len(tokens)), labels=[_plain(token.text) for token in tokens], **style)


def _plain(text: str, longest: int = _LONGEST_LABEL) -> str:
    """Text for a label: no mathematics from `$`, no control characters, and not too long."""
    shown = "".join(" " if unicodedata.category(letter)[0] == "C" else letter for letter in text)
    cut = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    return cut.replace("$", r"\$")
