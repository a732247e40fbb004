"""Rewrite MatMuls with constant weights to int8: a scale for each output channel, and for each row of activations.

x (..., K) -+-> greatest |x| of each row -> scale (..., 1) ----------------------------------+
            +-> / scale, rounded to uint8 -> MatMulIntegerToFloat(weights, their scales) -> * scale -> (..., N)

A row's scale depends on that row alone, so neither batch neighbours nor padding can change an answer. onnxruntime's
`quantize_dynamic` takes one scale for the whole batch (findings/dynamic_quantization_one_scale.sh), and its blockwise
`MatMulNBits` is no faster than float32 where a batch has more than a few rows: docs/explanation/precision.md has both
measurements.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from attnserve_server.conversion.graphs.nodes import NodeBuilder, remove_unused_initializers, replace_node
from attnserve_server.conversion.graphs.walk import is_fixed, is_standard
from attnserve_server.conversion.precision.calibration import Normalization, Ranges, factors_of, normalization_of
from attnserve_server.domain.values import Array

WEIGHT_ERROR_LIMIT = 0.1
"""The greatest root-mean-square error of rounded weights, over the median |weight|: normal weights have 0.012, MiniLM's
at most 0.035. Above it, a few large weights leave too few levels for the rest, and the MatMul stays in float32."""
_LEAST_WIDTH = 16
"""A MatMul over fewer numbers takes less time than rounding its rows."""
_LEVELS = 127
"""Symmetric, so that 0 stays 0 and the zero point is the same for every row."""
_ZERO_POINT = 128
"""Of unsigned activations; with signed weights they are the pair that VNNI, and its counterpart on ARM, multiply."""
_GELU_DEPTH = 0.171
"""The greatest |x| of negative results of Gelu, so that only its greatest result has to be found."""


def quantized(model: ir.Model, ranges: Ranges = MappingProxyType({})) -> ir.Model:
    """Rewrite, in place, every MatMul with constant float32 weights whose rounding error is below the limit.

    Args:
        model: its opset is 11 or later.
        ranges: of calibrated values; MatMuls that take these get one scale for all rows.

    Returns:
        The same object.
    """
    LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=_LEAST_WIDTH)(model)
    graph = model.graph
    for node in [node for node in graph if node.op_type == "Gemm" and _is_matmul_and_bias(node)]:
        _take_apart(node)
    rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in list(graph):
        weights = _weights(node)
        if weights is None:
            continue
        if relative_error(weights, *rounded_per_channel(weights)) > WEIGHT_ERROR_LIMIT:
            continue
        source = node.inputs[0]
        assert source is not None
        normalization = normalization_of(source) if str(source.name) in ranges else None
        if normalization is None:
            _replace(node, *rounded_per_channel(weights), rows)
        else:
            _replace_calibrated(node, weights, normalization, ranges[str(source.name)], rows)
    model.opset_imports.setdefault("com.microsoft", 1)
    remove_unused_initializers(graph)
    return model


def rounded_per_channel(weights: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Return weights (K, N) as int8 (K, N), and the scale of each output channel, float32 (N,)."""
    scales = np.abs(weights).max(axis=0).astype(np.float32) / np.float32(_LEVELS)
    scales[scales == 0] = 1
    return np.clip(np.rint(weights / scales), -_LEVELS, _LEVELS).astype(np.int8), scales


def relative_error(weights: Array, rounded: Array, scales: Array) -> float:
    """Return the root-mean-square error of rounded weights, over the median of the |weights| that are not 0.

    The median, because a few large weights would hide what rounding does to the others.
    """
    wide = np.abs(weights.astype(np.float64))
    if not wide.any():
        return 0.0
    error = rounded * scales.astype(np.float64) - weights
    return float(np.sqrt(np.mean(error**2)) / np.median(wide[wide > 0]))


def _is_matmul_and_bias(node: ir.Node) -> bool:
    """Return whether a `Gemm` is x @ weights + bias, as GPT-2's are: without scaling, and x is not transposed."""
    scaled = any(node.attributes.get_float(name, 1.0) != 1 for name in ("alpha", "beta"))
    return is_fixed(node.inputs[1]) and not scaled and not node.attributes.get_int("transA", 0)


def _take_apart(node: ir.Node) -> None:
    """Replace a `Gemm` by MatMul and Add."""
    source, weights, *bias = node.inputs
    assert source is not None
    assert weights is not None
    builder = _builder(node)
    if node.attributes.get_int("transB", 0):
        assert weights.const_value is not None
        transposed = np.ascontiguousarray(weights.const_value.numpy().T)
        weights = builder.stored(f"{builder.prefix}transposed", transposed)
    result = builder.op("MatMul", [source, weights])
    output = node.outputs[0]
    if bias and bias[0] is not None:
        result.shape, result.type = output.shape, output.type
        result = builder.op("Add", [result, bias[0]])
    builder.place_before(node)
    replace_node(node, result)


def _builder(node: ir.Node) -> NodeBuilder:
    """Return a builder of nodes that belong to the module of the node they replace."""
    assert isinstance(node.graph, ir.Graph)
    return NodeBuilder(node.graph, f"{node.outputs[0].name}.int8.", metadata=node.metadata_props)


