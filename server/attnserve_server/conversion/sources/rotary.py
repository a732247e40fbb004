"""Mends what torch's exporter writes for rotary positions, so that the runtime takes it. Knows nothing of sites."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_CACHES = (1, 2)
"""Positions of cos and sin among the inputs of `RotaryEmbedding`."""


def widen_rotary_caches(graph: ir.Graph) -> None:
    """Give the cos and sin of every `RotaryEmbedding` the batch axis that the operator asks for.

    The exporter shares one row of angles, (1, L, D / 2), among the batch; without position ids the operator wants
    (B, L, D / 2), and the runtime refuses any other. Source: ONNX operators, RotaryEmbedding-23.
    """
    for node in list(graph):
        if node.op_type != "RotaryEmbedding" or node.domain or (len(node.inputs) > 3 and node.inputs[3] is not None):
            continue
        source = node.inputs[0]
        assert source is not None
        rows = ir.node("Shape", [source], attributes={"start": 0, "end": 1})
        shape = ir.node("Concat", [rows.outputs[0], _ones(graph)], attributes={"axis": 0})
        added = [rows, shape]
        for position in _CACHES:
            wide = ir.node("Expand", [node.inputs[position], shape.outputs[0]])
            added.append(wide)
            node.replace_input_with(position, wide.outputs[0])
        graph.insert_before(node, added)


def _ones(graph: ir.Graph) -> ir.Value:
    """The extents of length and half the head size, which `Expand` leaves as they are."""
    name = "attnserve.rotary.ones"
    if name not in graph.initializers:
        array = np.ones(2, np.int64)
        value = ir.val(name, ir.DataType.INT64, ir.Shape([2]), const_value=ir.tensor(array, name=name))
        graph.register_initializer(value)
    return graph.initializers[name]
