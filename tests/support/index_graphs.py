"""An encoder that looks up tables by more than its token ids: positions, categories in columns, a segment.

onnxruntime refuses a run with an index beyond its table. A negative index counts from the table's end.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, HEADS = 8, 2
WORDS, PLACES, KINDS, COLOURS, SEGMENTS = 30, 20, 7, 4, 1
OFFSET = 2
"""What the graph itself adds to positions before it looks them up, as RoBERTa's do."""


def encoder() -> onnx.ModelProto:
    """`input_ids`, `position_ids`, `token_type_ids` (B, T), `categories` (B, T, 2), `language_id` (B) to `hidden`."""
    rng = np.random.default_rng(4)
    node = helper.make_node
    nodes = [
        node("Gather", ["words", "input_ids"], ["word"]),
        node("Cast", ["position_ids"], ["places64"], to=TensorProto.INT64),
        node("Add", ["places64", "offset"], ["shifted"]),
        node("Gather", ["places", "shifted"], ["place"]),
        node("Gather", ["segments", "token_type_ids"], ["segment"]),
        node("Split", ["categories", "sizes"], ["kind_column", "colour_column"], axis=2),
        node("Squeeze", ["kind_column", "last"], ["kind_ids"]),
        node("Squeeze", ["colour_column", "last"], ["colour_ids"]),
        node("Gather", ["kinds", "kind_ids"], ["kind"]),
        node("Gather", ["colours", "colour_ids"], ["colour"]),
        node("Gather", ["languages", "language_id"], ["language"]),
        node("Unsqueeze", ["language", "middle"], ["everywhere"]),
        node("Sum", ["word", "place", "segment", "kind", "colour", "everywhere"], ["embedded"]),
        node("Attention", ["embedded"] * 3, ["hidden"], q_num_heads=HEADS, kv_num_heads=HEADS),
    ]
    rows = {"words": WORDS, "places": PLACES, "segments": SEGMENTS, "kinds": KINDS, "colours": COLOURS, "languages": 5}
    constants = {name: rng.normal(size=(count, WIDTH)).astype(np.float32) for name, count in rows.items()}
    constants |= {
        "offset": np.array(OFFSET),
        "sizes": np.array([1, 1]),
        "last": np.array([2]),
        "middle": np.array([1]),
    }
    info = helper.make_tensor_value_info
    inputs = [
        info("input_ids", TensorProto.INT64, ["batch", "seq"]),
        info("position_ids", TensorProto.INT32, ["batch", "seq"]),
        info("token_type_ids", TensorProto.INT64, ["batch", "seq"]),
        info("categories", TensorProto.INT64, ["batch", "seq", 2]),
        info("language_id", TensorProto.INT64, ["batch"]),
    ]
    outputs = [info("hidden", TensorProto.FLOAT, ["batch", "seq", WIDTH])]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "indices", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
