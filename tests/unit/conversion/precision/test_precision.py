"""Reduced precision: int8 MatMuls and float16 graphs stay close to float32, and a row does not depend on its batch.

Graphs are made by hand and run in onnxruntime. `in_precision` raises BuildRefused for an unknown precision, a source
that is reduced already, and a graph without a MatMul to round.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import checked, precision_of
from attnserve_server.conversion.precision.choose import in_precision
from attnserve_server.conversion.precision.int8 import relative_error, rounded_per_channel
from attnserve_server.conversion.rewrite.taps import tapped
from onnx import helper, numpy_helper
from onnx_files import encoder

WIDTH = 48


def products(opset: int = 21, *, odd: bool = False) -> onnx.ModelProto:
    """Two MatMuls of one input, and a third of their sum; `odd` gives the last weights one very large number."""
    rng = np.random.default_rng(5)
    weights = {name: rng.normal(0, 0.3, (WIDTH, WIDTH)).astype(np.float32) for name in ("a", "b", "c")}
    if odd:
        weights["c"][0] = 1000.0
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["left"], name="/block/left/MatMul"),
        helper.make_node("MatMul", ["x", "b"], ["right"], name="/block/right/MatMul"),
        helper.make_node("Add", ["left", "right"], ["sum"]),
        helper.make_node("MatMul", ["sum", "c"], ["y"], name="/block/out/MatMul"),
    ]
    shape = ["batch", "seq", WIDTH]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return checked(model, "products")


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


def sample(*shape: int) -> np.ndarray:
    return np.random.default_rng(11).normal(size=(*shape, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 23])
def test_int8_matmuls_stay_close_to_float32_in_every_opset(opset: int) -> None:
    source = products(opset)
    reduced = checked(in_precision(source, "int8"), "products")
    assert precision_of(reduced) == "int8"
    x = sample(2, 7)
    expected, found = run(source, x), run(reduced, x)
    # Rounding to 127 levels errs by 0.3 levels of each number, about 0.6% of the norm, on both sides of two MatMuls.
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.02
    assert not np.array_equal(found, expected)


def test_int8_row_is_the_same_in_any_batch() -> None:
    reduced = in_precision(products(), "int8")
    alone = sample(1, 5)
    loud = np.concatenate([alone, 1000 * sample(1, 5)])
    # Integer sums are exact, and each row's scale is its own, so rounding cannot differ.
    np.testing.assert_array_equal(run(reduced, loud)[:1], run(reduced, alone))
    padded = np.concatenate([alone, 1000 * sample(1, 3)], axis=1)
    np.testing.assert_array_equal(run(reduced, padded)[:, :5], run(reduced, alone))


def test_row_changes_with_its_batch_under_one_scale_for_the_batch(tmp_path: Path) -> None:
    """The positive control of the test above: in the library's scheme, a large neighbour rounds a row to 0.

    Source: findings/dynamic_quantization_one_scale.sh.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - heavy

    onnx.save(products(), tmp_path / "source.onnx")
    quantize_dynamic(tmp_path / "source.onnx", tmp_path / "shared.onnx", per_channel=True, weight_type=QuantType.QInt8)
    shared = onnx.load(tmp_path / "shared.onnx")
    alone = sample(1, 5)
    loud = np.concatenate([alone, 1000 * sample(1, 5)])
    assert np.abs(run(shared, loud)[:1] - run(shared, alone)).max() > 0.1


def test_int8_row_of_zeros_stays_zero() -> None:
    x = sample(1, 4)
    x[0, 2] = 0
    assert not run(in_precision(products(), "int8"), x)[0, 2].any()


def test_matmuls_of_one_input_share_its_rounding() -> None:
    reduced = in_precision(products(), "int8")
    counts = [node.op_type for node in reduced.graph.node]
    assert counts.count("MatMulIntegerToFloat") == 3
    assert counts.count("QuantizeLinear") == 2


