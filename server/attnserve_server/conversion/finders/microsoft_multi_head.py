"""Find onnxruntime's `MultiHeadAttention`: query, key and value as separate or packed inputs, with their biases.

Measured on onnxruntime 1.32's CPU kernel: masks are added to the scores, as in its `Attention`. Key and value of rank 4
take no bias. Where keys outnumber queries, `unidirectional` counts both from the first, and does not mask keys for the
last query. Packed forms run on other providers only. A node whose weights cannot be given is yielded as a site (a place
in a graph that computes attention) with `Untappable(reason)`. `find` raises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir

from attnserve_server.conversion.base.sites import Columns, FoundSite, Operand, Scores, Untappable
from attnserve_server.conversion.finders.operator_nodes import (
    NotTappable,
    attention_bias,
    heads_of,
    key_padding,
    last_dimension_of,
    microsoft_nodes,
    past_of,
    presents_of,
    refuse_inputs,
    refuse_subgraph,
    required,
)
from attnserve_server.conversion.graphs.walk import input_of, rank_of

_PADDING_RANKS = (1, 2, 3)
_PAST_KEY = 6
_CACHES = {
    position: f"{name}: weights over a cache are not tapped yet"
    for position, name in enumerate(("past_sequence_length", "cache_indirection"), start=8)
}


def find(graph: ir.Graph) -> Iterator[FoundSite]:
    """Yield the sites of this operator, those in subgraphs too."""
    return (_site(node, graph) for node in microsoft_nodes(graph, "MultiHeadAttention"))


def _site(node: ir.Node, graph: ir.Graph) -> FoundSite:
    operator = "com.microsoft.MultiHeadAttention-1"
    causal = node.attributes.get_int("unidirectional", 0) == 1
    heads, head_dim = max(node.attributes.get_int("num_heads", 1), 1), 0
    try:
        heads = heads_of(node)
        refuse_subgraph(node, graph)
        refuse_inputs(node, _CACHES)
        query, key, value = _operands(node, heads)
        head_dim = _head_dim(query, key)
        query, key, value = _biased(node, query, key, value, head_dim)
        past = past_of(node, _PAST_KEY)
        if past is not None:
            key, value = presents_of(node, key, value)
        scores = Scores(
            query=query,
            key=key,
            value=value,
            output=Operand(node.outputs[0], heads, packed=True),
            head_dim=head_dim,
            scale=node.attributes.get_float("scale", 0.0) or 1.0 / math.sqrt(head_dim),
            causal=causal,
            masks=(*key_padding(node, 4, _PADDING_RANKS), *attention_bias(node, 5)),
            behind_past=past is not None,
            zeroed=False,
        )
    except NotTappable as why:
        return FoundSite(node, operator, heads, heads, head_dim, Untappable(str(why)), causal=causal)
    return FoundSite(node, operator, heads, heads, head_dim, scores, causal=causal)


def _operands(node: ir.Node, heads: int) -> tuple[Operand, Operand, Operand]:
    """Return query, key and value before their biases."""
    query = required(node, 0, "query")
    key, value = input_of(node, 1), input_of(node, 2)
    if key is None:
        return (
            Operand(query, heads, packed=True, part=0),
            Operand(query, heads, packed=True, part=1),
            Operand(query, heads, packed=True, part=2),
        )
    alone = Operand(query, heads, packed=True)
    if value is None:
        return alone, Operand(key, heads, packed=True, part=0), Operand(key, heads, packed=True, part=1)
    rank = rank_of(key)
    if rank not in {3, 4}:
        raise NotTappable(
            f"the rank of its key {key.name!r} is not known" if rank is None else f"its key has rank {rank}"
        )
    return alone, Operand(key, heads, packed=rank == 3), Operand(value, heads, packed=rank == 3)


def _head_dim(query: Operand, key: Operand) -> int:
    for operand in (query, key):
        width = last_dimension_of(operand.value)
        if width is None:
            continue
        if operand.part is not None or not operand.packed:
            return width
        if width % operand.heads == 0:
            return width // operand.heads
        raise NotTappable(f"the width of {operand.value.name!r}, {width}, is not divisible by {operand.heads} heads")
    raise NotTappable(f"the head size of {query.value.name!r} is not in the graph")


def _biased(
    node: ir.Node, query: Operand, key: Operand, value: Operand, head_dim: int
) -> tuple[Operand, Operand, Operand]:
    """Return the operands with the columns of the one bias that each of them takes."""
    bias = input_of(node, 3)
    if bias is None:
        return query, key, value
    hidden = query.heads * head_dim
    query = replace(query, bias=Columns(bias, 0, hidden))
    if not key.packed:
        return query, key, value
    width = last_dimension_of(bias)
    if width is None:
        value_width = last_dimension_of(value.value)
        width = None if value_width is None or value.part is not None else 2 * hidden + value_width
    key = replace(key, bias=Columns(bias, hidden, 2 * hidden))
    return query, key, replace(value, bias=Columns(bias, 2 * hidden, 3 * hidden if width is None else width))
