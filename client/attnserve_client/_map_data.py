"""The data of an attention map: weights with their tokens, and the links and panels computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from attnserve_client._labels import Labels
from attnserve_client._patches import Panel, PatchGrid
from attnserve_client._spans import Span, between, covered
from attnserve_client._tokens import Array, Link, RawLinks, Token, as_float32, names_of


@dataclass(frozen=True, eq=False, repr=False)  # no slots: cached_property stores the decoded weights in __dict__
class MapData:
    """Fields and weights of an `AttentionMap`, whose docstring describes the fields.

    Letters in shapes: H heads (1 where they are joined), L queries, S keys, W columns of a band.
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
    labels: Labels | None = field(default=None, repr=False)
    values: Literal["weights", "scores"] = field(default="weights", repr=False)

    def __repr__(self) -> str:
        """Return model, place, kind and shape on one line, without tokens and weights."""
        model = f"{self.model}, " if self.model else ""
        return f"{type(self).__name__}({model}{self.title}, {self.kind}, {self.form}, {self.values} {self.shape_text})"

    @property
    def shape_text(self) -> str:
        """The shape (H, L, S) as text."""
        return f"({self._head_count}, {len(self.query_tokens)}, {len(self.key_tokens)})"

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Tokens or words of the columns; in self-attention over all queries, those of the rows too."""
        return self.key_tokens

    @property
    def is_sparse(self) -> bool:
        """Whether links were received, so that `weights` is 0 where a link was omitted."""
        return isinstance(self.raw, RawLinks)

    @property
    def is_joined(self) -> bool:
        """Whether the heads were joined into one."""
        return self._head_count == 1 and len(self.heads) != 1

    @property
    def title(self) -> str:
        """Layers and heads of the map in a few words, for example `layer 5 (encoder.5), 12 heads joined`."""
        where = f"layer {self.layer} ({self.sites[0]})" if self.layer >= 0 else f"{len(self.sites)} layers joined"
        rows = len(self.heads)
        heads = f"{rows} heads joined" if self.is_joined else f"{rows} heads" if rows != 1 else f"head {self.heads[0]}"
        return f"{where}, {heads}"

    @cached_property
    def weights(self) -> npt.NDArray[np.float32]:
        """Weights, float32 (H, L, S), read-only.

        A row sums to 1, unless links were omitted, the model has an attention sink, or all keys of the row are masked.
        Dense float32 weights are a view of the response's bytes. Other types are decoded on first access. Links and
        bands are scattered into zeros, which takes H * L * S * 4 bytes: for long sequences, use `band`.

        Raises:
            ValueError: This map holds scores.
        """
        self._check_weights()
        if isinstance(self.raw, RawLinks):
            return self._scattered(self.raw)
        return self._over_keys(self.raw, outside=0)

    @cached_property
    def scores(self) -> npt.NDArray[np.float32]:
        """Scores, float32 (H, L, S), read-only; -inf for a key that is hidden from the query.

        Raises:
            ValueError: This map holds weights.
        """
        if self.values != "scores" or isinstance(self.raw, RawLinks):
            raise ValueError('this map holds weights, and no scores; select them with `values="scores"`')
        return self._over_keys(self.raw, outside=-np.inf)

    def _check_weights(self) -> None:
        if self.values == "scores":
            raise ValueError("this map holds scores, and no weights; read `scores`, or select weights")

    def _over_keys(self, raw: Array, outside: float) -> npt.NDArray[np.float32]:
        """Decode (H, L, S), or a band (H, L, W), to float32 (H, L, S), with `outside` for keys outside the band."""
        decoded = as_float32(raw)
        if self.band_keys is not None:
            band = decoded
            decoded = np.full((*band.shape[:2], len(self.key_tokens)), outside, dtype=np.float32)
            rows, columns = np.nonzero(self.band_keys >= 0)
            decoded[:, rows, self.band_keys[rows, columns]] = band[:, rows, columns]
        decoded.flags.writeable = False
        return decoded

    @property
    def band(self) -> npt.NDArray[np.float32] | None:
        """Weights, or scores, of a windowed site, float32 (H, L, W), read-only; None unless a band was received.

        `band_keys` holds the key of each column in each row.
        """
        if self.band_keys is None or isinstance(self.raw, RawLinks):
            return None
        decoded = as_float32(self.raw)
        decoded.flags.writeable = False
        return decoded

    @property
    def outside(self) -> npt.NDArray[np.bool_] | None:
        """Whether each key is outside each query's window, bool (L, S); None unless a band was received."""
        if self.band_keys is None:
            return None
        outside = np.ones((len(self.query_tokens), len(self.key_tokens)), dtype=np.bool_)
        rows, columns = np.nonzero(self.band_keys >= 0)
        outside[rows, self.band_keys[rows, columns]] = False
        return outside

    def names(self, *texts: str) -> dict[Token, str]:
        """Return the text of each unit, with its position where the text repeats: `append (4)`.

        Args:
            texts: The input text, or both texts of a pair. Positions in a text of several lines are line and column,
                from 1: `append, line 2, column 5`. Otherwise they are `Token.index`.
        """
        return names_of((self.query_tokens, self.key_tokens), texts)

    def links(
        self,
        top: int | None = 10,
        *,
        exclude_special: bool = True,
        head: int | None = None,
        include_self: bool = False,
        exclude_punctuation: bool = True,
    ) -> list[Link]:
        """Return the strongest links, by descending weight; equal weights in the order of head, query and key.

        Args:
            top: Most links to return; None for all with a weight above 0.
            exclude_special: Omit links from and to special tokens.
            head: Number of one head in `heads`; None for all heads.
            include_self: Keep links from a unit to itself, in maps whose rows and columns are the same units.
            exclude_punctuation: Omit links from and to units without a letter or digit.

        Raises:
            ValueError: This map has no such head, or holds scores.
        """
        weights, numbers = self._weights_of(head, by_column=True)
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
        kept = (places >= 0) & ~columns_out[places]
        kept[rows_out, :] = False
        if not include_self and self.query_axis == self.key_axis:
            rows = np.array([token.index for token in self.query_tokens], dtype=np.int64)
            columns = np.array([token.index for token in self.key_tokens], dtype=np.int64)
            kept &= rows[:, None] != columns[places]
        flat = np.where(kept, weights, 0.0).ravel()
        count = flat.size if top is None else max(0, top)
        order = np.argsort(-flat, kind="stable")[:count]
        found = []
        for place in order[flat[order] > 0]:
            at_head, row, column = np.unravel_index(place, weights.shape)
            query, key = self.query_tokens[row], self.key_tokens[places[row, column]]
            found.append(Link(query.text, key.text, float(flat[place]), numbers[at_head], query, key))
        return found

    def head_weights(self, head: int | None = None) -> npt.NDArray[np.float32]:
        """Return the weights of one head, float32 (L, S).

        Args:
            head: Number of the head in `heads`; None for the mean over this map's heads.

        Raises:
            ValueError: This map has no such head, or holds scores.
        """
        weights, _ = self._weights_of(head)
        return np.asarray(weights[0] if len(weights) == 1 else weights.mean(axis=0), dtype=np.float32)

    def over_spans(
        self, queries: Sequence[Span], keys: Sequence[Span] | None = None, head: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the weights between stretches of the text, such as terms of several words.

        A stretch has the units that it covers, wholly or in part. Its row is the mean of their rows, and its column the
        sum of their columns, as tokens are joined to words.

        Args:
            queries: N stretches, each (start, end) in Unicode code points of the text; of a pair of texts that are on
                one axis, (start, end, segment).
            keys: M stretches of the text of the columns; None for those of `queries`.
            head: Number of one head in `heads`; None for the mean over this map's heads.

        Returns:
            float32 (N, M).

        Raises:
            ValueError: A stretch has no unit in this map; this map has no such head, or holds scores.
        """
        weights = self.head_weights(head)
        rows = covered(self.query_tokens, queries, "queries")
        columns = covered(self.key_tokens, queries if keys is None else keys, "queries" if keys is None else "keys")
        return between(weights, rows, columns)

    def over_patches(self, head: int | None = None) -> list[Panel]:
        """Arrange weights over the patches of an image.

        Args:
            head: Number of one head in `heads`; None for the mean over this map's heads.

        Returns:
            A panel for each query, with its weights over the key patches. If the queries are patches instead, a panel
            for each key. Empty for a map without patches.

        Raises:
            ValueError: This map has no such head, or holds scores.
        """
        weights, tokens, others = self.head_weights(head), self.query_tokens, self.key_tokens
        grid = self.grids.get(self.key_axis)
        if grid is None:
            grid = self.grids.get(self.query_axis)
            weights, tokens, others = weights.T, others, tokens
        if grid is None:
            return []
        return [Panel(token, grid.lay_out(row, others)) for token, row in zip(tokens, weights, strict=True)]

    @property
    def _head_count(self) -> int:
        """H, computed without decoding the weights."""
        if isinstance(self.raw, RawLinks):
            return (len(self.raw.row_offsets) - 1) // len(self.query_tokens) if self.query_tokens else 1
        return int(self.raw.shape[0])

    def _weights_of(
        self, head: int | None, *, by_column: bool = False
    ) -> tuple[npt.NDArray[np.float32], list[int | None]]:
        """Return the weights (H', L, S) of one head or all, and the heads' numbers (None for joined heads).

        With `by_column`, the weights of a band are (H', L, W), in the order of `_places`.
        """
        self._check_weights()
        if head is not None and self.is_joined:
            raise ValueError(f"head {head} is not in this map, whose heads are joined; pass head=None")
        if head is not None and head not in self.heads:
            raise ValueError(f"head {head} is not in this map, which has heads {', '.join(map(str, self.heads))}")
        band = self.band if by_column else None
        weights = self.weights if band is None else np.take_along_axis(band, self._column_order()[None], axis=2)
        if self.is_joined:
            return weights, [None]
        if head is None:
            return weights, list(self.heads)
        at = self.heads.index(head)
        return weights[at : at + 1], [head]

    def _places(self) -> npt.NDArray[np.int64]:
        """Return each column's position among `key_tokens`, (L, S); for a band (L, W), ascending in each row."""
        if self.band_keys is None:
            return np.tile(np.arange(len(self.key_tokens)), (len(self.query_tokens), 1))
        return np.take_along_axis(self.band_keys.astype(np.int64), self._column_order(), axis=1)

    def _column_order(self) -> npt.NDArray[np.int64]:
        """Return the permutation (L, W) that sorts the columns of a band by key."""
        assert self.band_keys is not None
        return np.argsort(self.band_keys, axis=1, kind="stable")

    def _scattered(self, links: RawLinks) -> npt.NDArray[np.float32]:
        heads, rows, columns = self._head_count, len(self.query_tokens), len(self.key_tokens)
        dense = np.zeros((heads * rows, columns), dtype=np.float32)
        places = np.full(max((token.index for token in self.key_tokens), default=-1) + 1, -1, dtype=np.int64)
        places[[token.index for token in self.key_tokens]] = np.arange(columns)
        row_of = np.repeat(np.arange(heads * rows), np.diff(links.row_offsets))
        dense[row_of, places[links.keys]] = as_float32(links.weights)
        dense.flags.writeable = False
        return dense.reshape(heads, rows, columns)
