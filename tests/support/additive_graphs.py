"""Attention over features, whose mask is an input of floats that is added to the scores, in the forms of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH, HEADS = 16, 2
HEAD_DIM = WIDTH // HEADS
SHAPES = {
    "[B,S]": ["batch", "seq"],
    "[B,1,1,S]": ["batch", 1, 1, "seq"],
    "[B,1,S,S]": ["batch", 1, "seq", "seq"],
    "[B,S,S]": ["batch", "seq", "seq"],
}
FORMS = ("steps", "operator", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Added:
    """`x` (B, T, W) and `mask` in one of `SHAPES` to `y`, in one or two layers.

    `form`: the scores are written out step by step, or an attention operator of ONNX or of onnxruntime takes the mask.
    An unknown `shape` raises KeyError in `model`; an unknown `form` is not refused.
    """

    shape: str = "[B,1,1,S]"
    form: str = "steps"
    layers: int = 2
    dtype: type = np.float32
    floored: bool = False
    """Whether the graph itself bounds the mask by the lowest number, as transformers does."""

    def weights(self) -> dict[str, Array]:
        """Projections."""
        rng = np.random.default_rng(6)
        names = [f"{part}{layer}" for layer in range(self.layers) for part in "qkv"]
        return {name: (rng.normal(size=(WIDTH, WIDTH)) * 0.2).astype(self.dtype) for name in names}

    def model(self) -> onnx.ModelProto:
        """The graph."""
        node = helper.make_node
        axes = {"[B,S]": "axes12", "[B,S,S]": "axes1"}.get(self.shape)
        mask = "mask"
        nodes = []
        if axes:
            nodes.append(node("Unsqueeze", [mask, axes], ["mask4"]))
            mask = "mask4"
        if self.floored:
            nodes.append(node("Max", [mask, "floor"], ["floored"]))
            mask = "floored"
        if self.form != "steps":
            # The kernels require a row of the mask for every query.
            nodes += [
                node("Shape", ["x"], ["length"], start=1, end=2),
                node("Concat", ["one", "one", "length", "length"], ["square"], axis=0),
                node("Expand", [mask, "square"], ["square_mask"]),
            ]
            mask = "square_mask"
        hidden = "x"
        for layer in range(self.layers):
            for part in "qkv":
                nodes.append(node("MatMul", [hidden, f"{part}{layer}"], [f"{part}_{layer}"]))
            nodes += self._attention(layer, mask)
            nodes.append(node("Add", [hidden, f"attended{layer}"], [f"hidden{layer + 1}"]))
            hidden = f"hidden{layer + 1}"
        nodes.append(node("Identity", [hidden], ["y"]))
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        constants = {
            **self.weights(),
            "axes1": np.array([1]),
            "axes12": np.array([1, 2]),
            "one": np.array([1]),
            "floor": np.array(np.finfo(self.dtype).min, self.dtype),
            "split": np.array([0, 0, HEADS, HEAD_DIM]),
            "joined": np.array([0, 0, WIDTH]),
            "scale": np.array(HEAD_DIM**-0.5, self.dtype),
        }
        used = {name for each in nodes for name in each.input}
        initializers = [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used]
        inputs = [
            helper.make_tensor_value_info("x", kind, ["batch", "seq", WIDTH]),
            helper.make_tensor_value_info("mask", kind, SHAPES[self.shape]),
        ]
        outputs = [helper.make_tensor_value_info("y", kind, ["batch", "seq", WIDTH])]
        graph = helper.make_graph(nodes, "added", inputs, outputs, initializers)
        versions = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=10)

    def _attention(self, layer: int, mask: str) -> list[onnx.NodeProto]:
        node = helper.make_node
        parts = [f"{part}_{layer}" for part in "qkv"]
        if self.form == "operator":
            heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
            return [node("Attention", [*parts, mask], [f"attended{layer}"], **heads)]
        if self.form == "onnxruntime":
            inputs = [*parts, "", "", mask]
            return [node("MultiHeadAttention", inputs, [f"attended{layer}"], domain="com.microsoft", num_heads=HEADS)]
        nodes = []
        for part, turn in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True):
            nodes.append(node("Reshape", [part, "split"], [f"{part}.cut"]))
            nodes.append(node("Transpose", [f"{part}.cut"], [f"{part}.heads"], perm=turn))
        query, key, value = (f"{part}.heads" for part in parts)
        return [
            *nodes,
            node("MatMul", [query, key], [f"raw{layer}"]),
            node("Mul", [f"raw{layer}", "scale"], [f"scaled{layer}"]),
            node("Add", [f"scaled{layer}", mask], [f"scores{layer}"]),
            node("Softmax", [f"scores{layer}"], [f"weights{layer}"], axis=-1),
            node("MatMul", [f"weights{layer}", value], [f"product{layer}"]),
            node("Transpose", [f"product{layer}"], [f"turned{layer}"], perm=[0, 2, 1, 3]),
            node("Reshape", [f"turned{layer}", "joined"], [f"attended{layer}"]),
        ]

    def feeds(self, length: int, *, filler: float = -np.inf, seed: int = 0) -> dict[str, Array]:
        """One sequence without the batch axis, of which the mask hides some keys, but never the first."""
        rng = np.random.default_rng([seed, length])
        shape = tuple(length if extent == "seq" else int(extent) for extent in SHAPES[self.shape][1:])
        hidden = rng.random(shape) < 0.4
        hidden[..., 0] = False
        mask = np.where(hidden, filler, rng.normal(size=shape) * (rng.random(shape) < 0.5))
        return {"x": rng.normal(size=(length, WIDTH)).astype(self.dtype), "mask": mask.astype(self.dtype)}

    def reference(self, feeds: dict[str, Array]) -> tuple[Array, list[Array]]:
        """`y` (T, W) and each layer's weights (H, T, T) of one sequence, float64, from the definition."""
        tables = {name: array.astype(np.float64) for name, array in self.weights().items()}
        hidden, mask = feeds["x"].astype(np.float64), feeds["mask"].astype(np.float64)
        mask = mask.reshape(-1, mask.shape[-1])
        maps = []
        for layer in range(self.layers):
            query, key, value = (
                (hidden @ tables[f"{part}{layer}"]).reshape(len(hidden), HEADS, HEAD_DIM).transpose(1, 0, 2)
                for part in "qkv"
            )
            scores = query @ key.transpose(0, 2, 1) * HEAD_DIM**-0.5 + mask
            exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
            maps.append(exponents / exponents.sum(axis=-1, keepdims=True))
            hidden = hidden + (maps[-1] @ value).transpose(1, 0, 2).reshape(len(hidden), WIDTH)
        return hidden, maps
