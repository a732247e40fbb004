"""Runs a graph on the numbers of positions, and reads from it what one site's windows are."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attnserve_server.attention.bands import band_keys
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import WeightAxes, Windows
from attnserve_server.conversion.finders.decomposed_products import Product
from attnserve_server.conversion.learning.bands import SeenBand, fitted
from attnserve_server.conversion.learning.provenance import NotTraced
from attnserve_server.conversion.learning.windows.anchors import BATCHES, Anchors
from attnserve_server.conversion.learning.windows.arrange import arranged
from attnserve_server.conversion.learning.windows.products import Products
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.probe import probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array

_LONGER = (3, 1)
"""How many widths of the band the longest run spans, so that a band is seen to end on both sides."""
_NOTHING = 1e-6
"""What a masked weight may be."""


@dataclass(frozen=True, slots=True)
class _Table:
    """One run: the keys of each query's columns (L, W), its weights (B, H, L, W), and where each query's row is."""

    keys: Array
    weights: Array
    length: int
    block: int
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Study:
    """What is run to learn of one site: names of its query's and value's origins, key, scores and weights."""

    runner: GraphRunner
    sampler: Sampler
    names: Sequence[str]
    axes: WeightAxes
    products: Products
    anchors: Anchors

    def windows(self) -> Windows:
        """What its windows are. Raises NotTraced, or BuildRefused where the graph does not run."""
        tables = [self._table(lengths) for lengths in probe_lengths(self.sampler.signature.symbols)]
        width = tables[0].keys.shape[1]
        symbols = self.sampler.signature.symbols
        for widths in _LONGER if symbols else ():
            with contextlib.suppress(BuildRefused):  # of a graph that takes no sequences as long as that
                tables.append(self._table({symbol: width * widths + at for at, symbol in enumerate(symbols)}))
                break
        orders = {each.order for each in tables}
        if orders != {()} and (not self.anchors.fixed or len(orders) > 1):
            raise NotTraced("its queries change places, and their number is not fixed")
        spec = fitted([SeenBand(each.keys, each.length, each.block) for each in tables], fixed=self.anchors.fixed)
        if spec is None:
            raise NotTraced("its columns stand for keys in no known order")
        for each in tables:
            unnamed = (each.keys >= 0) & (band_keys(spec, len(each.keys), each.length) < 0)
            if (np.abs(each.weights[..., unnamed]) > _NOTHING).any():
                raise NotTraced("a row has weights for one key in two columns")
        causal = not any(_looked_at(each, 1) for each in tables) and any(_looked_at(each, -1) for each in tables)
        return Windows(spec, self.anchors.query, self.anchors.key_extent, orders.pop(), causal)

    def _table(self, lengths: Mapping[str, int]) -> _Table:
        batch = 1 if self.sampler.signature.fixed_batch else BATCHES[0]
        feeds = self.sampler.batch([self.sampler.sequence(lengths, row) for row in range(batch)], lengths)
        found = self.runner.run(feeds, self.names, tap=False)
        queries, keys, key, scores, weights = (found[each] for each in self.names)
        if scores.shape != weights.shape:
            raise NotTraced("its weights have other axes than its scores")
        rows = rows_of(self.products.of_scores, queries, key)
        columns = columns_of(self.products.of_value, 1 - self.products.position, keys, weights)
        axes = self.axes
        rows, columns, own = (arranged(each, axes, batch) for each in (rows, columns, weights))
        if any((each != each[:1, :1]).any() for each in (rows, columns)):
            raise NotTraced("its windows differ from head to head")
        if (rows != rows[..., :1]).any():
            raise NotTraced("the columns of a row belong to several queries")
        places = rows[0, 0, :, 0].astype(np.int64) - 1
        count = _length(self.anchors.query_extent, lengths)
        if sorted(places[places >= 0].tolist()) != list(range(count)):
            raise NotTraced("its rows are not its queries, each once")
        at = np.empty(count, dtype=np.int64)
        at[places[places >= 0]] = np.flatnonzero(places >= 0)
        straight = np.array_equal(at, np.arange(count))
        return _Table(
            keys=columns[0, 0, at].astype(np.int64) - 1,
            weights=own[:, :, at],
            length=_length(self.anchors.key_extent, lengths),
            block=_rows_of_window(axes, weights.shape),
            order=() if straight else tuple(at.tolist()),
        )


def _looked_at(table: _Table, side: int) -> bool:
    """Whether any query looks at a key behind it in the sequence (1), or before it (-1)."""
    beside = (table.keys >= 0) & ((table.keys - np.arange(len(table.keys))[:, np.newaxis]) * side > 0)
    return bool((np.abs(table.weights[..., beside]) > _NOTHING).any())


def _length(extent: str | int, lengths: Mapping[str, int]) -> int:
    return lengths[extent] if isinstance(extent, str) else extent


def _once(origins: Array, term: str, letters: set[str]) -> Array:
    """Positions in the first number along some axes alone, so that a sum over those axes gives them once."""
    once = origins.astype(np.float64)
    for place, letter in enumerate(term):
        if letter in letters:
            rest = [slice(None)] * once.ndim
            rest[place - len(term)] = slice(1, None)
            once[tuple(rest)] = 0
    return once


def rows_of(product: Product, queries: Array, keys: Array) -> Array:
    """The query that each score is of, in the layout of the scores."""
    term, other = product.terms
    summed = {letter for letter in term if letter != "." and letter in other and letter not in product.output}
    rows: Array = np.einsum(product.equation, _once(queries, term, summed), np.ones_like(keys, dtype=np.float64))
    return rows


def columns_of(product: Product, position: int, values: Array, weights: Array) -> Array:
    """The key that each weight multiplies, in the layout of the weights."""
    term, other = product.terms[position], product.terms[1 - position]
    own = {letter for letter in term if letter != "." and letter not in other}
    equation = f"{term},{other}->{other}".replace(".", "...")
    columns: Array = np.einsum(equation, _once(values, term, own), np.ones_like(weights, dtype=np.float64))
    return columns


def _rows_of_window(axes: WeightAxes, shape: tuple[int, ...]) -> int:
    return next(size for factors, size in zip(axes, shape, strict=True) if factors[0].role == "query")