def test_matmul_with_a_large_rounding_error_stays_in_float32() -> None:
    source = products(odd=True)
    reduced = in_precision(source, "int8")
    kept = [node.input[1] for node in reduced.graph.node if node.op_type == "MatMul"]
    assert kept == ["c"]
    assert {"a", "b"}.isdisjoint(tensor.name for tensor in reduced.graph.initializer)


def test_weights_are_rounded_per_channel() -> None:
    weights = np.array([[1.0, 100.0, 0.0], [-0.5, 50.0, 0.0]], np.float32)
    rounded, steps = rounded_per_channel(weights)
    np.testing.assert_array_equal(rounded, [[127, 127, 0], [-64, 64, 0]])
    np.testing.assert_allclose(steps, [1 / 127, 100 / 127, 1], rtol=1e-6)
    assert relative_error(weights, rounded, steps) < 0.01


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_source_stays_unchanged(precision: str) -> None:
    source = products()
    before = source.SerializeToString()
    in_precision(source, precision)  # type: ignore[arg-type]
    assert source.SerializeToString() == before


def test_fp32_is_the_source_itself() -> None:
    source = products()
    assert in_precision(source, "fp32") is source


def test_float16_keeps_the_types_of_inputs_and_outputs() -> None:
    source = products()
    reduced = checked(in_precision(source, "fp16"), "products")
    assert precision_of(reduced) == "fp16"
    for before, after in zip(
        (*source.graph.input, *source.graph.output), (*reduced.graph.input, *reduced.graph.output), strict=True
    ):
        assert (before.name, before.type) == (after.name, after.type)
    x = sample(2, 7)
    # float16 keeps 11 bits; sums of 48 terms of size 1 err by a few thousandths.
    np.testing.assert_allclose(run(reduced, x), run(source, x), atol=2e-2)


def test_float16_site_keeps_its_name_and_heads() -> None:
    _, before = tapped(checked(encoder(), "encoder"))
    _, after = tapped(checked(in_precision(checked(encoder(), "encoder"), "fp16"), "encoder"))
    assert list(before) == list(after)
    assert [(site.heads, site.head_dim, site.tappable) for site in after.values()] == [(4, 4, True)]


def test_reduced_source_is_not_reduced_again() -> None:
    half = in_precision(products(), "fp16")
    assert in_precision(half, "fp16") is half
    with pytest.raises(BuildRefused, match="fp16 already"):
        in_precision(half, "int8")


def test_nothing_to_round_is_refused() -> None:
    with pytest.raises(BuildRefused, match="no MatMul with constant weights"):
        in_precision(checked(encoder(), "encoder"), "int8")


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(BuildRefused, match="'int4' is not known; fp32, fp16, int8 are"):
        in_precision(products(), "int4")  # type: ignore[arg-type]


def test_fp16_keeps_the_buckets_of_distances() -> None:
    """As T5 does: logarithms of distances, cast to whole numbers."""
    numbers = {"eight": 8.0, "most": float(np.log(np.float32(16))), "width": 3.0}
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["distance"], name="distance", keepdims=0),
        helper.make_node("Div", ["distance", "eight"], ["part"], name="part"),
        helper.make_node("Log", ["part"], ["log"], name="log"),
        helper.make_node("Div", ["log", "most"], ["share"], name="share"),
        helper.make_node("Mul", ["share", "eight"], ["place"], name="place"),
        helper.make_node("Cast", ["place"], ["bucket"], name="bucket", to=onnx.TensorProto.INT64),
        helper.make_node("Cast", ["bucket"], ["number"], name="number", to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["number", "width"], ["y"], name="y"),
    ]
    graph = helper.make_graph(
        nodes,
        "buckets",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.float32(number), name) for name, number in numbers.items()],
    )
    source = checked(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "buckets")
    reduced = in_precision(source, "fp16")
    for distance in range(8, 128):
        x = np.array([distance], np.float32)
        assert run(reduced, x) == run(source, x), f"distance {distance}"


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_int8_rewrites_gemms(turned: bool, biased: bool) -> None:
    rng = np.random.default_rng(7)
    weights = rng.normal(0, 0.3, (WIDTH, WIDTH)).astype(np.float32)
    bias = rng.normal(size=WIDTH).astype(np.float32)
    stored = {"weights": np.ascontiguousarray(weights.T) if turned else weights, "bias": bias}
    inputs = ["x", "weights", "bias"] if biased else ["x", "weights"]
    graph = helper.make_graph(
        [helper.make_node("Gemm", inputs, ["y"], name="gemm", transB=int(turned))],
        "gemm",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(stored[name], name) for name in inputs[1:]],
    )
    source = checked(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "gemm")
    reduced = checked(in_precision(source, "int8"), "gemm")
    assert precision_of(reduced) == "int8"
    x = sample(5)
    # Levels of 1/127 of the greatest number on both sides, over 48 terms of size 0.3.
    np.testing.assert_allclose(run(reduced, x), run(source, x), rtol=0, atol=0.1)
    np.testing.assert_allclose(run(source, x), x @ weights + (bias if biased else 0), rtol=0, atol=1e-4)


