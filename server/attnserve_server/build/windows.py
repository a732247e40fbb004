"""Learns by running which query each row of a windowed site's weights is, and which key each column stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    windowed = {
        name: site for name, site in sites.items() if site.form == "windowed" and site.probabilities is not None
    }
    settled = dict(sites)
    for name, site in windowed.items():
        assert site.probabilities is not None
        try:
            found = _windows(proto, name, site.probabilities, sampler, work)
            settled[name] = replace(site, windows=found)
        except (NotTraced, BuildRefused) as why:
            reason = f"which keys its windows hold is not known: {why}"
            settled[name] = replace(site, probabilities=None, unavailable_reason=reason)
    return settled


def _windows(proto: onnx.ModelProto, name: str, probabilities: Probabilities, sampler: Sampler, work: Path) -> Windows:
    anchors = _anchors(proto, name, sampler, work / "anchors.onnx")
    model = ir.from_proto(proto)
    values = {value.name: value for node in model.graph for value in node.outputs}
    products = _products(find_sites(model.graph)[name])
    query = Tracer(model.graph, values[anchors.query], "query").trace(products.query)
    key = Tracer(model.graph, values[anchors.key], "key").trace(products.value)
    shown = [products.key, products.scores, products.weights]
    for value in shown:
        if not value.is_graph_output():
            model.graph.outputs.append(value)
    path = work / "provenance.onnx"
    ir.save(model, path)
    runner = Runner(path)
    names = [str(value.name) for value in (query, key, *shown)]
    short, long = probe_lengths(sampler.signature.symbols)
    tables = [_table(runner, sampler, lengths, names, probabilities, products, anchors) for lengths in (short, long)]
    width = tables[0].keys.shape[1]
    longest = {symbol: width * _LONGER + at for at, symbol in enumerate(sampler.signature.symbols)}
    try:
        if longest:
            tables.append(_table(runner, sampler, longest, names, probabilities, products, anchors))
    except BuildRefused:
        pass  # the graph takes no sequences as long as that
    orders = {each.order for each in tables}
    if orders != {()} and (not anchors.fixed or len(orders) > 1):
        raise NotTraced("its queries change places, and their number is not fixed")
    spec = fitted([SeenBand(each.keys, each.length, each.block) for each in tables], fixed=anchors.fixed)
    if spec is None:
        raise NotTraced("its columns stand for keys in no known order")
    for each in tables:
        unnamed = (each.keys >= 0) & (band_keys(spec, len(each.keys), each.length) < 0)
        if (np.abs(each.weights[..., unnamed]) > _NOTHING).any():
            raise NotTraced("a row has weights for one key in two columns")
    return Windows(spec, anchors.query, anchors.key_extent, orders.pop())


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
    values = arranged(value.astype(np.float64), of_vectors, {"batch": batch})
    outputs = arranged(output.astype(np.float64), of_vectors, {"batch": batch})
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


def _anchors(proto: onnx.ModelProto, name: str, sampler: Sampler, path: Path) -> _Anchors:
    """The nearest values before queries and keys that are (B, T, C), with T the length of an axis or fixed."""
    model = ir.from_proto(proto)
    products = _products(find_sites(model.graph)[name])
    found = {role: [each for each in ancestors(value) if each.producer()] for role, value in _traced(products)}
    shapes: dict[str, str] = {}
    for value in {each: None for values in found.values() for each in values}:
        shape = ir.node("Shape", [value], outputs=[ir.val(f"provenance.shape.{len(shapes)}", ir.DataType.INT64)])
        model.graph.append(shape)
        model.graph.outputs.append(shape.outputs[0])
        shapes[str(value.name)] = str(shape.outputs[0].name)
    ir.save(model, path)
    runner = Runner(path)
    lengths = probe_lengths(sampler.signature.symbols)
    batches = (1, 1) if sampler.signature.fixed_batch else _BATCHES
    runs = []
    for each, batch in zip(lengths, batches, strict=True):
        feeds = sampler.batch([sampler.sequence(each, row) for row in range(batch)], each)
        seen = runner.run(feeds, list(shapes.values()), tap=False)
        runs.append((batch, each, {value: tuple(seen[shape].tolist()) for value, shape in shapes.items()}))
    chosen: dict[str, tuple[str, str | int]] = {}
    for role, values in found.items():
        fits = [(str(value.name), extent) for value in values if (extent := _extent(str(value.name), runs)) is not None]
        # One that follows an axis of the inputs before one that is merely of one length.
        fits.sort(key=lambda fit: isinstance(fit[1], int))
        if not fits:
            raise NotTraced(f"nothing that its {role} comes from is a sequence")
        chosen[role] = fits[0]
    if chosen["query"][1] != chosen["key"][1]:
        raise NotTraced("its keys are of another sequence than its queries")
    return _Anchors(chosen["query"][0], chosen["key"][0], chosen["query"][1], chosen["key"][1])


def _traced(products: _Products) -> tuple[tuple[str, ir.Value], tuple[str, ir.Value]]:
    """Keys are told by their values, which stand in the same windows and which the weights multiply."""
    return ("query", products.query), ("key", products.value)


def _extent(
    value: str, runs: Sequence[tuple[int, Mapping[str, int], Mapping[str, tuple[int, ...]]]]
) -> str | int | None:
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


def _table(
    runner: Runner,
    sampler: Sampler,
    lengths: Mapping[str, int],
    names: Sequence[str],
    probabilities: Probabilities,
    products: _Products,
    anchors: _Anchors,
) -> _Table:
    batch = 1 if sampler.signature.fixed_batch else _BATCHES[0]
    feeds = sampler.batch([sampler.sequence(lengths, row) for row in range(batch)], lengths)
    found = runner.run(feeds, names, tap=False)
    queries, keys, key, scores, weights = (found[each] for each in names)
    if scores.shape != weights.shape:
        raise NotTraced("its weights have other axes than its scores")
    rows = _rows(products.of_scores, queries, key)
    columns = _columns(products.of_value, 1 - products.position, keys, weights)
    axes, extents = probabilities.axes, {"batch": batch}
    rows, columns, own = (arranged(each, axes, extents) for each in (rows, columns, weights))
    for each in (rows, columns):
        if (each != each[:1, :1]).any():
            raise NotTraced("its windows differ from head to head")
    if (rows != rows[..., :1]).any():
        raise NotTraced("the columns of a row belong to several queries")
    places = rows[0, 0, :, 0].astype(np.int64) - 1
    count = _length(anchors.query_extent, lengths)
    if sorted(places[places >= 0].tolist()) != list(range(count)):
        raise NotTraced("its rows are not its queries, each once")
    at = np.empty(count, dtype=np.int64)
    at[places[places >= 0]] = np.flatnonzero(places >= 0)
    straight = np.array_equal(at, np.arange(count))
    return _Table(
        keys=columns[0, 0, at].astype(np.int64) - 1,
        weights=own[:, :, at],
        length=_length(anchors.key_extent, lengths),
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


def arranged(array: Array, axes: tuple[tuple[Factor, ...], ...], extents: Mapping[str, int]) -> Array:
    """An array in a graph's layout as (B, H, M, W), M counting the rows of all windows in order.

    Args:
        array: with `axes`, or broadcast to them.
        axes: what each counts.
        extents: of the batch.
    """
    sizes: list[int] = []
    for factors, size in zip(axes, array.shape, strict=True):
        known = [extents["batch"] if factor.role == "batch" else factor.extent for factor in factors]
        rest = size // int(np.prod([each for each in known if each is not None], dtype=int))
        sizes += [rest if each is None else each for each in known]
    roles = [factor.role for each in axes for factor in each]
    order = sorted(range(len(roles)), key=lambda place: _ORDER[roles[place]])
    apart = array.reshape(sizes).transpose(order)
    heads = int(np.prod([size for size, role in zip(sizes, roles, strict=True) if role == "head"], dtype=int))
    return apart.reshape(extents["batch"], heads, -1, apart.shape[-1])


def _rows_of_window(axes: tuple[tuple[Factor, ...], ...], shape: tuple[int, ...]) -> int:
    return next(size for factors, size in zip(axes, shape, strict=True) if factors[0].role == "query")
