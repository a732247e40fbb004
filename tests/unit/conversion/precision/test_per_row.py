"""`--requantize per-row`: one scale and zero point per row instead of one for the whole batch.

`with_scale_per_row` returns the rewritten model and a report of the quantizers that stay, each with its reason. It
raises BuildRefused if the file has no dynamic quantizer, or if all of them stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.precision.per_row import with_scale_per_row
from attnserve_server.engine.session import RuntimeSession
from onnx import TensorProto, numpy_helper
from quantized_graphs import COLUMNS, FORMS, WIDTH, Array, exact_product, model_of, node, product, weights_of

Run = Callable[[onnx.ModelProto, Array], Array]


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a model as the server does, on a float32 input `x`, and return `y`."""

    def run(model: onnx.ModelProto, x: Array) -> Array:
        path = tmp_path_factory.mktemp("run") / "model.onnx"
        onnx.save(model, path)
        (y,) = RuntimeSession.load(path, provider="CPUExecutionProvider").run({"x": x.astype(np.float32)}, ["y"])
        return y

    return run


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    proto, report = with_scale_per_row(model)
    assert not report.left
    return checked(proto, "rewritten")


def sample(*shape: int) -> Array:
    """Rows of very different sizes, some of one sign only."""
    rng = np.random.default_rng(11)
    x = rng.normal(size=(*shape, WIDTH)) * rng.choice([0.01, 1, 100], (*shape, 1))
    x[0, 0] = np.abs(x[0, 0])
    x[0, -1] = -np.abs(x[0, -1])
    return x.astype(np.float32)


@pytest.mark.parametrize(("dtype", "per_channel"), [*itertools.product([np.int8, np.uint8], [False, True])])
@pytest.mark.parametrize("form", FORMS)
def test_each_row_is_rounded_as_the_standard_rounds_a_tensor(
    form: str, dtype: type, per_channel: bool, run: Run
) -> None:
    arrays = weights_of(dtype, per_channel=per_channel)
    x = sample(2, 7)
    found, expected = run(rewritten(product(form, arrays=arrays)), x), exact_product(x, arrays)
    # float32 keeps 24 bits of each row's integer sum, and of that times its scale.
    greatest = np.abs(expected - arrays["bias"]).max(axis=-1, keepdims=True) + 1
    np.testing.assert_array_less(np.abs(found - expected) / greatest, 2e-6)


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 21, 23])
def test_each_opset_gets_operators_that_it_has(opset: int, run: Run) -> None:
    x = sample(2, 7)
    found = run(rewritten(product(opset=opset)), x)
    np.testing.assert_allclose(found, exact_product(x, weights_of()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_one_row_alone_has_the_result_of_the_source(form: str, run: Run) -> None:
    source, x = product(form), sample(1, 3)
    for row in range(3):
        one = x[:, row : row + 1]
        np.testing.assert_allclose(run(rewritten(source), one), run(source, one), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("form", FORMS)
def test_row_has_the_same_bits_in_any_batch(form: str, opset: int, run: Run) -> None:
    model = rewritten(product(form, opset=opset))
    x = sample(5, 9)
    together = run(model, np.concatenate([x, 1e4 * sample(4, 9)]))
    for row, length in itertools.product(range(5), (1, 2, 9)):
        np.testing.assert_array_equal(together[row : row + 1, :length], run(model, x[row : row + 1, :length]))


@pytest.mark.parametrize("form", FORMS)
def test_row_of_the_source_changes_with_its_batch(form: str, run: Run) -> None:
    """The positive control: with one scale for the batch, a large neighbour changes a row."""
    x = sample(1, 5)
    assert np.abs(run(product(form), np.concatenate([x, 1e4 * x]))[:1] - run(product(form), x)).max() > 0.1


def test_row_of_zeros_gives_the_bias(run: Run) -> None:
    x = sample(1, 4)
    x[0, 2] = 0
    np.testing.assert_allclose(run(rewritten(product()), x)[0, 2], weights_of()["bias"], rtol=1e-6)


def test_weights_and_their_zero_points_are_those_of_the_file() -> None:
    source = product()
    model = rewritten(source)
    before, after = ({tensor.name: tensor for tensor in own.graph.initializer} for own in (source, model))
    for name in ("w", "w_scale", "w_zero"):
        assert numpy_helper.to_array(before[name]).tobytes() == numpy_helper.to_array(after[name]).tobytes()
    assert not {node.op_type for node in model.graph.node} & {"DynamicQuantizeLinear", "MatMulInteger"}


def test_source_stays_unchanged() -> None:
    source = product()
    before = source.SerializeToString()
    with_scale_per_row(source)
    assert source.SerializeToString() == before


def shared(opset: int = 17) -> onnx.ModelProto:
    """One quantizer, and three MatMuls of it, whose results are added."""
    nodes = [node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])]
    for part in "abc":
        nodes += [
            node("Mul", ["s", "w_scale"], [f"scales_{part}"]),
            node("MatMulInteger", ["q", "w", "z", "w_zero"], [f"sums_{part}"]),
            node("Cast", [f"sums_{part}"], [f"cast_{part}"], to=TensorProto.FLOAT),
            node("Mul", [f"cast_{part}", f"scales_{part}"], [f"product_{part}"]),
        ]
    nodes.append(node("Sum", ["product_a", "product_b", "product_c"], ["y"]))
    return model_of(nodes, {name: array for name, array in weights_of().items() if name != "bias"}, opset=opset)


def test_matmuls_of_one_quantizer_share_its_rows_and_are_exact_with_shared_weights(run: Run) -> None:
    model = rewritten(shared())
    assert [node.op_type for node in model.graph.node].count("QuantizeLinear") == 1
    arrays = weights_of()
    x = sample(2, 4)
    expected = 3 * (exact_product(x, arrays) - arrays["bias"])
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-3)


