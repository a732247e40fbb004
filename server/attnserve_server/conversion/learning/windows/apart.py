"""Tells windows from heads, which look alike where lengths are fixed: as many of either at any length.

Every head has the same positions of the sequence, each window has its own. So the numbers of the positions are sent
through the graph in the place of its vectors, as `provenance` does it, and compared along the axis that counts heads or
windows. Where no value is a sequence, the numbers of channels are: what has channels of its own is a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import Factor, Layout, Probabilities, Untappable, WeightAxes, heads_in
from attnserve_server.conversion.finders import find_probabilities
from attnserve_server.conversion.finders.decomposed_products import Product
from attnserve_server.conversion.learning.provenance import NotTraced, Tracer, ancestors, channels_of
from attnserve_server.conversion.learning.windows.anchors import BATCHES, Anchor, sides_of
from attnserve_server.conversion.learning.windows.settle import values_of
from attnserve_server.conversion.learning.windows.study import columns_of, rows_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.probe import probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array

Role = Literal["head", "window"]
_FOLDING = {"Reshape", "Flatten", "Concat", "Split", "SpaceToDepth", "DepthToSpace", "Gather", "GatherND", "Slice"}
_UNTOLD = "whether its weights are of heads or of windows cannot be told"


def windows_apart(
    proto: onnx.ModelProto, layouts: Mapping[str, Layout], sampler: Sampler, work: Path
) -> dict[str, Layout | Untappable]:
    """Return the layouts that change: what looked like heads and has positions of its own is windows.

    Only ambiguous layouts are examined. `Untappable` is returned for one where heads and windows look the same.

    Args:
        proto: the source.
        layouts: by the site's name.
        sampler: draws sequences for the source.
        work: a folder for files.
    """
    suspects = {name: layout for name, layout in layouts.items() if layout.ambiguous}
    if not suspects:
        return {}
    try:
        followed = _followed(proto, suspects, sampler, work)
    except BuildRefused:  # the graph with what was added to it does not run
        followed = {}
    batch = 1 if sampler.signature.fixed_batch else BATCHES[0]
    changed: dict[str, Layout | Untappable] = {}
    for name, layout in suspects.items():
        numbers = followed.get(name)
        axes = apart(layout.axes, numbers, batch) if numbers is not None else ()
        # Heads that share a projection have the same channels, and so do windows.
        if numbers is None or (axes != layout.axes and not numbers.positions):
            if layout.ambiguous == "all":  # else each sees all keys of a sequence, as heads do
                changed[name] = Untappable(_UNTOLD)
        elif axes != layout.axes:
            changed[name] = replace(layout, axes=axes, kv_heads=heads_in(axes))
    return changed


@dataclass(frozen=True, slots=True)
class Followed:
    """Numbers in the layout of a site's weights: of each weight's query, of its key, or of both.

    They are numbers of `positions`, or of the first of a head's channels.
    """

    tables: Sequence[Array]
    positions: bool = True


def apart(axes: WeightAxes, followed: Followed, batch: int) -> WeightAxes:
    """The axes, with each factor of heads that has positions of its own called windows, or parted into both.

    Args:
        axes: of the weights.
        followed: what was followed through the graph.
        batch: B.
    """
    own: Role = "window" if followed.positions else "head"
    made: list[list[Factor]] = []
    for place, factors in enumerate(axes):
        made.append([])
        for at, factor in enumerate(factors):
            if factor.role != "head" or factor.extent is None:
                made[-1].append(factor)
                continue
            along = [_along(table, factors, place, at, batch) for table in followed.tables]
            made[-1] += _parted(factor.extent, along, own)
    return tuple(map(tuple, made))


def _along(table: Array, factors: tuple[Factor, ...], place: int, at: int, batch: int) -> Array:
    """A table as (factor, everything else)."""
    known = [batch if factor.role == "batch" else factor.extent for factor in factors]
    rest = table.shape[place] // int(np.prod([each for each in known if each is not None], dtype=int))
    sizes = [rest if each is None else each for each in known]
    front = np.moveaxis(table, place, 0)
    split = front.reshape(*sizes, *front.shape[1:])
    return np.moveaxis(split, at, 0).reshape(sizes[at], -1)


def _parted(extent: int, along: Sequence[Array], own: Role) -> list[Factor]:
    """The fewest that have numbers of their own, which are `own`, before or behind those that share them."""
    shared: Role = "head" if own == "window" else "window"
    for count in (count for count in range(1, extent + 1) if extent % count == 0):
        rest = extent // count
        split = [table.reshape(count, rest, -1) for table in along]
        if all((each == each[:, :1]).all() for each in split):
            return _factors((own, count), (shared, rest))
        split = [table.reshape(rest, count, -1) for table in along]
        if all((each == each[:1]).all() for each in split):
            return _factors((shared, rest), (own, count))
    raise AssertionError("as many as the axis is long explain anything")


def _factors(*counted: tuple[Role, int]) -> list[Factor]:
    return [Factor(role, count) for role, count in counted if count > 1] or [Factor("one", 1)]


def _followed(proto: onnx.ModelProto, suspects: Collection[str], sampler: Sampler, work: Path) -> dict[str, Followed]:
    """What was followed to each site, in one copy of the graph; sites to which nothing was are left out."""
    model = ir.from_proto(proto)
    found = find_probabilities(model.graph)
    sides = sides_of(proto, suspects, sampler, work / "sides.onnx")
    traces = {
        name: trace
        for number, name in enumerate(suspects)
        if (trace := _traced(model.graph, found[name], sides[name], str(number))) is not None
    }
    if not traces:
        return {}
    beside = {value.name: value for trace in traces.values() for value in trace.beside}
    model.graph.outputs.extend(value for value in beside.values() if not value.is_graph_output())
    path = work / "apart.onnx"
    ir.save(model, path)
    runner = GraphRunner(path)
    batch = 1 if sampler.signature.fixed_batch else BATCHES[0]
    lengths, _ = probe_lengths(sampler.signature.symbols)
    feeds = sampler.batch([sampler.sequence(lengths, row) for row in range(batch)], lengths)
    fetches = {end for trace in traces.values() for end in trace.ends.values()} | {str(name) for name in beside}
    seen = {**feeds, **runner.run(feeds, sorted(fetches - set(feeds)), tap=False)}
    return {name: followed for name, trace in traces.items() if (followed := trace.followed(seen)) is not None}


@dataclass(frozen=True, slots=True)
class _Trace:
    """Outputs of the graph, by side, that number the vectors of a site's queries or of its values."""

    site: Probabilities
    ends: Mapping[str, str]
    positions: bool

    @property
    def beside(self) -> tuple[ir.Value, ...]:
        """What is needed besides: the weights, and the keys that the queries meet."""
        scores = _scores(self.site)
        weights = self.site.weights
        return (weights, scores.operand(1)) if scores is not None and "query" in self.ends else (weights,)

    def followed(self, seen: Mapping[str, Array]) -> Followed | None:
        """The numbers in the layout of the weights; None where they do not fit it."""
        weights, *keys = (seen[str(value.name)] for value in self.beside)
        tables: list[Array] = []
        scores, (product, position) = _scores(self.site), _product(self.site)
        if scores is not None and keys:
            tables.append(rows_of(scores, seen[self.ends["query"]], keys[0]))
        if "value" in self.ends:
            tables.append(columns_of(product, 1 - position, seen[self.ends["value"]], weights))
        fit = all(table.shape == weights.shape for table in tables)
        return Followed(tables, self.positions) if fit else None


