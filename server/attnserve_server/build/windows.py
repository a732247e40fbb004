"""Learns by running which query each row of a windowed site's weights is, and which key each column stands for."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from attnserve_server.attention.bands import band_keys
from attnserve_server.build.bands import SeenBand, fitted
from attnserve_server.build.errors import BuildRefused
from attnserve_server.build.feeds import Sampler
from attnserve_server.build.finders import find_sites
from attnserve_server.build.finders.decomposed_products import Product
from attnserve_server.build.probe import Axes, probe_lengths
from attnserve_server.build.provenance import NotTraced, Tracer, ancestors
from attnserve_server.build.runtime import Runner
from attnserve_server.build.sites import Factor, FoundSite, Probabilities, Windows
from attnserve_server.domain.values import Array

_ORDER = {"batch": 0, "head": 1, "one": 2, "window": 3, "query": 4, "key": 5}
_BATCHES = (2, 3)
_LONGER = 3
"""How many widths of the band the longest run spans, so that a band is seen to end on both sides."""
_NOTHING = 1e-6
"""What a masked weight may be."""


@dataclass(frozen=True, slots=True)
class _Anchors:
    """Names of the values whose vectors are the positions of queries and of keys, and the symbols of their axes."""

    query: str
    key: str
    query_extent: str | int
    key_extent: str | int

    @property
    def fixed(self) -> bool:
        return isinstance(self.query_extent, int) and isinstance(self.key_extent, int)


def with_windows(
    proto: onnx.ModelProto, sites: Mapping[str, FoundSite], sampler: Sampler, work: Path
) -> dict[str, FoundSite]:
    """The sites, the windowed ones of the graph's own weights with what their windows are, or why that is not known.

    Args:
        proto: the source.
        sites: of a copy of it, with the axes of their probabilities.
        sampler: makes sequences for it.
        work: a folder for files.
    """
    settled = dict(sites)
    windowed = {name: site.probabilities for name, site in sites.items() if site.form == "windowed"}
    found: dict[str, Windows | NotTraced] = {}
    own = {name: probabilities for name, probabilities in windowed.items() if probabilities is not None}
    if own:
        found = _windows(proto, own, sampler, work)
    for name, each in found.items():
        if isinstance(each, Windows):
            settled[name] = replace(sites[name], windows=each)
            continue
        reason = f"which keys its windows hold is not known: {each}"
        settled[name] = replace(sites[name], probabilities=None, unavailable_reason=reason)
    return settled


def _windows(
    proto: onnx.ModelProto, own: Mapping[str, Probabilities], sampler: Sampler, work: Path
) -> dict[str, Windows | NotTraced]:
    """All sites of a graph in one copy of it, since graphs are large."""
    found: dict[str, Windows | NotTraced] = {}
    anchors: dict[str, _Anchors] = {}
    for name, anchor in _anchors(proto, own, sampler, work / "anchors.onnx").items():
        if isinstance(anchor, NotTraced):
            found[name] = anchor
        else:
            anchors[name] = anchor
    model = ir.from_proto(proto)
    values = {value.name: value for node in model.graph for value in node.outputs}
    sites = find_sites(model.graph)
    traced: dict[str, tuple[_Products, list[str]]] = {}
    for number, (name, anchor) in enumerate(anchors.items()):
        products = _products(sites[name])
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
    runner = Runner(path)
    for name, (products, names) in traced.items():
        study = _Study(runner, sampler, names, own[name], products, anchors[name])
        try:
            found[name] = study.windows()
        except (NotTraced, BuildRefused) as why:
            found[name] = NotTraced(str(why))
    return found


def with_key_axes(axes: Axes, sites: Mapping[str, FoundSite]) -> Axes:
    """The axes with those that the keys of windowed sites are on: their weights have columns of a band instead."""
    keys = {name: site.windows.key for name, site in sites.items() if site.windows is not None}
    banded = {name: (axes.sites[name][0], key) for name, key in keys.items() if name in axes.sites}
    return replace(axes, sites={**axes.sites, **banded}, causal_sites=axes.causal_sites - set(banded))


def band_error(windows: Windows, probabilities: Probabilities, weights: Array, value: Array, output: Array) -> float:
    """How far weights @ value, over the keys that the band names, are from the site's own output.

    And how far the values of one key are from each other in the windows that it is in: were a column to stand for
    another key than its band says, they would differ. In parts of the greatest value, where that is beyond 1.

    Args:
        windows: of the site.
        probabilities: with the factors of its axes.
        weights: (B, H, L, W).
        value: as the graph has it, window by window.
        output: likewise, the product of the graph's own weights with it.
    """
    batch, _, queries, width = weights.shape
    of_vectors = (*probabilities.axes[:-2], (Factor("query"),), (Factor("key"),))
    values = arranged(value.astype(np.float64), of_vectors, batch)
    outputs = arranged(output.astype(np.float64), of_vectors, batch)
    count = values.shape[2] // width
    at = np.array(windows.order or range(queries))
    window_of = at // (outputs.shape[2] // count)
    seen = values.reshape(*values.shape[:2], count, width, -1)[:, :, window_of]
    error = np.abs(np.nan_to_num(np.einsum("bhqw,bhqwd->bhqd", weights, seen) - outputs[:, :, at])).max(initial=0.0)
    keys = band_keys(windows.band, queries, queries)
    rows, columns = np.nonzero(keys >= 0)
    named = seen[:, :, rows, columns]
    of_key = np.zeros((*values.shape[:2], queries, values.shape[-1]))
    of_key[:, :, keys[rows, columns]] = named
    apart = np.abs(named - of_key[:, :, keys[rows, columns]]).max(initial=0.0)
    return float(max(error, apart)) / max(1.0, float(np.abs(values).max(initial=0.0)))


@dataclass(frozen=True, slots=True)
class _Products:
    """The values that a site's scores and its output are the products of."""

    query: ir.Value
    key: ir.Value
    scores: ir.Value
    weights: ir.Value
    value: ir.Value
    of_scores: Product
    of_value: Product
    position: int


