"""Products with constant weights in eight bits: weights rounded per output channel, activations per row as they come.

x (..., K) -+-> greatest |x| of each row -> scale (..., 1) ----------------------------------+
            +-> / scale, rounded to uint8 -> MatMulIntegerToFloat(weights, their scales) -> * scale -> (..., N)

A row's scale depends on that row alone, so neither batch mates nor padding can change an answer. That is why the
products are rewritten here: onnxruntime's own `quantize_dynamic` takes one scale for the whole batch, and its blockwise
`MatMulNBits` does not but is no faster than float32 where a batch has more than a few rows. Both were measured:
docs/explanation/precision.md.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from attnserve_server.conversion.precision.calibrated import (
    Normalisation,
    Ranges,
    bias_behind,
    factors_of,
    normalisation_of,
)
from attnserve_server.conversion.precision.nodes import FIRST_AXIS_OPSET, Builder
from attnserve_server.domain.values import Array

WEIGHT_ERROR_LIMIT = 0.1
"""The greatest error of a rounded weight, in parts of a typical one: normal ones have 0.012, MiniLM's to 0.035. With
more, a few weights far beyond the others leave too few steps for the rest, and the product stays in float32."""
_LEAST_WIDTH = 16
"""A product over fewer numbers is over before its rows are rounded."""
_STEPS = 127
"""Symmetric, so that 0 stays 0 and the zero point is the same for every row."""
_ZERO_POINT = 128
"""Unsigned activations with signed weights: the pair that processors multiply at once (VNNI, and its like on ARM)."""
_GELU_DEPTH = 0.171
"""Gelu goes no further below 0, so only its greatest number has to be looked for."""


def quantized(model: ir.Model, ranges: Ranges = MappingProxyType({})) -> ir.Model:
    """Rewrite, in place, every product with constant float32 weights that rounding does not hurt.

    Args:
        model: its opset is 11 or later.
        ranges: of normalised values, as they were seen; products of these take one step for all rows.

    Returns:
        The same model; the same object.
    """
    LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=_LEAST_WIDTH)(model)
    graph = model.graph
    for node in [node for node in graph if node.op_type == "Gemm" and _is_product_and_bias(node)]:
        _take_apart(graph, node)
    rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in list(graph):
        weights = _weights(node)
        if weights is None:
            continue
        if relative_error(weights, *rounded_per_channel(weights)) > WEIGHT_ERROR_LIMIT:
            continue
        source = node.inputs[0]
        assert source is not None
        known = normalisation_of(source) if str(source.name) in ranges else None
        if known is None:
            _replace(graph, node, *rounded_per_channel(weights), rows)
        else:
            _replace_known(graph, node, weights, known, ranges[str(source.name)], rows)
    model.opset_imports.setdefault("com.microsoft", 1)
    for value in [value for value in graph.initializers.values() if not value.uses() and not value.is_graph_output()]:
        del graph.initializers[str(value.name)]
    return model


def rounded_per_channel(weights: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Weights (K, N) as int8 (K, N), and the step of each output channel, float32 (N,)."""
    steps = np.abs(weights).max(axis=0).astype(np.float32) / np.float32(_STEPS)
    steps[steps == 0] = 1
    return np.clip(np.rint(weights / steps), -_STEPS, _STEPS).astype(np.int8), steps


def relative_error(weights: Array, rounded: Array, steps: Array) -> float:
    """How far the rounded weights are from the true ones (root mean square), in parts of a typical one of these.

    Typical is the median of those that are not 0: a few weights far beyond the others would hide what they do to them.
    """
    wide = np.abs(weights.astype(np.float64))
    if not wide.any():
        return 0.0
    error = rounded * steps.astype(np.float64) - weights
    return float(np.sqrt(np.mean(error**2)) / np.median(wide[wide > 0]))


def _is_product_and_bias(node: ir.Node) -> bool:
    """Whether a `Gemm` is x @ weights + bias, as GPT-2's products are: nothing is scaled, and x is not transposed."""
    scaled = any(node.attributes.get_float(name, 1.0) != 1 for name in ("alpha", "beta"))
    weights = node.inputs[1]
    constant = weights is not None and weights.const_value is not None and not weights.is_graph_input()
    return constant and not scaled and not node.attributes.get_int("transA", 0)


def _take_apart(graph: ir.Graph, node: ir.Node) -> None:
    """Put a product and a sum in the place of a `Gemm`."""
    source, weights, *bias = node.inputs
    assert source is not None
    assert weights is not None
    builder = Builder(graph, node, "int8")
    if node.attributes.get_int("transB", 0):
        assert weights.const_value is not None
        turned = np.ascontiguousarray(weights.const_value.numpy().T)
        weights = builder.stored(f"{builder.base}.turned", turned)
    result = builder.op("MatMul", [source, weights])
    output = node.outputs[0]
    if bias and bias[0] is not None:
        result.shape, result.type = output.shape, output.type
        result = builder.op("Add", [result, bias[0]])
    builder.replace(node, result)


