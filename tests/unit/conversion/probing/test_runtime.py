"""Runs of a graph for probes: rows that taps select, refusals, messages without paths, and times of two graphs.

A tap is the nodes that return attention weights, for the rows that its input lists. A graph that cannot be loaded,
fails, or takes too long raises BuildRefused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.probing.runtime import GraphRunner, paired_seconds, time_ratio
from attnserve_server.conversion.rewrite.taps import tapped
from batch_graphs import graph
from onnx.shape_inference import infer_shapes
from opened import runner_of

X = {"x": np.ones((2, 3, 4), np.float32)}
ATTENTION = "g (float[b, t, 4] x) => (float y) { y = Attention<q_num_heads=2, kv_num_heads=2>(x, x, x) }"
DOUBLED = "g (float[b, t, 4] x) => (float y) { y = Add(x, x) }"


def test_taps_select_every_row_or_none(tmp_path: Path) -> None:
    model, _ = tapped(infer_shapes(graph(ATTENTION, opset=23)))
    runner = runner_of(ir.to_proto(model), tmp_path)
    assert runner.output_names == ("y", "attention.attention_0", "attention_scores.attention_0")
    assert runner.run(X, ["attention.attention_0"])["attention.attention_0"].shape == (2, 2, 3, 3)
    assert runner.run(X, ["attention.attention_0"], tap=False)["attention.attention_0"].shape == (0, 2, 3, 3)


def test_a_run_that_fails_is_refused_with_the_runtimes_reason(tmp_path: Path) -> None:
    runner = runner_of(graph("g (float[b, t] x) => (float y) { y = MatMul(x, x) }"), tmp_path)
    with pytest.raises(BuildRefused, match=r"the model does not run: .*MatMul") as refused:
        runner.run({"x": np.ones((2, 3), np.float32)}, ["y"])
    assert "/" not in str(refused.value)
    assert "ONNXRuntimeError" not in str(refused.value)


def test_a_run_that_takes_too_long_is_refused_with_the_limit(tmp_path: Path) -> None:
    body = """g (float[b, t] x) => (float y) {
        y = Loop(most, yes, x) <body = step (int64 number, bool again, float[b, t] state) => (bool on, float[b, t] next)
            { on = Identity(again) next = Identity(state) }>
    }"""
    runner = runner_of(graph(body, most=np.array(2**62), yes=np.array(True)), tmp_path)
    with pytest.raises(BuildRefused, match=r"one run took more than 0\.05 s"):
        runner.run({"x": np.ones((2, 3), np.float32)}, ["y"], limit_s=0.05)


def test_a_file_that_the_runtime_cannot_load_is_refused_without_its_path(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(BuildRefused, match="the runtime cannot load the model: ") as refused:
        GraphRunner(path)
    assert str(tmp_path) not in str(refused.value)


def test_an_output_that_is_not_a_tensor_is_refused(tmp_path: Path) -> None:
    body = "g (float[b, t, 4] x) => (seq(float) y) { y = SequenceConstruct(x) }"
    with pytest.raises(BuildRefused, match="output 'y' is not a tensor"):
        runner_of(graph(body), tmp_path).run(X, ["y"])


def test_times_of_two_graphs_are_measured_in_alternating_rounds(tmp_path: Path) -> None:
    runner = runner_of(graph(DOUBLED), tmp_path)
    one, other = paired_seconds(runner, runner, X, ["y"], budget_s=0)
    assert (len(one), len(other)) == (9, 9)
    assert time_ratio(runner, runner, X, ["y"]) > 0
