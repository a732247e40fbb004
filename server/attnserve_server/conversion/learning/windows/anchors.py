"""Finds where the queries and keys of a windowed site are still sequences: the nearest earlier values (B, T, C).

A site is a place in a graph that computes attention. It is windowed if each of its queries has a few keys. A missing
anchor is a `NotTraced`, returned with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.sites import Probabilities
from attnserve_server.conversion.finders import find_probabilities
from attnserve_server.conversion.graphs.contraction import Contraction
from attnserve_server.conversion.learning.layout import product_of
from attnserve_server.conversion.learning.provenance import NotTraced, ancestors
from attnserve_server.conversion.probing.feeds import Lengths, Sampler, probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner

BATCHES = (2, 3)
"""Of the two runs that distinguish the batch from other axes of two or three."""


@dataclass(frozen=True, slots=True)
class Products:
    """The two products of a site: `scores` = `query` @ `key`, and `weights` @ `value`.

    `position` is the operand of `of_value` that the weights are.
    """

    query: ir.Value
    key: ir.Value
    scores: ir.Value
    weights: ir.Value
    value: ir.Value
    of_scores: Contraction
    of_value: Contraction
    position: int


def products_of(site: Probabilities) -> Products:
    """Return the two products of a site.

    Raises:
        NotTraced: the scores are not one product, or weights and value are not multiplied as (..., L, W) @ (..., W, D).
    """
    of_value, of_scores = product_of(site), Contraction.of(site.scores[0])
    if of_scores is None or len(site.scores) > 1:
        raise NotTraced("its scores are not one product")
    position = site.position
    if position or not of_value.letters[0].endswith("ij") or not of_value.letters[1].endswith("jk"):
        raise NotTraced("its weights and its value are multiplied in no known layout")
    return Products(
        query=of_scores.operand(0),
        key=of_scores.operand(1),
        scores=of_scores.node.outputs[0],
        weights=site.weights,
        value=of_value.operand(1 - position),
        of_scores=of_scores,
        of_value=of_value,
        position=position,
    )


@dataclass(frozen=True, slots=True)
class Anchors:
    """The values whose vectors are the positions of queries and of keys, by name, and the axes of these positions.

    An axis is its symbol, or its fixed length.
    """

    query: str
    key: str
    query_axis: str | int
    key_axis: str | int

    @property
    def fixed(self) -> bool:
        """Whether the numbers of queries and keys are fixed."""
        return isinstance(self.query_axis, int) and isinstance(self.key_axis, int)


Anchor = tuple[str, str | int]
"""A value's name, and the symbol or fixed length of its second axis."""


def anchors_of(
    proto: onnx.ModelProto, names: Collection[str], sampler: Sampler, path: Path
) -> dict[str, Anchors | NotTraced]:
    """Return the anchors of both sides of each site, or the reason why one is missing or they differ.

    Args:
        proto: the graph.
        names: of sites whose weights the graph has as a value.
        sampler: draws sequences for the graph.
        path: of a file that is written.

    Raises:
        BuildRefused: the graph does not run.
    """
    chosen: dict[str, Anchors | NotTraced] = {}
    for name, sides in sides_of(proto, names, sampler, path).items():
        if isinstance(sides, NotTraced):
            chosen[name] = sides
            continue
        query, key = sides["query"], sides["key"]
        if isinstance(query, NotTraced):
            chosen[name] = query
        elif isinstance(key, NotTraced):
            chosen[name] = key
        elif query[1] != key[1]:
            chosen[name] = NotTraced("its keys are of another sequence than its queries")
        else:
            chosen[name] = Anchors(query[0], key[0], query[1], key[1])
    return chosen


def sides_of(
    proto: onnx.ModelProto, names: Collection[str], sampler: Sampler, path: Path
) -> dict[str, NotTraced | dict[str, Anchor | NotTraced]]:
    """Return the anchor of each site's `query` and `key`, or the reason why there is none.

    A site whose products are unknown has one reason for both sides. Arguments are those of `anchors_of`.
    """
    model = ir.from_proto(proto)
    sites = find_probabilities(model.graph)
    before: dict[str, dict[str, list[str]]] = {}
    shapes: dict[str, str] = {}
    chosen: dict[str, NotTraced | dict[str, Anchor | NotTraced]] = {}
    for name in names:
        try:
            products = products_of(sites[name])
        except NotTraced as why:
            chosen[name] = why
            continue
        before[name] = {}
        # Keys are traced from the values, which stand in the same windows and which the weights multiply.
        for role, value in (("query", products.query), ("key", products.value)):
            nearest = [each for each in ancestors(value) if each.producer() or each.is_graph_input()]
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
    runner = GraphRunner(path)
    batches = (1, 1) if sampler.signature.fixed_batch else BATCHES
    runs: list[_Run] = []
    for lengths, batch in zip(probe_lengths(sampler.signature.symbols), batches, strict=True):
        found = runner.run(sampler.rows(lengths, batch), list(shapes.values()), tap=False)
        runs.append((batch, lengths, {value: tuple(found[shape].tolist()) for value, shape in shapes.items()}))
    for name, roles in before.items():
        chosen[name] = {role: _nearest(role, values, runs) for role, values in roles.items()}
    return chosen


_Run = tuple[int, Lengths, Mapping[str, tuple[int, ...]]]
"""A batch, its lengths, and the shapes of values."""


def _nearest(role: str, values: Sequence[str], runs: Sequence[_Run]) -> Anchor | NotTraced:
    """Return the first value whose second axis follows an input's axis, else the first of a fixed length."""
    fits = [(value, axis) for value in values if (axis := _axis(value, runs)) is not None]
    if not fits:
        return NotTraced(f"nothing that its {role} comes from is a sequence")
    return min(fits, key=lambda fit: isinstance(fit[1], int))


def _axis(value: str, runs: Sequence[_Run]) -> str | int | None:
    """Return the second axis of a value (B, T, C), as a symbol or a fixed length above 1; None for other values."""
    shapes = [shapes[value] for _, _, shapes in runs]
    if any(len(shape) != 3 or shape[0] != batch for shape, (batch, _, _) in zip(shapes, runs, strict=True)):
        return None
    for symbol in runs[0][1]:
        if all(shape[1] == lengths[symbol] for shape, (_, lengths, _) in zip(shapes, runs, strict=True)):
            return symbol
    lengths = {shape[1] for shape in shapes}
    return lengths.pop() if len(lengths) == 1 and max(lengths) > 1 else None