def _weights(node: ir.Node) -> Array | None:
    """The constant weights (K, N) of a product that can be rewritten; None where it cannot."""
    if node.op_type != "MatMul" or node.domain not in {"", "ai.onnx"}:
        return None
    first, second = node.inputs
    if first is None or second is None or second.const_value is None or second.is_graph_input():
        return None
    if second.const_value.dtype is not ir.DataType.FLOAT or len(second.const_value.shape) != 2:
        return None
    weights = second.const_value.numpy()
    return weights if weights.shape[0] >= _LEAST_WIDTH and np.isfinite(weights).all() else None


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    rounded: npt.NDArray[np.int8],
    steps: npt.NDArray[np.float32],
    rows: dict[ir.Value, tuple[ir.Value, ir.Value]],
) -> None:
    """Put the integer product in a node's place. Products of one input share its rounded rows, which `rows` keeps."""
    builder = Builder(graph, node, "int8")
    source = node.inputs[0]
    assert source is not None
    if source not in rows:
        rows[source] = _rounded_rows(builder, source, rounded.shape[0])
    numbers, scale = rows[source]
    product = builder.op(
        "MatMulIntegerToFloat",
        [
            numbers,
            builder.stored(f"{builder.base}.weights", rounded),
            builder.stored("int8.one", np.array(1, np.float32)),
            builder.stored(f"{builder.base}.steps", steps),
            builder.stored("int8.zero_point", np.array(_ZERO_POINT, np.uint8)),
        ],
        domain="com.microsoft",
    )
    builder.replace(node, builder.op("Mul", [product, scale]))


def _replace_known(
    graph: ir.Graph,
    node: ir.Node,
    weights: Array,
    known: Normalisation,
    seen: Array,
    rows: dict[ir.Value, tuple[ir.Value, ir.Value]],
) -> None:
    """Put the integer product of a normalised value in a node's place, and its bias into the product."""
    source = node.inputs[0]
    assert source is not None
    builder = Builder(graph, node, "int8")
    if source not in rows:
        products = [use.node for use in source.uses()]
        all_weights = [own for own in map(_weights, products) if own is not None]
        factors = factors_of(seen, all_weights)
        operands = [
            known.node.inputs[0],
            builder.stored(f"{builder.base}.gain", (known.gain / factors).astype(np.float32)),
            builder.stored(f"{builder.base}.offset", (known.offset / factors).astype(np.float32)),
        ]
        assert operands[0] is not None
        scaled = ir.node("LayerNormalization", operands, name=f"{builder.base}.normalised")
        scaled.attributes.update(known.node.attributes)
        scaled.outputs[0].name = f"{builder.base}.normalised"
        graph.insert_before(node, scaled)
        one = builder.stored("int8.one", np.array(1, np.float32))
        zero_point = builder.stored("int8.zero_point", np.array(_ZERO_POINT, np.uint8))
        numbers = builder.op("QuantizeLinear", [scaled.outputs[0], one, zero_point])
        rows[source] = (numbers, builder.stored(f"{builder.base}.factors", factors))
    numbers, kept = rows[source]
    assert kept.const_value is not None
    rounded, steps = rounded_per_channel(weights * kept.const_value.numpy()[:, None])
    operands = [
        numbers,
        builder.stored(f"{builder.base}.weights", rounded),
        builder.stored("int8.one", np.array(1, np.float32)),
        builder.stored(f"{builder.base}.steps", steps),
        builder.stored("int8.zero_point", np.array(_ZERO_POINT, np.uint8)),
    ]
    biased = bias_behind(node)
    last = node if biased is None else biased[0]
    if biased is not None:
        operands += [None, biased[1]]
    result = builder.op("MatMulIntegerToFloat", operands, domain="com.microsoft")
    builder.replace(last, result)
    if last is not node:
        graph.remove(node, safe=True)


def _rounded_rows(builder: Builder, source: ir.Value, width: int) -> tuple[ir.Value, ir.Value]:
    """A value's rows as uint8 (..., K), and each row's scale, float32 (..., 1)."""
    highest = builder.extreme("ReduceMax", source)
    maker = source.producer()
    if maker is not None and maker.op_type == "Gelu":
        greatest = builder.op("Max", [highest, builder.stored("int8.gelu", np.array(_GELU_DEPTH, np.float32))])
    else:
        # The floor keeps a row of zeros from being divided by 0. Two reductions take less time than one of |x|, which
        # would have to be written first.
        floor = builder.stored("int8.floor", np.array(1e-20, np.float32))
        greatest = builder.op("Max", [highest, builder.op("Neg", [builder.extreme("ReduceMin", source)]), floor])
    scale = builder.op("Mul", [greatest, builder.stored("int8.step", np.array(1 / _STEPS, np.float32))])
    zero_point = builder.stored("int8.zero_point", np.array(_ZERO_POINT, np.uint8))
    if builder.opset < FIRST_AXIS_OPSET:
        one = builder.stored("int8.one", np.array(1, np.float32))
        return builder.op("QuantizeLinear", [builder.op("Div", [source, scale]), one, zero_point]), scale
    flat = builder.op("Reshape", [source, builder.stored(f"int8.rows_of_{width}", np.array([-1, width]))])
    scales = builder.op("Reshape", [scale, builder.stored("int8.flat", np.array([-1]))])
    zero_points = builder.op("Expand", [zero_point, builder.op("Shape", [scales])])
    numbers = builder.op("QuantizeLinear", [flat, scales, zero_points], axis=0)
    return builder.op("Reshape", [numbers, builder.op("Shape", [source])]), scale
