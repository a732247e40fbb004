"""The mean over heads beside each tap's weights: its numbers, for any number of rows and in every opset.

A tap is the nodes of a graph that return the attention weights of one site for selected rows. Here they select rows of
given weights. A graph without a site's output raises KeyError.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.rewrite.taps import add_means
from attnserve_server.model.manifest import SiteSpec
from attnserve_server.model.repository import MODEL_FILE
from quantized_graphs import encoder

LAST_BIT = 2.0**-24
"""Half of the last bit of numbers from 0.5 to 1, the greatest error of one rounding of a weight."""


def site(heads: int, **fields: object) -> SiteSpec:
    return SiteSpec.model_validate(
        {
            "name": "s", "layer": 0, "kind": "self", "form": "dense", "operator": "Softmax", "heads": heads,
            "kv_heads": heads, "head_dim": 8, "query_axis": "seq", "key_axis": "seq",
            "items_input": "attention_items.s", "weights_output": "attention.s", "mean_output": "attention_mean.s",
        }
        | fields
    )  # fmt: skip


def joined(heads: int, opset: int = 18, threads: int = 1, **fields: object) -> ort.InferenceSession:
    """A graph that returns given weights, (n, heads, L, S), and their mean."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 7, opset_import: ["" : {opset}]>
        g (float[b, {heads}, L, S] given, int64[n] items) => (float[n, {heads}, L, S] weights)
        {{ weights = Gather (given, items) }}"""
    )
    graph = ir.from_proto(model)
    graph.graph.inputs[1].name, graph.graph.outputs[0].name = "attention_items.s", "attention.s"
    add_means(graph.graph, [site(heads, **fields)])
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def drawn(*shape: int) -> np.ndarray:
    """Weights whose rows sum to 1."""
    weights = np.random.default_rng(sum(shape)).random(shape) ** 6
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def mean_by(session: ort.InferenceSession, weights: np.ndarray) -> np.ndarray:
    feeds = {"given": weights, "attention_items.s": np.arange(len(weights))}
    (found,) = session.run(["attention_mean.s"], feeds)
    return np.asarray(found)


@pytest.mark.parametrize("opset", [11, 13, 15, 18, 23])
@pytest.mark.parametrize(("heads", "queries", "keys"), [(2, 5, 5), (12, 7, 9), (3, 1, 4), (40, 6, 1)])
def test_mean_is_that_of_the_weights(opset: int, heads: int, queries: int, keys: int) -> None:
    session = joined(heads, opset)
    for count in (0, 1, 3):
        weights = drawn(count, heads, queries, keys)
        found = mean_by(session, weights)
        assert found.shape == (count, queries, keys)
        assert found.dtype == np.float32
        # Each addition, and the division, rounds once.
        np.testing.assert_allclose(found, weights.mean(axis=1, dtype=np.float64), rtol=0, atol=heads * LAST_BIT)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("heads", "length"), [(12, 8), (12, 33), (16, 128)])
def test_row_has_the_same_bits_alone_and_among_others(threads: int, heads: int, length: int) -> None:
    session, weights = joined(heads, threads=threads), drawn(5, heads, length, length)
    together = mean_by(session, weights)
    for row in range(len(weights)):
        np.testing.assert_array_equal(mean_by(session, weights[row : row + 1])[0], together[row])


def test_padding_leaves_the_bits_of_a_row() -> None:
    session, weights = joined(12), drawn(1, 12, 21, 21)
    padded = np.zeros((1, 12, 40, 40), np.float32)
    padded[:, :, :21, :21] = weights
    np.testing.assert_array_equal(mean_by(session, padded)[:, :21, :21], mean_by(session, weights))


@pytest.mark.parametrize("heads", [3, 7, 12, 25, 41, 64, 96])
def test_mean_of_ones_is_one(heads: int) -> None:
    assert mean_by(joined(heads), np.ones((2, heads, 3, 1), np.float32)).tolist() == [[[1.0]] * 3] * 2


def test_nan_of_one_row_and_position_stays_there() -> None:
    weights = drawn(2, 4, 3, 3)
    weights[1, 2, 0, 1] = np.nan
    found = np.isnan(mean_by(joined(4), weights))
    assert np.argwhere(found).tolist() == [[1, 0, 1]]


def test_site_without_a_mean_gets_none_and_one_without_weights_is_an_error() -> None:
    assert [output.name for output in joined(4, mean_output=None).get_outputs()] == ["attention.s"]
    with pytest.raises(KeyError, match=r"attention\.other"):
        joined(4, weights_output="attention.other")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_conversion_adds_the_mean_in_float32_in_every_precision(precision: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(encoder(), path)
    request = PrepareRequest(
        file=path, name="tiny", repository=tmp_path / "models", max_length=16, attack_seconds=0, precision=precision
    )
    bundle = prepare_bundle(request)
    session = ort.InferenceSession(str(bundle.path / MODEL_FILE), providers=["CPUExecutionProvider"])
    sites = [each for each in bundle.manifest.sites if each.available]
    assert sites
    names = [str(name) for each in sites for name in (each.weights_output, each.mean_output)]
    ids = np.random.default_rng(0).integers(0, 60, (3, 6))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found = session.run(names, feeds | {str(each.items_input): np.array([2, 0]) for each in sites})
    for weights, mean in zip(found[::2], found[1::2], strict=True):
        assert mean.dtype == np.float32
        expected = weights.mean(axis=1, dtype=np.float64)
        np.testing.assert_allclose(mean, expected, rtol=0, atol=weights.shape[1] * LAST_BIT)
