"""Which inputs of floats are masks that are added to scores: those that have no other use, on any way.

`Added` and `attention` make a graph with an input `mask`. `signature_of` marks a mask as additive, with the number that
pads it; any other input of floats stays data.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from additive_graphs import FORMS, SHAPES, Added
from attnserve_server.conversion.inputs.signature import in_float16, signature_of
from attnserve_server.conversion.probing.feeds import Sampler
from onnx import TensorProto, helper, numpy_helper

LOWEST, LOWEST_HALF = float(np.finfo(np.float32).min), float(np.finfo(np.float16).min)
Node = onnx.NodeProto
node = helper.make_node


def attention(*nodes: Node, mask: str = "mask") -> onnx.GraphProto:
    """Return self-attention over `x`; the value called `mask` is added to its scores, and `nodes` precede that."""
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", 4])]
    values.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", "seq", "seq"]))
    made = [
        *nodes,
        node("Transpose", ["x"], ["turned"], perm=[0, 2, 1]),
        node("MatMul", ["x", "turned"], ["product"]),
        node("Mul", ["product", "half"], ["scaled"]),
        node("Add", ["scaled", mask], ["scores"]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", "x"], ["y"]),
    ]
    constants = {
        "half": np.array(0.5, np.float32),
        "ten": np.array(10, np.float32),
        "one": np.array(1, np.float32),
        "zeros": np.array([0.0, 1.0], np.float32),
        "minus": np.array(-1e4, np.float32),
        "floor": np.array(LOWEST, np.float32),
    }
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "also")]
    also = any("also" in each.output for each in made)
    return helper.make_graph(made, "attention", values, outputs[: 1 + also], initializers)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_found_in_every_form_and_padded_with_the_lowest_number(shape: str, form: str, dtype: type) -> None:
    features, mask = signature_of(Added(shape=shape, form=form, dtype=dtype, floored=True).model().graph).inputs
    assert (mask.additive_mask, mask.padding) == (True, float(np.finfo(dtype).min))
    assert (features.additive_mask, features.padding) == (False, 0)


@pytest.mark.parametrize(
    ("nodes", "padding"),
    [
        ([], LOWEST),
        ([node("Clip", ["mask", "floor"], ["ready"])], LOWEST),
        ([node("Max", ["floor", "mask"], ["ready"])], LOWEST),
        ([node("IsInf", ["mask"], ["all"]), node("Where", ["all", "floor", "mask"], ["ready"])], LOWEST),
        ([node("Add", ["mask", "minus"], ["ready"])], LOWEST),
        ([node("Mul", ["ten", "mask"], ["ready"])], LOWEST / 10),
        ([node("Div", ["mask", "half"], ["ready"])], LOWEST / 2),
        ([node("Cast", ["mask"], ["narrow"], to=10), node("Cast", ["narrow"], ["ready"], to=1)], LOWEST_HALF),
        (
            [
                node("Add", ["scaled_before", "mask"], ["ready"]),
                node("MatMul", ["x", "turned_before"], ["scaled_before"]),
            ],
            LOWEST,
        ),
    ],
    ids=["added", "clipped", "floored", "chosen", "shifted", "scaled", "divided", "cast", "added twice"],
)
def test_masks_are_followed_through_operators_that_keep_them_masks(nodes: list[Node], padding: float) -> None:
    before = [node("Transpose", ["x"], ["turned_before"], perm=[0, 2, 1])]
    ordered = sorted([*before, *nodes], key=lambda each: "ready" in each.output)
    graph = attention(*ordered, mask="ready" if nodes else "mask")
    [mask] = [spec for spec in signature_of(graph).inputs if spec.name == "mask"]
    assert mask.additive_mask
    assert mask.padding == pytest.approx(padding)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Sub", ["one", "mask"], ["left"]), node("Mul", ["left", "minus"], ["ready"])],
        [node("Mul", ["mask", "minus"], ["ready"])],
        [node("Mul", ["mask", "zeros"], ["ready"])],
        [node("Mul", ["mask", "mask"], ["ready"])],
        [node("ReduceMean", ["mask"], ["also"]), node("Identity", ["mask"], ["ready"])],
        [node("Identity", ["mask"], ["also"]), node("Identity", ["mask"], ["ready"])],
        [node("Exp", ["mask"], ["ready"])],
        [node("Cast", ["mask"], ["whole"], to=TensorProto.INT64), node("Cast", ["whole"], ["ready"], to=1)],
    ],
    ids=["kept where 1", "negated", "times 0", "squared", "averaged too", "given too", "exponents", "whole numbers"],
)
def test_input_with_another_use_is_no_mask(nodes: list[Node]) -> None:
    signature = signature_of(attention(*nodes, mask="ready"))
    assert [(spec.additive_mask, spec.padding) for spec in signature.inputs] == [(False, 0), (False, 0)]


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Softmax", ["mask"], ["y"])],
        [node("Add", ["mask", "table"], ["moved"]), node("Softmax", ["moved"], ["y"])],
        [node("Add", ["mask", "x"], ["moved"]), node("Softmax", ["moved"], ["y"])],
        [node("MatMul", ["x", "table"], ["scores"]), node("Add", ["scores", "mask"], ["y"])],
        [node("Identity", ["mask"], ["y"])],
    ],
    ids=["scores themselves", "a bias is added", "features", "a residual", "an output"],
)
def test_floats_that_are_not_added_to_scores_are_no_masks(nodes: list[Node]) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "seq", 4]) for name in ("x", "mask")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", 4])
    table = numpy_helper.from_array(np.ones((4, 4), np.float32), "table")
    graph = helper.make_graph(nodes, "other", values, [output], [table])
    assert not any(spec.additive_mask for spec in signature_of(graph).inputs)


def test_in_float16_padding_stays_finite() -> None:
    signature = signature_of(Added().model().graph)
    assert [spec.padding for spec in in_float16(signature).inputs] == [0, LOWEST_HALF]


def test_drawn_masks_hide_some_keys_and_never_the_first() -> None:
    signature = signature_of(Added(shape="[B,1,S,S]").model().graph)
    drawn = Sampler(signature).sequence({"seq": 40})["mask"]
    hidden = drawn == LOWEST
    assert 0.05 < hidden.mean() < 0.2
    assert not hidden[..., 0].any()
