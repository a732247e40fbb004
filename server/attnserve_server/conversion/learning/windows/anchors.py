"""Finds where a windowed site's queries and keys were still sequences: the nearest values that are (B, T, C)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from attnserve_server.conversion.finders import find_probabilities
from attnserve_server.conversion.learning.provenance import NotTraced, ancestors
from attnserve_server.conversion.learning.windows.products import Products, products_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.probe import probe_lengths
from attnserve_server.conversion.probing.runtime import GraphRunner

BATCHES = (2, 3)
"""Of the runs that tell the batch from what else there may be two or three of."""


@dataclass(frozen=True, slots=True)
class Anchors:
    """Names of the values whose vectors are the positions of queries and of keys, and the symbols of their axes."""

    query: str
    key: str
    query_extent: str | int
    key_extent: str | int

    @property
    def fixed(self) -> bool:
        """Whether there are as many queries and keys at any lengths."""
        return isinstance(self.query_extent, int) and isinstance(self.key_extent, int)


Anchor = tuple[str, str | int]
"""A value's name, and the symbol of its second axis or how long that is."""


def anchors_of(
    proto: onnx.ModelProto, names: Collection[str], sampler: Sampler, path: Path
) -> dict[str, Anchors | NotTraced]:
    """The nearest values before queries and keys that are (B, T, C), with T the length of an axis or fixed."""
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
    """The anchor of each site's `query` and `key`, or why there is none; one reason where its products are unknown."""
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
        for role, value in _traced(products):
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
        feeds = sampler.batch([sampler.sequence(lengths, row) for row in range(batch)], lengths)
        seen = runner.run(feeds, list(shapes.values()), tap=False)
        runs.append((batch, lengths, {value: tuple(seen[shape].tolist()) for value, shape in shapes.items()}))
    for name, roles in before.items():
        chosen[name] = {role: _nearest(role, values, runs) for role, values in roles.items()}
    return chosen


def _nearest(role: str, values: Sequence[str], runs: Sequence[_Run]) -> Anchor | NotTraced:
    """One that follows an axis of the inputs before one that is merely of one length."""
    fits = [(value, extent) for value in values if (extent := _extent(value, runs)) is not None]
    if not fits:
        return NotTraced(f"nothing that its {role} comes from is a sequence")
    return min(fits, key=lambda fit: isinstance(fit[1], int))


def _traced(products: Products) -> tuple[tuple[str, ir.Value], tuple[str, ir.Value]]:
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
