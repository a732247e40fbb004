"""Find onnxruntime's `GroupQueryAttention`: grouped heads, rotation, windows, lengths of keys, and a past.

Measured on onnxruntime 1.32's CPU kernels: softcap precedes `attention_bias`. Query i attends to the last
`local_window_size` keys up to and with key i, and to none behind `seqlens_k`. Of `position_ids`, only the first number
counts (findings/group_query_position_ids.sh). `head_sink` (0 with `smooth_softmax` alone) is one more score, after
softcap.

The runtime has two kernels: one runs nodes that return present keys and values and have no softcap, the other runs the
rest (findings/group_query_connected_present.sh). They differ only for a query without a visible key. Such a query has
biases that are all the lowest float32 or below: one kernel gives 0, the other the mean of some values or NaN. Under a
window, queries behind `seqlens_k` are others. A tap, the nodes that return the weights, gives such rows weights of 0.
`q_norm_weight` and quantized caches run on other providers only.

A tap gives the weights under a window as a whole map with zeros outside, because windows of language models are wider
than most texts, and a band of that width would be larger than the map.

With a past, the last of L queries stands at the end that `seqlens_k` states, and the outputs of keys and values have
past and new ones. A node that no tap supports (with a quantized cache or an unknown head size, or in a subgraph) is
yielded as a site (a place in a graph that computes attention) with `Untappable(reason)`. `find` raises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite, Operand, Rotary, Scores, Untappable
from attnserve_server.conversion.finders.operator_nodes import (
    NotTappable,
    attention_bias,
    heads_of,
    last_dimension_of,
    microsoft_nodes,
    refuse_inputs,
    refuse_subgraph,
    refuse_uneven_heads,
    required,
)
from attnserve_server.conversion.graphs.walk import dimension_of, input_of
from attnserve_server.model.bands import SlidingBand

_PRESENT_KEY, _PRESENT_VALUE = 1, 2
_PAST_KEY, _LENGTHS, _COS, _SIN, _POSITIONS, _BIAS, _SINK = 3, 5, 7, 8, 9, 10, 11
_UNKNOWN = {
    12: "k_scale: weights over a quantized cache are not tapped",
    14: "q_norm_weight: normalized heads are not tapped",
    16: "query_seqlens: chunks of a cache are not tapped",
}
_UNKNOWN_BEHIND_PAST = {_POSITIONS: "position_ids beside past_key: rotation by both is not tapped"}


def find(graph: ir.Graph) -> Iterator[FoundSite]:
    """Yield the sites of this operator, those in subgraphs too."""
    return (_site(node, graph) for node in microsoft_nodes(graph, "GroupQueryAttention"))


def _site(node: ir.Node, graph: ir.Graph) -> FoundSite:
    operator = "com.microsoft.GroupQueryAttention-1"
    causal = node.attributes.get_int("causal", 1) == 1
    heads = max(node.attributes.get_int("num_heads", 1), 1)
    kv_heads, head_dim = max(node.attributes.get_int("kv_num_heads", heads), 1), 0
    try:
        heads, kv_heads = heads_of(node), heads_of(node, "kv_num_heads")
        refuse_uneven_heads(heads, kv_heads)
        head_dim = head_dim_of(node, heads, kv_heads)
        refuse_subgraph(node, graph)
        _refuse_unsupported(node)
        query, key, value = _operands(node, heads, kv_heads, head_dim)
        window = max(node.attributes.get_int("local_window_size", -1), 0)
        scores = Scores(
            query=query,
            key=key,
            value=value,
            output=Operand(node.outputs[0], heads, packed=True),
            head_dim=head_dim,
            scale=node.attributes.get_float("scale", 0.0) or 1.0 / math.sqrt(head_dim),
            softcap=node.attributes.get_float("softcap", 0.0),
            causal=causal,
            window=window,
            band=SlidingBand(before=window - 1, after=0) if causal and window else None,
            masks=attention_bias(node, _BIAS, masked_up_to=float(np.finfo(np.float32).min)),
            key_ends=required(node, _LENGTHS, "seqlens_k"),
            behind_past=_has_past(node),
            sink=_sink(node),
        )
    except NotTappable as why:
        return FoundSite(node, operator, heads, kv_heads, head_dim, Untappable(str(why)), causal=causal)
    return FoundSite(
        node, operator, heads, kv_heads, head_dim, scores, form="windowed" if window else "dense", causal=causal
    )


def head_dim_of(node: ir.Node, heads: int, kv_heads: int) -> int:
    """Return the head size of a node with these numbers of heads, from the query, or from the cache.

    Raises:
        NotTappable: neither states it.
    """
    query = required(node, 0, "query")
    width = last_dimension_of(query)
    parts = heads if input_of(node, 1) is not None else heads + 2 * kv_heads
    if width is not None and not width % parts:
        return width // parts
    present = node.outputs[_PRESENT_KEY] if len(node.outputs) > _PRESENT_KEY else None
    for cache in (input_of(node, _PAST_KEY), present):
        if (size := dimension_of(cache, -1)) is not None:
            return size
    raise NotTappable(f"the head size of {query.name!r} is not in the graph")


def _refuse_unsupported(node: ir.Node) -> None:
    if _has_past(node):
        if len(node.outputs) <= _PRESENT_VALUE:
            raise NotTappable("it takes past_key, and returns no keys and values of past and new positions")
        refuse_inputs(node, _UNKNOWN_BEHIND_PAST)
        if node.attributes.get_int("rotary_interleaved", 0):
            raise NotTappable("it takes past_key, whose heads are rotated in neighbouring pairs")
    refuse_inputs(node, _UNKNOWN)


def _has_past(node: ir.Node) -> bool:
    past = input_of(node, _PAST_KEY)
    return past is not None and (past.shape is None or past.shape[2] != 0)


def _sink(node: ir.Node) -> ir.Value | float | None:
    own = input_of(node, _SINK)
    return 0.0 if own is None and node.attributes.get_int("smooth_softmax", 0) == 1 else own


def _operands(node: ir.Node, heads: int, kv_heads: int, head_dim: int) -> tuple[Operand, Operand, Operand]:
    query, key, value = required(node, 0, "query"), input_of(node, 1), input_of(node, 2)
    rotary = _rotary(node)
    if _has_past(node):
        # The outputs that continue the cache have past and new keys, rotated, and all values.
        columns = None if key is not None else (0, heads * head_dim)
        return (
            Operand(query, heads, packed=True, columns=columns, rotary=rotary),
            Operand(node.outputs[_PRESENT_KEY], kv_heads, packed=False),
            Operand(node.outputs[_PRESENT_VALUE], kv_heads, packed=False),
        )
    if key is not None and value is not None:
        return (
            Operand(query, heads, packed=True, rotary=rotary),
            Operand(key, kv_heads, packed=True, rotary=rotary),
            Operand(value, kv_heads, packed=True),
        )
    ends = heads * head_dim, (heads + kv_heads) * head_dim, (heads + 2 * kv_heads) * head_dim
    return (
        Operand(query, heads, packed=True, columns=(0, ends[0]), rotary=rotary),
        Operand(query, kv_heads, packed=True, columns=(ends[0], ends[1]), rotary=rotary),
        Operand(query, kv_heads, packed=True, columns=(ends[1], ends[2])),
    )


def _rotary(node: ir.Node) -> Rotary | None:
    if not node.attributes.get_int("do_rotary", 0):
        return None
    cos, sin = required(node, _COS, "cos_cache"), required(node, _SIN, "sin_cache")
    if cos.shape is None or not isinstance(cos.shape[-1], int):
        raise NotTappable(f"the width of {cos.name!r} is not in the graph")
    interleaved = node.attributes.get_int("rotary_interleaved", 0) == 1
    ends = required(node, _LENGTHS, "seqlens_k") if _has_past(node) else None
    return Rotary(cos, sin, interleaved, first=input_of(node, _POSITIONS), ends=ends)
