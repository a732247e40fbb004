"""A decoder's layer around onnxruntime's `GroupQueryAttention`, whose keys end where the mask does, in float64 too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from microsoft_graphs import DOMAIN, softmax
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY = 2, 1, 16, 32, 30


@dataclass(frozen=True, slots=True)
class Decoder:
    """Ids (B, T) and a mask of them to hidden states (B, T, W).

    `ends`: the shape of seqlens_k, "[B]", "[B,1]", "[1,B]" or "[]"; `sent`: it is an input, which the caller sends
    in the place of the mask. Only the first two shapes can be sent; another raises KeyError. `window`: how many keys a
    query attends to, its own included; 0: all before it.
    """

    window: int = 3
    layers: int = 1
    ends: str = "[B]"
    sent: bool = False

    def tables(self) -> dict[str, Array]:
        """Embeddings, and the projections of each layer."""
        rng = np.random.default_rng(7)
        tables = {"words": rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)}
        widths = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
        for layer in range(self.layers):
            for part, width in widths.items():
                tables[f"{part}{layer}"] = (rng.normal(size=(WIDTH, width)) * 0.3).astype(np.float32)
        return tables

    def model(self) -> onnx.ModelProto:
        """The graph."""
        node = helper.make_node
        nodes = [
            node("Gather", ["words", "input_ids"], ["hidden0"]),
            node("ReduceSum", ["attention_mask", "last"], ["lengths"], keepdims=int(self.ends == "[B,1]")),
            node("Sub", ["lengths", "one"], ["ends64"]),
            node("Cast", ["ends64"], ["flat_ends"], to=TensorProto.INT32),
            node("Shape", ["input_ids"], ["total1"], start=1, end=2),
            node("Squeeze", ["total1"], ["total64"]),
            node("Cast", ["total64"], ["total"], to=TensorProto.INT32),
        ]
        ends = "flat_ends"
        if self.ends == "[1,B]":
            nodes.append(node("Unsqueeze", [ends, "zero"], ["row_ends"]))
            ends = "row_ends"
        if self.ends == "[]":
            nodes.append(node("ReduceMax", [ends], ["one_end"], keepdims=0))
            ends = "one_end"
        ends = "seqlens_k" if self.sent else ends
        for layer in range(self.layers):
            hidden = f"hidden{layer}"
            nodes += [node("MatMul", [hidden, f"{part}{layer}"], [f"{part}_{layer}"]) for part in "qkv"]
            attended = [f"q_{layer}", f"k_{layer}", f"v_{layer}", "", "", ends, "total"]
            attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
            if self.window:
                attributes["local_window_size"] = self.window
            nodes += [
                node("GroupQueryAttention", attended, [f"attended{layer}"], domain=DOMAIN, **attributes),
                node("Add", [hidden, f"attended{layer}"], [f"hidden{layer + 1}"]),
            ]
        nodes.append(node("Identity", [f"hidden{self.layers}"], ["hidden"]))
        if self.sent:
            nodes = [each for each in nodes if each.output[0] not in {"lengths", "ends64", "flat_ends"}]
        constants = {**self.tables(), "last": np.array([1]), "one": np.array(1), "zero": np.array([0])}
        inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])]
        if self.sent:
            extents = {"[B]": ["batch"], "[B,1]": ["batch", 1]}[self.ends]
            inputs.append(helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, extents))
        else:
            inputs.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "seq"]))
        output = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "seq", WIDTH])
        used = {name for each in nodes for name in each.input}
        initializers = [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used]
        graph = helper.make_graph(nodes, "decoder", inputs, [output], initializers)
        versions = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=9)

    def first_scores(self, ids: Array) -> Array:
        """The first layer's scores (H, T, T) of one sequence; minus infinity for a key that is hidden."""
        tables = {name: array.astype(np.float64) for name, array in self.tables().items()}
        return self._scores(tables, tables["words"][ids], 0)

    def _scores(self, tables: dict[str, Array], hidden: Array, layer: int) -> Array:
        at = np.arange(len(hidden))
        kept = at <= at[:, None]
        if self.window:
            kept &= at > at[:, None] - self.window
        query, key = (
            (hidden @ tables[f"{part}{layer}"]).reshape(len(hidden), -1, HEAD_DIM).transpose(1, 0, 2) for part in "qk"
        )
        scores = query @ np.repeat(key, HEADS // KV_HEADS, axis=0).transpose(0, 2, 1) / HEAD_DIM**0.5
        return np.where(kept, scores, -np.inf)

    def reference(self, ids: Array) -> tuple[Array, list[Array]]:
        """Hidden states (T, W) and each layer's weights (H, T, T) of one sequence, from the definition."""
        tables = {name: array.astype(np.float64) for name, array in self.tables().items()}
        hidden, maps = tables["words"][ids], []
        for layer in range(self.layers):
            maps.append(softmax(self._scores(tables, hidden, layer)))
            value = (hidden @ tables[f"v{layer}"]).reshape(len(ids), -1, HEAD_DIM).transpose(1, 0, 2)
            product = maps[-1] @ np.repeat(value, HEADS // KV_HEADS, axis=0)
            hidden = hidden + product.transpose(1, 0, 2).reshape(len(ids), -1)
        return hidden, maps
