"""Hand-made models whose heads give chosen scores: each token id has a row of scores in a table of the graph.

A head is the part of a manifest by which the server makes labels of an output's scores. The model below the head is the
one of `tiny_bundle`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from attnserve_server.model.heads import HeadSpec
from attnserve_server.model.manifest import Manifest, OutputSpec
from attnserve_server.model.repository import Bundle, write_bundle
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import VOCABULARY, tiny_graph, tiny_manifest, write_tiny_files

TABLES_SEED = 5


def table(name: str, width: int) -> np.ndarray:
    """Return the scores of every token id, float32 (vocabulary, width), which depend on the name and the width only."""
    random = np.random.default_rng([TABLES_SEED, *name.encode(), width])
    return (0.5 * random.standard_normal((len(VOCABULARY), width))).astype(np.float32)


def labelled_graph(outputs: Mapping[str, tuple[int, str]]) -> onnx.ModelProto:
    """Return the tiny graph with more outputs.

    Args:
        outputs: width and form by name: "each" gives (B, S, width), "flat" (B, S) of width 1, "sum" the sum of a
            sequence's rows, (B, width). Another form fails ONNX's checker.
    """
    model = tiny_graph()
    graph = model.graph
    for name, (width, form) in outputs.items():
        graph.initializer.append(numpy_helper.from_array(table(name, width), f"{name}_table"))
        rows = name if form == "each" else f"{name}_rows"
        graph.node.append(helper.make_node("Gather", [f"{name}_table", "input_ids"], [rows], axis=0))
        shape = ["batch", "seq", width]
        if form == "flat":
            graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), f"{name}_axis"))
            graph.node.append(helper.make_node("Squeeze", [rows, f"{name}_axis"], [name]))
            shape = ["batch", "seq"]
        if form == "sum":
            graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), f"{name}_axis"))
            graph.node.append(helper.make_node("Cast", ["attention_mask"], [f"{name}_mask"], to=TensorProto.FLOAT))
            graph.node.append(helper.make_node("Unsqueeze", [f"{name}_mask", f"{name}_last"], [f"{name}_mask3"]))
            graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), f"{name}_last"))
            graph.node.append(helper.make_node("Mul", [rows, f"{name}_mask3"], [f"{name}_kept"]))
            graph.node.append(helper.make_node("ReduceSum", [f"{name}_kept", f"{name}_axis"], [name], keepdims=0))
            shape = ["batch", width]
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    onnx.checker.check_model(model)
    return model


def labelled_manifest(name: str, head: HeadSpec, shapes: Mapping[str, Sequence[str | int]]) -> Manifest:
    """Return the tiny model's manifest with a head and its outputs, by shape."""
    tiny = tiny_manifest(name)
    more = tuple(OutputSpec(name=each, dtype="float32", shape=tuple(shape)) for each, shape in shapes.items())
    # Validated again, because a copy is not.
    return Manifest.model_validate(
        {**tiny.model_dump(), "outputs": [spec.model_dump() for spec in (*tiny.outputs, *more)], "head": head}
    )


def write_labelled(
    root: Path, folder: Path, name: str, head: HeadSpec, outputs: Mapping[str, tuple[int, str]]
) -> Bundle:
    """Write a bundle of the tiny model with a head. `outputs` as in `labelled_graph`; KeyError for another form."""
    files = write_tiny_files(folder)
    onnx.save(labelled_graph(outputs), folder / "model.onnx")
    shapes = {"each": lambda width: ("seq", width), "flat": lambda _: ("seq",), "sum": lambda width: (width,)}
    manifest = labelled_manifest(name, head, {each: shapes[form](width) for each, (width, form) in outputs.items()})
    return write_bundle(root, manifest, files)
