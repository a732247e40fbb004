"""Attention in single operators is found, tapped, and equal to the definition, in every form.

A site is a place in a graph that computes attention; it is tapped if the converted graph returns its weights.
`Decomposed` makes a graph by its form, and the weights in float64; the names of the forms are its module's tuples.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from attnserve_server.conversion.assemble import Assembled, assemble
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.engine.session import RuntimeSession
from decomposed_graphs import BIASES, GUARDS, HEADS, LAYOUTS, MASKS, SCALES, SPELLINGS, Decomposed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

Array = np.ndarray[Any, np.dtype[Any]]


def assembled(model: onnx.ModelProto, folder: Path) -> Assembled:
    proto = checked(model, "case")
    return assemble(proto, Sampler(signature_of(proto.graph), 0), folder, Steps.silent())


def assert_equals_definition(case: Decomposed, model: onnx.ModelProto | None = None) -> None:
    """Assert that a graph, by default the case's own, gives the case's weights."""
    with TemporaryDirectory() as folder:
        done = assembled(model or case.model(), Path(folder))
        (site,) = done.sites
        assert not site.unavailable_reason
        assert (site.heads, site.kv_heads) == (HEADS, case.kv_heads)
        session = RuntimeSession.load(done.model_path, provider="CPUExecutionProvider")
    feeds = case.feeds(4, 6, 9)
    expected = case.reference(feeds)
    # float32 sums in another order; float16 keeps 11 bits of scores up to 10; 8 bits of a weight are 1/255 apart.
    tolerance = 1e-2 if case.dtype is np.float16 else 1e-5
    if case.guard == "quantised":
        # Mixtures of heads add up several, times up to 2.
        tolerance = 0.51 / 255 * (8 if case.mixed else 1)
    for items in ([0, 1, 2, 3], [2], [3, 0], [1, 1, 2], []):
        asked = {**feeds, site.items_input: np.array(items, np.int64)}
        (weights,) = session.run(asked, [site.weights_output])
        assert weights.dtype == np.float32
        assert weights.shape == (len(items), *expected.shape[1:])
        np.testing.assert_allclose(weights, expected[items], rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_every_layout_with_every_mask(layout: str, mask: str) -> None:
    assert_equals_definition(Decomposed(layout=layout, mask=mask))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("divides", [False, True], ids=["Mul", "Div"])
def test_every_place_of_the_scale(scale: str, divides: bool) -> None:
    assert_equals_definition(Decomposed(scale=scale, divides=divides, bias="relative"))


@pytest.mark.parametrize("bias", BIASES)
def test_every_bias_and_mixture_of_heads(bias: str) -> None:
    assert_equals_definition(Decomposed(bias=bias))


@pytest.mark.parametrize("guard", GUARDS)
def test_every_guard(guard: str) -> None:
    assert_equals_definition(Decomposed(guard=guard, mask="minus infinity", causal=True))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("opset", [11, 12, 13, 18, 21, 23])
def test_every_spelling_of_softmax(spelling: str, opset: int) -> None:
    assert_equals_definition(Decomposed(spelling=spelling, opset=opset, mask="added"))


def test_weights_of_integer_matmuls_are_tapped_before_they_are_quantized(tmp_path: Path) -> None:
    case = Decomposed(layout="3-D", mask="added")
    onnx.save(case.model(), tmp_path / "wide.onnx")
    integers = {"MatMulConstBOnly": False}
    quantize_dynamic(tmp_path / "wide.onnx", tmp_path / "narrow.onnx", extra_options=integers)
    done = assembled(onnx.load(tmp_path / "narrow.onnx"), tmp_path)
    (site,) = done.sites
    assert (site.operator, site.unavailable_reason) == ("MatMulInteger-Softmax-MatMulInteger", "")
    session = RuntimeSession.load(done.model_path, provider="CPUExecutionProvider")
    feeds = case.feeds(4, 6, 9)
    (weights,) = session.run({**feeds, site.items_input: np.arange(4)}, [site.weights_output])
    # 8 bits of features, of their tables, and of queries and keys, whose scores reach 10.
    np.testing.assert_allclose(weights, case.reference(feeds), rtol=0, atol=0.1)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=0, atol=1e-5)


class Examples(CalibrationDataReader):
    """The inputs on which static quantization measures ranges."""

    def __init__(self, case: Decomposed) -> None:
        self._feeds = iter([case.feeds(3, 6, 9, seed) for seed in range(3)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator], ids=["around the products", "throughout"])
def test_sites_of_statically_quantized_files_are_found(form: QuantFormat, tmp_path: Path) -> None:
    case = Decomposed()
    onnx.save(onnx.shape_inference.infer_shapes(case.model()), tmp_path / "wide.onnx")
    quantize_static(tmp_path / "wide.onnx", tmp_path / "narrow.onnx", Examples(case), quant_format=form)
    done = assembled(onnx.load(tmp_path / "narrow.onnx"), tmp_path)
    (site,) = done.sites
    session = RuntimeSession.load(done.model_path, provider="CPUExecutionProvider")
    feeds = case.feeds(3, 6, 9, seed=1)
    (weights,) = session.run({**feeds, site.items_input: np.arange(3)}, [site.weights_output])
    # 8 bits of everything, of scores up to 10 too.
    np.testing.assert_allclose(weights, case.reference(feeds), rtol=0, atol=0.15)


@pytest.mark.parametrize("spelling", ["Softmax", "Exp", "LogSoftmax"])
@pytest.mark.parametrize("layout", ["4-D", "3-D", "turned"])
def test_file_that_the_runtime_saved_optimised_is_tapped(layout: str, spelling: str, tmp_path: Path) -> None:
    case = Decomposed(layout=layout, spelling=spelling, mask="chosen", scale="both")
    onnx.save(case.model(), tmp_path / "source.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(tmp_path / "source.onnx", options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    # The positive control: the runtime did write operators of its domain.
    assert any(node.op_type == "FusedMatMul" for node in optimised.graph.node)
    assert_equals_definition(case, optimised)


@st.composite
def forms(draw: st.DrawFn) -> Decomposed:
    layout = draw(st.sampled_from(LAYOUTS))
    oldest = 12 if "einsum" in layout else 11
    guard = draw(st.sampled_from(GUARDS))
    # The runtime quantizes no float16.
    dtype = np.float32 if guard == "quantised" else draw(st.sampled_from([np.float32, np.float32, np.float16]))
    latent = layout not in {"5-D", "einsum grouped"} and draw(st.booleans())
    return Decomposed(
        opset=draw(st.integers(oldest, 23)),
        layout=layout,
        scale=draw(st.sampled_from(SCALES)),
        divides=draw(st.booleans()),
        mask=draw(st.sampled_from(MASKS)),
        causal=draw(st.booleans()),
        bias=draw(st.sampled_from(BIASES)),
        guard=guard,
        spelling=draw(st.sampled_from(SPELLINGS)),
        cross=draw(st.booleans()),
        latent=latent,
        direct=draw(st.booleans()),
        dtype=dtype,
        wide_softmax=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(max_examples=100)
@given(forms())
@example(Decomposed(opset=11, scale="none", direct=True, dtype=np.float16))  # without weights to read a precision of
def test_any_combination_equals_the_definition(case: Decomposed) -> None:
    assert_equals_definition(case)


@settings(max_examples=15)
@given(forms())
def test_any_combination_is_prepared(case: Decomposed) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "case.onnx"
        onnx.save(case.model(), path)
        bundle = prepare_bundle(PrepareRequest(file=path, name="case", repository=Path(folder), max_length=40))
    (site,) = bundle.manifest.sites
    assert site.available
    assert site.heads == HEADS
