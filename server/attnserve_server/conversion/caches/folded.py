"""Take heads out of the batch axis of a cache, as BLOOM's has them: (B * H, D, P) becomes (B, H, D, P)."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.caches.finding import FoundPast
from attnserve_server.conversion.graphs.nodes import NodeBuilder, typed
from attnserve_server.conversion.graphs.walk import (
    constant_ints,
    dimension_of,
    input_of,
    permutation_of,
    producer_of,
    rank_of,
)

_PREFIX = "attnserve/heads/"


def folded_heads(past: FoundPast, batched: ir.Value) -> int:
    """Return how many heads axis 0 of a cache carries beside the batch; 0 where it is the batch alone.

    Args:
        past: one tensor of the cache.
        batched: an input whose axis 0 is the batch.

    Raises:
        BuildRefused: the axis carries heads, and their number is not in the graph.
    """
    shape = past.value.shape
    if shape is None or len(shape) != 3 or batched.shape is None or shape[0] == batched.shape[0]:
        return 0
    for use in past.uses:
        new = input_of(use.node, 1) if use.joined_axis is not None else None
        fold = producer_of(new, "Reshape")
        before = input_of(fold, 0) if fold is not None else None
        if rank_of(before) == 4 and (heads := _size_of(before, 1)):
            return heads
    raise BuildRefused(
        f"axis 0 of input {past.value.name!r} is {shape[0]}, not the batch, and the number of heads in it is not in "
        "the graph: export the file with a cache whose first axis is the batch"
    )


def _size_of(value: ir.Value | None, axis: int) -> int:
    """Return the size of an axis, as inferred, or as the Reshape behind it states; 0 where neither does."""
    while (known := dimension_of(value, axis)) is None:
        node = producer_of(value, "Transpose", "Reshape")
        if node is None:
            return 0
        if node.op_type == "Reshape":
            parts = producer_of(input_of(node, 1), "Concat")
            sizes = [constant_ints(part) for part in parts.inputs] if parts is not None else []
            stated = sizes[axis] if axis < len(sizes) else None
            return stated[0] if stated is not None and len(stated) == 1 and stated[0] > 0 else 0
        value, axis = input_of(node, 0), (permutation_of(node) or [0])[axis]
    return known


def with_batch_first(graph: ir.Graph, present: ir.Value, heads: int) -> None:
    """Give an output of the cache (B, H, ...) under its name, in the place of (B * H, ...)."""
    node, name, kind = present.producer(), present.name, present.dtype
    assert node is not None
    assert present.shape is not None
    build = NodeBuilder(graph, f"{_PREFIX}{name}/")
    shape = build.op("Concat", [build.ints(-1, heads), build.shape(present, 1, 3)], axis=0)
    apart = typed(build.op("Reshape", [present, shape]), kind, [None, heads, *list(present.shape)[1:]])
    build.place_after(node)
    graph.outputs[list(graph.outputs).index(present)] = apart
    present.name = f"{_PREFIX}{name}/folded"
    apart.name = name


def unfold(graph: ir.Graph, pasts: Sequence[FoundPast]) -> None:
    """Take the heads out of axis 0 of the inputs and outputs of a cache, where it carries heads.

    Args:
        graph: is changed.
        pasts: of the graph. They hold the old inputs then.

    Raises:
        BuildRefused: as `folded_heads`.
    """
    names = {past.value.name for past in pasts}
    batched = next((value for value in graph.inputs if value.name not in names and value.shape is not None), None)
    for past in pasts:
        heads = folded_heads(past, batched) if batched is not None else 0
        if not heads:
            continue
        assert batched is not None
        assert batched.shape is not None
        assert past.value.shape is not None
        name, sizes = past.value.name, list(past.value.shape)[1:]
        apart = typed(ir.val(str(name)), past.value.dtype, [batched.shape[0], heads, *sizes])
        build = NodeBuilder(graph, f"{_PREFIX}{name}/")
        shape = build.op("Concat", [build.ints(-1), build.shape(apart, 2, 4)], axis=0)
        folded = typed(build.op("Reshape", [apart, shape]), past.value.dtype, list(past.value.shape))
        first = next(iter(graph))
        build.place_before(first)
        past.value.replace_all_uses_with(folded)
        graph.inputs[list(graph.inputs).index(past.value)] = apart
        if past.present is not None:
            with_batch_first(graph, past.present, heads)
