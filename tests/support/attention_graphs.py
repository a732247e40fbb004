"""Hand-made graphs of one `Attention` operator of ai.onnx, and its weights in float64 written from the definition."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Case:
    """One operator with its inputs; `mask` broadcasts to (B, H, L, S), and `counts` is `nonpad_kv_seqlen`, (B,).

    `packed`: query, key and value are (B, T, H * D); else (B, H, T, D). `attributes`: those of the operator. No field
    is checked; a wrong one fails, if at all, where the graph is made or run.
    """

    batch: int = 3
    heads: int = 4
    kv_heads: int = 4
    queries: int = 5
    keys: int = 5
    head_dim: int = 8
    value_dim: int = 8
    packed: bool = False
    dtype: type = np.float32
    mask: Array | None = None
    counts: Array | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 23
    seed: int = 0

    def feeds(self) -> dict[str, Array]:
        rng = np.random.default_rng(self.seed)

        def drawn(heads: int, length: int, dim: int) -> Array:
            array = rng.normal(size=(self.batch, heads, length, dim))
            if self.packed:
                array = array.transpose(0, 2, 1, 3).reshape(self.batch, length, heads * dim)
            return array.astype(self.dtype)

        feeds = {
            "query": drawn(self.heads, self.queries, self.head_dim),
            "key": drawn(self.kv_heads, self.keys, self.head_dim),
            "value": drawn(self.kv_heads, self.keys, self.value_dim),
        }
        given = {"mask": self.mask, "counts": self.counts}
        return feeds | {name: array for name, array in given.items() if array is not None}

    def model(self) -> onnx.ModelProto:
        """The graph: dynamic lengths, static heads; output `output` is the operator's own."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))

        def shape(heads: int, length: str, dim: int) -> list[str | int]:
            return ["batch", length, heads * dim] if self.packed else ["batch", heads, length, dim]

        inputs = [
            helper.make_tensor_value_info("query", kind, shape(self.heads, "query_len", self.head_dim)),
            helper.make_tensor_value_info("key", kind, shape(self.kv_heads, "key_len", self.head_dim)),
            helper.make_tensor_value_info("value", kind, shape(self.kv_heads, "key_len", self.value_dim)),
        ]
        attributes = dict(self.attributes)
        if self.packed:
            attributes |= {"q_num_heads": self.heads, "kv_num_heads": self.kv_heads}
        if self.mask is not None:
            mask_kind = helper.np_dtype_to_tensor_dtype(self.mask.dtype)
            extents: list[str | None] = [None] * self.mask.ndim
            if self.mask.ndim == 4 and self.mask.shape[0] == self.batch > 1:
                extents[0] = "batch"
            inputs.append(helper.make_tensor_value_info("mask", mask_kind, extents))
        names = [spec.name for spec in inputs]
        if self.counts is not None:
            names += [""] * (6 - len(names)) + ["counts"]
            inputs.append(helper.make_tensor_value_info("counts", onnx.TensorProto.INT64, ["batch"]))
        node = helper.make_node("Attention", names, ["output"], name="attend", **attributes)
        output = helper.make_tensor_value_info("output", kind, shape(self.heads, "query_len", self.value_dim))
        graph = helper.make_graph([node], "attention", inputs, [output])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)

    def heads_first(self, array: Array, heads: int) -> Array:
        """Float64 (B, H, T, D) of a (possibly packed) array."""
        array = array.astype(np.float64)
        if not self.packed:
            return array
        batch, length, width = array.shape
        return array.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)

    def reference(self) -> Array:
        """Return the weights, float64 (B, H, L, S), by definition: one softmax per row over the keys not masked."""
        scores = self.scores()
        weights = np.zeros(scores.shape)
        for index in np.ndindex(*scores.shape[:3]):
            row = scores[index]
            if np.isfinite(row).any():
                exponents = np.exp(row - row.max())
                weights[index] = exponents / exponents.sum()
        return weights

    def scores(self) -> Array:
        """Return the scores, float64 (B, H, L, S), after scale, softcap and bias; minus infinity for a hidden key."""
        feeds = self.feeds()
        query = self.heads_first(feeds["query"], self.heads)
        key = self.heads_first(feeds["key"], self.kv_heads)
        scale = self.attributes.get("scale", self.head_dim**-0.5)
        softcap = self.attributes.get("softcap", 0.0)
        shown = np.zeros((self.batch, self.heads, self.queries, self.keys))
        for index in np.ndindex(self.batch, self.heads, self.queries):
            row, head, position = index
            scores = key[row, head // (self.heads // self.kv_heads)] @ query[row, head, position] * scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            allowed = np.ones(self.keys, bool)
            if self.mask is not None:
                mask = np.broadcast_to(self.mask, shown.shape)[index]
                if mask.dtype == bool:
                    allowed &= mask
                else:
                    allowed &= mask > np.finfo(mask.dtype).min / 2
                    scores = scores + np.where(allowed, mask.astype(np.float64), 0)
            if self.counts is not None:
                allowed &= np.arange(self.keys) < self.counts[row]
                position += self.counts[row] - self.queries
            if self.attributes.get("is_causal"):
                allowed &= np.arange(self.keys) <= position
            for side, sign in (("left", -1), ("right", 1)):
                reach = self.attributes.get(f"{side}_window_size", -1)
                if reach >= 0:
                    allowed &= sign * (np.arange(self.keys) - position) <= reach
            shown[index] = np.where(allowed, scores, -np.inf)
        return shown

    def output_from(self, weights: Array) -> Array:
        """Return the expected output, weights @ value, in the operator's layout, float64."""
        value = self.heads_first(self.feeds()["value"], self.kv_heads)
        output = weights @ np.repeat(value, self.heads // self.kv_heads, axis=1)
        if self.packed:
            output = output.transpose(0, 2, 1, 3).reshape(self.batch, self.queries, self.heads * self.value_dim)
        return output
