"""Graphs whose batch is one row, or the second axis, and graphs that take only some lengths.

Most functions find this by running a small graph, written into `tmp_path`. A graph that cannot be served for one of
these reasons raises BuildRefused with the axis or the number.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.learning.batch_axis import (
    batch_on_axis_1,
    names_the_batch_first,
    takes_one_row_alone,
)
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.model.manifest import OutputSpec
from batch_graphs import graph
from opened import runner_of


def over(nodes: str, inputs: str = "float[b, t, 8] x") -> onnx.ModelProto:
    constants = {"flat": np.array([1, -1, 8]), "fours": np.array([0, -1, 4, 8]), "back": np.array([0, -1, 8])}
    return graph(f"g ({inputs}) => (float y) {{ {nodes} }}", **constants, middle=np.array([1]))


def takes_one(model: onnx.ModelProto, folder: Path) -> bool:
    return takes_one_row_alone(model, signature_of(model.graph), folder)


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param("one = Reshape(x, flat) y = Add(x, one)", id="runs on one row"),
        pytest.param("y = Reshape(x, flat)", id="answers one row"),
    ],
)
def test_a_graph_of_one_row_is_recognized(nodes: str, tmp_path: Path) -> None:
    assert takes_one(over(nodes), tmp_path)


def test_a_graph_that_runs_on_several_rows_takes_them(tmp_path: Path) -> None:
    assert not takes_one(over("y = Relu(x)"), tmp_path)


def test_lengths_that_must_be_multiples_are_refused_with_the_number(tmp_path: Path) -> None:
    words = "only on lengths that are multiples of 4 along 't', .* pads its input to a multiple of 4 itself"
    with pytest.raises(BuildRefused, match=words):
        takes_one(over("cut = Reshape(x, fours) y = Reshape(cut, back)"), tmp_path)


def test_inputs_that_must_be_swapped_are_refused_by_name(tmp_path: Path) -> None:
    # Attention along axis 0 of x, (T, B, 8), and a mask (B, T).
    nodes = """
        xs = Transpose<perm=[1, 0, 2]>(x)
        xt = Transpose<perm=[1, 2, 0]>(x)
        raw = MatMul(xs, xt)
        keys = Unsqueeze(mask, middle)
        scores = Add(raw, keys)
        p = Softmax<axis=-1>(scores)
        y = MatMul(p, xs)
    """
    model = over(nodes, "float[time, n, 8] x, float[b, t] mask")
    with pytest.raises(BuildRefused, match=r"the batch may be axis 1 of 'x': the model runs .* batch_first=True"):
        takes_one(model, tmp_path)


def test_outputs_that_have_the_second_axis_in_front_are_refused(tmp_path: Path) -> None:
    nodes = "xs = Transpose<perm=[1, 0, 2]>(x) y = ReduceMean<axes=[1], keepdims=0>(xs)"
    with pytest.raises(BuildRefused, match="the batch may be axis 1 of 'x': every output has that axis in front"):
        takes_one(over(nodes), tmp_path)


MIX_ALONG_0 = """
    xs = Transpose<perm=[1, 0, 2]>(x)
    xt = Transpose<perm=[1, 2, 0]>(x)
    scores = MatMul(xs, xt)
    p = Softmax<axis=-1>(scores)
    mixed = MatMul(p, xs)
    y = Transpose<perm=[1, 0, 2]>(mixed)
"""
MIX_ALL = "sum = ReduceMean<axes=[0, 1], keepdims=1>(x) y = Add(x, sum)"


@pytest.mark.parametrize(("nodes", "moved"), [(MIX_ALONG_0, ("x",)), (MIX_ALL, ())], ids=["along axis 0", "along both"])
def test_a_second_axis_whose_positions_stay_apart_is_the_batch(
    nodes: str, moved: tuple[str, ...], tmp_path: Path
) -> None:
    model = over(nodes)
    outputs = [OutputSpec(name="y", dtype="float32", shape=("t", 8))]
    sampler = Sampler(signature_of(model.graph))
    assert batch_on_axis_1(runner_of(model, tmp_path), sampler, outputs, [], 1e-4) == moved


def test_a_second_axis_without_an_output_along_it_is_not_examined(tmp_path: Path) -> None:
    model = over(MIX_ALONG_0)
    outputs = [OutputSpec(name="y", dtype="float32", shape=(8,))]
    sampler = Sampler(signature_of(model.graph))
    assert batch_on_axis_1(runner_of(model, tmp_path), sampler, outputs, [], 1e-4) == ()


@pytest.mark.parametrize(
    ("first", "named"), [("batch", True), ("batch_size", True), ("N", True), ("bsz", True), ("seq", False)]
)
def test_a_first_axis_may_be_named_as_the_batch(first: str, named: bool) -> None:
    model = over("y = Relu(x)", f"float[{first}, t, 8] x")
    assert names_the_batch_first(model.graph, ["x"]) is named
