"""Axes that are solved for: what nodes force, what a table of positions gives, and what stays open.

A file may leave sizes of its inputs open that its nodes determine. `solved_axes` returns a corrected signature and
proves it by a run. A graph that runs as declared is left alone, and a size that nothing determines stays open.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.learning.solving import Solved, solved_axes
from batch_graphs import graph
from onnx import ModelProto
from open_axes_graphs import audio_encoder, drawn, image_encoder, with_memory


def solved(model: ModelProto, folder: Path) -> Solved:
    """The solution of a graph's axes."""
    return solved_axes(model, signature_of(model.graph), folder)


def shapes(found: Solved) -> list[tuple[str | int, ...]]:
    """The shapes of all inputs."""
    return [spec.shape for spec in found.signature.inputs]


@pytest.mark.parametrize("leading", [1, 2])
def test_an_image_takes_channels_from_its_convolution_and_sizes_from_its_positions(
    leading: int, tmp_path: Path
) -> None:
    found = solved(image_encoder(leading=leading), tmp_path)
    assert shapes(found) == [(3, 16, 16)]
    assert found.sizes == {"num_channels": 3, "height": 16, "width": 16}
    assert found.facts[0].startswith("axis 'num_channels' is 3, because of Conv ")
    assert found.facts[1].startswith("axes 'height' and 'width' are 16, if they are equal, because of Add ")


def test_an_image_of_unequal_sides_stays_open_and_the_options_are_named(tmp_path: Path) -> None:
    found = solved(image_encoder(rows=2, columns=5, leading=0), tmp_path)
    assert not found.runs
    assert shapes(found) == [(3, "height", "width")]
    assert "of input 'pixel_values': fix them with --axis height=SIZE --axis width=SIZE" in found.open_axes
    assert "= 10, because of Add" in found.open_axes


def test_frames_take_the_length_of_the_positions_behind_their_strides(tmp_path: Path) -> None:
    found = solved(audio_encoder(frames=12), tmp_path)
    assert shapes(found) == [(5, 12)]


def test_a_width_takes_the_size_of_the_weights_that_it_meets(tmp_path: Path) -> None:
    model = graph("g (float[b, t, hidden] x) => (float[b, t, 4] y) { y = MatMul(x, w) }", w=drawn(6, 4))
    assert shapes(solved(model, tmp_path)) == [("t", 6)]


def test_a_mask_over_a_memory_and_new_keys_follows_both(tmp_path: Path) -> None:
    found = solved(with_memory("?"), tmp_path)
    assert found.runs
    assert shapes(found)[2] == ("mask_axis_1",)
    assert {name: str(formula) for name, formula in found.signature.relations.items()} == {
        "mask_axis_1": "length + memory_length"
    }


def test_a_folded_axis_follows_from_the_axis_that_it_is_reshaped_to(tmp_path: Path) -> None:
    model = graph(
        "g (float[b, t, 4] x, float[b, ?, 4] pairs) => (float[b, t, 4] y) {"
        "folded = Reshape(pairs, shape) sum = ReduceSum<keepdims=0>(folded, two) y = Add(x, sum) }",
        shape=np.array([0, -1, 2, 4]),
        two=np.array([2]),
    )
    found = solved(model, tmp_path)
    assert found.runs
    assert shapes(found) == [("t", 4), ("pairs_axis_1", 4)]
    assert {name: str(formula) for name, formula in found.signature.relations.items()} == {"pairs_axis_1": "2 * t"}


def test_a_graph_that_runs_is_left_alone(tmp_path: Path) -> None:
    model = with_memory()
    found = solved(model, tmp_path)
    assert found.facts == ()
    assert found.signature == signature_of(model.graph)
