"""Distinguishes windows from heads where lengths are fixed, because both are then as many at any length.

Every head has the same positions of the sequence; each window has others. So the numbers of the positions go through
the graph in place of its vectors (`provenance`), and are compared along the axis that counts heads or windows. Where no
value is a sequence, the numbers of channels do: each head has other channels. For weights (B, 6, L, S):

    numbers of the queries along the axis of 6    0 0 0 3 3 3    two windows of three heads:  (window, 2), (head, 3)
                                                  0 3 0 3 0 3    three heads of two windows:  (head, 3), (window, 2)
                                                  0 0 0 0 0 0    six heads

A layout that no run distinguishes becomes `Untappable`, with the reason.
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
from attnserve_server.conversion.graphs.contraction import Contraction
from attnserve_server.conversion.learning.layout import product_of
from attnserve_server.conversion.learning.provenance import NotTraced, Tracer, ancestors, channels_of
from attnserve_server.conversion.learning.windows.anchors import BATCHES, Anchor, sides_of
from attnserve_server.conversion.learning.windows.study import columns_of, rows_of, values_of
from attnserve_server.conversion.probing.feeds import Sampler, probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.domain.values import Array

Role = Literal["head", "window"]
_FOLDING = {"Reshape", "Flatten", "Concat", "Split", "SpaceToDepth", "DepthToSpace", "Gather", "GatherND", "Slice"}
_UNKNOWN = "its weights may be of heads or of windows, which no run distinguishes"


def windows_apart(
    proto: onnx.ModelProto, layouts: Mapping[str, Layout], sampler: Sampler, work: Path
) -> dict[str, Layout | Untappable]:
    """Return the layouts that change: axes that look like heads, but differ in their positions, are windows.

    Only ambiguous layouts are examined. One where heads and windows cannot be distinguished becomes `Untappable`.

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
    except BuildRefused:  # the graph with the added nodes does not run
        followed = {}
    batch = 1 if sampler.signature.fixed_batch else BATCHES[0]
    changed: dict[str, Layout | Untappable] = {}
    for name, layout in suspects.items():
        numbers = followed.get(name)
        axes = apart(layout.axes, numbers, batch) if numbers is not None else ()
        # Heads that share a projection have the same channels, and so do windows.
        if numbers is None or (axes != layout.axes and not numbers.positions):
            if layout.ambiguous == "all":  # else each attends to all keys of a sequence, as heads do
                changed[name] = Untappable(_UNKNOWN)
        elif axes != layout.axes:
            changed[name] = replace(layout, axes=axes, kv_heads=heads_in(axes))
    return changed


@dataclass(frozen=True, slots=True)
class Followed:
    """Numbers in the layout of a site's weights: of each weight's query, of its key, or of both.

    They number `positions`; else the channels, of which the first of each head is taken.
    """

    tables: Sequence[Array]
    positions: bool = True


def apart(axes: WeightAxes, followed: Followed, batch: int) -> WeightAxes:
    """Return the axes, with each factor of heads that differs in its positions as windows, or split into both.

    Args:
        axes: of the weights.
        followed: the numbers that were sent through the graph.
        batch: B.
    """
    own: Role = "window" if followed.positions else "head"
    made: list[list[Factor]] = []
    for place, factors in enumerate(axes):
        made.append([])
        for at, factor in enumerate(factors):
            if factor.role != "head" or factor.size is None:
                made[-1].append(factor)
                continue
            along = [_along(table, factors, place, at, batch) for table in followed.tables]
            made[-1] += _split(factor.size, along, own)
    return tuple(map(tuple, made))


def _along(table: Array, factors: tuple[Factor, ...], place: int, at: int, batch: int) -> Array:
    """Return a table as (factor, everything else)."""
    known = [batch if factor.role == "batch" else factor.size for factor in factors]
    rest = table.shape[place] // int(np.prod([each for each in known if each is not None], dtype=int))
    sizes = [rest if each is None else each for each in known]
    front = np.moveaxis(table, place, 0)
    split = front.reshape(*sizes, *front.shape[1:])
    return np.moveaxis(split, at, 0).reshape(sizes[at], -1)


