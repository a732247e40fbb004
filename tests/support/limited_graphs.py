"""Small graphs with limits that their files do not declare, or whose batch is not the first axis.

Beyond its limit, a graph fails in onnxruntime or gives another answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
Extents = list[str | int | None]

WIDTH = 8
VOCABULARY = 50


class Writer:
    """A graph in the making, node by node. Constants are drawn from one seed."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        output = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def const(self, value: Any, kind: type = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(value, kind)
        return name

    def ints(self, *numbers: int) -> str:
        return self.const(numbers, np.int64)

    def scalar(self, number: int) -> str:
        return self.const(number, np.int64)

    def table(self, rows: int) -> str:
        return self.const(self.rng.normal(size=(rows, WIDTH)))

    def extent(self, value: str, axis: int) -> str:
        return self.op("Shape", value, start=axis, end=axis + 1)

    def range(self, value: str, axis: int) -> str:
        """0, 1, ... along an axis of a value, (T,)."""
        return self.op("Range", self.scalar(0), self.op("Squeeze", self.extent(value, axis)), self.scalar(1))

    def bias(self, mask: str) -> str:
        """(B, 1, S), very low where a mask of whole numbers (B, S) is 0."""
        absent = self.op("Sub", self.op("Cast", mask, to=TensorProto.FLOAT), self.const(1))
        return self.op("Unsqueeze", self.op("Mul", absent, self.const(1e9)), self.ints(1))

    def attend(
        self, query: str, key: str = "", value: str = "", bias: str = "", perm: tuple[int, ...] = (0, 2, 1)
    ) -> str:
        """One head of attention over the last two axes; keys and values are the queries where they are not given."""
        key, value = key or query, value or key or query
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=list(perm)))
        if bias:
            scores = self.op("Add", scores, bias)
        return self.op("MatMul", self.op("Softmax", scores, axis=-1), value)

    def model(self, output: str, inputs: Mapping[str, tuple[int, Extents]]) -> onnx.ModelProto:
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            [*self.nodes, helper.make_node("Identity", [output], ["out"])],
            "limited",
            [info(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [info("out", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model)

    def of_features(self, output: str, shape: Extents | None = None) -> onnx.ModelProto:
        return self.model(output, {"x": (TensorProto.FLOAT, shape or ["batch", "seq", WIDTH])})

    def of_ids(self, output: str) -> onnx.ModelProto:
        shape: Extents = ["batch", "seq"]
        return self.model(output, {name: (TensorProto.INT64, list(shape)) for name in ("input_ids", "attention_mask")})


def few_rows(rows: int) -> onnx.ModelProto:
    """Looks a row's number up in a table of `rows` zeros."""
    made = Writer()
    own = made.op("Gather", made.const(np.zeros((rows, 1, WIDTH))), made.range("x", 0))
    return made.of_features(made.attend(made.op("Add", "x", own)))


def few_positions_in_all(positions: int) -> onnx.ModelProto:
    """Looks up the number that each position has in the whole batch, row after row, in a table of so many zeros."""
    made = Writer()
    flat = made.op("Reshape", "x", made.ints(-1, WIDTH))
    numbered = made.op("Gather", made.const(np.zeros((positions, WIDTH))), made.range(flat, 0))
    return made.of_features(made.attend(made.op("Reshape", made.op("Add", flat, numbered), made.op("Shape", "x"))))


def positions_from(counted: str, *, table: int = 40, padding: int = 1) -> onnx.ModelProto:
    """Positions are counted from 2 on: over the ones of the mask, or over the ids that are not `padding`.

    `counted`: "ids", or anything else for the mask. `table`: the rows of positions.
    """
    made = Writer()
    kept = "attention_mask"
    if counted == "ids":
        kept = made.op(
            "Cast", made.op("Not", made.op("Equal", "input_ids", made.scalar(padding))), to=TensorProto.INT64
        )
    places = made.op("Add", made.op("Mul", made.op("CumSum", kept, made.scalar(1)), kept), made.scalar(1))
    words = made.op("Gather", made.table(VOCABULARY), "input_ids")
    hidden = made.op("Add", words, made.op("Gather", made.table(table), places))
    return made.of_ids(made.attend(hidden, bias=made.bias("attention_mask")))


def shared_positions(table: int) -> onnx.ModelProto:
    """Two sequences, x and y, joined; positions over both are looked up in one table."""
    made = Writer()
    both = made.op("Concat", "x", "y", axis=1)
    hidden = made.op("Add", both, made.op("Gather", made.table(table), made.range(both, 1)))
    rows = made.op("Slice", made.attend(hidden), made.ints(0), made.extent("x", 1), made.ints(1))
    shapes: dict[str, tuple[int, Extents]] = {
        name: (TensorProto.FLOAT, ["batch", symbol, WIDTH]) for name, symbol in (("x", "words"), ("y", "frames"))
    }
    return made.model(rows, shapes)


def cut_short(positions: int) -> onnx.ModelProto:
    """Answers for the first so many positions alone."""
    made = Writer()
    return made.of_features(made.op("Slice", made.attend("x"), made.ints(0), made.ints(positions), made.ints(1)))


def one_row() -> onnx.ModelProto:
    """Reshapes to one row, as a file does that was traced on one."""
    made = Writer()
    shape = made.op("Concat", made.ints(1), made.extent("x", 1), made.ints(WIDTH), axis=0)
    return made.of_features(made.attend(made.op("Reshape", "x", shape)))


def length_first(shape: Extents | None = None, *, mask: bool = False, pooled: bool = False) -> onnx.ModelProto:
    """(S, B, D), as torch has it without `batch_first`; the mask is (B, S) all the same."""
    made = Writer()
    rows = made.op("Transpose", "x", perm=[1, 0, 2])
    attended = made.attend(rows, bias=made.bias("mask") if mask else "")
    output = made.op("ReduceMean", attended, made.ints(1), keepdims=0) if pooled else ""
    output = output or made.op("Transpose", attended, perm=[1, 0, 2])
    inputs: dict[str, tuple[int, Extents]] = {"x": (TensorProto.FLOAT, shape or [None, None, WIDTH])}
    if mask:
        inputs["mask"] = (TensorProto.INT64, [None, None])
    return made.model(output, inputs)


def in_windows_of(window: int) -> onnx.ModelProto:
    """Attends within windows, and takes only lengths that are multiples of their width."""
    made = Writer()
    windows = made.op("Reshape", "x", made.ints(-1, window, WIDTH))
    return made.of_features(made.op("Reshape", made.attend(windows), made.op("Shape", "x")))
