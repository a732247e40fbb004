"""Find `LinearAttention`, of `ai.onnx` and of onnxruntime, in each of its update rules.

Its state is a sum of keys times values, so that it implies weights: what it returns for unit vectors as values. A node
that starts from another state than zeros, whose share no key of the sequence explains, is yielded as a site with
`Untappable(reason)`. A site is a place in a graph that computes attention. Source: ONNX operators, LinearAttention-27;
onnxruntime's operator has one more attribute.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite, Operand, Recurrent, Untappable
from attnserve_server.conversion.finders.operator_nodes import (
    MICROSOFT,
    NotTappable,
    heads_of,
    last_dimension_of,
    refuse_subgraph,
    refuse_uneven_heads,
    required,
)
from attnserve_server.conversion.graphs.walk import input_of, is_fixed, is_standard, producer_of

_OPERATOR = "LinearAttention"
_PAST_STATE = 3


def find(graph: ir.Graph) -> Iterator[FoundSite]:
    """Yield the sites of this operator, those in subgraphs too."""
    for node in graph.all_nodes():
        if node.op_type == _OPERATOR and (is_standard(node) or node.domain == MICROSOFT):
            yield _site(node, graph)


def _site(node: ir.Node, graph: ir.Graph) -> FoundSite:
    operator = f"com.microsoft.{_OPERATOR}-1" if node.domain == MICROSOFT else f"ai.onnx.{_OPERATOR}-27"
    heads, kv_heads = (max(node.attributes.get_int(name, 1), 1) for name in ("q_num_heads", "kv_num_heads"))
    head_dim = 0
    attention: Recurrent | Untappable
    try:
        refuse_subgraph(node, graph)
        heads, kv_heads = heads_of(node, "q_num_heads"), heads_of(node, "kv_num_heads")
        refuse_uneven_heads(heads, kv_heads)
        head_dim = (last_dimension_of(required(node, 0, "query")) or 0) // heads
        _refuse_state(input_of(node, _PAST_STATE))
        attention = Recurrent(
            node,
            value=Operand(required(node, 2, "value"), kv_heads, packed=True),
            output=Operand(node.outputs[0], heads, packed=True),
        )
    except NotTappable as why:
        attention = Untappable(str(why))
    return FoundSite(node, operator, heads, kv_heads, head_dim, attention, form="linear", causal=True)


def _refuse_state(state: ir.Value | None) -> None:
    if not _is_zero(state):
        raise NotTappable("it takes past_state: the share of a state is not a weight of any key")


def _is_zero(state: ir.Value | None) -> bool:
    """Return whether a state is left out, or zeros that the graph itself holds."""
    if state is None:
        return True
    if is_fixed(state) and state.const_value is not None:
        return not np.any(state.const_value.numpy())
    made = producer_of(state, "ConstantOfShape", "Expand")
    if made is None:
        return False
    if made.op_type == "Expand":
        return _is_zero(made.inputs[0])
    filled = made.attributes.get("value")
    return filled is None or not np.any(filled.as_tensor().numpy())
