"""Files of onnxruntime's `quantize_dynamic`, prepared with one scale per row: they batch, and stay near the file.

Such a file has one scale for its whole batch, so a neighbour changes an answer. Conversion with `requantize` gives each
row its own. A file that has no dynamic quantizer must be refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import typer
from attnserve_server.cli._app import app as commands
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.equality import Equality
from attnserve_server.model.repository import Bundle
from commands import conversion_app
from onnxruntime.quantization import QuantType
from quantized_graphs import dynamically_quantized, encoder, model_of, node
from typer.testing import CliRunner

Array = np.ndarray[Any, np.dtype[Any]]
OPTIONS: dict[str, dict[str, Any]] = {
    "uint8": {"weight_type": QuantType.QUInt8},
    "int8": {"weight_type": QuantType.QInt8},
    "int8 per channel": {"weight_type": QuantType.QInt8, "per_channel": True},
    "uint8 per channel": {"weight_type": QuantType.QUInt8, "per_channel": True},
    "products of activations too": {"extra_options": {"MatMulConstBOnly": False}},
}


def optimized(path: Path) -> Path:
    """The file as onnxruntime's own optimizer saves it, with DynamicQuantizeMatMul and MatMulIntegerToFloat."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    target = path.with_suffix(".optimized.onnx")
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return target


def prepared(file: Path, requantize: Literal["per-row"] | None = "per-row") -> Bundle:
    request = PrepareRequest(
        file=file,
        name="ranker",
        repository=file.parent / "models",
        max_length=64,
        fuse=False,
        requantize=requantize,
    )
    return prepare_bundle(request)


def feeds_of(bundle: Bundle, ids: list[Array]) -> dict[str, Array]:
    """A padded batch, and every tap selected for all of its rows."""
    length = max(map(len, ids))
    rows = np.zeros((len(ids), length), np.int64)
    mask = np.zeros_like(rows)
    for row, own in enumerate(ids):
        rows[row, : len(own)], mask[row, : len(own)] = own, 1
    taps = {str(site.items_input): np.arange(len(ids)) for site in bundle.manifest.sites if site.available}
    return {"input_ids": rows, "attention_mask": mask, **taps}


def worst_error(bundle: Bundle) -> float:
    """The greatest difference of a sequence in a batch from the sequence alone; above 1 they are not equal."""
    session = RuntimeSession.load(bundle.model_path, provider="CPUExecutionProvider")
    sites = [str(site.weights_output) for site in bundle.manifest.sites if site.available]
    fetches = ["last_hidden_state", *sites]
    rng = np.random.default_rng(6)
    ids = [rng.integers(1, 60, length) for length in (3, 9, 1, 40, 40, 17)]
    together = dict(zip(fetches, session.run(feeds_of(bundle, ids), fetches), strict=True))
    equality, worst = Equality(bundle.manifest.precision), 0.0
    for row, own in enumerate(ids):
        alone = dict(zip(fetches, session.run(feeds_of(bundle, [own]), fetches), strict=True))
        size = len(own)
        for name in fetches:
            found = together[name][row, :size] if name not in sites else together[name][row, :, :size, :size]
            worst = max(worst, equality.error(name, found, alone[name][0]))
    return worst


@pytest.mark.parametrize("saved", ["as quantized", "as optimized"])
@pytest.mark.parametrize("options", OPTIONS)
def test_requantized_encoder_batches_and_stays_close_to_its_file(options: str, saved: str, tmp_path: Path) -> None:
    file = dynamically_quantized(encoder(), tmp_path / "quantized.onnx", **OPTIONS[options])
    bundle = prepared(optimized(file) if saved == "as optimized" else file)
    manifest = bundle.manifest
    assert [site.available for site in manifest.sites] == [True, True]
    assert manifest.max_batch_size > 1
    assert all(axis.paddable for axis in manifest.axes)
    assert worst_error(bundle) <= 1
    report, quality = manifest.check.requantize, manifest.check.quality
    assert report is not None
    assert (report.rewritten, report.unrounded) == (8, 8 if "activations" in options else 0)
    assert report.left == ()
    assert quality is not None
    assert quality.against == "the file itself, each sequence alone"
    # A scale per row rounds more finely than one per sequence; what is left is the source's own error, about 1 %.
    assert quality.cosine_worst > 0.995
    assert quality.output_max_abs_error is not None
    assert 0 < quality.output_max_abs_error < 0.5
    assert quality.speed_ratio is not None


def test_answers_of_the_file_itself_change_with_their_batch(tmp_path: Path) -> None:
    """The positive control (C2): with one scale for the batch, neighbours and padding change an answer.

    Source: findings/dynamic_quantization_one_scale.sh.
    """
    bundle = prepared(dynamically_quantized(encoder(), tmp_path / "quantized.onnx"), requantize=None)
    assert worst_error(bundle) > 1
    assert bundle.manifest.check.requantize is None


