"""The nodes of one tap while it is built: its input, the nodes so far, and the output that ends it.

A site is a place in the graph that computes attention. A tap is the nodes that return its weights for the rows of the
batch that its input `items` selects. A site that its finder did not refuse raises nothing here.
`Tap` is a `NodeBuilder`: its nodes enter the graph when `finish` places them.
"""

from __future__ import annotations

import onnx_ir as ir

from attnserve_server.conversion.base.quantizers import Quantizer
from attnserve_server.conversion.graphs.contraction import quantizer_of
from attnserve_server.conversion.graphs.nodes import NodeBuilder
from attnserve_server.conversion.graphs.walk import input_of, is_made_of_constants, producer_of

ITEMS_PREFIX = "attention_items."
WEIGHTS_PREFIX = "attention."
SCORES_PREFIX = "attention_scores."


class Tap(NodeBuilder):
    """A tap under construction.

    `items` is its input, int64 (n,): the rows of the batch whose weights are selected, in any order; n may be 0.

    Args:
        graph: the graph to tap.
        name: of the site.
        shared: what the taps of the graph share; the nodes of the first tap precede those of the others.
    """

    def __init__(self, graph: ir.Graph, name: str, shared: dict[tuple[object, ...], ir.Value]) -> None:
        super().__init__(graph, f"{WEIGHTS_PREFIX}{name}/", shared=shared)
        self._name = name
        self.items = ir.val(ITEMS_PREFIX + name, ir.DataType.INT64, ir.Shape([f"{ITEMS_PREFIX}{name}.count"]))

    def finish(self, weights: ir.Value, heads: int, behind: ir.Node, scores: ir.Value | None = None) -> None:
        """Place the nodes behind one of the graph's own, and make the weights, float32 (n, H, L, S), an output.

        `scores`, of the same shape, are a second output.
        """
        self.place_after(behind)
        self.graph.inputs.append(self.items)
        for value, prefix in ((weights, WEIGHTS_PREFIX), (scores, SCORES_PREFIX)):
            if value is not None:
                value.name = prefix + self._name
                value.type = ir.TensorType(ir.DataType.FLOAT)
                value.shape = ir.Shape([f"{ITEMS_PREFIX}{self._name}.count", heads, None, None])
                self.graph.outputs.append(value)

    def rows_of(self, value: ir.Value) -> ir.Value:
        """Return the selected rows of a value whose first axis is the batch.

        Rows of a dequantized value are gathered as integers, and dequantized by a copy of its node. A second reader of
        its output could keep the runtime from fusing that node with the one that it stands in front of.
        """
        node = producer_of(value, "DequantizeLinear")
        quantizer = quantizer_of(node) if node is not None else None
        source = input_of(node, 0) if node is not None else None
        if quantizer is None or source is None or is_made_of_constants(source):
            return self.op("Gather", [value, self.items], axis=0)
        return self.dequantized(self.op("Gather", [source, self.items], axis=0), quantizer)

    def dequantized(self, rows: ir.Value, quantizer: Quantizer | None) -> ir.Value:
        """Return the numbers that integers represent; values without a quantizer are returned as they are."""
        if quantizer is None:
            return rows
        parts = [rows, quantizer.scale, *([] if quantizer.zero is None else [quantizer.zero])]
        return self.op("DequantizeLinear", parts, domain=quantizer.domain)

    def batch(self) -> ir.Value:
        """Return the number of rows of the batch, int64 of rank 1, from the first input, which is none of a tap's."""
        return self.shape(self.graph.inputs[0], 0, 1)

    def float32(self, value: ir.Value) -> ir.Value:
        """Return the value in float32."""
        return self.op("Cast", [value], to=int(ir.DataType.FLOAT))

    def not_less(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """Return one >= other, bool. Opset 11 has no GreaterOrEqual."""
        return self.op("Not", [self.op("Less", [one, other])])

    def lesser(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """Return the lesser of two int64 values. Min takes no integers before opset 12."""
        return self.op("Where", [self.op("Less", [one, other]), one, other])


class WholeBatch(Tap):
    """Nodes for checks that work on every row of the batch."""

    def rows_of(self, value: ir.Value) -> ir.Value:
        """Return the value: all rows."""
        return value