def _scores(site: Probabilities) -> Product | None:
    """The product of queries and keys; None where there are several, whose rows need not be the same."""
    return Product.of(site.scores[0]) if len(site.scores) == 1 else None


def _product(site: Probabilities) -> tuple[Product, int]:
    """The product of weights and value, and which of its operands the weights are."""
    product = Product.of(site.product)
    assert product is not None
    return product, site.position


def _traced(
    graph: ir.Graph, site: Probabilities, sides: NotTraced | Mapping[str, Anchor | NotTraced], label: str
) -> _Trace | None:
    """Positions of queries and values where they can be followed, else channels of the queries, or of the values."""
    values = values_of(graph)
    scores, (product, position) = _scores(site), _product(site)
    starts = {"query": scores.operand(0)} if scores is not None else {}
    starts["value"] = product.operand(1 - position)
    anchors = {} if isinstance(sides, NotTraced) else {"query": sides["query"], "value": sides["key"]}
    ends: dict[str, str] = {}
    for side, start in starts.items():
        anchor = anchors.get(side)
        if anchor is not None and not isinstance(anchor, NotTraced):
            with contextlib.suppress(NotTraced):
                ends[side] = str(Tracer(graph, values[anchor[0]], f"{label}.{side}").trace(start).name)
    if ends:
        return _Trace(site, ends, positions=True)
    for side, start in starts.items():
        channels = channels_of(start)
        if channels is not None:
            with contextlib.suppress(NotTraced):
                end = Tracer(graph, channels[0], f"{label}.{side}.channels", channels[1]).trace(start)
                return _Trace(site, {side: str(end.name)}, positions=False)
    # An axis of the inputs that nothing folds or parts is no windows over another axis.
    return _Trace(site, {}, positions=True) if all(map(_is_an_input, starts.values())) else None


def _is_an_input(value: ir.Value) -> bool:
    """Whether a value is a constant, or an input of the graph whose axes are at most turned on the way."""
    nodes = [each.producer() for each in ancestors(value)]
    return not any(node is not None and node.op_type in _FOLDING for node in nodes)