def features(form: str) -> onnx.ModelProto:
    """C1: float features, rounded dynamically and multiplied by the identity, attend to themselves without a mask."""
    arrays: dict[str, Array] = {"w": np.eye(4, dtype=np.int8), "w_scale": np.array(1, np.float32)}
    products = {
        "MatMulInteger": [
            node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            node("Mul", ["s", "w_scale"], ["scales"]),
            node("MatMulInteger", ["q", "w", "z"], ["sums"]),
            node("Cast", ["sums"], ["cast"], to=onnx.TensorProto.FLOAT),
            node("Mul", ["cast", "scales"], ["features"]),
        ],
        "DynamicQuantizeMatMul": [
            node("DynamicQuantizeMatMul", ["x", "w", "w_scale"], ["features"], domain="com.microsoft")
        ],
    }
    attention = [
        node("Transpose", ["features"], ["keys"], perm=[0, 2, 1]),
        node("MatMul", ["features", "keys"], ["scores"]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", "features"], ["y"]),
    ]
    return model_of([*products[form], *attention], arrays, x=("batch", "seq", 4), y=("batch", "seq", 4))


@pytest.mark.parametrize("form", ["MatMulInteger", "DynamicQuantizeMatMul"])
def test_row_of_ones_is_exact_beside_a_thousand(form: str, tmp_path: Path) -> None:
    file = tmp_path / "features.onnx"
    onnx.save(features(form), file)
    bundle = prepared(file)
    assert [site.available for site in bundle.manifest.sites] == [True]
    assert bundle.manifest.max_batch_size > 1
    batch = np.ones((2, 2, 4), np.float32)
    batch[1, 0, 1] = 1000
    for path, answer in ((bundle.model_path, 1.0), (file, 0.0)):
        session = RuntimeSession.load(path, provider="CPUExecutionProvider")
        taps = dict.fromkeys(set(session.input_names) - {"x"}, np.arange(2))
        (y,) = session.run({"x": batch, **taps}, ["y"])
        np.testing.assert_allclose(y[0], answer, rtol=1e-6)


def test_check_against_the_file_measures_each_sequence_alone(tmp_path: Path) -> None:
    file = dynamically_quantized(encoder(), tmp_path / "quantized.onnx")
    done = CliRunner().invoke(commands, ["check", str(prepared(file).path), "--against", str(file), "--json"])
    assert done.exit_code == 0, done.output
    quality = json.loads(done.stdout)["quality"]
    assert quality["against"] == "quantized.onnx, each sequence alone"
    assert quality["cosine_worst"] > 0.995


def test_rewriting_is_closer_to_float32_than_the_file(tmp_path: Path) -> None:
    model = encoder()
    file = dynamically_quantized(model, tmp_path / "quantized.onnx", per_channel=True)
    rng = np.random.default_rng(8)
    ids = [rng.integers(1, 60, 30) for _ in range(8)]
    bundle = prepared(file)
    errors = []
    feeds = feeds_of(bundle, ids)
    plain = {name: array for name, array in feeds.items() if name in {"input_ids", "attention_mask"}}
    for path, own in ((bundle.model_path, feeds), (file, plain)):
        session = RuntimeSession.load(path, provider="CPUExecutionProvider")
        true = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, plain)[0]
        errors.append(float(np.abs(session.run(own, ["last_hidden_state"])[0] - true).mean()))
    assert errors[0] < errors[1]


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    return conversion_app()


def call(app: typer.Typer, file: Path, *more: str) -> Any:
    line = ["prepare", str(file), "--name", "ranker", "--repository", str(file.parent / "models")]
    return CliRunner().invoke(app, [*line, "--requantize", "per-row", "--no-try", "--no-fuse", *more])


def test_command_prints_the_rewritten_quantizers_and_the_quality(app: typer.Typer, tmp_path: Path) -> None:
    file = dynamically_quantized(encoder(), tmp_path / "quantized.onnx")
    result = call(app, file)
    assert result.exit_code == 0, result.output
    assert "8 of 8 dynamic quantizers rewritten to one scale per row\n" in result.stdout
    assert "beside the file itself, each sequence alone: cosine of last_hidden_state " in result.stdout
    assert "times as fast" in result.stdout
    report = json.loads(call(app, file, "--json").stdout)["check"]
    assert report["requantize"] == {"rewritten": 8, "unrounded": 0, "left": []}
    assert report["quality"]["speed_ratio"] > 0


def test_file_without_dynamic_quantizer_is_refused_in_one_sentence(app: typer.Typer, tmp_path: Path) -> None:
    onnx.save(encoder(), tmp_path / "float.onnx")
    result = call(app, tmp_path / "float.onnx")
    assert result.exit_code == 2
    assert "error: --requantize per-row: the file has no dynamic quantizer" in result.stderr
    assert not (tmp_path / "models").exists()


def test_other_schemes_are_usage_errors(app: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["prepare", "x.onnx", "--name", "x", "--repository", "m", "--requantize", "per-batch"]
    )
    assert result.exit_code == 2
    assert "per-row" in result.stderr
