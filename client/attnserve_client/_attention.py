"""The attention over one sequence: weights that know their tokens. Drawing them is `_html`'s and `_plot`'s."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attnserve_client._patches import Panel, PatchGrid
from attnserve_client._tokens import Array, Link, RawLinks, Token, as_float32, plain_token

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)  # no slots: the decoded weights are kept beside the fields
class AttentionMap:
    """The attention of one site, or of several joined ones, over one sequence.

    Letters in shapes: H heads (1 where they were joined), L queries, S keys, W columns of a band.

    Attributes:
        sites: The site it is from; with joined layers all of them, in order.
        layer: The site's position in the model's list; -1 where several were joined.
        kind: `self`, `causal` or `cross`.
        form: `dense`, `windowed` or `linear`.
        heads: The heads along the first axis; with joined heads the ones that went in.
        query_axis: Axis symbol of the queries.
        key_axis: Axis symbol of the keys.
        query_tokens: What the L rows stand for.
        key_tokens: What the S columns stand for.
        axis_tokens: All units of each axis, special tokens included, by axis symbol.
        grids: How the units of an axis cover an image, by axis symbol; none for axes that hold no patches.
        raw: What came: weights (H, L, S), of a band (H, L, W), in the dtype asked for, a view of the answer's bytes; or
            links.
        band_keys: Where a band came, int32 (L, W): the place among `key_tokens` of the key that each column of a row
            stands for, and -1 where it stands for none; else None.
        residual: float32 (H, L), what each row's left-out links weigh together; None where all weights came.
        model: The model's name.
    """

    sites: tuple[str, ...]
    layer: int
    kind: str
    form: str
    heads: tuple[int, ...]
    query_axis: str
    key_axis: str
    query_tokens: tuple[Token, ...]
    key_tokens: tuple[Token, ...]
    raw: Array | RawLinks = field(repr=False)
    residual: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    band_keys: npt.NDArray[np.int32] | None = field(default=None, repr=False)
    axis_tokens: dict[str, tuple[Token, ...]] = field(default_factory=dict, repr=False)
    grids: dict[str, PatchGrid] = field(default_factory=dict, repr=False)
    model: str = ""

    @property
    def tokens(self) -> tuple[Token, ...]:
        """What the columns stand for; with self-attention over all rows, what the rows stand for too."""
        return self.key_tokens

    @property
    def is_sparse(self) -> bool:
        """Whether only the strongest links came, so that `weights` has zeros where others were left out."""
        return isinstance(self.raw, RawLinks)

    @property
    def is_joined(self) -> bool:
        """Whether the heads were joined into one."""
        return self._head_count == 1 and len(self.heads) != 1

    @property
    def title(self) -> str:
        """What it shows, in a few words, for example `layer 5 (encoder.5), mean of 12 heads`."""
        where = f"layer {self.layer} ({self.sites[0]})" if self.layer >= 0 else f"{len(self.sites)} layers joined"
        rows = len(self.heads)
        heads = f"{rows} heads joined" if self.is_joined else f"{rows} heads" if rows != 1 else f"head {self.heads[0]}"
        return f"{where}, {heads}"

    @cached_property
    def weights(self) -> npt.NDArray[np.float32]:
        """Weights, float32 (H, L, S), read-only; rows sum to 1 where nothing was left out.

        float32 weights are a view of the answer's bytes; others are decoded when first asked for, and links, or the
        columns of a band, are put in their places with zeros between. Of long sequences take `band` instead.
        """
        if isinstance(self.raw, RawLinks):
            return self._densified(self.raw)
        decoded = as_float32(self.raw)
        if self.band_keys is not None:
            band = decoded
            decoded = np.zeros((*band.shape[:2], len(self.key_tokens)), dtype=np.float32)
            rows, columns = np.nonzero(self.band_keys >= 0)
            decoded[:, rows, self.band_keys[rows, columns]] = band[:, rows, columns]
        decoded.flags.writeable = False
        return decoded

    @property
    def band(self) -> npt.NDArray[np.float32] | None:
        """Weights of a windowed site as they came, float32 (H, L, W), read-only; None where no band came.

        `band_keys` says which key each column of a row stands for.
        """
        if self.band_keys is None or isinstance(self.raw, RawLinks):
            return None
        decoded = as_float32(self.raw)
        decoded.flags.writeable = False
        return decoded

    @property
    def outside(self) -> npt.NDArray[np.bool_] | None:
        """Which keys lie outside each query's window, so that it cannot look at them: (L, S); None without a band."""
        if self.band_keys is None:
            return None
        beyond = np.ones((len(self.query_tokens), len(self.key_tokens)), dtype=np.bool_)
        rows, columns = np.nonzero(self.band_keys >= 0)
        beyond[rows, self.band_keys[rows, columns]] = False
        return beyond

    def links(
        self,
        top: int | None = 10,
        *,
        exclude_special: bool = True,
        head: int | None = None,
        include_self: bool = True,
        exclude_punctuation: bool = False,
    ) -> list[Link]:
        """The strongest links, greatest weight first; equal ones in the order of head, query and key.

        Args:
            top: How many at most; None for all that are above 0.
            exclude_special: Leave out links from and to special tokens.
            head: One head only, by its number in `heads`; None for all of them.
            include_self: Keep links of a unit to itself.
            exclude_punctuation: Leave out links from and to units that have no letter and no digit.

        Raises:
            ValueError: There is no such head in this map.
        """
        weights, numbers = self._chosen(head, by_column=True)
        places = self._places()
        rows_out, columns_out = (
            np.array(
                [
                    (exclude_special and token.special)
                    or (exclude_punctuation and not any(map(str.isalnum, token.text)))
                    for token in tokens
                ],
                dtype=np.bool_,
            )
            for tokens in (self.query_tokens, self.key_tokens)
        )
        wanted = (places >= 0) & ~columns_out[places]
        wanted[rows_out, :] = False
        if not include_self and self.query_axis == self.key_axis:
            rows = np.array([token.index for token in self.query_tokens], dtype=np.int64)
            columns = np.array([token.index for token in self.key_tokens], dtype=np.int64)
            wanted &= rows[:, None] != columns[places]
        flat = np.where(wanted, weights, 0.0).ravel()
        count = flat.size if top is None else max(0, top)
        order = np.argsort(-flat, kind="stable")[:count]
        found = []
        for place in order[flat[order] > 0]:
            at_head, row, column = np.unravel_index(place, weights.shape)
            query, key = self.query_tokens[row], self.key_tokens[places[row, column]]
            found.append(Link(query.text, key.text, float(flat[place]), numbers[at_head], query, key))
        return found

    def head_weights(self, head: int | None = None) -> npt.NDArray[np.float32]:
        """Weights of one head by its number in `heads`, or with None the mean over this map's heads, float32 (L, S).

        Raises:
            ValueError: There is no such head in this map.
        """
        weights, _ = self._chosen(head)
        return np.asarray(weights[0] if len(weights) == 1 else weights.mean(axis=0), dtype=np.float32)

    def over_patches(self, head: int | None = None) -> list[Panel]:
        """What each query looks at over the patches of an image; where the queries are patches, what looks at each key.

        Args:
            head: One head, or with None the mean over this map's heads.

        Returns:
            A panel for each row (or column), in order; empty where neither side is of patches.

        Raises:
            ValueError: There is no such head in this map.
        """
        weights, tokens, others = self.head_weights(head), self.query_tokens, self.key_tokens
        grid = self.grids.get(self.key_axis)
        if grid is None:
            grid = self.grids.get(self.query_axis)
            weights, tokens, others = weights.T, others, tokens
        if grid is None:
            return []
        return [Panel(token, grid.lay_out(row, others)) for token, row in zip(tokens, weights, strict=True)]

    def to_html(self) -> str:
        """A page that shows the map: heatmap, sentence and strongest links. It loads nothing and is safe to open."""
        from attnserve_client._html import page  # noqa: PLC0415 - drawing is loaded when something is drawn

        return page(self)

    def plot(self, head: int | None = None) -> Figure:
        """The map as a matplotlib figure: one head, or with None the mean over this map's heads.

        Raises:
            ImportError: matplotlib is missing; the message has the line that installs it.
            ValueError: There is no such head in this map.
        """
        from attnserve_client._plot import figure  # noqa: PLC0415 - matplotlib is an extra

        return figure(self, head)

    def to_dict(self) -> dict[str, Any]:
        """The map in plain types, ready for JSON. The weights of a band are (H, L, W), with its `band_keys` beside."""
        band = self.band
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
            "weights": (self.weights if band is None else band).tolist(),
            "band_keys": None if self.band_keys is None else self.band_keys.tolist(),
            "residual": None if self.residual is None else self.residual.tolist(),
        }

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that it and the notebook leave each other alone."""
        rows = min(len(self.query_tokens), 40)
        source = html.escape(self.to_html(), quote=True)
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{source}" title="attention map" '
            f'style="width:100%;height:{460 + 18 * rows}px;border:0"></iframe>'
        )

    @property
    def _head_count(self) -> int:
        """H, without decoding anything."""
        if isinstance(self.raw, RawLinks):
            return (len(self.raw.row_offsets) - 1) // len(self.query_tokens) if self.query_tokens else 1
        return int(self.raw.shape[0])

    def _chosen(self, head: int | None, *, by_column: bool = False) -> tuple[npt.NDArray[np.float32], list[int | None]]:
        """Weights (H', L, S) of the wanted heads, and their numbers (None for joined ones).

        `by_column`: of a band (H', L, W), in the order of `_places`.
        """
        if head is not None and self.is_joined:
            raise ValueError(f"head {head}: this map's heads are joined")
        if head is not None and head not in self.heads:
            raise ValueError(f"head {head} is not in this map; it has {', '.join(map(str, self.heads))}")
        band = self.band if by_column else None
        weights = self.weights if band is None else np.take_along_axis(band, self._column_order()[None], axis=2)
        if self.is_joined:
            return weights, [None]
        if head is None:
            return weights, list(self.heads)
        at = self.heads.index(head)
        return weights[at : at + 1], [head]

    def _places(self) -> npt.NDArray[np.int64]:
        """The key of each column as its place among `key_tokens`, (L, S); of a band (L, W), ascending in each row."""
        if self.band_keys is None:
            return np.tile(np.arange(len(self.key_tokens)), (len(self.query_tokens), 1))
        return np.take_along_axis(self.band_keys.astype(np.int64), self._column_order(), axis=1)

    def _column_order(self) -> npt.NDArray[np.int64]:
        """Columns of a band in the order of their keys, (L, W)."""
        assert self.band_keys is not None
        return np.argsort(self.band_keys, axis=1, kind="stable")

    def _densified(self, links: RawLinks) -> npt.NDArray[np.float32]:
        heads, rows, columns = self._head_count, len(self.query_tokens), len(self.key_tokens)
        dense = np.zeros((heads * rows, columns), dtype=np.float32)
        places = np.full(max((token.index for token in self.key_tokens), default=-1) + 1, -1, dtype=np.int64)
        places[[token.index for token in self.key_tokens]] = np.arange(columns)
        row_of = np.repeat(np.arange(heads * rows), np.diff(links.row_offsets))
        dense[row_of, places[links.keys]] = as_float32(links.weights)
        dense.flags.writeable = False
        return dense.reshape(heads, rows, columns)
