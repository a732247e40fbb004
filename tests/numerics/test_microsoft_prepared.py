"""Files of onnxruntime's operators, from ids and a mask to a bundle: sites, axes, and weights of padded sequences.

A site is a place in a graph that computes attention, and a bundle the folder of one converted model. Each test writes a
file, converts it, and compares the weights with their definition in NumPy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.repository import MODEL_FILE, Bundle
from microsoft_graphs import DOMAIN, Array, softmax, split
from onnx import TensorProto, helper, numpy_helper

WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 24, 4, 2, 16, 40
LENGTHS = (6, 2, 4)
# float32 has 24 bits; a softmax over tens of terms loses a few of them.
TOLERANCE = 1e-5


def constants() -> dict[str, Array]:
    rng = np.random.default_rng(5)
    angles = np.arange(64)[:, None] * 0.3 ** np.arange(HEAD_DIM // 2)

    def drawn(*shape: int) -> Array:
        return (rng.normal(size=shape) * 0.4).astype(np.float32)

    return {
        "words": drawn(VOCABULARY, WIDTH) * 2,
        "wq": drawn(WIDTH, HEADS * HEAD_DIM),
        "wk": drawn(WIDTH, KV_HEADS * HEAD_DIM),
        "wv": drawn(WIDTH, KV_HEADS * HEAD_DIM),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "one": np.array([1]),
    }


def file_of(path: Path, nodes: list[onnx.NodeProto], width: int, opset: int, arrays: dict[str, Array]) -> Path:
    info = helper.make_tensor_value_info
    inputs = [info(name, TensorProto.INT64, ["batch", "seq"]) for name in ("input_ids", "attention_mask")]
    outputs = [info("hidden", TensorProto.FLOAT, ["batch", "seq", width])]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "made", inputs, outputs, initializers)
    versions = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    onnx.save(helper.make_model(graph, opset_imports=versions, ir_version=8), path)
    return path


def grouped(path: Path, attributes: dict[str, Any], opset: int) -> Path:
    """A graph as exporters of language models write it: lengths from the mask, rotation inside, no cache."""
    node = helper.make_node
    reduce = (
        node("ReduceSum", ["attention_mask", "one"], ["sums"], keepdims=0)
        if opset >= 13
        else node("ReduceSum", ["attention_mask"], ["sums"], axes=[1], keepdims=0)
    )
    nodes = [
        node("Gather", ["words", "input_ids"], ["embedded"]),
        *(node("MatMul", ["embedded", f"w{part}"], [part]) for part in "qkv"),
        reduce,
        node("Sub", ["sums", "one"], ["ends"]),
        node("Cast", ["ends"], ["seqlens"], to=TensorProto.INT32),
        node("Shape", ["attention_mask"], ["shape"]),
        node("Gather", ["shape", "one"], ["length"]),
        node("Cast", ["length"], ["total"], to=TensorProto.INT32),
        node(
            "GroupQueryAttention",
            ["q", "k", "v", "", "", "seqlens", "total", "cos", "sin"],
            ["hidden"],
            name="/model/layers.0/attn/GroupQueryAttention",
            domain=DOMAIN,
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
            **attributes,
        ),
    ]
    return file_of(path, nodes, HEADS * HEAD_DIM, opset, constants())


def expected(ids: Array, window: int) -> Array:
    """Return the weights of one sequence alone, (H, L, L)."""
    wide = {name: array.astype(np.float64) for name, array in constants().items()}
    embedded = wide["words"][ids][None]
    turns = wide["cos"][: len(ids)] + 1j * wide["sin"][: len(ids)]

    def turned(array: Array) -> Array:
        wheels = (array[..., : HEAD_DIM // 2] + 1j * array[..., HEAD_DIM // 2 :]) * turns
        return np.concatenate([wheels.real, wheels.imag], axis=-1)

    query = turned(split(embedded @ wide["wq"], HEADS))[0]
    key = np.repeat(turned(split(embedded @ wide["wk"], KV_HEADS))[0], HEADS // KV_HEADS, axis=0)
    at = np.arange(len(ids))
    kept = at <= at[:, None]
    if window:
        kept &= at > at[:, None] - window
    return softmax(np.where(kept, query @ key.transpose(0, 2, 1) / np.sqrt(HEAD_DIM), -np.inf))


def weights_of(bundle: Bundle, feeds: dict[str, Array]) -> Array:
    (site,) = bundle.manifest.sites
    session = RuntimeSession.load(bundle.path / MODEL_FILE, provider="CPUExecutionProvider")
    (weights,) = session.run({**feeds, str(site.items_input): np.arange(len(LENGTHS))}, [str(site.weights_output)])
    return np.asarray(weights)


@pytest.mark.parametrize(("window", "opset"), [(0, 11), (0, 17), (3, 17)])
def test_grouped_attention_gives_its_own_weights(window: int, opset: int, tmp_path: Path) -> None:
    attributes = {"local_window_size": window} if window else {}
    file = grouped(tmp_path / "model.onnx", attributes, opset)
    bundle = prepare_bundle(PrepareRequest(file=file, name="tiny", repository=tmp_path / "models", max_length=64))
    (site,) = bundle.manifest.sites
    assert (site.name, site.operator) == ("model.layers.0.attn", "com.microsoft.GroupQueryAttention-1")
    assert (site.kind, site.heads, site.kv_heads, site.head_dim) == ("causal", HEADS, KV_HEADS, HEAD_DIM)
    assert (site.query_axis, site.key_axis) == ("seq", "seq")
    assert [axis.paddable for axis in bundle.manifest.axes] == [True]
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    ids = np.random.default_rng(6).integers(1, VOCABULARY, mask.shape) * mask
    weights = weights_of(bundle, {"input_ids": ids, "attention_mask": mask})
    for row, length in enumerate(LENGTHS):
        reference = expected(ids[row, :length], window)
        np.testing.assert_allclose(weights[row, :, :length, :length], reference, rtol=0, atol=TOLERANCE)
        assert not weights[row, :, :length, length:].any()
