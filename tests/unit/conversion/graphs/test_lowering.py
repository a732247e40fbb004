"""Operators that onnxruntime lacks are replaced by what it has, with the same results, or refused by name.

They are FlexAttention and CausalConvWithState; results are compared with the definitions of both. A node whose types
are not known raises BuildRefused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import pytest
from attnserve_server.conversion.assemble import assemble
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.engine.session import RuntimeSession

Array = np.ndarray[Any, np.dtype[Any]]
SCORES = "float[B, H, L, S]"
CAUSAL = (
    f"score_mod: graph = triangle ({SCORES} s) => ({SCORES} kept) <int64 two = {{2}}, int64 three = {{3}},"
    " int64 zero = {0}, int64 one = {1}, int64[1] back = {-1}, float low = {-inf}> { z = Shape(s) l = Gather(z, two)"
    " m = Gather(z, three) i = Range(zero, l, one) j = Range(zero, m, one) q = Unsqueeze(i, back)"
    " c = GreaterOrEqual(q, j) kept = Where(c, s, low) }"
)
CAPPED = (
    f"score_mod: graph = cap ({SCORES} s) => ({SCORES} t) <float most = {{2}}>"
    " { a = Div(s, most) b = Tanh(a) t = Mul(b, most) }"
)
HALVED = f"prob_mod: graph = half ({SCORES} p) => ({SCORES} r) <float part = {{0.5}}> {{ r = Mul(p, part) }}"


def flexible(attributes: str = "", kv_heads: int = 4) -> onnx.ModelProto:
    """One FlexAttention of four heads of size 8 over three inputs."""
    of_keys = f"float[batch, {kv_heads}, seq, 8]"
    operator = "ai.onnx.preview.FlexAttention" + (f"<{attributes}>" if attributes else "")
    model = onnx.parser.parse_model(
        '<ir_version: 13, opset_import: ["" : 26, "ai.onnx.preview" : 1]> g'
        f" (float[batch, 4, seq, 8] query, {of_keys} key, {of_keys} value)"
        f" => (float[batch, 4, seq, 8] output) {{ output = {operator}(query, key, value) }}"
    )
    model.graph.node[0].name = "/encoder/layer.0/attention/FlexAttention"
    return model


def feeds_of(kv_heads: int) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    heads = {"query": 4, "key": kv_heads, "value": kv_heads}
    return {name: rng.normal(size=(2, count, 5, 8)).astype(np.float32) for name, count in heads.items()}


@pytest.mark.parametrize(
    ("attributes", "kv_heads"),
    [("", 4), ("", 2), ("scale = 0.3", 4), (CAUSAL, 4), (CAPPED, 2), (f"{CAUSAL}, {HALVED}", 4)],
    ids=["plain", "grouped heads", "scale", "score_mod that masks", "score_mod that caps", "prob_mod"],
)
def test_weights_of_flexattention_are_those_that_multiply_the_values(
    attributes: str, kv_heads: int, tmp_path: Path
) -> None:
    proto = checked(flexible(attributes, kv_heads), "case")
    assert {entry.domain for entry in proto.opset_import} == {""}
    done = assemble(proto, Sampler(signature_of(proto.graph), 0), tmp_path, Steps.silent())
    (site,) = done.sites
    assert (site.name, site.unavailable_reason) == ("encoder.layer.0.attention", "")
    assert (site.heads, site.kv_heads) == (4, kv_heads)
    feeds = feeds_of(kv_heads)
    query, key, value = (np.repeat(array, 4 // array.shape[1], axis=1).astype(np.float64) for array in feeds.values())
    scores = query @ key.swapaxes(2, 3) * (0.3 if "scale" in attributes else 8**-0.5)
    if CAPPED in attributes:
        scores = 2 * np.tanh(scores / 2)
    if CAUSAL in attributes:
        scores = np.where(np.tri(5, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True) * (2 if HALVED in attributes else 1)
    session = RuntimeSession.load(done.model_path, provider="CPUExecutionProvider")
    asked = {**feeds, site.items_input: np.array([1, 0])}
    found, output = session.run(asked, [site.weights_output, "output"])
    # float32, sums of at most eight products.
    np.testing.assert_allclose(found, weights[[1, 0]], rtol=0, atol=1e-6)
    np.testing.assert_allclose(output, weights @ value, rtol=0, atol=1e-5)


def test_flexattention_without_known_types_is_refused_by_name() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 13, opset_import: ["" : 26, "ai.onnx.preview" : 1, "com.microsoft" : 1]> g'
        " (float[batch, 4, seq, 8] query) => (float[batch, 4, seq, 8] output) { lost = com.microsoft.Gelu(query)"
        " output = ai.onnx.preview.FlexAttention(lost, query, query) }"
    )
    with pytest.raises(BuildRefused, match=r"'output' \(FlexAttention\) are not in the graph"):
        checked(model, "case")


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("inputs", ["x, w", "x, w, b", "x, w, , past", "x, w, b, past"])
def test_causal_convolution_runs_as_the_operator_of_the_runtime(inputs: str, activation: str, tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 13, opset_import: ["" : 27]> g (float[batch, 4, seq] x, float[4, 1, 3] w, float[4] b,'
        " float[batch, 4, 2] past) => (float[batch, 4, seq] y, float[batch, 4, 2] state)"
        f' {{ y, state = CausalConvWithState<activation = "{activation}">({inputs}) }}'
    )
    used = [name for name in ("x", "w", "b", "past") if name in inputs.split(", ")]
    kept = [value for value in model.graph.input if value.name in used]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 4, 6), "w": (4, 1, 3), "b": (4,), "past": (2, 4, 2)}
    feeds = {name: rng.normal(size=shapes[name]).astype(np.float32) for name in used}
    expected = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    path = tmp_path / "graph.onnx"
    onnx.save(checked(model, "case"), path)
    found = GraphRunner(path).run(feeds, ["y", "state"])
    # float32, sums of three products.
    np.testing.assert_allclose(found["y"], expected[0], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found["state"], expected[1])
