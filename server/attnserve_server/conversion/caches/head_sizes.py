"""State the sizes of a cache's heads where the file names them only, as in `kv_cache_dim`: `state_sizes`.

A cache is the inputs that hold the keys and values of a decoder's earlier positions. A size that no node implies keeps
its name; nothing here raises.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from attnserve_server.conversion.caches.finding import FoundPast, Use
from attnserve_server.conversion.finders.microsoft_group_query import head_dim_of
from attnserve_server.conversion.finders.operator_nodes import NotTappable, heads_of
from attnserve_server.conversion.graphs.walk import dimension_of


def state_sizes(pasts: Sequence[FoundPast]) -> bool:
    """Replace the symbols of a cache's heads by numbers, on its inputs and outputs, where the graph implies them.

    Args:
        pasts: of a graph, which is changed.

    Returns:
        Whether any was replaced.
    """
    stated = False
    for past in pasts:
        for use in past.uses:
            for axis, size in _implied(use).items():
                if past.value.shape is not None and not isinstance(past.value.shape[axis], int):
                    stated = True
                    for value in (past.value, past.present):
                        if value is not None and value.shape is not None:
                            value.shape = ir.Shape(
                                [size if place == axis else each for place, each in enumerate(value.shape)]
                            )
    return stated


def _implied(use: Use) -> dict[int, int]:
    """Return the sizes that a node implies for the axes of the input, without the batch and the positions."""
    if use.node.op_type == "GroupQueryAttention":
        try:
            heads, kv_heads = heads_of(use.node), heads_of(use.node, "kv_num_heads")
            return {use.order[1]: kv_heads, use.order[3]: head_dim_of(use.node, heads, kv_heads)}
        except NotTappable:
            return {}
    if use.joined_axis is None or use.present_index is not None:
        return {}
    new = use.node.inputs[1] if len(use.node.inputs) > 1 else None
    sizes = {axis: dimension_of(new, place) for place, axis in enumerate(use.order)}
    return {axis: size for axis, size in sizes.items() if size is not None and axis not in {0, use.joined_axis}}
