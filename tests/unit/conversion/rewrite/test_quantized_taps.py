"""Taps of quantized values read integers, so that the runtime fuses the nodes between quantizers as without taps.

A tap is the nodes that are added to a graph to return its attention weights. `Static` makes attention between
quantizers, in a named form. One test quantizes a file with onnxruntime's own tool.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from attnserve_server.conversion.base.sites import Probabilities
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.graphs.reading import precision_of
from attnserve_server.conversion.rewrite.taps import sites_to_tap
from attnserve_server.model.repository import MODEL_FILE
from onnx_ir import from_proto, to_proto
from quantized_graphs import encoder
from static_graphs import FORMS, WIDTH, Static


def fused(path: Path) -> tuple[ort.InferenceSession, Counter[str]]:
    """The session that fuses between quantizers on every processor, and its operators."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".fused.onnx"))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    return session, Counter(node.op_type for node in graph.node if node.op_type.startswith("QLinear"))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("form", FORMS[:2])
def test_taps_leave_the_runtimes_fusions_and_answers_as_they_are(form: str, dtype: type, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(Static(form, dtype).model(), path)
    request = PrepareRequest(file=path, name="tiny", repository=tmp_path / "models", max_length=16, attack_seconds=0)
    bundle = prepare_bundle(request)
    source, before = fused(path)
    tapped, after = fused(copied(bundle.path / MODEL_FILE, tmp_path / "tapped.onnx"))
    assert before == after
    assert after["QLinearSoftmax"] == 1
    x = np.random.default_rng(1).normal(size=(2, 6, WIDTH)).astype(np.float32)
    (site,) = bundle.manifest.sites
    for items in ([], [0, 1]):
        feeds = {"x": x, str(site.items_input): np.array(items, np.int64)}
        np.testing.assert_array_equal(tapped.run(["y"], feeds)[0], source.run(["y"], {"x": x})[0])


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copy(source, target))


@pytest.mark.parametrize("form", FORMS)
def test_finder_reads_the_integers_and_their_quantizers(form: str) -> None:
    graph = from_proto(Static(form, np.int8).model()).graph
    (site,) = find_sites(graph).values()
    own = site.attention
    assert isinstance(own, Probabilities)
    for value, quantizer, name in (
        (own.weights, own.of_weights, "weights"),
        (own.value, own.of_value, "x"),
        (own.output, own.of_output, "product"),
    ):
        made_by = value.producer()
        assert made_by is not None
        assert made_by.op_type in {"QuantizeLinear", "QLinearSoftmax", "QLinearMatMul", "Transpose"}
        assert quantizer is not None
        assert str(quantizer.zero.dtype if quantizer.zero is not None else None) == "INT8"
        assert quantizer.scale.name == f"{name}.scale"
    assert own.levels is not None
    assert own.levels.step == pytest.approx(Static.step("product"))
    # The zero point of int8 is 3: (-128 - 3) steps and (127 - 3) steps.
    assert (own.levels.low, own.levels.high) == pytest.approx((-131 * 0.017, 124 * 0.017))
    assert not site.rows_sum_to_one


def test_signed_quantizers_of_tapped_values_become_unsigned_with_the_same_numbers(tmp_path: Path) -> None:
    proto = Static("QDQ", np.int8).model()
    model = from_proto(proto)
    own = next(iter(sites_to_tap(model.graph).values())).attention
    assert isinstance(own, Probabilities)
    assert [str(value.dtype) for value in (own.weights, own.output)] == ["UINT8", "UINT8"]
    # Two nodes dequantize x, so that the runtime leaves it as it is, too.
    assert str(own.value.dtype) == "INT8"
    x = np.random.default_rng(2).normal(size=(3, 7, WIDTH)).astype(np.float32)
    answers = []
    for name, each in (("before", proto), ("after", to_proto(model))):
        onnx.save(each, tmp_path / f"{name}.onnx")
        session, _ = fused(tmp_path / f"{name}.onnx")
        answers.append(session.run(["y"], {"x": x})[0])
    np.testing.assert_array_equal(*answers)


def test_file_of_the_runtimes_static_quantizer_is_tapped_and_keeps_its_answers(tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static  # noqa: PLC0415

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            rng = np.random.default_rng(1)
            self._left = [
                {"input_ids": rng.integers(1, 60, (2, length)), "attention_mask": np.ones((2, length), np.int64)}
                for length in (5, 12)
            ]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self._left.pop() if self._left else None

    onnx.save(encoder(), tmp_path / "plain.onnx")
    signed = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    for form in (QuantFormat.QDQ, QuantFormat.QOperator):
        path = tmp_path / f"{form.name}.onnx"
        quantize_static(tmp_path / "plain.onnx", path, Reader(), quant_format=form, per_channel=True, **signed)
        assert precision_of(onnx.load(path)) == "int8"
        request = PrepareRequest(
            file=path, name=form.name, repository=tmp_path / "models", max_length=32, attack_seconds=0
        )
        manifest = prepare_bundle(request).manifest
        assert [site.available for site in manifest.sites] == [True, True]
        assert manifest.precision == "int8"
        assert manifest.check.output_max_abs_error == 0.0
        # Beyond one step of each product's own quantizer.
        assert manifest.check.weight_max_abs_error <= 1e-5


@pytest.mark.parametrize(("reader", "precision"), [("MatMul(x, w)", "int8"), ("Add(x, row)", "fp32")])
def test_matmul_of_dequantized_weights_is_int8(reader: str, precision: str) -> None:
    """The runtime fuses it to MatMulNBits, which rounds activations to 8 bits."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> weights (float[batch, seq, 4] x) => (float[batch, seq, 4] y)
        <int8[4, 4] q, int8[4] r, float s = {{0.1}}> {{
            w = DequantizeLinear(q, s) row = DequantizeLinear(r, s) y = {reader}
        }}"""
    )
    assert precision_of(proto) == precision
