"""Attention between quantizers with constant scales, as static quantizers write it, and its numbers by definition.

    x (B, S, W) -> Q -> split heads -> [DQ] -> MatMul -> Q, DQ -> Softmax -> Q, DQ -> MatMul with x -> Q, DQ -> y

`QDQ` states each operator in floats between DequantizeLinear and QuantizeLinear; `QOperator` has QLinearMatMul and
QLinearSoftmax; `microsoft` is QDQ with onnxruntime's own quantizers. Queries, keys and values are x itself.
Source: ONNX operators, QuantizeLinear-13: ties round to even, and results saturate.

Another form than these three is built as `QDQ`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
FORMS = ("QDQ", "QOperator", "microsoft")
HEADS, HEAD_DIM = 2, 4
WIDTH = HEADS * HEAD_DIM
DOMAIN = "com.microsoft"
# By value: the scale, and the zero point of uint8; that of int8 is 128 less.
_QUANTIZERS = {"x": (0.02, 120), "scores": (0.05, 100), "weights": (1 / 256, 0), "product": (0.017, 131)}
_MASKED = -1000.0
"""What a mask adds to a hidden score, far below the least number that its quantizer represents."""


@dataclass(frozen=True, slots=True)
class Static:
    """One graph. `masked`: it takes `attention_mask` (B, S), whose zeros lower scores before these are quantized."""

    form: str = "QDQ"
    dtype: type = np.uint8
    masked: bool = False

    def model(self) -> onnx.ModelProto:
        """The graph: `x` float32 (B, S, W) to `y` float32 (B, S, W)."""
        nodes: list[onnx.NodeProto] = []

        def op(operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
            output = f"{operator}_{len(nodes)}"
            nodes.append(helper.make_node(operator, list(inputs), [output], name=output, domain=domain, **attributes))
            return output

        own = DOMAIN if self.form == "microsoft" else ""

        def q(value: str, of: str) -> str:
            return op("QuantizeLinear", value, f"{of}.scale", f"{of}.zero", domain=own)

        def dq(value: str, of: str) -> str:
            return op("DequantizeLinear", value, f"{of}.scale", f"{of}.zero", domain=own)

        def of(name: str) -> tuple[str, str]:
            return f"{name}.scale", f"{name}.zero"

        if self.form == "QOperator":
            split = op("Reshape", q("x", "x"), "split")
            heads, keys = (op("Transpose", split, perm=perm) for perm in ([0, 2, 1, 3], [0, 2, 3, 1]))
            scores = op("QLinearMatMul", heads, *of("x"), keys, *of("x"), *of("scores"))
            if self.masked:
                scores = q(op("Add", dq(scores, "scores"), self._bias(op)), "scores")
            attributes = {"axis": -1, "opset": 17, "domain": DOMAIN}
            weights = op("QLinearSoftmax", scores, *of("scores"), *of("weights"), **attributes)
            product = op("QLinearMatMul", weights, *of("weights"), heads, *of("x"), *of("product"))
        else:
            split = op("Reshape", dq(q("x", "x"), "x"), "split")
            heads, keys = (q(op("Transpose", split, perm=perm), "x") for perm in ([0, 2, 1, 3], [0, 2, 3, 1]))
            scores = op("MatMul", dq(heads, "x"), dq(keys, "x"))
            if self.masked:
                scores = op("Add", scores, self._bias(op))
            weights = q(op("Softmax", dq(q(scores, "scores"), "scores"), axis=-1), "weights")
            product = q(op("MatMul", dq(weights, "weights"), dq(heads, "x")), "product")
        turned = op("Transpose", dq(product, "product"), perm=[0, 2, 1, 3])
        nodes.append(helper.make_node("Reshape", [turned, "join"], ["y"]))
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", WIDTH])]
        if self.masked:
            inputs.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "seq"]))
        constants: dict[str, Array] = {
            "split": np.array([0, 0, HEADS, HEAD_DIM]),
            "join": np.array([0, 0, WIDTH]),
            "axes": np.array([1, 2]),
            "one": np.array(1, np.float32),
            "low": np.array(_MASKED, np.float32),
        }
        for name in _QUANTIZERS:
            scale, zero = self._quantizer(name)
            constants |= {f"{name}.scale": np.array(scale, np.float32), f"{name}.zero": np.array(zero, self.dtype)}
        graph = helper.make_graph(
            nodes,
            "static",
            inputs,
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", WIDTH])],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        versions = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
        return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=versions, ir_version=8))

    def _bias(self, op: Any) -> str:
        hidden = op("Sub", "one", op("Cast", "attention_mask", to=TensorProto.FLOAT))
        return str(op("Unsqueeze", op("Mul", hidden, "low"), "axes"))

    def _quantizer(self, name: str) -> tuple[float, int]:
        scale, zero = _QUANTIZERS[name]
        return float(np.float32(scale)), zero if self.dtype is np.uint8 else zero - 128

    def _rounded(self, value: Array, name: str) -> Array:
        """Quantize and dequantize, in float64."""
        (scale, zero), limits = self._quantizer(name), np.iinfo(self.dtype)
        integers = np.clip(np.rint(value / scale) + zero, limits.min, limits.max)
        return np.asarray((integers - zero) * scale)

    def reference(self, x: Array, mask: Array | None = None) -> tuple[Array, Array]:
        """Return y (S, W) and the weights (H, S, S) of one sequence (S, W)."""
        heads = self._rounded(x.astype(np.float64), "x").reshape(-1, HEADS, HEAD_DIM).transpose(1, 0, 2)
        scores = heads @ heads.transpose(0, 2, 1)
        if self.form == "QOperator":
            scores = self._rounded(scores, "scores")
        if mask is not None:
            scores = scores + np.where(mask, 0.0, _MASKED)
        scores = self._rounded(scores, "scores")
        exponents = np.exp(scores - scores.max(-1, keepdims=True))
        weights = self._rounded(exponents / exponents.sum(-1, keepdims=True), "weights")
        y = self._rounded(weights @ heads, "product")
        return y.transpose(1, 0, 2).reshape(len(x), WIDTH), weights

    @staticmethod
    def step(name: str) -> float:
        """The distance of two numbers that a quantizer represents."""
        return _QUANTIZERS[name][0]
