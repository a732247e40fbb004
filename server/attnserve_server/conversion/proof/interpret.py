"""Interpret the nodes of a graph in order, each by the rule of its operator.

A node yields `unknown` where its operator has no rule, where its rule does not cover the case, or where its rule raises
any exception.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from attnserve_server.conversion.proof.context import Context, Registered
from attnserve_server.conversion.proof.helpers import attribute, constant, numbers
from attnserve_server.conversion.proof.hiding import softmaxed
from attnserve_server.conversion.proof.intervals import Interval
from attnserve_server.conversion.proof.layout import Mixed, NotFollowed, is_plain, size_of
from attnserve_server.conversion.proof.rules import RULES
from attnserve_server.conversion.proof.values import Cause, Standing, Value

_FOLDED: Final = 1 << 16
"""The number of elements up to which a node of constants is computed."""
_NOT_FOLDED: Final = {
    *("If", "Loop", "Scan", "Shape", "Size", "ConstantOfShape", "Dropout"),
    *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"),
}


@dataclass
class Interpreter:
    """One interpretation of a graph. `values` grows with each node, those of subgraphs included."""

    ctx: Context
    values: dict[ir.Value, Value] = field(default_factory=dict)

    def run(self, graph: ir.Graph, given: Mapping[ir.Value, Value]) -> list[Value]:
        """Return what holds of a graph's outputs, given what holds of its inputs."""
        self.values.update(given)
        self.ctx.run_graph, self.ctx.known = self.run, self.value_of
        for node in graph:
            self._follow(node)
        return [self.value_of(output) for output in graph.outputs]

    def value_of(self, value: ir.Value) -> Value:
        """Return what is known of a value so far."""
        known = self.values.get(value)
        if known is None:
            if value.const_value is None:
                known = self.ctx.unknown(f"{value.name} has no producer in the graph")
            else:
                known = constant(value.const_value.numpy())
            self.values[value] = known
        return known

    def _follow(self, node: ir.Node) -> None:
        self.ctx.node = node
        inputs = [None if value is None else self.value_of(value) for value in node.inputs]
        for output, value in zip(node.outputs, self._outputs(node, inputs), strict=False):
            self.values[output] = _within_span(value)
        for output in node.outputs:
            self.values.setdefault(output, self.ctx.unknown("an output that its rule does not return"))

    def _outputs(self, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
        if node.op_type == "Constant" and node.domain in {"", "ai.onnx"}:
            return [_constant(node)]
        folded = self._folded(node, inputs)
        if folded is not None:
            return folded
        written_out = self._softmax(node)
        return self._by_rule(node, inputs) if written_out is None else [written_out]

    def _by_rule(self, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
        domain = "" if node.domain == "ai.onnx" else node.domain
        registered = RULES.get((domain, node.op_type))
        if registered is None:
            name = f"{domain}.{node.op_type}" if domain else node.op_type
            return self._lost(node, inputs, Standing.UNKNOWN, f"the proof has no rule for the operator {name}")
        if not registered.shapes_only and any(value is not None and value.layout is None for value in inputs):
            return self._lost(node, inputs, Standing.UNKNOWN, "the axes of an input are not known")
        outputs = self._applied(registered, node, inputs)
        return outputs if registered.shapes_only else self._no_better(outputs, inputs)

    def _applied(self, registered: Registered, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
        try:
            found = registered.apply(self.ctx, node, inputs)
        except NotFollowed as why:
            return self._lost(node, inputs, Standing.UNKNOWN, str(why))
        except Mixed as why:
            return self._lost(node, inputs, Standing.DIFFERENT, str(why))
        except Exception as fault:  # noqa: BLE001 - nothing is proved of a graph that a rule cannot read
            why_not = f"the rule of {node.op_type} failed ({type(fault).__name__})"
            return self._lost(node, inputs, Standing.UNKNOWN, why_not)
        return list(found) if isinstance(found, list) else [found]

    @staticmethod
    def _no_better(outputs: Sequence[Value], inputs: Sequence[Value | None]) -> list[Value]:
        """Return the outputs with a standing no better than the worst input's."""
        standing, cause = _worst(inputs)
        if standing is Standing.UNKNOWN:
            # What depends on an unknown value is unknown, not different.
            return [replace(value, standing=standing, cause=cause) for value in outputs]
        # The places of rows are checked where they are used, for every way of computing them.
        return [value if value.items else _at_least(value, standing, cause) for value in outputs]

    def _softmax(self, node: ir.Node) -> Value | None:
        """Return the value of a decomposed softmax, exp(x - max x) / sum of exp(x - max x).

        None for any other division.
        """
        if node.op_type != "Div" or any(value is None for value in node.inputs):
            return None
        powers, total = (value.producer() if value is not None else None for value in node.inputs)
        if powers is None or total is None or powers.op_type != "Exp" or total.op_type != "ReduceSum":
            return None
        if total.inputs[0] is not powers.outputs[0] or not attribute(total, "keepdims", 1):
            return None
        axes = self._axes_of(total)
        scores = powers.inputs[0]
        shifted = scores.producer() if scores is not None else None
        if shifted is not None and shifted.op_type == "Sub" and shifted.inputs[1] is not None:
            greatest = shifted.inputs[1].producer()
            if greatest is not None and greatest.op_type == "ReduceMax" and greatest.inputs[0] is shifted.inputs[0]:
                if self._axes_of(greatest) != axes or not attribute(greatest, "keepdims", 1):
                    return None  # the maximum of more than a row may leave zeros only in the row
                scores = shifted.inputs[0]
        value = self.value_of(scores) if scores is not None else None
        if value is None or value.layout is None or not axes:
            return None
        return softmaxed(self.ctx, self.ctx.as_data(value), [axis % len(value.layout) for axis in axes])

    def _axes_of(self, node: ir.Node) -> list[int] | None:
        """Return the axes of a reduction, as the node gives them."""
        axes: list[int] | None = attribute(node, "axes")
        if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
            axes = numbers(self.value_of(node.inputs[1]))
        return axes

    def _lost(self, node: ir.Node, inputs: Sequence[Value | None], standing: Standing, why: str) -> list[Value]:
        self.ctx.node = node
        before, cause = _worst(inputs)
        if before >= standing:
            return [Value(None, before, cause) for _ in node.outputs]
        return [self.ctx.bad(standing, why) for _ in node.outputs]

    def _folded(self, node: ir.Node, inputs: Sequence[Value | None]) -> list[Value] | None:
        """Return the outputs of a node whose inputs are all small constants."""
        if node.domain not in {"", "ai.onnx"} or node.op_type in _NOT_FOLDED or not inputs:
            return None
        arrays = [None if value is None else _whole(value) for value in inputs]
        if any(value is not None and array is None for value, array in zip(inputs, arrays, strict=True)):
            return None
        proto = ir.to_proto(node)
        names = [name for name in proto.input if name]
        feeds = dict(zip(names, [array for array in arrays if array is not None], strict=False))
        try:
            opset = [onnx.helper.make_opsetid("", self.ctx.opset)]
            graph = onnx.helper.make_graph(
                [proto], "folded", [_info(name) for name in feeds], [_info(name) for name in proto.output if name]
            )
            model = onnx.helper.make_model(graph, opset_imports=opset)
            with np.errstate(all="ignore"):
                found = ReferenceEvaluator(model).run(None, feeds)
        except Exception:  # noqa: BLE001 - what cannot be computed here is followed by its rule
            return None
        folded = [np.asarray(array) for array in found]
        return None if any(array.size > _FOLDED for array in folded) else [constant(array) for array in folded]


def _info(name: str) -> onnx.ValueInfoProto:
    return onnx.helper.make_value_info(name, onnx.TypeProto())


def _whole(value: Value) -> np.ndarray | None:
    """Return the array of a value that is a small constant, else None."""
    array = value.constant
    if array is None or value.layout is None or array.size > _FOLDED or value.standing is not Standing.EQUAL:
        return None
    if not all(is_plain(axis) for axis in value.layout):
        return None
    return array if [size_of(axis).number for axis in value.layout] == list(array.shape) else None


def _constant(node: ir.Node) -> Value:
    for name, found in node.attributes.items():
        if name == "value":
            return constant(found.value.numpy())
        if name in {"value_int", "value_ints"}:
            return constant(np.array(found.value, np.int64))
        if name in {"value_float", "value_floats"}:
            return constant(np.array(found.value, np.float32))
    return Value(None, Standing.UNKNOWN, Cause(node.name or "", node.op_type, "a constant that is no tensor"))


def _worst(values: Sequence[Value | None]) -> tuple[Standing, Cause | None]:
    known = [value for value in values if value is not None]
    found = max(known, key=lambda value: value.standing, default=None)
    return (Standing.EQUAL, None) if found is None else (found.standing, found.cause)


def _within_span(value: Value) -> Value:
    """Return the value with its regions clipped to the interval of all elements."""
    if not value.regions or not (math.isfinite(value.span.low) or math.isfinite(value.span.high)):
        return value
    regions = {
        region: entry if entry.lowered else replace(entry, interval=_meet(entry.interval, value.span))
        for region, entry in value.regions.items()
    }
    return replace(value, regions=regions)


def _meet(one: Interval, whole: Interval) -> Interval:
    low, high = max(one.low, whole.low), min(one.high, whole.high)
    return replace(one, low=low, high=high) if low <= high else one


def _at_least(value: Value, standing: Standing, cause: Cause | None) -> Value:
    return value if value.standing >= standing else replace(value, standing=standing, cause=cause)