def _split(size: int, along: Sequence[Array], own: Role) -> list[Factor]:
    """Split a factor in two: the fewest that differ in their numbers (`own`), and the rest, which share them."""
    shared: Role = "head" if own == "window" else "window"
    for count in (count for count in range(1, size + 1) if size % count == 0):
        rest = size // count
        split = [table.reshape(count, rest, -1) for table in along]
        if all((each == each[:, :1]).all() for each in split):
            return _factors((own, count), (shared, rest))
        split = [table.reshape(rest, count, -1) for table in along]
        if all((each == each[:1]).all() for each in split):
            return _factors((shared, rest), (own, count))
    raise AssertionError("a factor of the whole size explains any numbers")


def _factors(*counted: tuple[Role, int]) -> list[Factor]:
    return [Factor(role, count) for role, count in counted if count > 1] or [Factor("one", 1)]


def _followed(proto: onnx.ModelProto, suspects: Collection[str], sampler: Sampler, work: Path) -> dict[str, Followed]:
    """Send numbers through one copy of the graph. Sites that none reach are left out."""
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
    feeds = sampler.rows(lengths, batch)
    fetches = {end for trace in traces.values() for end in trace.ends.values()} | {str(name) for name in beside}
    arrays = {**feeds, **runner.run(feeds, sorted(fetches - set(feeds)), tap=False)}
    return {name: followed for name, trace in traces.items() if (followed := trace.followed(arrays)) is not None}


@dataclass(frozen=True, slots=True)
class _Trace:
    """Outputs of the graph that number the vectors of a site's queries (side `query`) or of its values (`value`)."""

    site: Probabilities
    ends: Mapping[str, str]
    positions: bool

    @property
    def beside(self) -> tuple[ir.Value, ...]:
        """The values whose shapes are needed besides: the weights, and the keys that the queries are multiplied by."""
        scores = _score_product(self.site)
        weights = self.site.weights
        return (weights, scores.operand(1)) if scores is not None and "query" in self.ends else (weights,)

    def followed(self, arrays: Mapping[str, Array]) -> Followed | None:
        """Return the numbers in the layout of the weights; None where they do not fit it."""
        weights, *keys = (arrays[str(value.name)] for value in self.beside)
        tables: list[Array] = []
        scores = _score_product(self.site)
        if scores is not None and keys:
            tables.append(rows_of(scores, arrays[self.ends["query"]], keys[0]))
        if "value" in self.ends:
            product = product_of(self.site)
            tables.append(columns_of(product, 1 - self.site.position, arrays[self.ends["value"]], weights))
        fit = all(table.shape == weights.shape for table in tables)
        return Followed(tables, self.positions) if fit else None


def _score_product(site: Probabilities) -> Contraction | None:
    """Return the product of queries and keys; None where there are several, whose rows may differ."""
    return Contraction.of(site.scores[0]) if len(site.scores) == 1 else None


def _traced(
    graph: ir.Graph, site: Probabilities, sides: NotTraced | Mapping[str, Anchor | NotTraced], label: str
) -> _Trace | None:
    """Trace the positions of queries and values; where none can be traced, the channels of either."""
    values = values_of(graph)
    scores = _score_product(site)
    starts = {"query": scores.operand(0)} if scores is not None else {}
    starts["value"] = product_of(site).operand(1 - site.position)
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
    # An axis of the inputs that no node folds or splits is no windows over another axis.
    return _Trace(site, {}, positions=True) if all(map(_is_an_input, starts.values())) else None


def _is_an_input(value: ir.Value) -> bool:
    """Whether a value is a constant, or an input of the graph that is at most transposed on the way."""
    nodes = [each.producer() for each in ancestors(value)]
    return not any(node is not None and node.op_type in _FOLDING for node in nodes)
