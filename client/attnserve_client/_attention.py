"""The attention map that results hold: its data, and ways to export and draw it."""

from __future__ import annotations

import html
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attnserve_client import _frames, _html
from attnserve_client._map_data import MapData
from attnserve_client._svg_links import Rule
from attnserve_client._svg_views import View, drawn
from attnserve_client._tokens import plain_token

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

    from attnserve_client._svg import Svg

_NOTEBOOK_CELLS = 10_000
"""Cells of a map that a notebook stores as SVG beside the page: about 100 kB."""


def _plain_scores(scores: npt.NDArray[np.float32]) -> Any:
    plain = scores.astype(object)
    plain[np.isinf(scores)] = None
    return plain.tolist()


class AttentionMap(MapData):
    """The attention of one site, a place in the graph that computes attention, or of several joined sites.

    It is that of one sequence. Letters in shapes: H heads (1 where they are joined), L queries, S keys, W columns of a
    band.

    Attributes:
        sites: Name of its site; with joined layers the names of all of them, in order.
        layer: Position of the site in the model's list; -1 with joined layers.
        kind: `self`, `causal` or `cross`.
        form: `dense`, `windowed` or `linear`.
        heads: Numbers of the heads along the first axis; with joined heads, the numbers of those that were joined.
        query_axis: Axis symbol of the queries.
        key_axis: Axis symbol of the keys.
        query_tokens: Tokens or words of the L rows.
        key_tokens: Tokens or words of the S columns.
        axis_tokens: All units of each axis, special tokens included, by axis symbol.
        grids: Image grid of each axis of patches, by axis symbol; empty for a map without patches.
        raw: Weights as received: (H, L, S), or (H, L, W) of a band, in the selected dtype, as a view of the response's
            bytes; or links.
        band_keys: int32 (L, W), the position among `key_tokens` of each band column's key in each row; -1 where a
            column has no key. None unless a band was received.
        residual: float32 (H, L), total weight of the links omitted from each row; None unless links were received.
        model: Name of the model.
        labels: The labels of the sequence; None if none were selected.
        values: What the map holds: `weights` or `scores`. Pages, figures and links are of weights.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the map in plain types for JSON. The weights of a band are (H, L, W), with their `band_keys`.

        A map of scores has `scores` in place of `weights`, with None for -inf.
        """
        numbers = self.band
        if numbers is None:
            numbers = self.scores if self.values == "scores" else self.weights
        return {
            "sites": list(self.sites),
            "layer": self.layer,
            "kind": self.kind,
            "form": self.form,
            "heads": list(self.heads),
            "query_axis": self.query_axis,
            "key_axis": self.key_axis,
            "grids": {axis: asdict(grid) for axis, grid in self.grids.items()},
            "queries": [plain_token(token) for token in self.query_tokens],
            "keys": [plain_token(token) for token in self.key_tokens],
            self.values: _plain_scores(numbers) if self.values == "scores" else numbers.tolist(),
            "band_keys": None if self.band_keys is None else self.band_keys.tolist(),
            "residual": None if self.residual is None else self.residual.tolist(),
            "labels": None if self.labels is None else self.labels.to_dict(),
        }

    def to_html(self) -> str:
        """Return a page with heatmap, text and strongest links. It loads nothing, and token texts stay inert.

        Raises:
            ValueError: This map holds scores.
        """
        return _html.page(self)

    def to_svg(
        self,
        view: View = "heatmap",
        head: int | None = None,
        *,
        top: int | None = None,
        include_self: bool = False,
        exclude_special: bool = True,
        exclude_punctuation: bool = True,
        caption: str | None = None,
    ) -> Svg:
        """Draw the map as SVG, a text that loads nothing. A notebook draws it as the last value of a cell.

        Which links `bipartite` and `arcs` draw follows the rule of `links()`. The heatmap has all weights; of a map
        over image patches, it has a panel for each word.

        Args:
            view: `"heatmap"`; `"bipartite"`, lines from a column of queries to a column of keys, as BertViz draws; or
                `"arcs"` beside one column, for maps whose rows and columns are of one sequence.
            head: Number of one head in `heads`; None for the mean over this map's heads.
            top: Most links to draw, the strongest; None for two for each query, from 10 to 60 together.
            include_self: Draw links from a unit to itself.
            exclude_special: Draw no links from and to special tokens.
            exclude_punctuation: Draw no links from and to units without a letter or digit.
            caption: The line above; None for model and `title`, an empty one for none.

        Returns:
            The text of the file. It has a title and a description for screen readers.

        Raises:
            ValueError: The view is unknown, or it is `"arcs"` and the sides differ; this map has no such head, holds
                scores, or has more than 360,000 cells for a heatmap.
        """
        rule = Rule(top, include_self, exclude_special, exclude_punctuation)
        return drawn(self, view, head, rule, caption)

    def plot(self, head: int | None = None) -> Figure:
        """Draw the map as a matplotlib figure.

        Args:
            head: Number of one head in `heads`; None for the mean over this map's heads.

        Raises:
            ImportError: matplotlib is missing; the message has the command that installs it.
            ValueError: This map has no such head, or holds scores.
        """
        from attnserve_client._plot import figure  # noqa: PLC0415 - matplotlib is an extra

        return figure(self, head)

    def to_pandas(self, head: int | None = None) -> pd.DataFrame:
        """Return the weights of one head as a table: queries down, keys across, named by their texts.

        Args:
            head: Number of the head in `heads`; None for the mean over this map's heads.

        Raises:
            ImportError: pandas is not installed; it is the extra `pandas`.
            ValueError: This map has no such head, or holds scores.
        """
        return _frames.frame(self, head)

    def to_xarray(self) -> xr.DataArray:
        """Return the weights, or scores, with the dimensions `head`, `query` and `key`, and the texts of the units.

        Raises:
            ImportError: xarray is not installed; it is the extra `xarray`.
        """
        return _frames.data_array(self)

    def _repr_html_(self) -> str | None:
        """Return the page in an iframe, so that its styles and scripts and those of a notebook stay apart.

        None for a map of scores: a notebook then shows its representation.
        """
        if self.values == "scores":
            return None
        rows = min(len(self.query_tokens), 40)
        source = html.escape(self.to_html(), quote=True)
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{source}" title="attention map" '
            f'style="width:100%;height:{460 + 18 * rows}px;border:0"></iframe>'
        )

    def _repr_svg_(self) -> str | None:
        """Return the heatmap, for exports of notebooks that cannot show pages, such as LaTeX.

        None for a map of scores, and for a long one.
        """
        if self.values == "scores" or len(self.query_tokens) * len(self.key_tokens) > _NOTEBOOK_CELLS:
            return None
        return str(self.to_svg())
