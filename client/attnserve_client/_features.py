"""The features that results hold: for each site, head and query, a few numbers in place of a row of weights.

A site is a place in the graph that computes attention. An unknown feature raises KeyError.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attnserve_client._tokens import Token, plain_token

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, eq=False)
class SiteFeatures:
    """The features of one site over one sequence. Letters in shapes: H heads, L queries, F features.

    Attributes:
        site: Name of the site.
        layer: Position of the site in the model's list.
        kind: `self`, `causal` or `cross`.
        form: `dense`, `windowed` or `linear`.
        heads: Numbers of the H heads.
        query_axis: Axis symbol of the queries.
        key_axis: Axis symbol of the keys.
        query_tokens: Tokens or words of the L rows.
        key_tokens: Tokens or words that the rows have weights for.
        names: Names of the F features.
        values: float32 (H, L, F), read-only: a view of the response's bytes.
    """

    site: str
    layer: int
    kind: str
    form: str
    heads: tuple[int, ...]
    query_axis: str = field(repr=False)
    key_axis: str = field(repr=False)
    query_tokens: tuple[Token, ...] = field(repr=False)
    key_tokens: tuple[Token, ...] = field(repr=False)
    names: tuple[str, ...]
    values: npt.NDArray[np.float32] = field(repr=False)

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        """Return one feature of each head and query, float32 (H, L).

        Raises:
            KeyError: The selection had no such feature.
        """
        return self.values[:, :, _place(self.names, name)]

    def to_dict(self) -> dict[str, Any]:
        """Return the features in plain types for JSON; None for a value that is not a number."""
        return {
            "site": self.site,
            "layer": self.layer,
            "kind": self.kind,
            "form": self.form,
            "heads": list(self.heads),
            "query_axis": self.query_axis,
            "key_axis": self.key_axis,
            "queries": [plain_token(token) for token in self.query_tokens],
            "features": list(self.names),
            "values": _plain_numbers(self.values),
        }


@dataclass(frozen=True, slots=True, eq=False)
class AttentionFeatures:
    """The features of all selected sites over one sequence, in the order of their layers.

    Attributes:
        model: Name of the model.
        names: Names of the features, in the order of the selection.
        sites: The features of each site.
    """

    model: str
    names: tuple[str, ...]
    sites: tuple[SiteFeatures, ...] = field(repr=False)

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of each column of `by_head`; where sites have different heads, its place among a site's heads."""
        numbers = {each.heads for each in self.sites}
        return numbers.pop() if len(numbers) == 1 else tuple(range(max((len(each) for each in numbers), default=0)))

    def by_head(self, name: str) -> npt.NDArray[np.float32]:
        """Return the mean of one feature over the queries of each head, float32 (sites, heads).

        NaN where a site has fewer heads than another, or no queries.

        Raises:
            KeyError: The selection had no such feature.
        """
        place = _place(self.names, name)
        means = np.full((len(self.sites), len(self.heads)), np.nan, np.float32)
        for row, each in enumerate(self.sites):
            if each.query_tokens:
                means[row, : len(each.heads)] = each.values[:, :, place].mean(axis=1, dtype=np.float64)
        return means

    def to_numpy(self) -> npt.NDArray[np.float32]:
        """Return all features as one array, float32 (sites, H, L, F).

        Raises:
            ValueError: The sites differ in the number of heads or queries, or there are none.
        """
        shapes = sorted({each.values.shape for each in self.sites})
        if len(shapes) > 1:
            raise ValueError(
                f"the sites have features of shapes {shapes}; use `sites[i].values`, or select fewer sites"
            )
        return np.stack([each.values for each in self.sites])

    def to_dict(self) -> dict[str, Any]:
        """Return the features in plain types for JSON."""
        return {
            "model": self.model,
            "features": list(self.names),
            "sites": [each.to_dict() for each in self.sites],
        }

    def plot(self, name: str | None = None) -> Figure:
        """Draw one feature as a matplotlib figure: layers down, heads across, each the mean over its queries.

        Args:
            name: Name of the feature; None for the first.

        Raises:
            ImportError: matplotlib is missing; the message has the command that installs it.
            KeyError: The selection had no such feature.
        """
        from attnserve_client._plot import heads_figure  # noqa: PLC0415 - matplotlib is an extra

        shown = name or self.names[0]
        return heads_figure(self.by_head(shown), [each.layer for each in self.sites], self.heads, shown, self.model)


def _plain_numbers(values: npt.NDArray[np.float32]) -> Any:
    plain = values.astype(object)
    plain[np.isnan(values)] = None
    return plain.tolist()


def _place(names: tuple[str, ...], name: str) -> int:
    if name not in names:
        raise KeyError(f"{name!r} is not one of the selected features: {', '.join(names)}")
    return names.index(name)
