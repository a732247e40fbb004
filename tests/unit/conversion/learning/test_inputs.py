"""Corrections of declared inputs: axes that must be equal, a length that need not be fixed, masks that need a key.

Each correction is found by running a small graph, written into `tmp_path`. A graph that needs no correction, or that
would answer otherwise, keeps its inputs; `with_free_length` returns None for it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.inputs.signature import Signature, signature_of
from attnserve_server.conversion.learning.inputs import with_free_length, with_needed_keys
from attnserve_server.conversion.learning.solving import solved_axes
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.model.manifest import InputRole
from batch_graphs import graph
from onnx import shape_inference
from opened import runner_of


def equal_axes(declared: str, nodes: str, folder: Path) -> tuple[Signature, Signature]:
    """The signature of a graph, and the corrected one."""
    model = graph(f"g ({declared}) => (float z) {{ {nodes} }}")
    signature = signature_of(model.graph)
    return signature, solved_axes(model, signature, folder).signature


def test_nameless_axes_that_must_be_equal_share_a_symbol(tmp_path: Path) -> None:
    before, after = equal_axes("float[b, ?, 4] x, float[b, ?, 4] y", "z = Add(x, y)", tmp_path)
    assert before.symbols == ("x_axis_1", "y_axis_1")
    assert after.symbols == ("x_axis_1",)
    assert [spec.shape for spec in after.inputs] == [("x_axis_1", 4), ("x_axis_1", 4)]


def test_a_nameless_axis_takes_the_name_of_the_axis_that_it_must_equal(tmp_path: Path) -> None:
    _, after = equal_axes("float[b, words, 4] x, float[b, ?, 4] y", "z = Add(x, y)", tmp_path)
    assert [spec.shape for spec in after.inputs] == [("words", 4), ("words", 4)]


def test_only_the_axes_that_must_be_equal_are_made_equal(tmp_path: Path) -> None:
    declared = "float[b, ?, 4] x, float[b, ?, 4] y, float[b, ?, 4] other"
    _, after = equal_axes(declared, "sum = Add(x, y) z = Concat<axis=1>(sum, other)", tmp_path)
    assert after.symbols == ("x_axis_1", "other_axis_1")


def test_axes_that_may_differ_stay_apart(tmp_path: Path) -> None:
    before, after = equal_axes("float[b, ?, 4] x, float[b, ?, 4] y", "z = Concat<axis=1>(x, y)", tmp_path)
    assert after == before


def test_named_axes_that_a_node_forces_to_be_equal_share_the_first_name(tmp_path: Path) -> None:
    _, after = equal_axes("float[b, one, 4] x, float[b, two, 4] y", "z = Add(x, y)", tmp_path)
    assert [spec.shape for spec in after.inputs] == [("one", 4), ("one", 4)]


TABLE = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
EMBEDDED = """
    table = Identity(words)
    rows = Gather(table, input_ids)
    kept_2 = Cast<to=1>(attention_mask)
    kept = Unsqueeze(kept_2, last)
"""
MASKED_MEAN = """
    masked = Mul(rows, kept)
    sum = ReduceSum<keepdims=0>(masked, middle)
    count = ReduceSum<keepdims=0>(kept, middle)
    z = Div(sum, count)
"""


def text_model(nodes: str, length: str = "8", mask_length: str = "8") -> onnx.ModelProto:
    """A model of token ids and a mask of a declared length."""
    head = f"g (int64[b, {length}] input_ids, int64[b, {mask_length}] attention_mask) => (float[b, 4] z)"
    constants = {"words": TABLE, "last": np.array([-1]), "middle": np.array([1]), "eight": np.float32(8)}
    constants["positions"] = np.ones((8, 4), np.float32)
    model = graph(f"{head} {{ {EMBEDDED} {nodes} }}", **constants)
    return shape_inference.infer_shapes(model)


def freed(model: onnx.ModelProto, folder: Path) -> tuple[onnx.ModelProto, int] | None:
    return with_free_length(model, signature_of(model.graph), folder)


def test_a_length_that_the_graph_does_not_depend_on_becomes_dynamic(tmp_path: Path) -> None:
    found = freed(text_model(MASKED_MEAN), tmp_path)
    assert found is not None
    model, length = found
    assert length == 8
    assert [spec.shape for spec in signature_of(model.graph).inputs] == [("seq",), ("seq",)]
    ids = np.array([[3, 1, 4, 1, 5]])
    mean = runner_of(model, tmp_path).run({"input_ids": ids, "attention_mask": np.ones_like(ids)}, ["z"])["z"]
    np.testing.assert_allclose(mean, TABLE[ids].astype(np.float64).mean(axis=1), rtol=1e-5)  # float32 sums


@pytest.mark.parametrize(
    ("nodes", "length", "mask_length"),
    [
        pytest.param(
            "placed = Add(rows, positions) z = ReduceMean<axes=[1], keepdims=0>(placed)", "8", "8", id="table"
        ),
        pytest.param("z = ReduceMean<axes=[1], keepdims=0>(rows)", "8", "8", id="padding counts"),
        pytest.param(MASKED_MEAN, "t", "t", id="dynamic already"),
        pytest.param("z = ReduceMean<axes=[1], keepdims=0>(rows)", "8", "m", id="no mask of this length"),
    ],
)
def test_a_length_stays_fixed_where_answers_would_change(
    nodes: str, length: str, mask_length: str, tmp_path: Path
) -> None:
    assert freed(text_model(nodes, length, mask_length), tmp_path) is None


@pytest.mark.parametrize(
    ("nodes", "needed"),
    [
        ("p = Softmax<axis=-1>(scores)", True),
        ("q = Softmax<axis=-1>(scores) n = IsNaN(q) p = Where(n, zero, q)", False),
    ],
    ids=["softmax", "guarded softmax"],
)
def test_a_mask_is_marked_where_a_row_without_a_key_gives_nan(nodes: str, needed: bool, tmp_path: Path) -> None:
    body = f"""g (float[b, t, 4] x, float[b, t, t] bias) => (float[b, t, 4] y) {{
        xt = Transpose<perm=[0, 2, 1]>(x)
        raw = MatMul(x, xt)
        scores = Add(raw, bias)
        {nodes}
        y = MatMul(p, x)
    }}"""
    model = shape_inference.infer_shapes(graph(body, zero=0.0))
    sampler = Sampler(signature_of(model.graph))
    assert [spec.additive_mask for spec in sampler.signature.inputs] == [False, True]
    corrected = with_needed_keys(runner_of(model, tmp_path), sampler, ["y"])
    assert [spec.needs_key for spec in corrected] == [False, needed]
    assert [spec.role for spec in corrected] == [InputRole.DATA, InputRole.DATA]
