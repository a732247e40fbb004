"""Rewrite dynamic quantization so that each row (token) has its own scale, instead of one for the whole batch.

x (..., K) -+-> least and greatest of each row, 0 included -> scale s and zero point z, (..., 1) ----------+
            +-> round(x / s) + z, uint8 -> MatMulIntegerToFloat(the file's own weights) -> + (128 - z) c -> * s

c_n = (weights' scale)_n * sum_k (w_kn - weights' zero point_n), because the kernel takes one zero point for all rows
(128), and sum_k (q - z)(w - zw) = sum_k (q - 128)(w - zw) + (128 - z) sum_k (w - zw). A row's scale depends on that row
alone, integer sums are exact, and everything else is elementwise: neither the rest of the batch nor padding can change
a row. Source: ONNX, DynamicQuantizeLinear, applied to the last axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.nodes import NodeBuilder, remove_unused_initializers, replace_node
from attnserve_server.conversion.graphs.walk import dimension_of
from attnserve_server.conversion.precision.dynamic_quantizers import Quantizer, quantizers_of
from attnserve_server.conversion.precision.quantizer_uses import Use
from attnserve_server.model.report import LeftQuantizer, RequantizeReport

Scheme = Literal["per-row"]
"""How `prepare --requantize` rewrites dynamic quantizers."""
_CENTRE = 128
"""The zero point that the kernel gets for all rows: it halves the integer sums, so that float32 holds more of them."""
_LEVELS = 255
_LEAST_GREATEST = 1e-20
"""Keeps a row of zeros from being divided by 0; far below the scale of any other row."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Activations as uint8 (..., K), and for each row, float32 (..., 1), its scale and 128 - its zero point."""

    numbers: ir.Value
    scale: ir.Value
    shift: ir.Value


def with_scale_per_row(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, RequantizeReport]:
    """Copy a graph and give its dynamic quantizers one scale and zero point per row; weights stay bit for bit the same.

    Args:
        proto: the source, of opset 11 or later.

    Returns:
        The copy, and the report: which quantizers were rewritten, and why the others were not.

    Raises:
        BuildRefused: the source has no dynamic quantizer, or none can be rewritten.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    model = ir.from_proto(copy)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    found = quantizers_of(model.graph)
    if not found:
        raise BuildRefused(
            "--requantize per-row: the file has no dynamic quantizer (DynamicQuantizeLinear or DynamicQuantizeMatMul); "
            "prepare it without the option"
        )
    left = [quantizer for quantizer in found if quantizer.reason]
    if len(left) == len(found):
        raise BuildRefused(
            f"--requantize per-row: none of the {len(found)} dynamic quantizers can take one scale per row; "
            f"{left[0].name}: {left[0].reason}. Prepare the file without the option: its sequences then run alone"
        )
    rows: dict[ir.Value, _Rows] = {}
    for quantizer in found:
        if not quantizer.reason:
            _rewrite(model.graph, quantizer, rows)
    model.opset_imports.setdefault("com.microsoft", 1)
    remove_unused_initializers(model.graph)
    return ir.to_proto(model), RequantizeReport(
        rewritten=sum(quantizer.rounds for quantizer in found if not quantizer.reason),
        unrounded=sum(not quantizer.rounds for quantizer in found if not quantizer.reason),
        left=tuple(LeftQuantizer(node=quantizer.name, reason=quantizer.reason) for quantizer in left),
    )


def column_sums(use: Use) -> npt.NDArray[np.float32]:
    """Return c, what one level of zero point adds to each column: (N,), or (..., 1, N) of weights with more axes."""
    assert use.weights is not None
    assert use.weights.const_value is not None
    weights = use.weights.const_value.numpy().astype(np.int64)
    zero_point, scale = (_constant(value) for value in (use.zero_point, use.scale))
    centred = weights - (0 if zero_point is None else zero_point.astype(np.int64))
    sums = centred.sum(axis=-2, keepdims=weights.ndim > 2)
    made: npt.NDArray[np.float32] = (sums * (1.0 if scale is None else scale.astype(np.float64))).astype(np.float32)
    return made


def _constant(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _rewrite(graph: ir.Graph, quantizer: Quantizer, rows: dict[ir.Value, _Rows]) -> None:
    """Rewrite all uses of a quantizer. Quantizers of one value share its rounded rows, which `rows` keeps."""
    if quantizer.node.graph is not graph:
        return  # a MatMul of two activations, which was rewritten with the other one's quantizer
    source = quantizer.source
    if quantizer.rounds and source not in rows:
        builder = _builder(graph, quantizer.node, "per_row.rows")
        rows[source] = _rounded(builder, source, _width_of(quantizer))
        builder.place_before(quantizer.node)
    for use in quantizer.uses:
        if use.nodes[0].graph is not graph:
            continue  # as above
        builder = _builder(graph, use.nodes[0], "per_row")
        if use.activations is not None:
            result = _in_float32(builder, use)
        elif use.weights is not None:
            result = _product(builder, use, rows[source])
        else:
            result = _dequantized(builder, rows[source])
        builder.place_before(use.nodes[0])
        replace_node(use.nodes[0], result)
        for node in use.nodes[1:]:
            if node.graph is graph and not any(output.uses() for output in node.outputs):
                graph.remove(node, safe=True)
    if quantizer.node.graph is graph:
        graph.remove(quantizer.node, safe=True)


def _builder(graph: ir.Graph, node: ir.Node, what: str) -> NodeBuilder:
    """Return a builder of nodes that belong to the module of the node they replace."""
    return NodeBuilder(graph, f"{node.outputs[0].name}.{what}.", metadata=node.metadata_props)


def _product(builder: NodeBuilder, use: Use, rows: _Rows) -> ir.Value:
    """Multiply rounded rows by the file's own weights: float32 (..., N)."""
    one = builder.number(1.0)
    scale = _constant(use.scale)
    operands = [
        rows.numbers,
        _unshared(builder, use.weights, "weights"),
        one,
        one if scale is None else use.scale,
        builder.number(_CENTRE, ir.DataType.UINT8),
        _unshared(builder, use.zero_point, "zero_point"),
    ]
    product = builder.op("MatMulIntegerToFloat", operands, domain="com.microsoft")
    sums = builder.stored(f"{builder.prefix}column_sums", column_sums(use))
    result = builder.op("Mul", [builder.op("Add", [product, builder.op("Mul", [rows.shift, sums])]), rows.scale])
    return result if use.bias is None else builder.op("Add", [result, use.bias])


