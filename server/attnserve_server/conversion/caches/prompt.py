"""Specialise a decoder's graph at an empty past: `without_past` removes the inputs of its cache.

Concat(past, new) becomes new, an operator's past is left out, and the size of the past is 0. The graph then computes
whole sequences, and its outputs of the cache have the keys and values of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.caches.finding import FoundPast, Use
from attnserve_server.conversion.caches.folded import folded_heads, with_batch_first
from attnserve_server.conversion.graphs.nodes import NodeBuilder, remove_unused_initializers, replace_node
from attnserve_server.conversion.graphs.walk import constant_ints, input_of

_PREFIX = "attnserve/prompt/"
_WINDOWED_CACHE = "sliding_window_cache"
"""An attribute of GroupQueryAttention: its cache holds the last window alone, and it refuses to run without one. Of a
whole sequence, `local_window_size` states the same window."""


def without_past(model: ir.Model, pasts: Sequence[FoundPast]) -> None:
    """Remove the inputs of a cache from a graph, as an empty past allows.

    Args:
        model: is changed.
        pasts: its inputs that hold a cache, each with its uses and the output that continues it, from `find_pasts`.

    Raises:
        BuildRefused: the graph has no input but its cache, a size of the past that it needs is not known, or axis 0 of
            a past carries heads beside the batch, whose number is not in the graph.
    """
    graph = model.graph
    names = {past.value.name for past in pasts}
    batched = next((value for value in graph.inputs if value.name not in names and value.shape is not None), None)
    if batched is None:
        raise BuildRefused("the graph has no input but its cache: it has no ids to compute keys and values from")
    presents = {past.present.name: folded_heads(past, batched) for past in pasts if past.present is not None}
    for past in pasts:
        heads = folded_heads(past, batched)
        for use in past.uses:
            if use.node.op_type == "Shape":
                _size(graph, past, use, batched, heads)
            elif use.node.op_type == "Concat":
                _unjoin(graph, use)
            else:
                use.node.replace_input_with(use.index, None)
                use.node.attributes.pop(_WINDOWED_CACHE, None)
    RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.outputs if presents.get(value.name)]:
        with_batch_first(graph, value, presents[value.name])
    for past in pasts:
        graph.inputs.remove(past.value)
    remove_unused_initializers(graph)


def _unjoin(graph: ir.Graph, use: Use) -> None:
    """Take the past out of a Concat; a Concat of one value is removed."""
    node = use.node
    left = [value for at, value in enumerate(node.inputs) if at != use.index]
    if len(left) > 1:
        for at, value in enumerate(left):
            node.replace_input_with(at, value)
        node.resize_inputs(len(left))
        return
    [new], output = left, node.outputs[0]
    assert new is not None
    for user, index in output.uses():
        user.replace_input_with(index, new)
    if output.is_graph_output():
        build = NodeBuilder(graph, f"{_PREFIX}{output.name}/")
        same = build.op("Identity", [new])
        build.place_after(node)
        replace_node(node, same)


def _size(graph: ir.Graph, past: FoundPast, use: Use, batched: ir.Value, heads: int) -> None:
    """Replace the sizes of an empty past, which are 0 on the axis of positions, where nodes take them."""
    node = use.node
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", len(use.order))
    axes = list(use.order)[start:end]
    build = NodeBuilder(graph, f"{_PREFIX}{past.value.name}/{node.name}/")
    for user, index in node.outputs[0].uses():
        chosen = constant_ints(input_of(user, 1)) if user.op_type == "Gather" and index == 0 else None
        if chosen is None or len(chosen) != 1 or axes[chosen[0]] != past.axis:
            continue
        picked = input_of(user, 1)
        assert picked is not None
        scalar = picked.shape is not None and len(picked.shape) == 0
        user.outputs[0].replace_all_uses_with(build.scalar(0) if scalar else build.ints(0))
    if not node.outputs[0].uses():
        return
    parts = [_extent(build, past, axis, batched, heads) for axis in axes]
    whole = parts[0] if len(parts) == 1 else build.op("Concat", parts, axis=0)
    build.place_before(node)
    node.outputs[0].replace_all_uses_with(whole)


def _extent(build: NodeBuilder, past: FoundPast, axis: int, batched: ir.Value, heads: int) -> ir.Value:
    """Return the size of one axis of an empty past, int64 of rank 1."""
    if axis == past.axis:
        return build.ints(0)
    if axis == 0:
        rows = build.shape(batched, 0, 1)
        return build.op("Mul", [rows, build.ints(heads)]) if heads else rows
    size = past.value.shape[axis] if past.value.shape is not None else None
    if not isinstance(size, int):
        raise BuildRefused(
            f"input {past.value.name!r}: axis {axis} has no known size, which an empty past needs: export the file "
            "with that size as a number"
        )
    return build.ints(size)
