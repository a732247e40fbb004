"""Attention of the plain form, decomposed as by exporters, with every step that fusing must keep; float64 weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH, HEADS = 16, 4
HEAD_DIM = WIDTH // HEADS
_MOST = 160

SCALES = ("none", "scores", "query", "key", "both")
TURNS = ("at once", "heads first", "folded")
MASKS = ("lowest", "minus infinity", "-1e4", "bias", "chosen", "chosen inverted", "chosen minus infinity", "causal")
"""Steps before softmax, in any number: numbers that are added for hidden keys, a bias of every head, choices
between a score and a number, and a choice by a triangle that is cut from a table."""
OPSETS = (11, 13, 14, 17, 18, 20, 23)
_FILLS = {"chosen": -1e9, "chosen inverted": -1e4, "chosen minus infinity": -np.inf}


@dataclass
class Plain:
    """Features (B, L, W) attend to themselves, or to memory (B, S, W), and are projected.

    `operator`: by ai.onnx Attention on split heads, with nothing but causal and a scale.

    `scale`, `turn` and each of `masks` are names from the tuples above. `divides`: the scale is a Div, not a Mul.
    `guard`: an operator over the weights, "not a number" for zeros in the place of NaN, or "" for none. `cross`: keys
    come from the memory. `packed`: the output is (B, L, W) after a projection; else heads (B, H, L, D).
    `shapes_computed`: shapes are computed in the graph and do not state the number of heads. A bias or a triangle has
    160 positions at most. An unknown mask raises KeyError in `model`; other names are not checked.
    """

    opset: int = 17
    scale: str = "scores"
    divides: bool = False
    turn: str = "at once"
    masks: tuple[str, ...] = ()
    guard: str = ""
    cross: bool = False
    packed: bool = True
    operator: bool = False
    shapes_computed: bool = False
    dtype: type = np.float32
    name: str = "/encoder/layer.0/attention/self/Softmax"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)

    def tables(self) -> dict[str, Array]:
        rng = np.random.default_rng(3)
        names = ("wq", "wk", "wv", "wo")
        tables = {name: (rng.normal(size=(WIDTH, WIDTH)) * 0.4).astype(self.dtype) for name in names}
        tables["bias"] = rng.normal(size=(1, HEADS, _MOST, _MOST)).astype(self.dtype)
        tables["triangle"] = np.tri(_MOST, dtype=bool)[None, None]
        return tables

    def op(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=name or output, **attributes))
        return output

    def const(self, array: Any, kind: type | None = None) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(array, kind or self.dtype)
        return name

    def ints(self, *numbers: int) -> str:
        return self.const(numbers, np.int64)

    def model(self) -> onnx.ModelProto:
        self.nodes, self.constants = [], self.tables()
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        info = helper.make_tensor_value_info
        inputs = [info("queries", kind, ["batch", "target", WIDTH])]
        keys, length = ("memory", "source") if self.cross else ("queries", "target")
        if self.cross:
            inputs.append(info("memory", kind, ["batch", "source", WIDTH]))
        if set(self.masks) - {"bias", "causal"}:
            inputs.append(info("keep", onnx.TensorProto.BOOL, ["batch", length]))
        query, key, value = (
            self.op("Reshape", self.op("MatMul", features, table), self._split_shape(features))
            for features, table in (("queries", "wq"), (keys, "wk"), (keys, "wv"))
        )
        query, value = (self.op("Transpose", each, perm=[0, 2, 1, 3]) for each in (query, value))
        output = self._by_operator(query, key, value) if self.operator else self._by_steps(query, key, value, keys)
        if self.packed:
            output = self.op("Reshape", self.op("Transpose", output, perm=[0, 2, 1, 3]), self.ints(0, 0, WIDTH))
            output = self.op("MatMul", output, "wo")
        self.nodes.append(helper.make_node("Identity", [output], ["answer"]))
        shape = ["batch", "target", WIDTH] if self.packed else ["batch", HEADS, "target", HEAD_DIM]
        used = {name for node in self.nodes for name in node.input}
        initializers = [numpy_helper.from_array(array, name) for name, array in self.constants.items() if name in used]
        graph = helper.make_graph(self.nodes, "plain", inputs, [info("answer", kind, shape)], initializers)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10 if self.opset > 20 else 7)

    def _split_shape(self, features: str) -> str:
        """Return the shape (B, T, H, D). If computed at run time, it does not state the number of heads."""
        if not self.shapes_computed:
            return self.ints(0, 0, HEADS, HEAD_DIM)
        return self.op("Concat", self._extents(features, 0, 2), self.ints(-1), self.ints(HEAD_DIM), axis=0)

    def _by_operator(self, query: str, key: str, value: str) -> str:
        key = self.op("Transpose", key, perm=[0, 2, 1, 3])
        attributes = {
            "is_causal": int("causal" in self.masks),
            "scale": 1.0 if self.scale == "none" else HEAD_DIM**-0.5,
        }
        return self.op("Attention", query, key, value, name=self.name, **attributes)

    def _by_steps(self, query: str, key: str, value: str, keys: str) -> str:
        query, turned = self._scaled(query, self._turned(key))
        scores = self.op("MatMul", query, turned)
        if self.scale == "scores":
            scores = self._times(scores, HEAD_DIM**-0.5)
        for mask in self.masks:
            scores = self._masked(mask, scores, keys)
        weights = self._guarded(self.op("Softmax", scores, name=self.name, axis=-1 if self.opset >= 13 else 3))
        return self.op("MatMul", weights, value)

    def _times(self, value: str, factor: float) -> str:
        return (
            self.op("Div", value, self.const(1 / factor)) if self.divides else self.op("Mul", self.const(factor), value)
        )

    def _scaled(self, query: str, turned: str) -> tuple[str, str]:
        if self.scale == "query":
            return self._times(query, HEAD_DIM**-0.5), turned
        if self.scale == "key":
            return query, self._times(turned, HEAD_DIM**-0.5)
        if self.scale == "both":
            return self._times(query, HEAD_DIM**-0.25), self._times(turned, HEAD_DIM**-0.25)
        return query, turned

    def _turned(self, key: str) -> str:
        if self.turn == "at once":
            return self.op("Transpose", key, perm=[0, 2, 3, 1])
        key = self.op("Transpose", key, perm=[0, 2, 1, 3])
        if self.turn == "heads first":
            return self.op("Transpose", key, perm=[0, 1, 3, 2])
        folded = self.op("Reshape", key, self.op("Concat", self.ints(-1), self._extents(key, 2, 4), axis=0))
        turned = self.op("Transpose", folded, perm=[0, 2, 1])
        extents = (self._extents(key, *pair) for pair in ((0, 2), (3, 4), (2, 3)))
        return self.op("Reshape", turned, self.op("Concat", *extents, axis=0))

    def _extents(self, value: str, start: int, end: int) -> str:
        return self.op("Slice", self.op("Shape", value), self.ints(start), self.ints(end))

    def _masked(self, mask: str, scores: str, keys: str) -> str:
        if mask in {"bias", "causal"}:
            ends = self.op("Concat", self._extents("queries", 1, 2), self._extents(keys, 1, 2), axis=0)
            table = "bias" if mask == "bias" else "triangle"
            cut = self.op("Slice", table, self.ints(0, 0), ends, self.ints(2, 3))
            if mask == "bias":
                return self.op("Add", cut, scores)
            return self.op("Where", cut, scores, self.const(np.finfo(self.dtype).min))
        keep = (
            self.op("Unsqueeze", "keep", self.ints(1, 2))
            if self.opset >= 13
            else self.op("Unsqueeze", "keep", axes=[1, 2])
        )
        if mask == "chosen inverted":
            return self.op("Where", self.op("Not", keep), self.const(self._fill(mask)), scores)
        if mask in _FILLS:
            return self.op("Where", keep, scores, self.const(self._fill(mask)))
        return self.op("Add", scores, self.op("Where", keep, self.const(0.0), self.const(self._fill(mask))))

    def _fill(self, mask: str) -> float:
        lowest = float(np.finfo(self.dtype).min)
        fill = {"lowest": lowest, "minus infinity": -np.inf, "-1e4": -1e4, **_FILLS}[mask]
        return fill if np.isinf(fill) else max(fill, lowest)

    def _guarded(self, weights: str) -> str:
        if self.guard == "not a number":
            return self.op("Where", self.op("IsNaN", weights), self.const(0.0), weights)
        return self.op(self.guard, weights) if self.guard else weights

    def feeds(self, batch: int, queries: int, keys: int, *, hide_all: bool = False) -> dict[str, Array]:
        """`hide_all`: the last sequence has no key that counts."""
        rng = np.random.default_rng([5, batch, queries, keys])
        keys = keys if self.cross else queries
        feeds = {"queries": rng.normal(size=(batch, queries, WIDTH)).astype(self.dtype)}
        if self.cross:
            feeds["memory"] = rng.normal(size=(batch, keys, WIDTH)).astype(self.dtype)
        if set(self.masks) - {"bias", "causal"}:
            keep = rng.random((batch, keys)) > 0.3
            keep[:, 0] = True
            keep[-1] &= not hide_all
            feeds["keep"] = keep
        return feeds

    def reference(self, feeds: dict[str, Array]) -> Array:
        """The weights, float64 (B, H, L, S), from the definition; rows of hidden keys alone are 0."""
        wide = {name: array.astype(np.float64) for name, array in {**self.tables(), **feeds}.items()}
        memory = wide["memory"] if self.cross else wide["queries"]

        def split(features: Array) -> Array:
            return features.reshape(*features.shape[:2], HEADS, HEAD_DIM).transpose(0, 2, 1, 3)

        scores = split(wide["queries"] @ wide["wq"]) @ split(memory @ wide["wk"]).swapaxes(2, 3)
        scores = scores * (1.0 if self.scale == "none" else HEAD_DIM**-0.5)
        shown = np.ones(scores.shape, bool)
        if "keep" in feeds:
            shown &= feeds["keep"][:, None, None]
        if "causal" in self.masks:
            shown &= np.tri(*scores.shape[2:], dtype=bool)
        scores = scores + self.masks.count("bias") * wide["bias"][:, :, : scores.shape[2], : scores.shape[3]]
        exponents = np.where(shown, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
        return exponents / np.maximum(exponents.sum(axis=-1, keepdims=True), 1e-300)