def _unshared(builder: NodeBuilder, value: ir.Value | None, what: str) -> ir.Value | None:
    """Return weights or their zero point; a copy, where several nodes share signed ones.

    Without VNNI the runtime makes signed weights unsigned, so that sums do not saturate, and fails where several nodes
    share them (onnxruntime 1.32; findings/x64quantprecision_shared_weights.sh). It packs weights for each node in any
    case, so that a copy costs no memory at run time.
    """
    if value is None or len(list(value.uses())) == 1:
        return value
    assert value.const_value is not None
    if value.const_value.dtype is ir.DataType.UINT8:
        return value
    return builder.stored(f"{builder.prefix}{what}", value.const_value.numpy())


def _in_float32(builder: NodeBuilder, use: Use) -> ir.Value:
    """Multiply two activations in float32, (..., M, N): the columns of the second would need a scale each.

    In weights @ value such a scale would span positions.
    """
    assert use.activations is not None
    result = builder.op("MatMul", use.activations)
    return result if use.bias is None else builder.op("Add", [result, use.bias])


def _dequantized(builder: NodeBuilder, rows: _Rows) -> ir.Value:
    """Return rounded rows as float32 (..., K) again: (q - zero point) * scale."""
    numbers = builder.op("Cast", [rows.numbers], to=ir.DataType.FLOAT.value)
    centred = builder.op("Sub", [numbers, builder.number(float(_CENTRE))])
    return builder.op("Mul", [builder.op("Add", [centred, rows.shift]), rows.scale])


def _width_of(quantizer: Quantizer) -> int:
    """Return K, the length of a row, by the weights or by the last axis of the activations."""
    for use in quantizer.uses:
        if use.weights is not None and use.weights.const_value is not None:
            shape: tuple[int, ...] = use.weights.const_value.numpy().shape
            return shape[-2]
    width = dimension_of(quantizer.source, -1)
    assert width is not None
    return width


def _rounded(builder: NodeBuilder, source: ir.Value, width: int) -> _Rows:
    """Round each row of a value as DynamicQuantizeLinear rounds a whole tensor."""
    zero, levels = builder.number(0.0), builder.number(float(_LEVELS))
    greatest = builder.op("Max", [builder.reduce("ReduceMax", source, -1), builder.number(_LEAST_GREATEST)])
    least = builder.op("Min", [builder.reduce("ReduceMin", source, -1), zero])
    scale = builder.op("Div", [builder.op("Sub", [greatest, least]), levels])
    # Minus the zero point. The standard has it saturate; the division alone stays within rounding of the same bounds,
    # but the proof of batching cannot know that.
    limits = [builder.number(float(-_LEVELS)), zero]
    offset = builder.op("Round", [builder.op("Clip", [builder.op("Div", [least, scale]), *limits])])
    shift = builder.op("Add", [offset, builder.number(float(_CENTRE))])
    if not builder.has("QuantizeLinear with a scale for each row"):
        moved = builder.op("Sub", [builder.op("Round", [builder.op("Div", [source, scale])]), offset])
        clipped = builder.op("Clip", [moved, zero, levels])
        return _Rows(builder.op("Cast", [clipped], to=ir.DataType.UINT8.value), scale, shift)
    zero_point = builder.op("Cast", [builder.op("Neg", [offset])], to=ir.DataType.UINT8.value)
    scales, zero_points = (builder.op("Reshape", [value, builder.ints(-1)]) for value in (scale, zero_point))
    if source.shape is not None and len(source.shape) == 2:
        return _Rows(builder.op("QuantizeLinear", [source, scales, zero_points], axis=0), scale, shift)
    in_rows = builder.op("Reshape", [source, builder.ints(-1, width)])
    numbers = builder.op("QuantizeLinear", [in_rows, scales, zero_points], axis=0)
    return _Rows(builder.op("Reshape", [numbers, builder.op("Shape", [source])]), scale, shift)
