"""Small ONNX files made by hand, as other exporters write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

WIDTH, HEADS, VOCABULARY = 16, 4, 50


def encoder(
    *,
    batch: str | int | None = "batch",
    length: str | int | None = "seq",
    opset: int = 23,
    positions: int = 40,
    masked: bool = True,
    attend: bool = True,
) -> onnx.ModelProto:
    """Ids to hidden states, with one `Attention` over packed heads: embeddings, attention, residual.

    Args:
        batch: the axis in the file: a symbol, a fixed size, or None for no name.
        length: the same for the sequence.
        opset: of ai.onnx.
        positions: rows of the table of positions; a longer sequence fails when it is run.
        masked: whether there is an input `attention_mask`.
        attend: False puts a Tanh in the place of attention.
    """
    rng = np.random.default_rng(3)
    tables = {
        "words": rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
        "positions": rng.normal(size=(positions, WIDTH)).astype(np.float32),
    }
    constants = {"zero": np.array(0), "one": np.array(1), "axes": np.array([1, 2])}
    node = helper.make_node
    nodes = [
        node("Gather", ["words", "input_ids"], ["word"]),
        node("Shape", ["input_ids"], ["length_1"], start=1, end=2),
        node("Squeeze", ["length_1"], ["length"]),
        node("Range", ["zero", "length", "one"], ["place"]),
        node("Gather", ["positions", "place"], ["position"]),
        node("Add", ["word", "position"], ["embedded"]),
    ]
    inputs = [helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, [batch, length])]
    mask = ""
    if masked:
        inputs.append(helper.make_tensor_value_info("attention_mask", onnx.TensorProto.INT64, [batch, length]))
        nodes += [
            node("Cast", ["attention_mask"], ["kept"], to=onnx.TensorProto.BOOL),
            node("Unsqueeze", ["kept", "axes"], ["kept_rows"]),
            node("Shape", ["input_ids"], ["sizes"]),
            node("Concat", ["batch_1", "one_1", "length_1", "length_1"], ["square"], axis=0),
            node("Expand", ["kept_rows", "square"], ["mask"]),
        ]
        nodes.insert(-2, node("Shape", ["input_ids"], ["batch_1"], start=0, end=1))
        constants["one_1"] = np.array([1])
        mask = "mask"
    heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
    if attend:
        attention_inputs = ["embedded", "embedded", "embedded", *([mask] if mask else [])]
        nodes.append(node("Attention", attention_inputs, ["attended"], name="/block.0/attention/Attention", **heads))
    else:
        nodes.append(node("Tanh", ["embedded"], ["attended"]))
    nodes.append(node("Add", ["attended", "embedded"], ["hidden"]))
    initializers = [numpy_helper.from_array(array, name) for name, array in {**tables, **constants}.items()]
    output = helper.make_tensor_value_info("hidden", onnx.TensorProto.FLOAT, [batch, length, WIDTH])
    graph = helper.make_graph(nodes, "encoder", inputs, [output], initializers)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10, producer_name="hand", producer_version="1"
    )


def saved(model: onnx.ModelProto, path: Path) -> Path:
    """The model as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path
