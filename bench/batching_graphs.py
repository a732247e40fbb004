"""Small models whose answers depend on their batch if nothing prevents it, and one that may be batched.

Each represents files of users. `bench.batching` serves them, and tests make other graphs with `Maker`. Nothing
here checks a graph: a wrong one fails where it is loaded.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

WIDTH: Final = 16
HEADS: Final = 2
VOCABULARY: Final = 50
MASKS: Final = {"-inf": -np.inf, "lowest": float(np.finfo(np.float32).min), "-1e9": -1e9, "-1e4": -1e4}


class Maker:
    """Writes one graph: nodes, constants, inputs and outputs. The batch is the axis `b`, positions are `t`.

    Fractions are float32, or float16 with `dtype`.
    """

    def __init__(self, opset: int = 17, seed: int = 0, dtype: type = np.float32) -> None:
        """An empty graph of an opset; drawn constants depend on the seed."""
        self.opset = opset
        self.dtype = dtype
        self.kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, kind: int, *shape: str | int) -> str:
        """Declare an input (B, *shape)."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, ["b", *shape]))
        return name

    def ids(self) -> str:
        """The input `input_ids`, int64 (B, t), as vectors of a drawn table, float32 (B, t, WIDTH)."""
        return self.op("Gather", self.drawn(VOCABULARY, WIDTH), self.input("input_ids", TensorProto.INT64, "t"), axis=0)

    def mask(self) -> str:
        """The input `attention_mask`, int64 (B, t)."""
        return self.input("attention_mask", TensorProto.INT64, "t")

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """One node of one output."""
        return self.ops(kind, *inputs, domain=domain, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> list[str]:
        """One node."""
        names = [f"{kind}_{len(self._nodes)}_{number}" for number in range(outputs)]
        self._nodes.append(
            helper.make_node(kind, list(inputs), names, name=f"n_{names[0]}", domain=domain, **attributes)
        )
        return names

    def const(self, value: Any, dtype: Any = None) -> str:
        """A constant, of fractions unless another dtype is named."""
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value, dtype or self.dtype), name))
        return name

    def ints(self, *numbers: int) -> str:
        """An int64 constant of rank 1."""
        return self.const(numbers, np.int64)

    def drawn(self, *shape: int, scale: float = 1.0) -> str:
        """A constant of normal numbers."""
        return self.const(self.random.normal(size=shape) * scale)

    def unsqueeze(self, value: str, *axes: int) -> str:
        """Axes of size 1."""
        if self.opset >= 13:
            return self.op("Unsqueeze", value, self.ints(*axes))
        return self.op("Unsqueeze", value, axes=list(axes))

    def total(self, value: str, axis: int, *, keep: bool = False) -> str:
        """The sum over an axis."""
        return self.op("ReduceSum", value, self.ints(axis), keepdims=int(keep))

    def length(self, value: str) -> str:
        """The size of axis 1, an int64 scalar."""
        return self.op("Gather", self.op("Shape", value), self.const(1, np.int64), axis=0)

    def number(self, value: str) -> str:
        """As a fraction."""
        return self.op("Cast", value, to=self.kind)

    def normalised(self, value: str, width: int = WIDTH) -> str:
        """A LayerNorm over the last axis."""
        return self.op("LayerNormalization", value, self.const(np.ones(width)), self.const(np.zeros(width)), axis=-1)

    def heads(self, value: str, *, key: bool = False, heads: int = HEADS, width: int = WIDTH) -> str:
        """(B, H, T, D), or of keys (B, H, D, T)."""
        split = self.op("Reshape", value, self.ints(0, 0, heads, width // heads))
        return self.op("Transpose", split, perm=[0, 2, 3, 1] if key else [0, 2, 1, 3])

    def bias(self, mask: str, filler: float) -> str:
        """What is added to scores: 0 where the mask is 1, `filler` elsewhere, (B, 1, 1, T)."""
        kept = self.op("Cast", mask, to=TensorProto.BOOL)
        return self.unsqueeze(self.op("Where", kept, self.const(0.0), self.const(filler)), 1, 2)

    def attended(self, query: str, key: str, value: str, bias: str = "", scale: float | str = 0.3) -> str:
        """Attention over (B, T, WIDTH), plus a bias on its scores."""
        scores = self.op("MatMul", self.heads(query), self.heads(key, key=True))
        scores = self.op("Mul", scores, scale if isinstance(scale, str) else self.const(scale))
        weights = self.op("Softmax", self.op("Add", scores, bias) if bias else scores, axis=-1)
        product = self.op("Transpose", self.op("MatMul", weights, self.heads(value)), perm=[0, 2, 1, 3])
        return self.op("Reshape", product, self.ints(0, 0, WIDTH))

    def projected(self, value: str, scale: float = 0.3) -> str:
        """A product with a drawn matrix."""
        return self.op("MatMul", value, self.drawn(WIDTH, WIDTH, scale=scale))

    def branch(self, number: float) -> onnx.GraphProto:
        """A graph without inputs that gives one number, for an If."""
        name = f"branch_{len(self._nodes)}_{'high' if number > 1 else 'low'}"
        tensor = helper.make_tensor(f"{name}_tensor", TensorProto.FLOAT, [], [number])
        node = helper.make_node("Constant", [], [name], value=tensor)
        return helper.make_graph(
            [node], f"{name}_graph", [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, [])]
        )

    def output(self, value: str, name: str, *shape: str | int) -> None:
        """Declare an output of fractions (B, *shape)."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"n_{name}"))
        self._outputs.append(helper.make_tensor_value_info(name, self.kind, ["b", *shape]))

    def model(self) -> onnx.ModelProto:
        """The graph as a model."""
        graph = helper.make_graph(self._nodes, "model", self._inputs, self._outputs, self._constants)
        domains = sorted({node.domain for node in self._nodes} - {""})
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def quantized(make: Maker, value: str, columns: int = WIDTH, width: int = WIDTH, weights: Array | None = None) -> str:
    """An integer MatMul with one scale for all activations: DynamicQuantizeLinear, MatMulInteger.

    Weights have seven bits, because kernels of processors without VNNI saturate at eight.
    """
    drawn = make.random.integers(-63, 64, (width, columns)) if weights is None else weights
    whole, scale, zero = make.ops("DynamicQuantizeLinear", value, outputs=3)
    product = make.number(make.op("MatMulInteger", whole, make.const(drawn, np.int8), zero))
    return make.op("Mul", product, make.op("Mul", scale, make.const(0.01 if weights is None else 1.0)))


def int8_bert() -> onnx.ModelProto:
    """Dynamic int8 BERT style: embedding, LayerNorm, then attention over three integer MatMuls."""
    make = Maker()
    hidden = make.normalised(make.ids())
    query, key, value = (quantized(make, hidden) for _ in range(3))
    attended = make.attended(query, key, value, make.bias(make.mask(), -np.inf))
    make.output(make.op("Add", hidden, attended), "hidden", "t", WIDTH)
    return make.model()


def experts(capacity: int = 40) -> onnx.ModelProto:
    """A mixture of two experts over masked attention. The second one takes only the first tokens of the flat batch."""
    make = Maker()
    words = make.ids()
    hidden = make.op("Add", words, make.attended(words, words, words, make.bias(make.mask(), -np.inf), 0.1))
    flat = make.op("Reshape", hidden, make.ints(-1, WIDTH))
    gate = make.op("Sigmoid", make.op("MatMul", flat, make.drawn(WIDTH, 1, scale=0.3)))
    chosen = make.number(make.op("Greater", gate, make.const(0.4)))
    fits = make.op("LessOrEqual", make.op("CumSum", chosen, make.const(0, np.int64)), make.const(float(capacity)))
    fits = make.number(fits)
    passed = make.op("Mul", make.op("Mul", make.op("Mul", chosen, fits), gate), make.projected(flat))
    make.output(make.op("Reshape", make.op("Add", flat, passed), make.op("Shape", hidden)), "hidden", "t", WIDTH)
    return make.model()


def greatest_length() -> onnx.ModelProto:
    """Attention whose output is scaled by the greatest length of the batch."""
    make = Maker()
    words, mask = make.ids(), make.mask()
    attended = make.attended(words, words, words, make.bias(mask, -np.inf), 0.1)
    greatest = make.op("ReduceMax", make.number(make.total(mask, 1)), keepdims=0)
    make.output(make.op("Mul", attended, make.op("Div", greatest, make.const(32.0))), "hidden", "t", WIDTH)
    return make.model()


def quantized_features() -> onnx.ModelProto:
    """DynamicQuantizeLinear directly on a float input, then attention under a mask."""
    make = Maker()
    hidden = quantized(make, make.input("x", TensorProto.FLOAT, "t", WIDTH))
    make.output(make.attended(hidden, hidden, hidden, make.bias(make.mask(), -np.inf)), "hidden", "t", WIDTH)
    return make.model()


def if_on_length() -> onnx.ModelProto:
    """Scores scaled by an If on the length: above 64 positions by another number."""
    make = Maker()
    words, mask = make.ids(), make.mask()
    long = make.op("Greater", make.length(mask), make.const(64, np.int64))
    scale = make.op("If", long, then_branch=make.branch(1.5), else_branch=make.branch(0.1))
    make.output(make.attended(words, words, words, make.bias(mask, -np.inf), scale), "hidden", "t", WIDTH)
    return make.model()


def rotary_switch() -> onnx.ModelProto:
    """Rotary positions with another base once the batch's greatest position passes 48 (LongRoPE, dynamic NTK)."""
    make = Maker()
    words, mask = make.ids(), make.mask()
    places = make.op("Sub", make.op("CumSum", mask, make.const(1, np.int64)), make.const(1, np.int64))
    long = make.op("Greater", make.op("ReduceMax", places, keepdims=0), make.const(48, np.int64))
    half = WIDTH // HEADS // 2
    short, far = (make.const(base ** -(np.arange(half) / half)) for base in (1e2, 1e5))
    angles = make.op("Mul", make.unsqueeze(make.number(places), 2), make.op("Where", long, far, short))
    doubled = make.unsqueeze(make.op("Concat", angles, angles, axis=-1), 1)
    cos, sin = make.op("Cos", doubled), make.op("Sin", doubled)

    def rotated(heads: str) -> str:
        first, second = make.ops("Split", heads, make.ints(half, half), outputs=2, axis=-1)
        turned = make.op("Concat", make.op("Neg", second), first, axis=-1)
        return make.op("Add", make.op("Mul", heads, cos), make.op("Mul", turned, sin))

    query, key = (rotated(make.heads(make.projected(words))) for _ in range(2))
    scores = make.op("MatMul", query, make.op("Transpose", key, perm=[0, 1, 3, 2]))
    weights = make.op("Softmax", make.op("Add", scores, make.bias(mask, -np.inf)), axis=-1)
    product = make.op("Transpose", make.op("MatMul", weights, make.heads(words)), perm=[0, 2, 1, 3])
    make.output(make.op("Reshape", product, make.ints(0, 0, WIDTH)), "hidden", "t", WIDTH)
    return make.model()


def unmasked(width: int = 64) -> onnx.ModelProto:
    """softmax(x x^T) x over wide features, without a mask."""
    make = Maker()
    features = make.input("x", TensorProto.FLOAT, "t", width)
    weights = make.op("Softmax", make.op("MatMul", features, make.op("Transpose", features, perm=[0, 2, 1])), axis=-1)
    make.output(make.op("MatMul", weights, features), "y", "t", width)
    return make.model()


def bert(mask: str = "-inf", layers: int = 2) -> onnx.ModelProto:
    """Masked BERT style, which batches: embedding, LayerNorm, attention, residuals, a masked mean.

    `mask`: a key of `MASKS`, the value that hides padding; any other raises KeyError.
    """
    make = Maker()
    hidden, keep = make.normalised(make.ids()), make.mask()
    bias = make.bias(keep, MASKS[mask])
    for _ in range(layers):
        query, key, value = (make.projected(hidden) for _ in range(3))
        hidden = make.normalised(make.op("Add", hidden, make.attended(query, key, value, bias)))
    ones = make.unsqueeze(make.number(keep), 2)
    count = make.op("Max", make.total(ones, 1), make.const(1e-9))
    make.output(make.op("Div", make.total(make.op("Mul", hidden, ones), 1), count), "embedding", WIDTH)
    make.output(hidden, "hidden", "t", WIDTH)
    return make.model()
