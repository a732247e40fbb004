"""What is read off a graph's inputs, and which inputs cannot be served."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from attnserve_server.build.errors import BuildRefused
from attnserve_server.build.feeds import Sampler
from attnserve_server.build.graph import checked, precision_of
from attnserve_server.build.signature import Signature, signature_of
from attnserve_server.model.manifest import InputRole
from onnx import helper, numpy_helper

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def signature(*inputs: tuple[str, int, list[Any] | None], constants: tuple[str, ...] = ()) -> Signature:
    values = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs]
    initializers = [numpy_helper.from_array(np.zeros(1, np.float32), name) for name in constants]
    return signature_of(helper.make_graph([], "graph", values, [], initializers), padding_id=3)


def test_first_axis_is_the_batch_whatever_its_name() -> None:
    found = signature(("left", FLOAT, ["N", "patch", 8]), ("right", FLOAT, ["M", "patch"]))
    assert [spec.shape for spec in found.inputs] == [("patch", 8), ("patch",)]
    assert found.symbols == ("patch",)
    assert found.fixed_batch is None


def test_nameless_axes_of_data_are_named_after_their_input() -> None:
    assert signature(("image", FLOAT, ["N", None, None])).symbols == ("image_axis_1", "image_axis_2")


def test_initialisers_listed_as_inputs_are_none() -> None:
    assert [spec.name for spec in signature(("x", FLOAT, ["N"]), ("w", FLOAT, [1]), constants=("w",)).inputs] == ["x"]


def test_token_names_on_other_shapes_and_types_are_data() -> None:
    found = signature(("input_ids", FLOAT, ["N", "seq"]), ("attention_mask", INT64, ["N", 1, "seq"]))
    assert {spec.role for spec in found.inputs} == {InputRole.DATA}
    assert {spec.fill for spec in found.inputs} == {None}


def test_padding_of_ids_is_the_tokenizers() -> None:
    found = signature(("input_ids", INT64, ["N", "seq"]), ("position_ids", INT64, ["N", "seq"]))
    assert [(spec.role, spec.padding) for spec in found.inputs] == [(InputRole.TOKEN_IDS, 3), (InputRole.DATA, 0)]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([("x", FLOAT, None)], "'x' has no known shape"),
        ([("x", FLOAT, [])], "'x' is a scalar"),
        ([("x", FLOAT, ["N", 0])], "axis 1 has the extent 0"),
        ([("x", FLOAT, [4, "seq"])], "fixed at 4"),
        ([("x", FLOAT, ["N", "N"])], "'N' names the batch axis and another one"),
        ([("x", FLOAT, ["N", "batch"])], "'batch' names the batch axis and another one"),
        ([("x", onnx.TensorProto.STRING, ["N"])], "'x' is of type"),
        ([("x", onnx.TensorProto.COMPLEX64, ["N"])], "'x' is of type complex64"),
        ([], "no inputs"),
    ],
)
def test_inputs_that_cannot_be_served_are_refused(inputs: list[Any], words: str) -> None:
    with pytest.raises(BuildRefused, match=words):
        signature(*inputs)


def test_sampled_batches_are_padded_as_the_server_pads() -> None:
    kinds = ("input_ids", INT64, ["N", "seq"]), ("attention_mask", INT64, ["N", "seq"])
    more = ("flag", onnx.TensorProto.BOOL, ["N"]), ("position_ids", INT64, ["N", "seq"]), ("x", FLOAT, ["N", "seq", 2])
    sampler = Sampler(signature(*kinds, *more), vocabulary_size=10)
    feeds, lengths = sampler.mixed((2, 4))
    assert lengths == [{"seq": 2}, {"seq": 4}]
    assert feeds["input_ids"][0, 2:].tolist() == [3, 3]
    assert 3 not in feeds["input_ids"][1]
    assert feeds["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert feeds["position_ids"].tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert feeds["flag"].dtype == np.bool_
    assert not feeds["x"][0, 2:].any()
    assert feeds["x"][0, :2].all()


def test_integer_kernels_make_a_model_int8() -> None:
    node = helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    assert precision_of(helper.make_model(helper.make_graph([node], "graph", [], []))) == "int8"


def test_invalid_graph_is_refused_in_one_sentence() -> None:
    node = helper.make_node("NoSuchOperator", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, FLOAT, ["N"]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "graph", values[:1], values[1:]))
    with pytest.raises(BuildRefused, match=r"ranker\.onnx is not a valid ONNX model: .*NoSuchOperator") as refusal:
        checked(model, "ranker.onnx")
    assert "\n" not in str(refusal.value)