def _products(site: FoundSite) -> _Products:
    assert site.probabilities is not None
    assert site.probabilities.product is not None
    of_value = Product.of(site.probabilities.product)
    of_scores = Product.of(site.probabilities.scores[0])
    assert of_value is not None
    if of_scores is None or len(site.probabilities.scores) > 1:
        raise NotTraced("its scores are not one product")
    position = site.probabilities.position
    if position or not of_value.terms[0].endswith("ij") or not of_value.terms[1].endswith("jk"):
        raise NotTraced("its weights and its value are multiplied in no known layout")
    return _Products(
        query=of_scores.operand(0),
        key=of_scores.operand(1),
        scores=of_scores.node.outputs[0],
        weights=site.probabilities.value,
        value=of_value.operand(1 - position),
        of_scores=of_scores,
        of_value=of_value,
        position=position,
    )


def _anchors(
    proto: onnx.ModelProto, names: Collection[str], sampler: Sampler, path: Path
) -> dict[str, _Anchors | NotTraced]:
    """The nearest values before queries and keys that are (B, T, C), with T the length of an axis or fixed."""
    model = ir.from_proto(proto)
    sites = find_sites(model.graph)
    before: dict[str, dict[str, list[str]]] = {}
    shapes: dict[str, str] = {}
    chosen: dict[str, _Anchors | NotTraced] = {}
    for name in names:
        try:
            products = _products(sites[name])
        except NotTraced as why:
            chosen[name] = why
            continue
        before[name] = {}
        for role, value in _traced(products):
            nearest = [each for each in ancestors(value) if each.producer()]
            before[name][role] = [str(each.name) for each in nearest]
            for each in nearest:
                if each.name not in shapes:
                    shape = ir.val(f"provenance.shape.{len(shapes)}", ir.DataType.INT64)
                    model.graph.append(ir.node("Shape", [each], outputs=[shape]))
                    model.graph.outputs.append(shape)
                    shapes[str(each.name)] = str(shape.name)
    if not before:
        return chosen
    ir.save(model, path)
    runner = Runner(path)
    batches = (1, 1) if sampler.signature.fixed_batch else _BATCHES
    runs: list[_Run] = []
    for lengths, batch in zip(probe_lengths(sampler.signature.symbols), batches, strict=True):
        feeds = sampler.batch([sampler.sequence(lengths, row) for row in range(batch)], lengths)
        seen = runner.run(feeds, list(shapes.values()), tap=False)
        runs.append((batch, lengths, {value: tuple(seen[shape].tolist()) for value, shape in shapes.items()}))
    for name, roles in before.items():
        try:
            query, key = (_nearest(role, values, runs) for role, values in roles.items())
        except NotTraced as why:
            chosen[name] = why
            continue
        same = query[1] == key[1]
        other = NotTraced("its keys are of another sequence than its queries")
        chosen[name] = _Anchors(query[0], key[0], query[1], key[1]) if same else other
    return chosen


def _nearest(role: str, values: Sequence[str], runs: Sequence[_Run]) -> tuple[str, str | int]:
    """One that follows an axis of the inputs before one that is merely of one length."""
    fits = [(value, extent) for value in values if (extent := _extent(value, runs)) is not None]
    if not fits:
        raise NotTraced(f"nothing that its {role} comes from is a sequence")
    return min(fits, key=lambda fit: isinstance(fit[1], int))


