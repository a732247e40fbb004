"""Dynamic quantization with one scale per row (token) in the place of one scale for the whole batch.

x (..., K) -+-> least and greatest of each row, 0 included -> scale s and zero point z, (..., 1) ----------+
            +-> round(x / s) + z, uint8 -> MatMulIntegerToFloat(the file's own weights) -> + (128 - z) c -> * s

c_n = (weights' scale)_n * sum_k (w_kn - weights' zero point_n), because the kernel takes one zero point for all rows
(128), and sum_k (q - z)(w - zw) = sum_k (q - 128)(w - zw) + (128 - z) sum_k (w - zw). Each row's scale comes from that
row alone, integer sums are exact, and everything else is by element: neither the rest of the batch nor padding can
change a row. Source: ONNX, DynamicQuantizeLinear, taken over the last axis.
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
from attnserve_server.conversion.precision.dynamic_quantizers import Quantizer, Use, quantizers_of, width_of
from attnserve_server.conversion.precision.nodes import FIRST_AXIS_OPSET, Builder
from attnserve_server.model.report import LeftQuantizer, RequantizeReport

Scheme = Literal["per-row"]
"""How `prepare --requantize` rewrites dynamic quantizers."""
_CENTRE = 128
"""The zero point that the kernel gets for all rows: it halves the integer sums, so that float32 holds more of them."""
_STEPS = 255
_LEAST_GREATEST = 1e-20
"""Keeps a row of zeros from being divided by 0; far below one step of any other row."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Activations as uint8 (..., K), and of each row, float32 (..., 1), the scale and 128 - zero point."""

    numbers: ir.Value
    scale: ir.Value
    shift: ir.Value


def with_scale_per_row(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, RequantizeReport]:
    """A graph whose dynamic quantizers take one scale and zero point per row; weights are the source's, bit for bit.

    Args:
        proto: the source, of opset 11 or later. It is left as it is.

    Returns:
        The rewritten graph, and which quantizers were rewritten and which were not.

    Raises:
        BuildRefused: the source has no dynamic quantizer, or none that can be rewritten.
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
    for value in [
        value for value in model.graph.initializers.values() if not value.uses() and not value.is_graph_output()
    ]:
        del model.graph.initializers[str(value.name)]
    return ir.to_proto(model), RequantizeReport(
        rewritten=sum(quantizer.rounds for quantizer in found if not quantizer.reason),
        unrounded=sum(not quantizer.rounds for quantizer in found if not quantizer.reason),
        left=tuple(LeftQuantizer(node=quantizer.name, reason=quantizer.reason) for quantizer in left),
    )


def column_sums(use: Use) -> npt.NDArray[np.float32]:
    """What a row's zero point adds to each column for each step: (N,), or (..., 1, N) of weights with more axes."""
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
        return  # a product of two activations, which the other one's quantizer has replaced
    source = quantizer.source
    if quantizer.rounds and source not in rows:
        rows[source] = _rounded(Builder(graph, quantizer.node, "per_row.rows"), source, width_of(quantizer))
    for use in quantizer.uses:
        if use.nodes[0].graph is not graph:
            continue  # as above
        builder = Builder(graph, use.nodes[0], "per_row")
        if use.activations is not None:
            result = _in_float32(builder, use)
        elif use.weights is not None:
            result = _product(builder, use, rows[source])
        else:
            result = _brought_back(builder, rows[source])
        builder.replace(use.nodes[0], result)
        for node in use.nodes[1:]:
            if node.graph is graph and not any(output.uses() for output in node.outputs):
                graph.remove(node, safe=True)
    if quantizer.node.graph is graph:
        graph.remove(quantizer.node, safe=True)


def _product(builder: Builder, use: Use, rows: _Rows) -> ir.Value:
    """The product of rounded rows and a file's own weights, float32 (..., N)."""
    one = builder.stored("per_row.one", np.array(1, np.float32))
    scale = _constant(use.scale)
    operands = [
        rows.numbers,
        _own(builder, use.weights, "weights"),
        one,
        one if scale is None else use.scale,
        builder.stored("per_row.centre", np.array(_CENTRE, np.uint8)),
        _own(builder, use.zero_point, "zero_point"),
    ]
    product = builder.op("MatMulIntegerToFloat", operands, domain="com.microsoft")
    sums = builder.stored(f"{builder.base}.column_sums", column_sums(use))
    result = builder.op("Mul", [builder.op("Add", [product, builder.op("Mul", [rows.shift, sums])]), rows.scale])
    return result if use.bias is None else builder.op("Add", [result, use.bias])


