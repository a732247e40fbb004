"""Graphs as other exporters write them: projections around one `Attention`, and their outputs in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
Shape = list[str | int | None]

WIDTH = 16


@dataclass
class Foreign:
    """Query features (B, L, W) attend to key features (B, S, W), or to themselves unless `cross`.

    `mask`: "" for none, "bool" for (B, S) that keeps, "broadcast" for the same as (B, 1, 1, S) at the operator,
    "inverted" for (B, S) that leaves out, "float" for (B, S) that is added to the scores.
    `target`, `source`, `batch`: axes in the file, each a symbol, a fixed size, or None for no name. `projected`: False
    takes the key features themselves as keys and values. No field is checked; a wrong one fails, if at all, where the
    graph is made or run.
    """

    target: str | int | None = "frames"
    source: str | int | None = "frames"
    batch: str | int | None = "batch"
    cross: bool = False
    mask: str = ""
    heads: int = 4
    kv_heads: int = 4
    dtype: type = np.float32
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 23
    seed: int = 0
    projected: bool = True

    @property
    def head_dim(self) -> int:
        return WIDTH // self.heads

    def weights(self) -> dict[str, Array]:
        rng = np.random.default_rng(self.seed)
        widths = {"wq": WIDTH, "wk": self.kv_heads * self.head_dim, "wv": self.kv_heads * self.head_dim}
        return {name: (rng.normal(size=(WIDTH, width)) * 0.4).astype(self.dtype) for name, width in widths.items()}

    def model(self) -> onnx.ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        info, node = helper.make_tensor_value_info, helper.make_node
        inputs = [info("queries", kind, [self.batch, self.target, WIDTH])]
        keys = "queries"
        if self.cross:
            keys = "memory"
            inputs.append(info("memory", kind, [self.batch, self.source, WIDTH]))
        nodes = [node("MatMul", ["queries", "wq"], ["q"])]
        if self.projected:
            nodes += [node("MatMul", [keys, "wk"], ["k"]), node("MatMul", [keys, "wv"], ["v"])]
        else:
            nodes += [node("Identity", [keys], ["k"]), node("Identity", [keys], ["v"])]
        constants: dict[str, Array] = dict(self.weights())
        operands = ["q", "k", "v"]
        if self.mask:
            mask_kind = kind if self.mask == "float" else onnx.TensorProto.BOOL
            inputs.append(info("key_mask", mask_kind, [self.batch, self.source if self.cross else self.target]))
            kept = "key_mask"
            if self.mask == "inverted":
                nodes.append(node("Not", ["key_mask"], ["kept"]))
                kept = "kept"
            nodes += [
                node("Unsqueeze", [kept, "axes"], ["rows"]),
                node("Shape", ["queries"], ["rows_of"], start=0, end=1),
                node("Shape", ["queries"], ["length"], start=1, end=2),
                node("Shape", ["k"], ["keys_of"], start=1, end=2),
                node("Concat", ["rows_of", "one", "length", "keys_of"], ["square"], axis=0),
                node("Expand", ["rows", "square"], ["mask"]),
            ]
            constants |= {"axes": np.array([1, 2]), "one": np.array([1])}
            operands.append("rows" if self.mask == "broadcast" else "mask")
        heads = {"q_num_heads": self.heads, "kv_num_heads": self.kv_heads}
        nodes.append(node("Attention", operands, ["attended"], **heads, **self.attributes))
        outputs = [info("attended", kind, [self.batch, self.target, WIDTH])]
        initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        graph = helper.make_graph(nodes, "foreign", inputs, outputs, initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)

    def reference(self, feeds: dict[str, Array]) -> tuple[Array, Array]:
        """Output (L, W) and weights (H, L, S) of one sequence without a batch axis, from the definition."""
        wide = {name: array.astype(np.float64) for name, array in {**self.weights(), **feeds}.items()}
        queries = wide["queries"]
        memory = wide["memory"] if self.cross else queries
        keys, values = (memory @ wide["wk"], memory @ wide["wv"]) if self.projected else (memory, memory)

        def split(array: Array, heads: int) -> Array:
            return array.reshape(len(array), heads, self.head_dim).transpose(1, 0, 2)

        group = self.heads // self.kv_heads
        query = split(queries @ wide["wq"], self.heads)
        key, value = (np.repeat(split(array, self.kv_heads), group, axis=0) for array in (keys, values))
        scores = query @ key.transpose(0, 2, 1) * self.attributes.get("scale", self.head_dim**-0.5)
        if cap := self.attributes.get("softcap"):
            scores = cap * np.tanh(scores / cap)
        allowed = np.ones(scores.shape, bool)
        if self.mask == "float":
            scores = scores + wide["key_mask"]
        elif self.mask:
            allowed &= feeds["key_mask"] if self.mask != "inverted" else ~feeds["key_mask"]
        if self.attributes.get("is_causal"):
            allowed &= np.tri(*scores.shape[1:], dtype=bool)
        exponents = np.where(allowed, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
        weights = exponents / exponents.sum(axis=-1, keepdims=True)
        return (weights @ value).transpose(1, 0, 2).reshape(len(queries), WIDTH), weights

    def feeds(self, length: int, keys: int = 0, seed: int = 1, scale: float = 1.0) -> dict[str, Array]:
        """One sequence without the batch axis."""
        rng = np.random.default_rng(seed)
        feeds: dict[str, Array] = {"queries": (scale * rng.normal(size=(length, WIDTH))).astype(self.dtype)}
        if self.cross:
            feeds["memory"] = (scale * rng.normal(size=(keys, WIDTH))).astype(self.dtype)
        if self.mask:
            count = keys if self.cross else length
            kept = rng.integers(0, 2, count).astype(bool)
            kept[0] = True
            feeds["key_mask"] = (
                rng.normal(size=count).astype(self.dtype)
                if self.mask == "float"
                else kept
                if self.mask != "inverted"
                else ~kept
            )
        return feeds


def tabular() -> onnx.ModelProto:
    """Rows of 8 numbers, each to its sum: no axis but the batch, and an output of nothing else."""
    info = helper.make_tensor_value_info
    node = helper.make_node("ReduceSum", ["row", "last"], ["score"], keepdims=0)
    inputs, outputs = [info("row", onnx.TensorProto.FLOAT, ["n", 8])], [info("score", onnx.TensorProto.FLOAT, ["n"])]
    graph = helper.make_graph([node], "tabular", inputs, outputs, [numpy_helper.from_array(np.array([1]), "last")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def words() -> Array:
    """The table of `scorer`, (50, 16)."""
    return np.random.default_rng(11).normal(size=(50, WIDTH)).astype(np.float32)


def scorer() -> onnx.ModelProto:
    """Narrow ids, a mask of bools and a number for each row; an input with a default; outputs with and without axes."""
    info, node = helper.make_tensor_value_info, helper.make_node
    nodes = [
        node("Gather", ["words", "input_ids"], ["found"]),
        node("Unsqueeze", ["temperature", "inner"], ["factor"]),
        node("Mul", ["found", "factor"], ["tempered"]),
        node("Mul", ["tempered", "gain"], ["embedded"]),
        node("Unsqueeze", ["keep", "inner"], ["row"]),
        node("Shape", ["input_ids"], ["count"], start=0, end=1),
        node("Shape", ["input_ids"], ["length"], start=1, end=2),
        node("Concat", ["count", "last", "length", "length"], ["square"], axis=0),
        node("Expand", ["row", "square"], ["mask"]),
        node("Attention", ["embedded"] * 3 + ["mask"], ["attended"], q_num_heads=4, kv_num_heads=4),
        node("Cast", ["keep"], ["kept"], to=onnx.TensorProto.FLOAT),
        node("Unsqueeze", ["kept", "wide"], ["column"]),
        node("Mul", ["attended", "column"], ["masked"]),
        node("ReduceSum", ["masked", "last"], ["pooled"], keepdims=0),
        node("ReduceSum", ["pooled", "last"], ["score"], keepdims=0),
        node("ArgMax", ["pooled"], ["label"], axis=1, keepdims=0),
    ]
    inputs = [
        info("input_ids", onnx.TensorProto.INT32, ["n", "t"]),
        info("keep", onnx.TensorProto.BOOL, ["n", "t"]),
        info("temperature", onnx.TensorProto.FLOAT, ["n"]),
        info("gain", onnx.TensorProto.FLOAT, []),
    ]
    outputs = [
        info("pooled", onnx.TensorProto.FLOAT, ["n", WIDTH]),
        info("score", onnx.TensorProto.FLOAT, ["n"]),
        info("label", onnx.TensorProto.INT64, ["n"]),
    ]
    constants = {
        "words": words(),
        "gain": np.array(1.5, np.float32),
        "inner": np.array([1, 2]),
        "wide": np.array([2]),
        "last": np.array([1]),
    }
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "scorer", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
