"""A span head: attention over ids, then a score of each position that is an infinity where the mask hides it.

An id of `VOCABULARY` or more raises IndexError in `scores`, and fails the graph where it is run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH, HEADS, VOCABULARY = 16, 4, 40


def tables() -> dict[str, Array]:
    """Return the embeddings, and the vector whose products with them are the scores."""
    rng = np.random.default_rng(9)
    return {
        "words": rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
        "start_column": rng.normal(size=(WIDTH, 1)).astype(np.float32),
    }


def span_head(*, hides: bool = True) -> onnx.ModelProto:
    """`logits` (B, T) is -inf, and `distances` (B, T) is +inf, where `attention_mask` and `allowed` are not both 1.

    `log_probabilities` (B, T) is the LogSoftmax of `logits`.

    `hides`: False leaves out `allowed`, so that a sequence without padding has no infinity.
    """
    node = helper.make_node
    nodes = [
        node("Gather", ["words", "input_ids"], ["embedded"]),
        node("Cast", ["attention_mask"], ["kept"], to=TensorProto.BOOL),
        node("Unsqueeze", ["kept", "axes"], ["rows"]),
        node("Shape", ["input_ids"], ["count"], start=0, end=1),
        node("Shape", ["input_ids"], ["length"], start=1, end=2),
        node("Concat", ["count", "one", "length", "length"], ["square"], axis=0),
        node("Expand", ["rows", "square"], ["mask"]),
        node("Attention", ["embedded"] * 3 + ["mask"], ["attended"], q_num_heads=HEADS, kv_num_heads=HEADS),
        node("MatMul", ["attended", "start_column"], ["column"]),
        node("Squeeze", ["column", "last"], ["scores"]),
        node("Mul", ["scores", "scores"], ["squares"]),
        node("Where", ["shown", "scores", "lowest"], ["logits"]),
        node("Where", ["shown", "squares", "highest"], ["distances"]),
        node("LogSoftmax", ["logits"], ["log_probabilities"], axis=-1),
    ]
    ids = ["input_ids", "attention_mask"]
    if hides:
        ids.append("allowed")
        nodes[11:11] = [
            node("Cast", ["allowed"], ["allowed_too"], to=TensorProto.BOOL),
            node("And", ["kept", "allowed_too"], ["shown"]),
        ]
    else:
        nodes.insert(11, node("Identity", ["kept"], ["shown"]))
    constants = {
        **tables(),
        "axes": np.array([1, 2]),
        "one": np.array([1]),
        "last": np.array([2]),
        "lowest": np.array(-np.inf, np.float32),
        "highest": np.array(np.inf, np.float32),
    }
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"]) for name in ids]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "seq"])
        for name in ("logits", "distances", "log_probabilities")
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "span", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def scores(ids: Array) -> Array:
    """The scores of one sequence, float64 (T,), before anything is hidden."""
    wide = {name: array.astype(np.float64) for name, array in tables().items()}
    heads = wide["words"][ids].reshape(len(ids), HEADS, -1).transpose(1, 0, 2)
    products = heads @ heads.transpose(0, 2, 1) * heads.shape[2] ** -0.5
    exponents = np.exp(products - products.max(axis=-1, keepdims=True))
    weights = exponents / exponents.sum(axis=-1, keepdims=True)
    attended = (weights @ heads).transpose(1, 0, 2).reshape(len(ids), WIDTH)
    return np.asarray((attended @ wide["start_column"])[:, 0])