def loud() -> tuple[Array, Array]:
    """C1: a row of ones, and a neighbour with one number of 1000."""
    quiet = np.ones((1, 2, 4), np.float32)
    return quiet, np.concatenate([quiet, np.where(np.arange(8).reshape(1, 2, 4) == 5, 1000, quiet)])


def identity(form: str) -> onnx.ModelProto:
    arrays = {
        "w": np.eye(4, dtype=np.int8),
        "w_scale": np.float32(1),
        "w_zero": np.int8(0),
        "bias": np.zeros(4, np.float32),
    }
    if form in FORMS:
        source = product(form, arrays=arrays)
        nodes = source.graph.node
    else:
        arrays = {}
        nodes = [
            node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ]
    return model_of(nodes, arrays, x=("batch", "seq", 4), y=("batch", "seq", 4))


@pytest.mark.parametrize("form", [*FORMS, "DequantizeLinear"])
def test_row_of_small_numbers_is_exact_beside_a_row_of_large_ones(form: str, run: Run) -> None:
    alone, batch = loud()
    source = identity(form)
    assert run(source, batch)[0].max() == 0  # the positive control
    found = run(rewritten(source), batch)
    np.testing.assert_allclose(found[:1], alone, rtol=1e-6)
    np.testing.assert_array_equal(found[:1], run(rewritten(source), alone))


@pytest.mark.parametrize("order", ["cast first", "scale first"])
def test_weights_without_scale_and_zero_point_are_rewritten(order: str, run: Run) -> None:
    factors = ["cast", "s"] if order == "cast first" else ["s", "cast"]
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        node("MatMulInteger", ["q", "w", "z"], ["sums"]),
        node("Cast", ["sums"], ["cast"], to=TensorProto.FLOAT),
        node("Mul", factors, ["y"]),
    ]
    alone, batch = loud()
    model = rewritten(model_of(nodes, {"w": np.eye(4, dtype=np.int8)}, x=("batch", "seq", 4), y=("batch", "seq", 4)))
    np.testing.assert_allclose(run(model, batch)[:1], alone, rtol=1e-6)


