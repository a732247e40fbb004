"""Finds onnxruntime's own `Attention`, which projects its input with packed weights, as its optimizer writes it.

Measured on onnxruntime 1.32's CPU kernel: masks are added to the scores (`mask_filter_value` for keys that integers
leave out, the lowest float32 number behind the frontier, `attention_bias` as it stands), so a row in which every key is
masked is no zero row but the softmax of scores that are all shifted alike. `mask_index` of 3 * B + 2 numbers counts by
its first B. Masks of rank 4 run on other providers alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from attnserve_server.build.finders.microsoft_nodes import (
    NotTappable,
    attention_bias,
    given,
    heads_of,
    key_padding,
    last_extent_of,
    nodes_of,
    refuse_inputs,
    refuse_subgraph,
    required,
)
from attnserve_server.build.sites import Columns, FoundSite, Operand, Scores

_MASK_RANKS = (1, 2, 3, 4)


def find(graph: ir.Graph) -> Iterator[FoundSite]:
    """All `Attention` nodes of onnxruntime's domain, in subgraphs too."""
    return (_site(node, graph) for node in nodes_of(graph, "Attention"))


def _site(node: ir.Node, graph: ir.Graph) -> FoundSite:
    operator = "com.microsoft.Attention-1"
    causal = node.attributes.get_int("unidirectional", 0) == 1
    heads, head_dim = max(node.attributes.get_int("num_heads", 1), 1), 0
    try:
        heads = heads_of(node)
        hidden, value_hidden = _hidden_sizes(node, heads)
        head_dim = hidden // heads
        refuse_subgraph(node, graph)
        refuse_inputs(node, {4: "past: weights over a cache are not tapped yet"})
        _refuse_rotation(node)
        scores = Scores(
            query=_operand(node, heads, 0, hidden),
            key=_operand(node, heads, hidden, 2 * hidden),
            head_dim=head_dim,
            scale=node.attributes.get_float("scale", 0.0) or 1.0 / math.sqrt(head_dim),
            causal=causal,
            masks=(*key_padding(node, 3, _MASK_RANKS), *attention_bias(node, 5)),
            zeroed=False,
        )
    except NotTappable as why:
        return FoundSite(node, operator, heads, heads, head_dim, causal=causal, unavailable_reason=str(why))
    return FoundSite(
        node,
        operator,
        heads,
        heads,
        head_dim,
        causal=causal,
        scores=scores,
        value=_operand(node, heads, 2 * hidden, 2 * hidden + value_hidden),
        output=Operand(node.outputs[0], heads, packed=True),
    )


def _refuse_rotation(node: ir.Node) -> None:
    if node.attributes.get_int("do_rotary", 0):
        raise NotTappable("it rotates query and key itself, which onnxruntime's CPU kernel cannot do")


def _hidden_sizes(node: ir.Node, heads: int) -> tuple[int, int]:
    """Of query and key, and of value."""
    declared = list(node.attributes.get_ints("qkv_hidden_sizes", ()))
    width = last_extent_of(given(node, 1)) or last_extent_of(given(node, 2))
    if not declared and (width is None or width % 3):
        raise NotTappable("the width of its packed weights is not in the graph")
    query, key, value = declared or [(width or 0) // 3] * 3
    if query != key or query % heads or value % heads or not query:
        raise NotTappable(f"sizes of query, key and value, {query}, {key} and {value}, do not suit {heads} heads")
    return query, value


def _operand(node: ir.Node, heads: int, start: int, stop: int) -> Operand:
    """A third of the projection."""
    bias = given(node, 2)
    return Operand(
        required(node, 0, "input"),
        heads,
        packed=True,
        weights=required(node, 1, "weights"),
        columns=(start, stop),
        bias=None if bias is None else Columns(bias, start, stop),
    )
