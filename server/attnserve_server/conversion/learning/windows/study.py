"""Reads from a run on the numbers of positions which query each row of windowed weights is, and which key each column.

The graph pads, cuts and repeats vectors on the way from a sequence (B, T, C) to the operands of its products.
`provenance.Tracer` adds the same nodes once more, on the numbers 1 to T in place of the vectors. For windows of two
queries that attend to their own block and the block before it, with T = 6:

    positions          1 2 3 4 5 6
    of queries         1 2        3 4        5 6           (window, query); 0 would be padding
    of keys            0 0 1 2    1 2 3 4    3 4 5 6       (window, key)

Each score is the product of a query and a key. In the scores' einsum, the queries' numbers in one channel and ones for
the keys give the query of each score; in the product of weights and value, ones for the weights and the values' numbers
give the key of each weight. Sorted by query, with 0 shown as a dot:

    query 1   . . 1 2      query 3   1 2 3 4      query 5   3 4 5 6
    query 2   . . 1 2      query 4   1 2 3 4      query 6   3 4 5 6

`bands.fitted` puts several such tables into closed form: here a BlockBand of block 2, one block before, none after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from attnserve_server.attention.bands import band_keys
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import Layout, Untappable, WeightAxes, Windows
from attnserve_server.conversion.finders import find_probabilities
from attnserve_server.conversion.graphs.contraction import Contraction
from attnserve_server.conversion.learning.bands import KeyTable, fitted
from attnserve_server.conversion.learning.products import arranged
from attnserve_server.conversion.learning.provenance import NotTraced, Tracer
from attnserve_server.conversion.learning.windows.anchors import BATCHES, Anchors, Products, anchors_of, products_of
from attnserve_server.conversion.probing.feeds import Lengths, Sampler, probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array

_LONGER = (3, 1)
"""The widths of the band that the longest run spans, so that the band ends on both sides of it."""
_NOTHING = 1e-6
"""The greatest weight of a masked key."""


def windows_of(
    proto: onnx.ModelProto, layouts: Mapping[str, Layout], sampler: Sampler, work: Path
) -> dict[str, Windows | Untappable]:
    """Return the windows of each site whose layout has some, or the reason why they are unknown.

    Args:
        proto: the source.
        layouts: by the site's name.
        sampler: draws sequences for the source.
        work: a folder for files.
    """
    windowed = {name: layout.axes for name, layout in layouts.items() if layout.windowed}
    if not windowed:
        return {}
    found: dict[str, Windows | NotTraced]
    try:
        found = _windows(proto, windowed, sampler, work)
    except BuildRefused as why:  # the graph with the added nodes does not run
        found = {name: NotTraced(str(why)) for name in windowed}
    return {
        name: each if isinstance(each, Windows) else Untappable(f"which keys its windows hold is not known: {each}")
        for name, each in found.items()
    }


def _windows(
    proto: onnx.ModelProto, own: Mapping[str, WeightAxes], sampler: Sampler, work: Path
) -> dict[str, Windows | NotTraced]:
    """Trace and study all sites in one copy of the graph, because graphs are large."""
    found: dict[str, Windows | NotTraced] = {}
    anchors: dict[str, Anchors] = {}
    for name, anchor in anchors_of(proto, own, sampler, work / "anchors.onnx").items():
        if isinstance(anchor, NotTraced):
            found[name] = anchor
        else:
            anchors[name] = anchor
    model = ir.from_proto(proto)
    values = values_of(model.graph)
    sites = find_probabilities(model.graph)
    traced: dict[str, tuple[Products, list[str]]] = {}
    for number, (name, anchor) in enumerate(anchors.items()):
        products = products_of(sites[name])
        try:
            query = Tracer(model.graph, values[anchor.query], f"{number}.query").trace(products.query)
            key = Tracer(model.graph, values[anchor.key], f"{number}.key").trace(products.value)
        except NotTraced as why:
            found[name] = why
            continue
        shown = [products.key, products.scores, products.weights]
        model.graph.outputs.extend(value for value in shown if not value.is_graph_output())
        traced[name] = products, [str(value.name) for value in (query, key, *shown)]
    if not traced:
        return found
    path = work / "provenance.onnx"
    ir.save(model, path)
    runner = GraphRunner(path)
    for name, (products, names) in traced.items():
        study = Study(runner, sampler, names, own[name], products, anchors[name])
        try:
            found[name] = study.windows()
        except (NotTraced, BuildRefused) as why:
            found[name] = NotTraced(str(why))
        except ValueError:  # arrays of shapes that no windows have
            found[name] = NotTraced("its layout is not understood")
    return found


def values_of(graph: ir.Graph) -> dict[str, ir.Value]:
    """Return a graph's inputs and the outputs of its nodes, by name."""
    made = (value for node in graph for value in node.outputs)
    return {str(value.name): value for value in (*graph.inputs, *made)}


