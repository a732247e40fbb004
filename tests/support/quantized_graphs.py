"""Graphs with dynamic quantization, as quantizers and onnxruntime's optimizer write them, and their float64 results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from attnserve_server.conversion.graphs.reading import checked
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH, COLUMNS = 48, 32
FORMS = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
node = helper.make_node


def model_of(
    nodes: Sequence[onnx.NodeProto],
    arrays: Mapping[str, Array],
    *,
    x: Sequence[str | int] = ("batch", "seq", WIDTH),
    y: Sequence[str | int | None] | None = ("batch", "seq", COLUMNS),
    opset: int = 17,
) -> onnx.ModelProto:
    """A checked model with the float32 input `x` and the float32 output `y`."""
    graph = helper.make_graph(
        list(nodes),
        "quantized",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return checked(helper.make_model(graph, opset_imports=imports, ir_version=8), "quantized")


def weights_of(dtype: type = np.int8, *, per_channel: bool = True) -> dict[str, Array]:
    """Rounded weights (K, N) with their scale and zero point, of one or of each column, and a bias."""
    rng = np.random.default_rng(5)
    limits = np.iinfo(dtype)
    columns = (COLUMNS,) if per_channel else ()
    return {
        "w": rng.integers(limits.min, limits.max + 1, (WIDTH, COLUMNS)).astype(dtype),
        "w_scale": rng.uniform(0.001, 0.01, columns).astype(np.float32),
        "w_zero": (rng.integers(-9, 9, columns) + (120 if dtype is np.uint8 else 0)).astype(dtype),
        "bias": rng.normal(size=COLUMNS).astype(np.float32),
    }


def product(form: str = FORMS[0], *, opset: int = 17, arrays: Mapping[str, Array] | None = None) -> onnx.ModelProto:
    """x (B, T, K), rounded dynamically, times weights (K, N), plus a bias. KeyError for a form outside `FORMS`."""
    quantized = node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="/x/quantize")
    nodes = {
        "MatMulInteger": [
            quantized,
            node("Mul", ["s", "w_scale"], ["scales"]),
            node("MatMulInteger", ["q", "w", "z", "w_zero"], ["sums"]),
            node("Cast", ["sums"], ["cast"], to=TensorProto.FLOAT),
            node("Mul", ["cast", "scales"], ["product"]),
            node("Add", ["product", "bias"], ["y"]),
        ],
        "MatMulIntegerToFloat": [
            quantized,
            node(
                "MatMulIntegerToFloat", ["q", "w", "s", "w_scale", "z", "w_zero", "bias"], ["y"], domain="com.microsoft"
            ),
        ],
        "DynamicQuantizeMatMul": [
            node("DynamicQuantizeMatMul", ["x", "w", "w_scale", "w_zero", "bias"], ["y"], domain="com.microsoft")
        ],
    }[form]
    return model_of(nodes, arrays or weights_of(), opset=opset)


def rounded_rows(x: Array) -> tuple[Array, Array, Array]:
    """DynamicQuantizeLinear of each row, in float64: numbers (..., K), scale and zero point (..., 1).

    Source: ONNX, DynamicQuantizeLinear: the range includes 0; ties are rounded to even.
    """
    wide = x.astype(np.float64)
    greatest, least = np.maximum(wide.max(-1, keepdims=True), 0), np.minimum(wide.min(-1, keepdims=True), 0)
    scale = np.where(greatest == least, 1.0, (greatest - least) / 255)
    zero_point = np.clip(np.rint(-least / scale), 0, 255)
    return np.clip(np.rint(wide / scale) + zero_point, 0, 255), scale, zero_point


def exact_product(x: Array, arrays: Mapping[str, Array]) -> Array:
    """Return the output of `product` in float64, with a separate scale for each row."""
    numbers, scale, zero_point = rounded_rows(x)
    weights = arrays["w"].astype(np.float64) - arrays["w_zero"].astype(np.float64)
    made: Array = (numbers - zero_point) @ weights * arrays["w_scale"].astype(np.float64) * scale + arrays["bias"]
    return made


def encoder(opset: int = 17, *, width: int = 32, heads: int = 4, layers: int = 2) -> onnx.ModelProto:
    """BERT in float32, as exporters take it apart: ids and mask (B, T) to `last_hidden_state` (B, T, W)."""
    rng = np.random.default_rng(2)
    arrays: dict[str, Array] = {
        "words": rng.normal(size=(60, width)),
        "gain": np.ones(width),
        "offset": np.zeros(width),
        "one": np.array(1.0),
        "lowest": np.array(np.finfo(np.float32).min),
        "root": np.array(np.sqrt(width // heads)),
    }
    indices = {
        "axes": np.array([1, 2]),
        "split": np.array([0, 0, heads, width // heads]),
        "join": np.array([0, 0, width]),
    }
    nodes: list[onnx.NodeProto] = []

    def op(operator: str, *inputs: str, named: str = "", **attributes: Any) -> str:
        output = named or f"{operator}_{len(nodes)}"
        nodes.append(node(operator, list(inputs), [output], name=f"/{output}", **attributes))
        return output

    def linear(x: str, name: str, *shape: int) -> str:
        arrays[f"{name}.weight"] = rng.normal(0, shape[0] ** -0.5, shape)
        arrays[f"{name}.bias"] = rng.normal(0, 0.1, shape[1])
        return op("Add", op("MatMul", x, f"{name}.weight"), f"{name}.bias")

    hidden = op("LayerNormalization", op("Gather", "words", "input_ids"), "gain", "offset", axis=-1)
    hide = op("Mul", op("Sub", "one", op("Cast", "attention_mask", to=TensorProto.FLOAT)), "lowest")
    mask = op("Unsqueeze", hide, "axes")
    for layer in range(layers):
        query, key, value = (
            op("Transpose", op("Reshape", linear(hidden, f"{layer}.{part}", width, width), "split"), perm=perm)
            for part, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
        )
        scores = op("Add", op("Div", op("MatMul", query, key), "root"), mask)
        mixed = op("Transpose", op("MatMul", op("Softmax", scores, axis=-1), value), perm=[0, 2, 1, 3])
        attended = linear(op("Reshape", mixed, "join"), f"{layer}.out", width, width)
        hidden = op("LayerNormalization", op("Add", hidden, attended), "gain", "offset", axis=-1)
        narrow = linear(
            op("Relu", linear(hidden, f"{layer}.wide", width, 4 * width)), f"{layer}.narrow", 4 * width, width
        )
        hidden = op("LayerNormalization", op("Add", hidden, narrow), "gain", "offset", axis=-1)
    op("Identity", hidden, named="last_hidden_state")
    graph = helper.make_graph(
        nodes,
        "encoder",
        [
            helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "seq"])
            for n in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "seq", width])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
        + [numpy_helper.from_array(array, name) for name, array in indices.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def dynamically_quantized(model: onnx.ModelProto, path: Path, **options: Any) -> Path:
    """The file that onnxruntime's `quantize_dynamic` makes of a model; it is what optimum calls too.

    `options`: further arguments of `quantize_dynamic`. The model itself is saved beside `path`.
    """
    from onnxruntime.quantization import quantize_dynamic  # noqa: PLC0415 - heavy

    source = path.with_suffix(".source.onnx")
    onnx.save(model, source)
    quantize_dynamic(source, path, **options)
    return path
