"""Rewrite a graph to the precision that a user chose: float16, or int8 MatMuls."""

from __future__ import annotations

import logging
import warnings
from types import MappingProxyType
from typing import Final, Literal

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import precision_of
from attnserve_server.conversion.precision.calibration import Ranges
from attnserve_server.conversion.precision.int8 import quantized

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "fp16", "int8")

_FLOAT32_OPERATORS: Final = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "ReduceMean")
"""They stay in float32: sums of squares of real activations exceed float16's 65,504, and means lose bits."""
_ELEMENTWISE: Final = frozenset(
    (
        "Abs",
        "Add",
        "Cast",
        "Ceil",
        "Div",
        "Floor",
        "Identity",
        "Log",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Round",
        "Sub",
        "Where",
    )
)


def in_precision(
    proto: onnx.ModelProto, precision: Precision, ranges: Ranges = MappingProxyType({})
) -> onnx.ModelProto:
    """Return a graph in another precision. Taps are added later, so that they show what the reduced model computes.

    Args:
        proto: the source; it is not changed.
        precision: `fp32` returns the source. `fp16`: float16 weights and activations; inputs and outputs keep their
            types, so that clients need not change, and operators that exceed float16's range stay in float32. `int8`:
            MatMuls with constant weights, as int8.py rewrites them; everything else stays in float32.
        ranges: for `int8`, the calibrated ranges of `ranges_of`.

    Raises:
        BuildRefused: the precision is not known, or the source is reduced already, or has nothing to reduce.
    """
    if precision not in PRECISIONS:
        raise BuildRefused(f"precision {precision!r} is not known; {', '.join(PRECISIONS)} are")
    own = precision_of(proto)
    if precision in {"fp32", own}:
        return proto
    if own != "fp32":
        raise BuildRefused(f"the source is in {own} already: only an fp32 source can be converted to {precision}")
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    if precision == "fp16":
        return _float16(copy)
    reduced = ir.to_proto(quantized(ir.from_proto(copy), ranges))
    if precision_of(reduced) != "int8":
        raise BuildRefused("int8: the source has no MatMul with constant weights that can be rounded; use fp32 or fp16")
    return reduced


def _float16(proto: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import (  # noqa: PLC0415 - slow to import
        DEFAULT_OP_BLOCK_LIST,
        convert_float_to_float16,
    )

    inferred = onnx.shape_inference.infer_shapes(proto)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # It warns of numbers that it clips to float16's range; the quality check measures their effect.
            warnings.simplefilter("ignore")
            converted: onnx.ModelProto = convert_float_to_float16(
                inferred,
                keep_io_types=True,
                op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_FLOAT32_OPERATORS],
                node_block_list=_counting(inferred.graph),
            )
    except Exception as fault:  # noqa: BLE001 - the boundary to the converter, which raises many types
        raise BuildRefused(f"fp16: the graph cannot be converted: {type(fault).__name__}") from None
    finally:
        logging.disable(disabled)
    model = ir.from_proto(converted)
    model.graph.sort()
    return _with_shapes(ir.to_proto(model), inferred)


def _counting(graph: onnx.GraphProto) -> list[str]:
    """Return the names of nodes whose fractions are cast to integers, such as the buckets of relative distances.

    In float16, a logarithm that is a whole number may round to the bucket below.
    """
    producers = {output: node for node in graph.node for output in node.output}
    integers = {onnx.TensorProto.INT64, onnx.TensorProto.INT32}
    waiting = [
        node.input[0]
        for node in graph.node
        if node.op_type == "Cast" and onnx.helper.get_node_attr_value(node, "to") in integers
    ]
    names: dict[str, None] = {}
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or node.op_type not in _ELEMENTWISE or node.name in names:
            continue
        names[node.name] = None
        waiting.extend(node.input)
    return list(names)


def _with_shapes(proto: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with inferred types and the source's shapes; exporters know more shapes than inference finds."""
    typed = {value.name: value.type.tensor_type for value in source.graph.value_info}
    # An unknown shape reads like the shape of a scalar.
    shapes = {name: tensor.shape for name, tensor in typed.items() if tensor.HasField("shape")}
    del proto.graph.value_info[:]
    proto = onnx.shape_inference.infer_shapes(proto)
    for value in proto.graph.value_info:
        if value.name in shapes:
            value.type.tensor_type.shape.CopyFrom(shapes[value.name])
    return proto
