"""Graphs from ids to the last position's hidden state, by which tests see whether padding ids change an answer.

They do in every graph but that of `last_token(mask="heeded")`. Another mask than those named is taken as "ignored".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH, HEADS, VOCABULARY = 8, 2, 40


def table() -> Array:
    """Embeddings."""
    return np.random.default_rng(12).normal(size=(VOCABULARY, WIDTH)).astype(np.float32)


def last_token(*, mask: str = "") -> onnx.ModelProto:
    """`input_ids` (B, T) to `last` (B, W). `mask`: "" for no input of that name, "heeded", or "ignored".

    A mask hides keys. "heeded": `last` is the sum over the kept positions. "ignored": it is the last position, even of
    padding.
    """
    node = helper.make_node
    nodes = [node("Gather", ["words", "input_ids"], ["embedded"])]
    attended = ["embedded"] * 3
    ids = ["input_ids"]
    if mask:
        ids.append("attention_mask")
        nodes += [
            node("Cast", ["attention_mask"], ["kept"], to=TensorProto.BOOL),
            node("Unsqueeze", ["kept", "axes"], ["rows"]),
            node("Shape", ["input_ids"], ["count"], start=0, end=1),
            node("Shape", ["input_ids"], ["length"], start=1, end=2),
            node("Concat", ["count", "one", "length", "length"], ["square"], axis=0),
            node("Expand", ["rows", "square"], ["hidden_keys"]),
        ]
        attended.append("hidden_keys")
    nodes.append(node("Attention", attended, ["hidden"], q_num_heads=HEADS, kv_num_heads=HEADS))
    if mask == "heeded":
        nodes += [
            node("Cast", ["attention_mask"], ["weight"], to=TensorProto.FLOAT),
            node("Unsqueeze", ["weight", "two"], ["column"]),
            node("Mul", ["hidden", "column"], ["weighted"]),
            node("ReduceSum", ["weighted", "one"], ["last"], keepdims=0),
        ]
    else:
        nodes.append(node("Gather", ["hidden", "end"], ["last"], axis=1))
    constants = {
        "words": table(),
        "axes": np.array([1, 2]),
        "one": np.array([1]),
        "two": np.array([2]),
        "end": np.array(-1),
    }
    used = {name for each in nodes for name in each.input}
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"]) for name in ids]
    outputs = [helper.make_tensor_value_info("last", TensorProto.FLOAT, ["batch", WIDTH])]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used]
    graph = helper.make_graph(nodes, "last", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def reference(ids: Array, mask: Array | None = None, *, pooled: bool = False) -> tuple[Array, Array]:
    """`last` (W) and the weights (H, T, T), float64, of one sequence of ids, padding included.

    `pooled`: the sum of a heeded mask, not the last position.
    """
    embedded = table().astype(np.float64)[ids]
    heads = embedded.reshape(len(ids), HEADS, -1).transpose(1, 0, 2)
    scores = heads @ heads.transpose(0, 2, 1) * heads.shape[2] ** -0.5
    if mask is not None:
        scores = np.where(mask > 0, scores, -np.inf)
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = exponents / exponents.sum(axis=-1, keepdims=True)
    hidden = (weights @ heads).transpose(1, 0, 2).reshape(len(ids), WIDTH)
    if not pooled:
        return hidden[-1], weights
    return (hidden * (1 if mask is None else mask[:, None])).sum(axis=0), weights