def _traced(products: _Products) -> tuple[tuple[str, ir.Value], tuple[str, ir.Value]]:
    """Keys are told by their values, which stand in the same windows and which the weights multiply."""
    return ("query", products.query), ("key", products.value)


_Run = tuple[int, Mapping[str, int], Mapping[str, tuple[int, ...]]]
"""A batch, its lengths, and the shapes of values."""


def _extent(value: str, runs: Sequence[_Run]) -> str | int | None:
    """What the second of three axes follows, where the first is the batch."""
    shapes = [shapes[value] for _, _, shapes in runs]
    if any(len(shape) != 3 or shape[0] != batch for shape, (batch, _, _) in zip(shapes, runs, strict=True)):
        return None
    for symbol in runs[0][1]:
        if all(shape[1] == lengths[symbol] for shape, (_, lengths, _) in zip(shapes, runs, strict=True)):
            return symbol
    extents = {shape[1] for shape in shapes}
    return extents.pop() if len(extents) == 1 and max(extents) > 1 else None


@dataclass(frozen=True, slots=True)
class _Table:
    """One run: the keys of each query's columns (L, W), its weights (B, H, L, W), and where each query's row is."""

    keys: Array
    weights: Array
    length: int
    block: int
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Study:
    """What is run to learn of one site: names of its query's and value's origins, key, scores and weights."""

    runner: Runner
    sampler: Sampler
    names: Sequence[str]
    probabilities: Probabilities
    products: _Products
    anchors: _Anchors

    def windows(self) -> Windows:
        """What its windows are. Raises NotTraced, or BuildRefused where the graph does not run."""
        tables = [self._table(lengths) for lengths in probe_lengths(self.sampler.signature.symbols)]
        width = tables[0].keys.shape[1]
        longest = {symbol: width * _LONGER + at for at, symbol in enumerate(self.sampler.signature.symbols)}
        if longest:
            with contextlib.suppress(BuildRefused):  # of a graph that takes no sequences as long as that
                tables.append(self._table(longest))
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
        return Windows(spec, self.anchors.query, self.anchors.key_extent, orders.pop())

    def _table(self, lengths: Mapping[str, int]) -> _Table:
        batch = 1 if self.sampler.signature.fixed_batch else _BATCHES[0]
        feeds = self.sampler.batch([self.sampler.sequence(lengths, row) for row in range(batch)], lengths)
        found = self.runner.run(feeds, self.names, tap=False)
        queries, keys, key, scores, weights = (found[each] for each in self.names)
        if scores.shape != weights.shape:
            raise NotTraced("its weights have other axes than its scores")
        rows = _rows(self.products.of_scores, queries, key)
        columns = _columns(self.products.of_value, 1 - self.products.position, keys, weights)
        axes = self.probabilities.axes
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


def _rows(product: Product, queries: Array, keys: Array) -> Array:
    """The query that each score is of, in the layout of the scores."""
    term, other = product.terms
    summed = {letter for letter in term if letter != "." and letter in other and letter not in product.output}
    rows: Array = np.einsum(product.equation, _once(queries, term, summed), np.ones_like(keys, dtype=np.float64))
    return rows


def _columns(product: Product, position: int, values: Array, weights: Array) -> Array:
    """The key that each weight multiplies, in the layout of the weights."""
    term, other = product.terms[position], product.terms[1 - position]
    own = {letter for letter in term if letter != "." and letter not in other}
    equation = f"{term},{other}->{other}".replace(".", "...")
    columns: Array = np.einsum(equation, _once(values, term, own), np.ones_like(weights, dtype=np.float64))
    return columns


def arranged(array: Array, axes: tuple[tuple[Factor, ...], ...], batch: int) -> Array:
    """An array in a graph's layout as (B, H, M, W), M counting the rows of all windows in order.

    Args:
        array: with `axes`, or broadcast to them.
        axes: what each counts.
        batch: B.
    """
    sizes: list[int] = []
    for factors, size in zip(axes, array.shape, strict=True):
        known = [batch if factor.role == "batch" else factor.extent for factor in factors]
        rest = size // int(np.prod([each for each in known if each is not None], dtype=int))
        sizes += [rest if each is None else each for each in known]
    roles = [factor.role for each in axes for factor in each]
    order = sorted(range(len(roles)), key=lambda place: _ORDER[roles[place]])
    apart = array.reshape(sizes).transpose(order)
    heads = int(np.prod([size for size, role in zip(sizes, roles, strict=True) if role == "head"], dtype=int))
    return apart.reshape(batch, heads, -1, apart.shape[-1])


def _rows_of_window(axes: tuple[tuple[Factor, ...], ...], shape: tuple[int, ...]) -> int:
    return next(size for factors, size in zip(axes, shape, strict=True) if factors[0].role == "query")