def normalised(opset: int = 21) -> onnx.ModelProto:
    """A normalization whose channels have very different ranges, and a MatMul with a bias behind it."""
    rng = np.random.default_rng(9)
    gain = np.ones(WIDTH, np.float32)
    gain[3] = 40.0
    arrays = {
        "gain": gain,
        "offset": rng.normal(size=WIDTH).astype(np.float32),
        "weights": rng.normal(0, 0.3, (WIDTH, WIDTH)).astype(np.float32),
        "bias": rng.normal(size=WIDTH).astype(np.float32),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gain", "offset"], ["n"], axis=-1, epsilon=1e-5),
        helper.make_node("MatMul", ["n", "weights"], ["product"], name="/block/MatMul"),
        helper.make_node("Add", ["product", "bias"], ["biased"]),
        helper.make_node("Add", ["biased", "n"], ["y"]),
    ]
    shape = ["batch", "seq", WIDTH]
    graph = helper.make_graph(
        nodes,
        "normalised",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return checked(model, "normalised")


def reach_of(x: np.ndarray) -> np.ndarray:
    model = normalised()
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    centred = x - x.mean(-1, keepdims=True)
    n = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * arrays["gain"] + arrays["offset"]
    return np.asarray(np.abs(n).reshape(-1, WIDTH).max(axis=0))


def test_calibrated_range_leaves_no_work_per_row() -> None:
    reduced = checked(in_precision(normalised(), "int8", {"n": reach_of(sample(4, 20))}), "normalised")
    operators = [node.op_type for node in reduced.graph.node]
    assert not {"ReduceMax", "ReduceMin", "Div"} & set(operators)
    # The bias is an input of the MatMul; other readers of the normalized value still get the unscaled one.
    assert operators.count("Add") == 1
    assert operators.count("LayerNormalization") == 2


def test_calibrated_range_keeps_channels_of_large_and_of_small_numbers() -> None:
    source = normalised()
    x = sample(2, 9)
    reduced = in_precision(source, "int8", {"n": reach_of(sample(4, 20))})
    expected, found = run(source, x), run(reduced, x)
    # As without calibration: both sides are rounded to 127 levels; one channel has 40 times the range of the others.
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.02


def test_row_with_a_calibrated_range_is_the_same_in_any_batch() -> None:
    reduced = in_precision(normalised(), "int8", {"n": reach_of(sample(4, 20))})
    alone = sample(1, 5)
    loud = np.concatenate([alone, 1000 * sample(1, 5)])
    np.testing.assert_array_equal(run(reduced, loud)[:1], run(reduced, alone))


def test_range_of_a_value_without_normalization_changes_nothing() -> None:
    plain = in_precision(products(), "int8", {"x": np.ones(WIDTH)})
    assert plain.SerializeToString() == in_precision(products(), "int8").SerializeToString()