def _weights(node: ir.Node) -> Array | None:
    """Return the constant weights (K, N) of a MatMul that can be rewritten; None where it cannot."""
    if node.op_type != "MatMul" or not is_standard(node):
        return None
    first, second = node.inputs
    if first is None or second is None or second.const_value is None or second.is_graph_input():
        return None
    if second.const_value.dtype is not ir.DataType.FLOAT or len(second.const_value.shape) != 2:
        return None
    weights = second.const_value.numpy()
    return weights if weights.shape[0] >= _LEAST_WIDTH and np.isfinite(weights).all() else None


def _replace(
    node: ir.Node,
    rounded: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
    rows: dict[ir.Value, tuple[ir.Value, ir.Value]],
) -> None:
    """Replace a MatMul by its integer form. MatMuls of one input share its rounded rows, which `rows` keeps."""
    builder = _builder(node)
    source = node.inputs[0]
    assert source is not None
    if source not in rows:
        rows[source] = _rounded_rows(builder, source, rounded.shape[0])
    numbers, scale = rows[source]
    product = builder.op("MatMulIntegerToFloat", _operands(builder, numbers, rounded, scales), domain="com.microsoft")
    result = builder.op("Mul", [product, scale])
    builder.place_before(node)
    replace_node(node, result)


def _operands(
    builder: NodeBuilder, numbers: ir.Value, rounded: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]
) -> list[ir.Value]:
    """Return the first five inputs of MatMulIntegerToFloat; the activations' scale of 1 is multiplied in later."""
    return [
        numbers,
        builder.stored(f"{builder.prefix}weights", rounded),
        builder.number(1.0),
        builder.stored(f"{builder.prefix}scales", scales),
        builder.number(_ZERO_POINT, ir.DataType.UINT8),
    ]


def _replace_calibrated(
    node: ir.Node,
    weights: Array,
    normalization: Normalization,
    reach: Array,
    rows: dict[ir.Value, tuple[ir.Value, ir.Value]],
) -> None:
    """Replace a MatMul of a calibrated value, and the Add of its bias, by the integer form."""
    source = node.inputs[0]
    assert source is not None
    builder = _builder(node)
    if source not in rows:
        all_weights = [own for own in (_weights(use.node) for use in source.uses()) if own is not None]
        factors = factors_of(reach, all_weights)
        operands = [
            normalization.node.inputs[0],
            builder.stored(f"{builder.prefix}gain", (normalization.gain / factors).astype(np.float32)),
            builder.stored(f"{builder.prefix}offset", (normalization.offset / factors).astype(np.float32)),
        ]
        [scaled] = builder.outputs_of("LayerNormalization", operands, 1, normalization.node.attributes)
        quantize = [scaled, builder.number(1.0), builder.number(_ZERO_POINT, ir.DataType.UINT8)]
        rows[source] = (
            builder.op("QuantizeLinear", quantize),
            builder.stored(f"{builder.prefix}factors", factors),
        )
    numbers, kept = rows[source]
    assert kept.const_value is not None
    rounded, scales = rounded_per_channel(weights * kept.const_value.numpy()[:, None])
    biased = _bias_behind(node)
    bias = [] if biased is None else [None, biased[1]]
    result = builder.op(
        "MatMulIntegerToFloat", [*_operands(builder, numbers, rounded, scales), *bias], domain="com.microsoft"
    )
    builder.place_before(node)
    if biased is None:
        replace_node(node, result)
        return
    replace_node(biased[0], result)
    assert isinstance(node.graph, ir.Graph)
    node.graph.remove(node, safe=True)


def _bias_behind(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """Return the Add of a constant row behind a MatMul, and that row; None where another node reads the MatMul."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0].node.op_type != "Add":
        return None
    addition = uses[0].node
    other = addition.inputs[1 - uses[0].idx]
    if other is None or other.const_value is None or len(other.const_value.shape) != 1:
        return None
    weights = node.inputs[1]
    assert weights is not None
    assert weights.const_value is not None
    return (addition, other) if other.const_value.shape[0] == weights.const_value.shape[1] else None


def _rounded_rows(builder: NodeBuilder, source: ir.Value, width: int) -> tuple[ir.Value, ir.Value]:
    """Return a value's rows as uint8 (..., K), and the scale of each row, float32 (..., 1)."""
    highest = builder.reduce("ReduceMax", source, -1)
    maker = source.producer()
    if maker is not None and maker.op_type == "Gelu":
        greatest = builder.op("Max", [highest, builder.number(_GELU_DEPTH)])
    else:
        # The floor keeps a row of zeros from being divided by 0. Two reductions take less time than one of |x|, which
        # would have to be written to memory first.
        lowest = builder.reduce("ReduceMin", source, -1)
        greatest = builder.op("Max", [highest, builder.op("Neg", [lowest]), builder.number(1e-20)])
    scale = builder.op("Mul", [greatest, builder.number(1 / _LEVELS)])
    zero_point = builder.number(_ZERO_POINT, ir.DataType.UINT8)
    if not builder.has("QuantizeLinear with a scale for each row"):
        divided = builder.op("Div", [source, scale])
        return builder.op("QuantizeLinear", [divided, builder.number(1.0), zero_point]), scale
    flat = builder.op("Reshape", [source, builder.ints(-1, width)])
    scales = builder.op("Reshape", [scale, builder.ints(-1)])
    zero_points = builder.op("Expand", [zero_point, builder.op("Shape", [scales])])
    numbers = builder.op("QuantizeLinear", [flat, scales, zero_points], axis=0)
    return builder.op("Reshape", [numbers, builder.op("Shape", [source])]), scale