def test_weights_of_several_experts_are_rewritten(run: Run) -> None:
    rng = np.random.default_rng(4)
    w = rng.integers(-127, 128, (3, WIDTH, COLUMNS)).astype(np.int8)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        node("Mul", ["s", "w_scale"], ["scales"]),
        node("MatMulInteger", ["q", "w", "z"], ["sums"]),
        node("Cast", ["sums"], ["cast"], to=TensorProto.FLOAT),
        node("Mul", ["cast", "scales"], ["y"]),
    ]
    model = model_of(
        nodes, {"w": w, "w_scale": np.float32(0.01)}, x=("batch", 3, "seq", WIDTH), y=("batch", 3, "seq", COLUMNS)
    )
    x = sample(2, 3, 5)
    arrays = {"w_zero": np.int8(0), "w_scale": np.float32(0.01), "bias": np.float32(0)}
    expected = np.stack([exact_product(x[:, at], {**arrays, "w": w[at]}) for at in range(3)], axis=1)
    np.testing.assert_allclose(run(rewritten(model), x), expected, rtol=1e-5, atol=1e-3)


def two_activations(form: str) -> onnx.ModelProto:
    """x x^T, both operands rounded dynamically."""
    quantized = [
        node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        node("DynamicQuantizeLinear", ["t"], ["tq", "ts", "tz"]),
    ]
    domain = {"domain": "com.microsoft"}
    nodes = {
        "MatMulInteger": [
            *quantized,
            node("Mul", ["s", "ts"], ["scales"]),
            node("MatMulInteger", ["q", "tq", "z", "tz"], ["sums"]),
            node("Cast", ["sums"], ["cast"], to=TensorProto.FLOAT),
            node("Mul", ["cast", "scales"], ["y"]),
        ],
        "MatMulIntegerToFloat": [
            *quantized,
            node("MatMulIntegerToFloat", ["q", "tq", "s", "ts", "z", "tz"], ["y"], **domain),
        ],
        "DynamicQuantizeMatMul": [
            quantized[0],
            quantized[2],
            node("DynamicQuantizeMatMul", ["x", "tq", "ts", "tz"], ["y"], **domain),
        ],
    }[form]
    return model_of(nodes, {}, y=("batch", "seq", "keys"))


