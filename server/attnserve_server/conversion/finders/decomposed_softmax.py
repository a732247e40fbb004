"""Find softmax in every form that graphs write it: the scores it takes, and the axis it runs over.

    Softmax(scores)
    BiasSoftmax(scores, bias)                         onnxruntime's fused form
    QLinearSoftmax(scores)                            onnxruntime's form for integers
    Exp(LogSoftmax(scores))
    Exp(scores) / ReduceSum(Exp(scores))              as Div, or as Mul by the Reciprocal; masked or guarded from 0;
                                                      Exp may be a polynomial times a power of two

Whether a softmax is one of attention is decided in decomposed.py. Nothing here raises; a softmax over several axes at
once is yielded with the reason in `refused`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from attnserve_server.conversion.graphs.axes import Axis
from attnserve_server.conversion.graphs.operators import SINCE
from attnserve_server.conversion.graphs.walk import (
    axes_of,
    before,
    input_of,
    is_constant,
    is_standard,
    producer_of,
    rank_of,
)

_CASTS = {"Cast", "Identity"}
_MASKING = {*_CASTS, "Mul", "Where"}
"""Operators that may be between the exponentials and their division: they set some of them to 0."""
_GUARDS = {*_CASTS, "Add", "Max", "Clip", "Unsqueeze", "Expand"}
"""Operators that may be between the sum and the division: they keep the sum from 0."""


@dataclass(frozen=True, slots=True)
class Softmax:
    """One softmax.

    Attributes:
        node: the last of its nodes.
        spelling: its operators, for the name of a site's form.
        scores: what softmax is taken of.
        axis: the axis it runs over, counted from the end; None: not known.
        refused: why no tap can read its weights; empty where one can.
    """

    node: ir.Node
    spelling: str
    scores: ir.Value
    axis: Axis
    refused: str = ""


def softmaxes(graph: ir.Graph) -> Iterator[Softmax]:
    """Yield every softmax of a graph and its subgraphs, in the order of their last nodes."""
    for node in graph.all_nodes():
        scores = input_of(node, 0)
        if scores is None:
            continue
        if node.op_type == "Softmax" and is_standard(node):
            yield _softmax(node, scores, _version(node, graph))
        elif node.op_type == "BiasSoftmax":
            yield Softmax(node, "BiasSoftmax", scores, -1)
        elif node.op_type == "QLinearSoftmax":
            yield _softmax(node, scores, node.attributes.get_int("opset", SINCE["Softmax over one axis"]))
        elif node.op_type == "Exp":
            log = producer_of(before(scores, _CASTS), "LogSoftmax")
            if log is not None and log.inputs[0] is not None:
                inner = _softmax(log, log.inputs[0], _version(log, graph))
                yield Softmax(node, "LogSoftmax-Exp", inner.scores, inner.axis, inner.refused)
        elif node.op_type in {"Div", "Mul"} and (axis := _sum_axis(node)) is not False:
            yield Softmax(node, "Exp-ReduceSum-" + node.op_type, scores, axis)


def _version(node: ir.Node, graph: ir.Graph) -> int:
    return node.version or graph.opset_imports.get("", 0)


def _softmax(node: ir.Node, scores: ir.Value, version: int) -> Softmax:
    """Return a softmax in the form of an opset.

    Source: ONNX operators, Softmax-1, Softmax-11 (the input is coerced to 2-D) and Softmax-13; onnxruntime's
    QLinearSoftmax.
    """
    spelling = "QLinearSoftmax" if node.op_type == "QLinearSoftmax" else "Softmax"
    one_axis = version >= SINCE["Softmax over one axis"]
    rank = rank_of(scores) or rank_of(node.outputs[0])
    axis = node.attributes.get_int("axis", -1 if one_axis else 1)
    if axis >= 0:
        # Exporters count from the front only where they know the rank; almost all mean the last axis.
        axis = axis - rank if rank is not None else -1
    if not one_axis and axis != -1:
        shape = scores.shape
        if shape is None or any(size != 1 for size in list(shape)[axis + 1 :]):
            refused = f"its softmax (opset {version}) runs over several axes at once"
            return Softmax(node, spelling, scores, None, refused)
    return Softmax(node, spelling, scores, axis)


def _sum_axis(node: ir.Node) -> Axis | bool:
    """Return the axis of exponentials that are divided by their own sum; False where the node does not do that."""
    numerator, divisor = input_of(node, 0), input_of(node, 1)
    if numerator is None or divisor is None or not _has_exponentials(numerator):
        return False
    total = producer_of(before(divisor, _GUARDS))
    if node.op_type == "Mul":
        if total is None or total.op_type != "Reciprocal" or total.inputs[0] is None:
            return False
        total = producer_of(before(total.inputs[0], _GUARDS))
    if total is None or total.op_type != "ReduceSum" or total.inputs[0] is None:
        return False
    if before(total.inputs[0], _CASTS) is not before(numerator, _CASTS):
        return False
    axes = axes_of(total)
    if axes is None or len(axes) != 1:
        return None
    rank = rank_of(numerator)
    return axes[0] if axes[0] < 0 else axes[0] - rank if rank is not None else None


def _has_exponentials(value: ir.Value) -> bool:
    """Return whether a value is exponentials, possibly masked.

    A power of a constant counts: onnxsim writes Exp as a polynomial times a power of two. Source: Kim et al. 2021,
    "I-BERT", algorithm 2.
    """
    waiting, seen = [value], set()
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type == "Exp" or (node.op_type == "Pow" and is_constant(input_of(node, 0))):
            return True
        if node.op_type in _MASKING:
            waiting += [value for value in node.inputs if value is not None]
    return False
