"""Hand-made graphs of one `LinearAttention`, and its weights in float64 written from the definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

Array = np.ndarray[Any, np.dtype[Any]]
RULES = ("linear", "gated", "delta", "gated_delta")


@dataclass
class LinearOperator:
    """One operator with its inputs.

    Args:
        rule: the update rule, one of `RULES`.
        domain: of the operator; "" is ai.onnx.
        per_feature: whether the decay has a number for each feature of a key, not one for each head.
        shared_rate: whether all heads have one update rate, not one for each head of keys.

    No field is checked; a wrong one fails, if at all, where the graph is made or run.
    """

    rule: str = "linear"
    domain: str = "com.microsoft"
    per_feature: bool = False
    shared_rate: bool = False
    batch: int = 3
    length: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 4
    value_dim: int = 3
    scale: float = 0.0
    dtype: type = np.float32

    def feeds(self) -> dict[str, Array]:
        rng = np.random.default_rng(0)

        def drawn(width: int) -> Array:
            return rng.normal(size=(self.batch, self.length, width))

        key = drawn(self.kv_heads * self.head_dim)
        feeds = {
            "query": drawn(self.heads * self.head_dim),
            "key": key / (1 + np.abs(key).max()),
            "value": drawn(self.kv_heads * self.value_dim),
        }
        if "gated" in self.rule:
            feeds["decay"] = -np.abs(drawn(self.kv_heads * (self.head_dim if self.per_feature else 1)))
        if "delta" in self.rule:
            feeds["beta"] = 1 / (1 + np.exp(-drawn(1 if self.shared_rate else self.kv_heads)))
        return {name: array.astype(self.dtype) for name, array in feeds.items()}

    def model(self) -> onnx.ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        inputs = [
            helper.make_tensor_value_info(name, kind, ["batch", "seq", array.shape[2]])
            for name, array in self.feeds().items()
        ]
        given = self.feeds()
        names = ["query", "key", "value", "", *(name if name in given else "" for name in ("decay", "beta"))]
        attributes: dict[str, Any] = {"q_num_heads": self.heads, "kv_num_heads": self.kv_heads}
        node = helper.make_node(
            "LinearAttention",
            names,
            ["output", "state"],
            domain=self.domain,
            update_rule=self.rule,
            scale=self.scale,
            **attributes,
        )
        output = helper.make_tensor_value_info("output", kind, ["batch", "seq", self.heads * self.value_dim])
        graph = helper.make_graph([node], "recurrent", inputs, [output])
        opsets = [helper.make_opsetid("", 21 if self.domain else 27), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def reference(self) -> Array:
        """Return the weights, float64 (B, H, L, S): how the state, and so the result, depends on each value."""
        feeds = {name: array.astype(np.float64) for name, array in self.feeds().items()}
        split = (self.batch, self.length, self.kv_heads, -1)
        query = feeds["query"].reshape(self.batch, self.length, self.heads, self.head_dim)
        key = feeds["key"].reshape(split)
        decay = feeds["decay"].reshape(split) if "decay" in feeds else np.zeros((*split[:3], 1))
        beta = feeds.get("beta", np.ones((self.batch, self.length, 1)))
        scale = self.scale or self.head_dim**-0.5
        weights = np.zeros((self.batch, self.heads, self.length, self.length))
        for row, head in np.ndindex(self.batch, self.heads):
            of_head = head // (self.heads // self.kv_heads)
            shares = np.zeros((self.head_dim, self.length))  # of each value in the state
            for place in range(self.length):
                shares *= np.exp(decay[row, place, of_head])[:, None]
                unit = np.eye(self.length)[place]
                own = key[row, place, of_head]
                if "delta" in self.rule:
                    rate = beta[row, place, min(of_head, beta.shape[2] - 1)]
                    unit = rate * (unit - own @ shares)
                shares += own[:, None] * unit
                weights[row, head, place] = scale * query[row, place, head] @ shares
        return weights
