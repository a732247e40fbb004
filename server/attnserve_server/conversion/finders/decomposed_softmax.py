"""Softmax in the spellings that graphs have for it: what it is taken of, and over which axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from attnserve_server.conversion.finders.decomposed_walk import Axis, axes_of, rank_of

_ONE_AXIS_FROM = 13
"""The version of the standard operator set from which Softmax runs over one axis, not over that and all behind it."""
_ALONG = {"Cast", "Identity"}
_MASKING = {*_ALONG, "Mul", "Where"}
_STEADYING = {*_ALONG, "Add", "Max", "Clip", "Unsqueeze", "Expand"}


@dataclass(frozen=True, slots=True)
class Softmax:
    """One softmax: its last node, the scores, the axis from the end, and why it cannot be tapped, if so."""

    node: ir.Node
    spelling: str
    scores: ir.Value
    axis: Axis
    refused: str = ""


def softmaxes(graph: ir.Graph) -> Iterator[Softmax]:
    """All of a graph, those in subgraphs too, in the order of the nodes that end them."""
    for node in graph.all_nodes():
        scores = node.inputs[0] if node.inputs else None
        if scores is None:
            continue
        if node.op_type == "Softmax" and node.domain in {"", "ai.onnx"}:
            yield _softmax(node, scores, graph)
        elif node.op_type == "BiasSoftmax":
            yield Softmax(node, "BiasSoftmax", scores, -1)
        elif node.op_type == "QLinearSoftmax":
            refused = "its weights are integers from softmax to product, which are not tapped yet"
            yield Softmax(node, "QLinearSoftmax", scores, -1, refused)
        elif node.op_type == "Exp":
            log = _back(scores, _ALONG)
            if log is not None and log.op_type == "LogSoftmax" and log.inputs[0] is not None:
                inner = _softmax(log, log.inputs[0], graph)
                yield Softmax(node, "LogSoftmax-Exp", inner.scores, inner.axis, inner.refused)
        elif node.op_type in {"Div", "Mul"} and (axis := _sum_axis(node)) is not False:
            yield Softmax(node, "Exp-ReduceSum-" + node.op_type, scores, axis)


def _softmax(node: ir.Node, scores: ir.Value, graph: ir.Graph) -> Softmax:
    """Source: ONNX operators, Softmax-1, Softmax-11 (the input is coerced to 2-D) and Softmax-13."""
    version = node.version or graph.opset_imports.get("", 0)
    rank = rank_of(scores) or rank_of(node.outputs[0])
    axis = node.attributes.get_int("axis", -1 if version >= _ONE_AXIS_FROM else 1)
    if axis >= 0:
        # Exporters count from the front only where the rank is known to them; almost all mean the last axis.
        axis = axis - rank if rank is not None else -1
    if version < _ONE_AXIS_FROM and axis != -1:
        shape = scores.shape
        if shape is None or any(extent != 1 for extent in list(shape)[axis + 1 :]):
            return Softmax(
                node, "Softmax", scores, None, f"its softmax (opset {version}) runs over several axes at once"
            )
    return Softmax(node, "Softmax", scores, axis)


def _sum_axis(node: ir.Node) -> Axis | bool:
    """The axis of exponentials divided by their own sum; False where the node is no such thing."""
    numerator, divisor = (*node.inputs, None)[:2]
    if numerator is None or divisor is None or not _exponentials(numerator):
        return False
    total = _back(divisor, _STEADYING)
    if node.op_type == "Mul":
        if total is None or total.op_type != "Reciprocal" or total.inputs[0] is None:
            return False
        total = _back(total.inputs[0], _STEADYING)
    if total is None or total.op_type != "ReduceSum" or not _same(total.inputs[0], numerator):
        return False
    axes = axes_of(total)
    if axes is None or len(axes) != 1:
        return None
    rank = rank_of(numerator)
    return axes[0] if axes[0] < 0 else axes[0] - rank if rank is not None else None


def _exponentials(value: ir.Value) -> bool:
    """Whether a value is made of exponentials, some of them perhaps masked out."""
    open_, seen = [value], set()
    while open_:
        node = open_.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type == "Exp":
            return True
        if node.op_type in _MASKING:
            open_ += [value for value in node.inputs if value is not None]
    return False


def _back(value: ir.Value, through: set[str]) -> ir.Node | None:
    """The first node behind a value that does more than those."""
    node = value.producer()
    while node is not None and node.op_type in through and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node


def _same(one: ir.Value | None, other: ir.Value) -> bool:
    """Whether two values are one, casts aside."""

    def root(value: ir.Value) -> ir.Value:
        node = value.producer()
        while node is not None and node.op_type in _ALONG and node.inputs[0] is not None:
            value = node.inputs[0]
            node = value.producer()
        return value

    return one is not None and root(one) is root(other)
