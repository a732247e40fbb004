"""Windowed attention written out step by step, in the ways that graphs have for it, beside its definition.

In a window, each query attends only to the keys near it. No field is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

HEADS, HEAD_DIM = 2, 4
WIDTH = HEADS * HEAD_DIM


@dataclass(frozen=True, slots=True)
class Windowed:
    """One layer of self-attention over `x` (B, T, D), of which `mask` (B, T) keeps some.

    `style` "blocks": queries in blocks of `block`, keys of `before` blocks before to `after` behind. "gathered": each
    query by itself, with `before` keys before it and `after` behind. `global_keys`: the number of keys that every query
    attends to as well. `causal`: no key behind the query; not together with global keys.

    `tangle` adds nodes that the finder does not follow. "sums": each value is the sum of those before it. "backwards":
    windows run from the end of the sequence. "skips": the blocks before and behind a query's own are exchanged.
    """

    style: str = "blocks"
    block: int = 4
    before: int = 1
    after: int = 1
    global_keys: int = 0
    causal: bool = False
    opset: int = 18
    tangle: str = ""

    @property
    def width(self) -> int:
        """Columns of the band."""
        steps = self.before + 1 + self.after
        return self.global_keys + (steps * self.block if self.style == "blocks" else steps)

    def parameters(self) -> dict[str, Array]:
        """Projections of query, key and value."""
        random = np.random.default_rng(3)
        return {part: random.normal(0, 0.6, (WIDTH, WIDTH)).astype(np.float32) for part in "qkv"}

    def feeds(self, *lengths: int, seed: int = 0) -> dict[str, Array]:
        """A batch padded to the longest."""
        random = np.random.default_rng(seed)
        mask = np.zeros((len(lengths), max(lengths)), np.int64)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
        return {"x": random.normal(size=(*mask.shape, WIDTH)).astype(np.float32), "mask": mask}

    def allowed(self, length: int) -> Array:
        """Which keys each query may attend to, bool (T, T)."""
        query, key = np.arange(length)[:, None], np.arange(length)[None, :]
        if self.style == "blocks":
            apart = key // self.block - query // self.block
            near = (-self.before <= apart) & (apart <= self.after)
        else:
            near = (key - query >= -self.before) & (key - query <= self.after)
        seen = near | (key < self.global_keys)
        return seen & (key <= query) if self.causal else seen

    def reference(self, feeds: Mapping[str, Array]) -> Array:
        """Weights (B, H, T, T) in float64, from the definition (Vaswani et al. 2017, eq. 1)."""
        wide = feeds["x"].astype(np.float64)
        query, key = (self._split(wide @ self.parameters()[part].astype(np.float64)) for part in "qk")
        scores = query @ key.swapaxes(-1, -2) / HEAD_DIM**0.5
        seen = self.allowed(wide.shape[1]) & (feeds["mask"][:, None, None, :] > 0)
        scores = np.where(seen, scores, -1e30)
        exponentials = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        return exponentials / np.maximum(exponentials.sum(-1, keepdims=True), 1e-300)

    @staticmethod
    def _split(hidden: Array) -> Array:
        return hidden.reshape(*hidden.shape[:2], HEADS, HEAD_DIM).transpose(0, 2, 1, 3)

    def model(self) -> onnx.ModelProto:
        """The graph; outputs `hidden` (B, T, D)."""
        return _Graph(self).model()


class _Graph:
    def __init__(self, case: Windowed) -> None:
        self.case = case
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], **attributes))
        return name

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def constant(self, array: Array) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def model(self) -> onnx.ModelProto:
        case = self.case
        parts = {part: self.split(self.op("MatMul", "x", self.constant(w))) for part, w in case.parameters().items()}
        if case.tangle == "sums":
            parts["v"] = self.op("CumSum", parts["v"], self.scalar(2))
        if case.tangle == "backwards":
            parts = {part: self.backwards(value) for part, value in parts.items()}
        kept = self.op("Reshape", self.op("Cast", "mask", to=TensorProto.FLOAT), self.ints(0, 1, -1, 1))
        self.length = self.op("Slice", self.op("Shape", "x"), self.ints(1), self.ints(2))
        windows = self.blocks if case.style == "blocks" else self.gathered
        local = self.op("Mul", kept, self.local()) if case.global_keys else kept
        queries, keys, values, seen = windows(parts["q"], (parts["k"],) * 2, (parts["v"],) * 2, (local, kept))
        turned = self.op("Transpose", keys, perm=[0, 1, 2, 4, 3])
        scores = self.op("MatMul", queries, turned)
        scores = self.op("Mul", scores, self.constant(np.array(HEAD_DIM**-0.5, np.float32)))
        hidden = self.op("Sub", seen, self.constant(np.array(1, np.float32)))
        bias = self.op("Mul", hidden, self.constant(np.array(1e9, np.float32)))
        scores = self.op("Add", scores, self.op("Transpose", bias, perm=[0, 1, 2, 4, 3]))
        scores = self.op("Add", scores, self.constant(self.unseen()))
        product = self.op("MatMul", self.op("Softmax", scores, axis=-1 if case.opset >= 13 else 4), values)
        rows = self.op("Reshape", product, self.ints(0, HEADS, -1, HEAD_DIM))
        rows = self.op("Slice", rows, self.ints(0), self.length, self.ints(2))
        rows = self.backwards(rows) if case.tangle == "backwards" else rows
        joined = self.op("Reshape", self.op("Transpose", rows, perm=[0, 2, 1, 3]), self.ints(0, 0, WIDTH))
        self.nodes.append(helper.make_node("Add", ["x", joined], ["hidden"]))
        graph = helper.make_graph(
            self.nodes,
            "windowed",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", WIDTH]),
                helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", "seq"]),
            ],
            [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "seq", WIDTH])],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.case.opset)], ir_version=7)

    def split(self, flat: str) -> str:
        """(B, T, D) -> (B, H, T, head_dim)."""
        return self.op("Transpose", self.op("Reshape", flat, self.ints(0, 0, HEADS, HEAD_DIM)), perm=[0, 2, 1, 3])

    def local(self) -> str:
        """1 for keys that are not global, which windows must not contain a second time: (T, 1)."""
        ramp = self.op("Range", self.scalar(0), self.op("Squeeze", self.length), self.scalar(1))
        behind = self.op("Greater", ramp, self.scalar(self.case.global_keys - 1))
        return self.op("Reshape", self.op("Cast", behind, to=TensorProto.FLOAT), self.ints(-1, 1))

    def blocks(self, query: str, *others: tuple[str, str]) -> tuple[str, ...]:
        """Queries (B, H, blocks, block, D), and of the others the columns (B, H, blocks, W, D).

        Each of the others is returned twice: in windows, and as global keys.
        """
        block = self.ints(self.case.block)
        more = self.op("Add", self.length, self.ints(self.case.block - 1))
        whole = self.op("Mul", self.op("Div", more, block), block)
        queries = self.cut(self.padded(query, 0, self.case.block), self.ints(0), whole)
        return queries, *(self.around(each, first, whole) for each, first in others)

    def around(self, value: str, first: str, whole: str) -> str:
        case = self.case
        padded = self.padded(value, case.before * case.block, (case.after + 1) * case.block)
        pieces = []
        for step in range(case.before + 1 + case.after):
            start = self.ints(step * case.block)
            pieces.append(self.cut(padded, start, self.op("Add", whole, start)))
        if case.tangle == "skips":
            pieces.reverse()
        return self.with_global_keys(first, self.op("Concat", *pieces, axis=3))

    def backwards(self, value: str) -> str:
        """The sequence from its end."""
        last = self.ints(np.iinfo(np.int64).min)
        return self.op("Slice", value, self.ints(-1), last, self.ints(2), self.ints(-1))

    def cut(self, value: str, start: str, end: str) -> str:
        """Places from `start` to `end`, in blocks."""
        part = self.op("Slice", value, start, end, self.ints(2))
        width = self.op("Slice", self.op("Shape", part), self.ints(3), self.ints(4))
        heads = self.op("Slice", self.op("Shape", part), self.ints(0), self.ints(2))
        return self.op("Reshape", part, self.op("Concat", heads, self.ints(-1, self.case.block), width, axis=0))

    def padded(self, value: str, before: int, after: int) -> str:
        return self.op("Pad", value, self.ints(0, 0, before, 0, 0, 0, after, 0))

    def gathered(self, query: str, *others: tuple[str, str]) -> tuple[str, ...]:
        """Queries (B, H, T, 1, D), and of the others the columns (B, H, T, W, D)."""
        case = self.case
        count = self.op("Squeeze", self.length)
        ramp = self.op("Range", self.scalar(0), count, self.scalar(1))
        places = self.op(
            "Add", self.op("Reshape", ramp, self.ints(-1, 1)), self.ints(*range(1 + case.before + case.after))
        )
        queries = self.op("Reshape", query, self.ints(0, 0, 0, 1, HEAD_DIM))
        pairs = [
            (self.op("Gather", self.padded(each, case.before, case.after), places, axis=2), g) for each, g in others
        ]
        return queries, *(self.with_global_keys(first, columns) for columns, first in pairs)

    def with_global_keys(self, value: str, columns: str) -> str:
        """The first keys before the columns of every window."""
        if not self.case.global_keys:
            return columns
        first = self.op("Slice", value, self.ints(0), self.ints(self.case.global_keys), self.ints(2))
        shape = self.op("Shape", columns)
        windows = [self.op("Slice", shape, self.ints(0), self.ints(3)), self.ints(self.case.global_keys)]
        last = self.op("Slice", shape, self.ints(4), self.ints(5))
        wide = self.op("Reshape", first, self.op("Concat", *self.lone(first), axis=0))
        return self.op("Concat", self.op("Expand", wide, self.op("Concat", *windows, last, axis=0)), columns, axis=3)

    def lone(self, value: str) -> tuple[str, str, str]:
        """Return the sizes of (B, H, G, D), with an axis of one window before G."""
        shape = self.op("Shape", value)
        return (
            self.op("Slice", shape, self.ints(0), self.ints(2)),
            self.ints(1),
            self.op("Slice", shape, self.ints(2), self.ints(4)),
        )

    def scalar(self, number: int) -> str:
        return self.constant(np.array(number, np.int64))

    def unseen(self) -> Array:
        """A bias for keys behind the query, (rows of a window, W)."""
        case = self.case
        rows = case.block if case.style == "blocks" else 1
        first = -case.before * rows
        local = np.arange(first, first + case.width - case.global_keys)[None, :] - np.arange(rows)[:, None]
        bias = np.zeros((rows, case.width), np.float32)
        if case.causal:
            bias[:, case.global_keys :][local > 0] = -1e9
        return bias