@pytest.mark.parametrize("form", FORMS)
def test_matmul_of_two_activations_runs_in_float32(form: str, run: Run) -> None:
    proto, report = with_scale_per_row(two_activations(form))
    assert (report.rewritten, report.unrounded, report.left) == (0, 2, ())
    x = np.random.default_rng(3).normal(size=(2, 5, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(run(checked(proto, "two"), x), x @ x.transpose(0, 2, 1), atol=1e-4)
    assert "2 removed: their MatMul of two activations runs in float32" in str(report)


def beside(*nodes: onnx.NodeProto, **arrays: Array) -> onnx.ModelProto:
    """A MatMul that can be rewritten, and nodes that cannot; these give `other`."""
    source = product()
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in source.graph.initializer}
    return model_of([*source.graph.node, *nodes], {**known, **arrays})


_AGAIN = node("DynamicQuantizeLinear", ["x"], ["q2", "s2", "z2"], name="again")
_SUMS = node("MatMulInteger", ["q2", "w", "z2", "w_zero"], ["sums2"])
_CAST = node("Cast", ["sums2"], ["cast2"], to=TensorProto.FLOAT)
LEFT = {
    "Transpose takes one scale for its whole input": [_AGAIN, node("Transpose", ["q2"], ["other"])],
    "its scale also goes into Sqrt": [
        _AGAIN, _SUMS, _CAST, node("Mul", ["cast2", "s2"], ["other"]), node("Sqrt", ["s2"], ["root"]),
    ],
    "its zero point also goes into Cast": [_AGAIN, node("Cast", ["z2"], ["other"], to=TensorProto.FLOAT)],
    "MatMulInteger is not followed by Cast alone": [_AGAIN, _SUMS, _CAST, node("Abs", ["sums2"], ["other"])],
    "Cast is not followed by Mul alone": [_AGAIN, _SUMS, _CAST, node("Abs", ["cast2"], ["other"])],
    "its MatMulInteger is not multiplied by its own scale": [
        _AGAIN, _SUMS, _CAST, node("Mul", ["cast2", "bias"], ["other"]),
    ],
    "MatMulInteger takes its integers with another zero point": [
        _AGAIN, node("MatMulInteger", ["q2", "w", "", "w_zero"], ["other"]),
    ],
    "MatMulInteger multiplies it as the second operand, which has no scale per row": [
        _AGAIN, node("MatMulInteger", ["turned", "q2", "", "z2"], ["other"]),
    ],
    "its input has no axis besides the batch": [
        node("ReduceMax", ["x"], ["flat"], axes=[1, 2], keepdims=0),
        node("DynamicQuantizeLinear", ["flat"], ["q2", "s2", "z2"], name="again"),
    ],
    "its last axis is dynamic, so a row's scale would depend on the length": [
        node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        node("DynamicQuantizeLinear", ["t"], ["q2", "s2", "z2"], name="again"),
        node("DequantizeLinear", ["q2", "s2", "z2"], ["other"]),
    ],
    "both operands of the MatMul depend on the input": [
        node("Cast", ["x"], ["bytes"], to=TensorProto.INT8), node("Transpose", ["bytes"], ["bytes_t"], perm=[0, 2, 1]),
        _AGAIN, node("MatMulIntegerToFloat", ["q2", "bytes_t", "s2", "one", "z2"], ["other"], domain="com.microsoft"),
    ],
    "its weights are scaled along another axis than their columns": [
        node("DynamicQuantizeMatMul", ["x", "w", "per_row"], ["other"], domain="com.microsoft", name="again"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", LEFT)
def test_quantizer_that_cannot_take_a_scale_per_row_is_reported_with_the_reason(reason: str) -> None:
    arrays = {
        "turned": np.ones((4, 3), np.uint8),
        "one": np.array(1, np.float32),
        "per_row": np.ones((WIDTH, 1), np.float32),
    }
    proto, report = with_scale_per_row(beside(*LEFT[reason], **arrays))
    assert report.rewritten == 1
    assert [(left.node, left.reason) for left in report.left] == [("again", reason)]
    assert f"1 of 2 dynamic quantizers rewritten to one scale per row; again not rewritten: {reason}" in str(report)
    onnx.checker.check_model(proto)


def convolved() -> onnx.ModelProto:
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="conv_quantizer"),
        node("ConvInteger", ["q", "kernel", "z"], ["sums"]),
        node("Cast", ["sums"], ["cast"], to=TensorProto.FLOAT),
        node("Mul", ["cast", "s"], ["y"]),
    ]
    return model_of(nodes, {"kernel": np.ones((2, 3, 1), np.uint8)}, x=("batch", 3, "seq"), y=("batch", 2, "seq"))


def test_file_whose_quantizers_all_stay_is_refused() -> None:
    with pytest.raises(
        BuildRefused, match=r"none of the 1 dynamic quantizers .* conv_quantizer: ConvInteger takes one"
    ):
        with_scale_per_row(convolved())


def test_quantizer_in_a_subgraph_stays() -> None:
    inner = onnx.helper.make_graph(
        [
            node("DynamicQuantizeLinear", ["x"], ["qi", "si", "zi"], name="inner"),
            node("DequantizeLinear", ["qi", "si", "zi"], ["o"]),
        ],
        "body",
        [],
        [onnx.helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
    )
    choice = node("If", ["always"], ["other"], then_branch=inner, else_branch=inner)
    _, report = with_scale_per_row(beside(choice, always=np.array(True)))
    assert {left.reason for left in report.left} == {"it is in the body of a node If"}


def test_file_without_dynamic_quantizer_is_refused() -> None:
    plain = model_of([node("Relu", ["x"], ["y"])], {}, y=("batch", "seq", WIDTH))
    with pytest.raises(BuildRefused, match="the file has no dynamic quantizer"):
        with_scale_per_row(plain)
