"""Answers of a tapped graph against a reference: its source, or the graph itself.

A tapped graph also returns the attention weights of its sites. `compared` compares answers with `answers()`, cut to
each sequence's length. A source with another number of sites raises CheckFailed; other differences are returned. A site
is a place in a graph that computes attention.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.assemble import Assembled, assemble
from attnserve_server.conversion.base.errors import CheckFailed
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.verify.compare import (
    Differences,
    Reference,
    check_against_itself,
    differences,
    over_keys,
)
from attnserve_server.model.bands import SlidingBand
from attnserve_server.model.manifest import OutputSpec, SiteSpec
from batch_graphs import graph

Array = np.ndarray[Any, np.dtype[Any]]

OUTPUTS = (OutputSpec(name="states", dtype="float32", shape=("seq", 2)),)
LENGTHS = ({"seq": 3}, {"seq": 2})


def site(**changes: Any) -> SiteSpec:
    known = {
        "name": "site", "layer": 0, "kind": "self", "form": "dense", "operator": "Softmax", "heads": 1, "kv_heads": 1,
        "head_dim": 2, "query_axis": "seq", "key_axis": "seq", "items_input": "items", "weights_output": "weights",
    }  # fmt: skip
    return SiteSpec(**{**known, **changes})


def answers() -> dict[str, Array]:
    """The answers to two sequences of 3 and 2 positions, in a batch padded to 3."""
    weights = np.zeros((2, 1, 3, 3), np.float32)
    weights[0] = 1 / 3
    weights[1, :, :2, :2] = 0.5
    return {"states": np.ones((2, 3, 2), np.float32), "weights": weights}


def compared(found: dict[str, Array], sites: tuple[SiteSpec, ...] = (site(),)) -> Differences:
    exact = answers()
    reference = Reference({"states": exact["states"]}, [exact["weights"]] * len(sites))
    return differences(OUTPUTS, sites, found, reference, LENGTHS)


def test_equal_answers_have_no_differences() -> None:
    found = compared(answers())
    assert (found.output, found.weight) == (0, 0)
    assert found.row_sum < 1e-6  # three float32 thirds


@pytest.mark.parametrize(("name", "place"), [("states", (0, 2, 1)), ("weights", (1, 0, 1, 0))])
def test_a_difference_within_a_sequence_counts(name: str, place: tuple[int, ...]) -> None:
    found = answers()
    found[name][place] += 0.25
    measured = compared(found)
    assert (measured.output if name == "states" else measured.weight) == 0.25


@pytest.mark.parametrize(
    ("name", "place"), [("states", (1, 2, 1)), ("weights", (1, 0, 2, 0)), ("weights", (1, 0, 0, 2))]
)
def test_a_difference_in_padding_does_not_count(name: str, place: tuple[int, ...]) -> None:
    found = answers()
    found[name][place] += 0.25
    assert compared(found) == compared(answers())


def test_what_the_source_does_not_give_is_left_out() -> None:
    found = answers()
    found["states"] += 1
    found["weights"] += 1
    assert differences(OUTPUTS, [site()], found, Reference({}, [None]), LENGTHS) == Differences(0, 0, 0)
    untapped = site(items_input=None, weights_output=None, unavailable_reason="its layout is not known")
    assert compared(found, (untapped,)).weight == 0


def test_another_number_of_sites_fails_the_check() -> None:
    with pytest.raises(CheckFailed, match="1 sites in the graph, but the source gives 0 attention tensors"):
        differences(OUTPUTS, [site()], answers(), Reference({}, []), LENGTHS)


def test_columns_of_a_band_are_put_where_their_keys_are() -> None:
    band = SlidingBand(before=1, after=0)
    columns = np.array([[[0, 1], [0.25, 0.75], [0.5, 0.5], [9, 9]]], np.float32)
    windowed = site(form="windowed", band=band)
    expected = [[[1, 0, 0], [0.25, 0.75, 0], [0, 0.5, 0.5]]]
    np.testing.assert_array_equal(over_keys(windowed, columns, 3, 3), expected)


def test_whole_rows_of_a_windowed_site_are_cropped() -> None:
    rows = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    whole = site(form="windowed", band=SlidingBand(before=1, after=0), whole_rows=True)
    np.testing.assert_array_equal(over_keys(whole, rows, 2, 3), rows[:, :2, :3])


def assembled(folder: Path) -> Assembled:
    body = """g (float[b, t, 4] x) => (float[b, t, 4] y) {
        attended = Attention<q_num_heads=2, kv_num_heads=2>(x, x, x)
        y = Mul(attended, two)
    }"""
    model = onnx.shape_inference.infer_shapes(graph(body, opset=23, two=2.0))
    return assemble(model, Sampler(signature_of(model.graph)), folder, Steps.silent())


def test_a_tapped_graph_agrees_with_itself(tmp_path: Path) -> None:
    report = check_against_itself(assembled(tmp_path), {"t": 30}, 4, paddable=True)
    assert report.lengths == (3, 21, 9, 30)
    # float32 sums in another order.
    assert report.output_max_abs_error == 0
    assert report.weight_max_abs_error < 1e-5
    assert report.row_sum_max_abs_error < 1e-5
    assert report.tapped_over_source_time is not None


def test_a_batch_has_one_length_where_padding_is_not_harmless(tmp_path: Path) -> None:
    report = check_against_itself(assembled(tmp_path), {"t": 30}, 2, paddable=False)
    assert report.lengths == (30, 30)


def test_another_graph_than_the_source_has_an_error(tmp_path: Path) -> None:
    made = assembled(tmp_path)
    model = onnx.load(made.model_path)
    (doubled,) = (tensor for tensor in model.graph.initializer if tensor.name == "two")
    doubled.CopyFrom(onnx.numpy_helper.from_array(np.float32(3), "two"))
    changed = tmp_path / "changed.onnx"
    onnx.save(model, changed)
    report = check_against_itself(replace(made, model_path=changed), {"t": 30}, 4, paddable=True)
    assert report.output_max_abs_error > 0.1