def _own(builder: Builder, value: ir.Value | None, what: str) -> ir.Value | None:
    """Weights or their zero point; a copy of signed ones that several nodes share.

    Without VNNI the runtime makes signed weights unsigned, so that products do not saturate, and fails to where several
    nodes share them (onnxruntime 1.32). It packs weights for each node in any case.
    """
    if value is None or len(list(value.uses())) == 1:
        return value
    assert value.const_value is not None
    if value.const_value.dtype is ir.DataType.UINT8:
        return value
    return builder.stored(f"{builder.base}.{what}", value.const_value.numpy())


def _in_float32(builder: Builder, use: Use) -> ir.Value:
    """A product of two activations, (..., M, N): the second has no rows along which a scale would be its own.

    A scale for each of its columns would span positions in weights @ value.
    """
    assert use.activations is not None
    result = builder.op("MatMul", use.activations)
    return result if use.bias is None else builder.op("Add", [result, use.bias])


def _brought_back(builder: Builder, rows: _Rows) -> ir.Value:
    """Rounded rows as float32 (..., K) again: (q - zero point) * scale."""
    numbers = builder.op("Cast", [rows.numbers], to=ir.DataType.FLOAT.value)
    centre = builder.stored("per_row.centre_float", np.array(_CENTRE, np.float32))
    return builder.op("Mul", [builder.op("Add", [builder.op("Sub", [numbers, centre]), rows.shift]), rows.scale])


def _rounded(builder: Builder, source: ir.Value, width: int) -> _Rows:
    """A value's rows as DynamicQuantizeLinear rounds a whole tensor."""
    greatest = builder.op(
        "Max",
        [builder.extreme("ReduceMax", source), builder.stored("per_row.least", np.array(_LEAST_GREATEST, np.float32))],
    )
    zero = builder.stored("per_row.zero", np.array(0, np.float32))
    least = builder.op("Min", [builder.extreme("ReduceMin", source), zero])
    steps = builder.stored("per_row.steps", np.array(_STEPS, np.float32))
    scale = builder.op("Div", [builder.op("Sub", [greatest, least]), steps])
    # Minus the zero point. The standard has it saturate; the division alone stays within rounding of the same bounds,
    # but the proof of batching cannot know that.
    farthest = builder.stored("per_row.farthest", np.array(-_STEPS, np.float32))
    offset = builder.op("Round", [builder.op("Clip", [builder.op("Div", [least, scale]), farthest, zero])])
    shift = builder.op("Add", [offset, builder.stored("per_row.centre_float", np.array(_CENTRE, np.float32))])
    if builder.opset < FIRST_AXIS_OPSET:
        steps_of = builder.op("Sub", [builder.op("Round", [builder.op("Div", [source, scale])]), offset])
        cut = builder.op("Clip", [steps_of, zero, steps])
        return _Rows(builder.op("Cast", [cut], to=ir.DataType.UINT8.value), scale, shift)
    zero_point = builder.op("Cast", [builder.op("Neg", [offset])], to=ir.DataType.UINT8.value)
    flat = builder.stored("per_row.flat", np.array([-1]))
    scales, zero_points = (builder.op("Reshape", [value, flat]) for value in (scale, zero_point))
    if source.shape is not None and len(source.shape) == 2:
        return _Rows(builder.op("QuantizeLinear", [source, scales, zero_points], axis=0), scale, shift)
    in_rows = builder.op("Reshape", [source, builder.stored(f"per_row.rows_of_{width}", np.array([-1, width]))])
    numbers = builder.op("QuantizeLinear", [in_rows, scales, zero_points], axis=0)
    return _Rows(builder.op("Reshape", [numbers, builder.op("Shape", [source])]), scale, shift)
