"""The taps of linear attention: compute, for the selected rows, the weights that features or an operator imply.

items (n,) -+-> Gather(phi(Q)) -+-> MatMul -> (n, H, L, S) -> / sum over keys -> weights
            +-> Gather(phi(K)) -+

items (n,) ---> Gather(Q, K, decay, beta) -+-> LinearAttention -> (n, L, H * S) -> weights (n, H, L, S)
                          unit vectors ----+

A site is a place in the graph that computes attention. A tap is the nodes that return its weights for the rows of the
batch that its input `items` selects. A site that its finder did not refuse raises nothing here.
"""

from __future__ import annotations

import onnx_ir as ir

from attnserve_server.conversion.base.sites import Features, Linear, Recurrent
from attnserve_server.conversion.graphs.operators import MICROSOFT
from attnserve_server.conversion.rewrite.taps.tap import Tap

_VALUE = 2
_ATTRIBUTES = ("q_num_heads", "kv_num_heads", "scale", "update_rule")


def weights_of_linear(tap: Tap, linear: Linear) -> ir.Value:
    """Return A[i, j] = phi(q_i) . phi(k_j) / sum over j' of phi(q_i) . phi(k_j'), float32 (n, H, L, S).

    Masked keys have features of 0, and so weights of 0. A row in which every key is masked is 0.
    Source: Katharopoulos et al. 2020, eq. 4 and 5.
    """
    query, key = (_heads_first(tap, features) for features in (linear.query, linear.key))
    dots = tap.op("MatMul", [query, tap.op("Transpose", [key], perm=[0, 1, 3, 2])])
    sums = tap.reduce("ReduceSum", dots, 3)
    zero = tap.number(0.0)
    return tap.op("Where", [tap.op("Equal", [sums, zero]), zero, tap.op("Div", [dots, sums])])


def weights_of_recurrent(tap: Tap, recurrent: Recurrent) -> ir.Value:
    """Return the operator's result for unit vectors as values, float32 (n, H, L, S), with zeros behind each query.

    Every update rule adds a value, or its difference from what the state returns for the key, to the state. So the
    result is a sum of values, and that of the unit vector of key j is the weight of key j. The runtime's own operator
    computes it, which takes no rows too, in float32. Source: ONNX operators, LinearAttention-27.
    """
    node, heads, kv_heads = recurrent.node, recurrent.output.heads, recurrent.value.heads
    inputs: list[ir.Value | None] = []
    for position, value in enumerate(node.inputs):
        rows = tap.rows_of(value) if value is not None and position != _VALUE else None
        inputs.append(rows if rows is None or value is None or value.dtype is ir.DataType.FLOAT else tap.float32(rows))
    query = inputs[0]
    assert query is not None
    count, length = tap.shape(query, 0, 1), tap.shape(query, 1, 2)
    places = tap.op("Range", [tap.scalar(0), tap.op("Squeeze", [length]), tap.scalar(1)])
    units = tap.float32(tap.op("Equal", [tap.unsqueeze(places, 1), places]))
    shape = tap.op("Concat", [count, length, tap.ints(kv_heads), length], axis=0)
    units = tap.op("Expand", [tap.unsqueeze(units, 1), shape])
    width = tap.op("Mul", [length, tap.ints(kv_heads)])
    inputs[_VALUE] = tap.reshape(units, [count, length, width])
    tap.graph.opset_imports.setdefault(MICROSOFT, 1)
    attributes = {name: node.attributes[name].value for name in _ATTRIBUTES if name in node.attributes}
    sums = tap.outputs_of(node.op_type, inputs, 2, attributes, domain=MICROSOFT)[0]
    return tap.op("Transpose", [tap.reshape(sums, [count, length, tap.ints(heads), length])], perm=[0, 2, 1, 3])


def _heads_first(tap: Tap, features: Features) -> ir.Value:
    """Return the selected rows, float32 (n, H, T, D)."""
    batch = features.order[0]
    rows = tap.op("Gather", [features.value, tap.items], axis=batch)
    if features.order != tuple(range(len(features.order))):
        rows = tap.op("Transpose", [rows], perm=features.order)
    if len(features.order) == 3:
        rows = tap.unsqueeze(rows, 1)
    return rows if features.value.dtype is ir.DataType.FLOAT else tap.float32(rows)
