"""A tiny cross-encoder: the tiny model with a head that scores a pair of texts, and a repository of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from attnserve_server.model.heads import HeadSpec
from attnserve_server.model.manifest import Manifest, OutputSpec
from attnserve_server.model.repository import write_bundle
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import WIDTH, tiny_graph, tiny_manifest, write_tiny_files, write_tiny_repository


def ranking_graph() -> onnx.ModelProto:
    """The tiny model, with the output `logits` (B, 1): a linear layer on its embedding."""
    model = tiny_graph()
    weights = np.random.default_rng(3).normal(0, 2, (WIDTH, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights, "head"))
    model.graph.node.append(helper.make_node("MatMul", ["embedding", "head"], ["logits"]))
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1]))
    onnx.checker.check_model(model)
    return model


def ranking_manifest(name: str = "ranker") -> Manifest:
    """The manifest of the cross-encoder."""
    tiny = tiny_manifest(name)
    head = HeadSpec(kind="sequence_labels", outputs=("logits",), labels=("score",), activation="sigmoid", top_k=1)
    outputs = (*tiny.outputs, OutputSpec(name="logits", dtype="float32", shape=(1,)))
    return tiny.model_copy(update={"head": head, "outputs": outputs})


def write_ranking_repository(root: Path, folder: Path) -> Path:
    """The models `tiny`, `plain` and `ranker`."""
    files = write_tiny_files(folder)
    write_tiny_repository(root, files)
    onnx.save(ranking_graph(), folder / "ranker.onnx")
    write_bundle(root, ranking_manifest(), {**files, "model.onnx": folder / "ranker.onnx"})
    return root
