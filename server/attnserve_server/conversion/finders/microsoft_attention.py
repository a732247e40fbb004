"""Find onnxruntime's `Attention`, which projects its input with packed weights, and `QAttention`, its int8 form.

Measured on onnxruntime 1.32's CPU kernel: the kernel adds masks to the scores. It adds `mask_filter_value` for keys
that an integer mask hides, the lowest float32 for keys behind a causal query, and `attention_bias` unchanged. So a row
whose keys are all masked is not 0: it is the softmax of scores that are all shifted by the same number
(findings/contrib_masks_are_finite.sh). Of a `mask_index` of 3 * B + 2 numbers, the kernel reads the first B. Masks of
rank 4 run on other providers only.

A node whose weights cannot be given is yielded as a site (a place in a graph that computes attention) with
`Untappable(reason)`. `find` raises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from attnserve_server.conversion.base.quantizers import Quantized
from attnserve_server.conversion.base.sites import Columns, FoundSite, Operand, Scores, Untappable
from attnserve_server.conversion.finders.operator_nodes import (
    NotTappable,
    attention_bias,
    heads_of,
    key_padding,
    last_dimension_of,
    microsoft_nodes,
    refuse_inputs,
    refuse_subgraph,
    required,
)
from attnserve_server.conversion.graphs.walk import input_of

_MASK_RANKS = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class _Places:
    """Positions of inputs at which the two operators differ."""

    mask: int
    past: int
    bias: int | None = None


_PLACES = {"Attention": _Places(mask=3, past=4, bias=5), "QAttention": _Places(mask=5, past=8)}


def find(graph: ir.Graph) -> Iterator[FoundSite]:
    """Yield the sites of both operators, those in subgraphs too."""
    return (_site(node, graph, _PLACES[node.op_type]) for node in microsoft_nodes(graph, *_PLACES))


def _site(node: ir.Node, graph: ir.Graph, places: _Places) -> FoundSite:
    operator = f"com.microsoft.{node.op_type}-1"
    causal = node.attributes.get_int("unidirectional", 0) == 1
    heads, head_dim = max(node.attributes.get_int("num_heads", 1), 1), 0
    try:
        heads = heads_of(node)
        hidden, value_hidden = _hidden_sizes(node, heads)
        head_dim = hidden // heads
        refuse_subgraph(node, graph)
        refuse_inputs(node, {places.past: "past: weights over a cache are not tapped yet"})
        _refuse_rotation(node)
        scores = Scores(
            query=_operand(node, heads, 0, hidden),
            key=_operand(node, heads, hidden, 2 * hidden),
            value=_operand(node, heads, 2 * hidden, 2 * hidden + value_hidden),
            output=Operand(node.outputs[0], heads, packed=True),
            head_dim=head_dim,
            scale=node.attributes.get_float("scale", 0.0) or 1.0 / math.sqrt(head_dim),
            causal=causal,
            masks=(
                *key_padding(node, places.mask, _MASK_RANKS),
                *(attention_bias(node, places.bias) if places.bias is not None else ()),
            ),
            zeroed=False,
        )
    except NotTappable as why:
        return FoundSite(node, operator, heads, heads, head_dim, Untappable(str(why)), causal=causal)
    return FoundSite(node, operator, heads, heads, head_dim, scores, causal=causal)


def _refuse_rotation(node: ir.Node) -> None:
    if node.attributes.get_int("do_rotary", 0):
        raise NotTappable("it rotates query and key itself, which onnxruntime's CPU kernel cannot do")


def _hidden_sizes(node: ir.Node, heads: int) -> tuple[int, int]:
    """Return the width of query and key, and that of the value."""
    declared = list(node.attributes.get_ints("qkv_hidden_sizes", ()))
    width = last_dimension_of(input_of(node, 1)) or last_dimension_of(input_of(node, 2))
    if not declared and (width is None or width % 3):
        raise NotTappable("the width of its packed weights is not in the graph")
    query, key, value = declared or [(width or 0) // 3] * 3
    if query != key or query % heads or value % heads or not query:
        raise NotTappable(
            f"the widths of query, key and value, {query}, {key} and {value}, are not divisible by {heads} heads"
        )
    return query, value


def _operand(node: ir.Node, heads: int, start: int, stop: int) -> Operand:
    """Return query, key or value: some columns of the projection."""
    bias = input_of(node, 2)
    return Operand(
        required(node, 0, "input"),
        heads,
        packed=True,
        weights=required(node, 1, "weights"),
        quantized=_quantized(node),
        columns=(start, stop),
        bias=None if bias is None else Columns(bias, start, stop),
    )


def _quantized(node: ir.Node) -> Quantized | None:
    if node.op_type != "QAttention":
        return None
    scales = required(node, 3, "input_scale"), required(node, 4, "weight_scale")
    return Quantized(*scales, input_zero=input_of(node, 6), weight_zero=input_of(node, 7))
