"""Attention whose mask the graph reduces to a count of ones, as onnxruntime's optimizer writes it, and its weights.

The weights are those under the mask itself: what the model answered before the optimizer reduced the mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from microsoft_graphs import DOMAIN, FILTER_VALUE, padding_bias, softmax, split
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
FORMS = ("Attention", "MultiHeadAttention", "EmbedLayerNormalization")
HEADS, WIDTH, VOCABULARY, POSITIONS = 2, 8, 20, 16
_EPSILON = 1e-5


def tables() -> dict[str, Array]:
    """Embeddings and the packed projection of queries, keys and values."""
    rng = np.random.default_rng(5)
    return {
        "words": rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
        "places": rng.normal(size=(POSITIONS, WIDTH)).astype(np.float32),
        "gain": np.ones(WIDTH, np.float32),
        "shift": np.zeros(WIDTH, np.float32),
        "weights": rng.normal(size=(WIDTH, 3 * WIDTH)).astype(np.float32),
        "bias": rng.normal(size=3 * WIDTH).astype(np.float32),
        "axes": np.array([1], np.int64),
    }


def counted(form: str) -> onnx.ModelProto:
    """`input_ids` and `attention_mask` (B, S) to `output` (B, S, W). `form`: one of `FORMS`; it is not checked."""
    node = helper.make_node
    nodes = [node("Cast", ["attention_mask"], ["mask"], to=TensorProto.INT32)]
    if form == "EmbedLayerNormalization":
        inputs = ["ids", "", "words", "places", "", "gain", "shift", "mask"]
        nodes += [
            node("Cast", ["input_ids"], ["ids"], to=TensorProto.INT32),
            node(form, inputs, ["hidden", "count"], domain=DOMAIN, epsilon=_EPSILON),
        ]
    else:
        nodes += [
            node("Gather", ["words", "input_ids"], ["hidden"]),
            node("ReduceSum", ["mask", "axes"], ["count"], keepdims=0),
        ]
    if form == "MultiHeadAttention":
        nodes += [
            node("MatMul", ["hidden", "weights"], ["product"]),
            node("Add", ["product", "bias"], ["packed"]),
            node("Split", ["packed"], ["q", "k", "v"], axis=2, num_outputs=3),
            node(form, ["q", "k", "v", "", "count"], ["output"], name="attend", domain=DOMAIN, num_heads=HEADS),
        ]
    else:
        inputs = ["hidden", "weights", "bias", "count"]
        nodes.append(node("Attention", inputs, ["output"], name="attend", domain=DOMAIN, num_heads=HEADS))
    graph = helper.make_graph(
        nodes,
        form,
        [
            helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "seq"])
            for n in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "seq", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in tables().items()],
    )
    versions = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=9)


def weights_of(form: str, ids: Array, mask: Array) -> Array:
    """Float64 (H, S, S) of one sequence, under its whole mask."""
    constants = {name: array.astype(np.float64) for name, array in tables().items()}
    hidden = constants["words"][ids]
    if form == "EmbedLayerNormalization":
        hidden = hidden + constants["places"][: len(ids)]
        centred = hidden - hidden.mean(-1, keepdims=True)
        hidden = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + _EPSILON)
    packed = (hidden @ constants["weights"] + constants["bias"])[None]
    query, key, _ = (split(part, HEADS) for part in np.split(packed, 3, axis=-1))
    scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(WIDTH // HEADS)
    found: Array = softmax(scores + padding_bias(mask[None], 1, len(ids), len(ids), FILTER_VALUE))[0]
    return found