@dataclass(frozen=True, slots=True)
class _Table:
    """One run.

    Attributes:
        keys: the key of each column of each query, (L, W); -1 for none.
        weights: sorted by query, (B, H, L, W).
        length: S.
        block: how many queries a window has.
        order: the row of each query, where rows stand in another order; else empty.
    """

    keys: Array
    weights: Array
    length: int
    block: int
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Study:
    """The runs on one site.

    Attributes:
        runner: the graph with the added nodes.
        sampler: draws sequences for it.
        names: of five outputs: the numbers of the site's queries and of its values, its key, scores and weights.
        axes: of its weights.
        products: its two products.
        anchors: where its queries and keys are sequences.
    """

    runner: GraphRunner
    sampler: Sampler
    names: Sequence[str]
    axes: WeightAxes
    products: Products
    anchors: Anchors

    def windows(self) -> Windows:
        """Return the site's windows. Raises NotTraced, or BuildRefused where the graph does not run."""
        tables = [self._table(lengths) for lengths in probe_lengths(self.sampler.signature.symbols)]
        width = tables[0].keys.shape[1]
        symbols = self.sampler.signature.symbols
        for widths in _LONGER if symbols else ():
            with contextlib.suppress(BuildRefused):  # a graph that takes no sequences of that length
                tables.append(self._table({symbol: width * widths + at for at, symbol in enumerate(symbols)}))
                break
        orders = {each.order for each in tables}
        if orders != {()} and (not self.anchors.fixed or len(orders) > 1):
            raise NotTraced("its queries change places, and their number is not fixed")
        spec = fitted([KeyTable(each.keys, each.length, each.block) for each in tables], fixed=self.anchors.fixed)
        if spec is None:
            raise NotTraced("the keys of its columns follow no known pattern")
        for each in tables:
            unnamed = (each.keys >= 0) & (band_keys(spec, len(each.keys), each.length) < 0)
            if (np.abs(each.weights[..., unnamed]) > _NOTHING).any():
                raise NotTraced("a row has weights for one key in two columns")
        causal = not any(_attends(each, 1) for each in tables) and any(_attends(each, -1) for each in tables)
        return Windows(spec, self.anchors.query, self.anchors.key_axis, orders.pop(), causal)

    def _table(self, lengths: Lengths) -> _Table:
        batch = 1 if self.sampler.signature.fixed_batch else BATCHES[0]
        found = self.runner.run(self.sampler.rows(lengths, batch), self.names, tap=False)
        queries, keys, key, scores, weights = (found[each] for each in self.names)
        if scores.shape != weights.shape:
            raise NotTraced("its weights have other axes than its scores")
        rows = rows_of(self.products.of_scores, queries, key)
        columns = columns_of(self.products.of_value, 1 - self.products.position, keys, weights)
        rows, columns, own = (arranged(each, self.axes, batch) for each in (rows, columns, weights))
        if any((each != each[:1, :1]).any() for each in (rows, columns)):
            raise NotTraced("its windows differ from head to head")
        if (rows != rows[..., :1]).any():
            raise NotTraced("the columns of a row belong to several queries")
        places = rows[0, 0, :, 0].astype(np.int64) - 1
        count = _length(self.anchors.query_axis, lengths)
        if sorted(places[places >= 0].tolist()) != list(range(count)):
            raise NotTraced("its rows are not its queries, each once")
        at = np.empty(count, dtype=np.int64)
        at[places[places >= 0]] = np.flatnonzero(places >= 0)
        straight = np.array_equal(at, np.arange(count))
        return _Table(
            keys=columns[0, 0, at].astype(np.int64) - 1,
            weights=own[:, :, at],
            length=_length(self.anchors.key_axis, lengths),
            block=_queries_of_a_window(self.axes, weights.shape),
            order=() if straight else tuple(at.tolist()),
        )


def _attends(table: _Table, side: int) -> bool:
    """Whether any query attends to a key behind it in the sequence (1), or before it (-1)."""
    beside = (table.keys >= 0) & ((table.keys - np.arange(len(table.keys))[:, np.newaxis]) * side > 0)
    return bool((np.abs(table.weights[..., beside]) > _NOTHING).any())


def _length(axis: str | int, lengths: Lengths) -> int:
    return lengths[axis] if isinstance(axis, str) else axis


def _once(numbers: Array, term: str, letters: set[str]) -> Array:
    """Keep the numbers at the first place along some axes and set the others to 0, so that a sum gives them once."""
    once = numbers.astype(np.float64)
    for place, letter in enumerate(term):
        if letter in letters:
            rest = [slice(None)] * once.ndim
            rest[place - len(term)] = slice(1, None)
            once[tuple(rest)] = 0
    return once


def rows_of(product: Contraction, queries: Array, keys: Array) -> Array:
    """Return the number of the query of each score, in the layout of the scores.

    Args:
        product: of queries and keys.
        queries: the numbers of its first operand.
        keys: its second operand, of which only the shape counts.
    """
    term, other = product.letters
    summed = {letter for letter in term if letter != "." and letter in other and letter not in product.output}
    rows: Array = np.einsum(product.equation, _once(queries, term, summed), np.ones_like(keys, dtype=np.float64))
    return rows


def columns_of(product: Contraction, position: int, values: Array, weights: Array) -> Array:
    """Return the number of the key that each weight multiplies, in the layout of the weights.

    Args:
        product: of weights and value.
        position: which operand the value is.
        values: the numbers of the value.
        weights: the other operand, of which only the shape counts.
    """
    term, other = product.letters[position], product.letters[1 - position]
    own = {letter for letter in term if letter != "." and letter not in other}
    equation = f"{term},{other}->{other}".replace(".", "...")
    columns: Array = np.einsum(equation, _once(values, term, own), np.ones_like(weights, dtype=np.float64))
    return columns


def _queries_of_a_window(axes: WeightAxes, shape: tuple[int, ...]) -> int:
    return next(size for factors, size in zip(axes, shape, strict=True) if factors[0].role == "query")
