"""Linear attention in plain ONNX files: found in every spelling, and only where it is.

It is phi(Q) (phi(K)^T V), divided by its sums: no node holds its weights, which are compared with the definition in
float64. `linear_graph` makes a graph of a named spelling, or of a look-alike that must give no site. A site is a place
in a graph that computes attention.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.base.sites import Linear, value_and_output
from attnserve_server.conversion.base.tolerances import product_error
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.graphs.reading import save
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.taps import expose, tapped
from linear_graphs import HEADS, LOOK_ALIKES, SPELLINGS, WIDTH, implied_weights, linear_graph

# float32 MatMuls over four features and five keys, summed in another order.
TOLERANCE = 1e-5


def feeds(batch: int = 3, length: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(length)
    mask = np.ones((batch, length), np.int64)
    mask[0, length - 1 :] = 0 if length > 1 else 1
    return {"frames": rng.normal(size=(batch, length, WIDTH)).astype(np.float32), "attention_mask": mask}


@pytest.mark.parametrize(
    ("spelling", "opset"), [*((spelling, 17) for spelling in SPELLINGS), ("matmul", 11), ("einsum", 12)]
)
def test_weights_equal_the_definition_in_every_spelling(spelling: str, opset: int, tmp_path: Path) -> None:
    proto = linear_graph(spelling, opset)
    model, sites = tapped(proto)
    ((name, site),) = sites.items()
    assert isinstance(site.attention, Linear)
    expose(model, [site])
    save(model, tmp_path / "tapped.onnx")
    runner = GraphRunner(tmp_path / "tapped.onnx")
    heads = 1 if spelling == "matmul-one-head" else HEADS
    for length in (1, 5):
        given = feeds(length=length)
        inner = [str(value.name) for value in value_and_output(site.attention)]
        found = runner.run(given, [f"attention.{name}", *inner, "attended"])
        expected = implied_weights(proto, given["frames"], given["attention_mask"], heads=heads)
        np.testing.assert_allclose(found[f"attention.{name}"], expected, atol=TOLERANCE, rtol=0)
        assert product_error(site.attention, expected, found[inner[0]], found[inner[1]]) < TOLERANCE
    assert (site.form, site.heads, site.head_dim) == ("linear", heads, WIDTH // heads)


@pytest.mark.parametrize("look_alike", LOOK_ALIKES)
def test_similar_graphs_are_not_reported(look_alike: str) -> None:
    assert not find_sites(ir.from_proto(linear_graph(look_alike)).graph)


def test_only_the_selected_rows_are_computed_in_the_order_of_the_selection(tmp_path: Path) -> None:
    proto = linear_graph("matmul")
    model, sites = tapped(proto)
    save(model, tmp_path / "tapped.onnx")
    import onnxruntime as ort  # noqa: PLC0415 - the server's session always selects all rows here

    session = ort.InferenceSession(tmp_path / "tapped.onnx")
    given = feeds()
    (name,) = sites
    expected = implied_weights(proto, given["frames"], given["attention_mask"])
    for items in ([], [2], [1, 0]):
        asked = {**given, f"attention_items.{name}": np.array(items, np.int64)}
        (weights,) = session.run([f"attention.{name}"], asked)
        np.testing.assert_allclose(weights, expected[items], atol=TOLERANCE, rtol=0)


def test_a_row_without_any_key_is_zero(tmp_path: Path) -> None:
    model, sites = tapped(linear_graph("matmul"))
    save(model, tmp_path / "tapped.onnx")
    given = feeds()
    given["attention_mask"][1] = 0
    (name,) = sites
    weights = GraphRunner(tmp_path / "tapped.onnx").run(given, [f"attention.{name}"])[f"attention.{name}"]
    assert not weights[1].any()
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("spelling", ["matmul", "einsum-of-three"])
def test_a_file_of_this_form_becomes_a_bundle_with_a_linear_site(spelling: str, tmp_path: Path) -> None:
    onnx.save(linear_graph(spelling), tmp_path / "linear.onnx")
    request = PrepareRequest(
        file=tmp_path / "linear.onnx", name="linear", repository=tmp_path / "models", max_length=64
    )
    manifest = prepare_bundle(request).manifest
    (site,) = manifest.sites
    assert (site.form, site.kind, site.heads, site.available) == ("linear", "self", HEADS, True)
    assert (site.query_axis, site.key_axis) == ("seq", "seq")
    # The proof does not support an einsum of three operands, so that the default policy does not pad.
    assert manifest.axis("seq").paddable == (spelling == "matmul")
    assert manifest.under("tested").axis("seq").paddable
    assert manifest.check.weight_max_abs_error < TOLERANCE


@pytest.mark.parametrize("spelling", ["matmul", "einsum-heads-last"])
def test_half_precision_features_give_the_weights_that_the_model_uses(spelling: str, tmp_path: Path) -> None:
    proto = linear_graph(spelling, dtype=np.float16)
    onnx.save(proto, tmp_path / "half.onnx")
    request = PrepareRequest(file=tmp_path / "half.onnx", name="half", repository=tmp_path / "models", max_length=64)
    bundle = prepare_bundle(request)
    (site,) = bundle.manifest.sites
    assert (site.form, site.available, bundle.manifest.precision) == ("linear", True, "fp16")
    given = feeds()
    given["frames"] = given["frames"].astype(np.float16)
    weights = GraphRunner(bundle.path / "model.onnx").run(given, [str(site.weights_output)])[str(site.weights_output)]
    expected = implied_weights(proto, given["frames"], given["attention_mask"])
    # float16 keeps 11 bits of features up to 5.
    np.testing.assert_allclose(weights, expected, atol=1e-2, rtol=0)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
