"""The continuing graph of a decoder is served only if it answers as the prompt graph does.

The prompt graph takes whole sequences; the continuing graph takes new positions and the keys and values of earlier
ones. `tried` changes the continuing graph, and returns what is kept of it and the warnings. A difference is a warning,
and the graph is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.caches.decoder import Cache, Decoder, Past
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.verify.continuing import Continuing, continuing_of
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.manifest import BATCH
from onnx import numpy_helper
from past_graphs import HEAD_DIM, KV_HEADS, LAYERS, PASTS, PRESENTS, graph, manifest, reference

Change = Callable[[onnx.ModelProto], None]
MANIFEST = manifest().model_copy(update={"past": None})


class Recorded(Steps):
    """Keeps warnings, and prints nothing."""

    def __init__(self) -> None:
        super().__init__(None)
        self.warnings: list[str] = []

    def warn(self, warning: str) -> None:
        self.warnings.append(warning)


def tried(folder: Path, change: Change | None = None) -> tuple[Continuing | None, list[str]]:
    """The continuing graph after `change`, and the warnings."""
    model_path = folder / "model.onnx"
    onnx.save(graph(past=False), model_path)
    continuing = graph(past=True, taps=False)
    if change is not None:
        change(continuing)
    continuing = onnx.shape_inference.infer_shapes(continuing)
    pasts = (
        Past(name, present, "float32", (KV_HEADS, "past", HEAD_DIM), 1)
        for name, present in zip(PASTS, PRESENTS, strict=True)
    )
    cache = Cache(tuple(pasts), "past", "seq", "past+seq", ("attention_mask",), "position_ids")
    steps = Recorded()
    sampler = Sampler(Signature(MANIFEST.inputs, ("seq",)), MANIFEST.vocabulary_size)
    decoder = Decoder(graph(past=False, taps=False), continuing, cache)
    return continuing_of(decoder, MANIFEST, model_path, sampler, folder, steps), steps.warnings


def scaled(name: str, factor: float) -> Change:
    def change(model: onnx.ModelProto) -> None:
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))

    return change


def without_last_layer_tap(model: onnx.ModelProto) -> None:
    """Replace the second softmax by a rectifier, so that the graph has one attention site less."""
    for node in model.graph.node:
        if node.output[0] == "p1":
            node.op_type = "Relu"
            del node.attribute[:]


def mixing_rows(model: onnx.ModelProto) -> None:
    """Add the mean of all rows of the batch, less each row's own if it is alone."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "rows_axis"))
    made = [
        onnx.helper.make_node("ReduceMean", ["hidden0", "rows_axis"], ["mean_row"], keepdims=1),
        onnx.helper.make_node("Sub", ["mean_row", "hidden0"], ["others"]),
        onnx.helper.make_node("Add", ["hidden0", "others"], ["mixed"]),
    ]
    for node in model.graph.node:
        if node.output[0] == "hidden1":
            node.input[0] = "mixed"
    at = next(at for at, node in enumerate(model.graph.node) if node.output[0] == "hidden0")
    for offset, node in enumerate(made, start=1):
        model.graph.node.insert(at + offset, node)


def test_a_graph_that_agrees_is_tapped_at_the_sites_of_the_prompt_graph(tmp_path: Path) -> None:
    found, warnings = tried(tmp_path)
    assert warnings == []
    assert found is not None
    assert [cache.present for cache in found.past.caches] == list(PRESENTS)
    assert found.past.outputs[1].shape == (KV_HEADS, "past+seq", HEAD_DIM)
    session = RuntimeSession.load(found.path, provider="CPUExecutionProvider")
    before = reference([4, 5, 6]).pasts
    feeds = {
        "input_ids": np.array([[7, 8]]),
        "attention_mask": np.ones((1, 5), np.int64),
        "position_ids": np.array([[3, 4]]),
        **{name: value[None] for name, value in before.items()},
        **{f"attention_items.layer{layer}": np.array([0]) for layer in range(LAYERS)},
    }
    expected = reference([7, 8], before)
    for layer, weights in enumerate(session.run(feeds, [f"attention.layer{layer}" for layer in range(LAYERS)])):
        # float32 sums in another order.
        np.testing.assert_allclose(weights[0], expected.weights[layer], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (scaled("k1", 1.01), r"sequences cannot have a past: output '\S+' after a past differs from that of whole"),
        (without_last_layer_tap, "it has 1 attention sites, and whole sequences have 2"),
    ],
)
def test_a_graph_that_differs_is_left_out_with_a_warning(tmp_path: Path, change: Change, why: str) -> None:
    found, warnings = tried(tmp_path, change)
    assert found is None
    (warning,) = warnings
    assert re.search(why, warning)


def test_a_graph_whose_rows_change_each_other_runs_sequences_alone(tmp_path: Path) -> None:
    found, _ = tried(tmp_path, mixing_rows)
    assert found is not None
    assert found.past.certificate is not None
    clause = found.past.certificate.clause(BATCH)
    assert not clause.allows("tested")
    assert clause.reason == "output 'logits' of a sequence with a past depends on its batch"
