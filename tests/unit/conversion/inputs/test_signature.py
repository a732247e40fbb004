"""The signature that is read from a graph's inputs, and the inputs that cannot be served.

A signature has each input's type, role and shape without the batch axis, and the symbols of the axes. Inputs that the
server cannot fill raise BuildRefused, with the remedy where there is one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import checked, precision_of
from attnserve_server.conversion.inputs.signature import Signature, signature_of
from attnserve_server.conversion.inputs.text import text_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.model.manifest import InputRole, TextSpec
from onnx import helper, numpy_helper

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def signature(*inputs: tuple[str, int, list[Any] | None], constants: tuple[str, ...] = ()) -> Signature:
    values = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs]
    initializers = [numpy_helper.from_array(np.zeros(1, np.float32), name) for name in constants]
    return signature_of(helper.make_graph([], "graph", values, [], initializers), padding_id=3)


def test_first_axis_is_the_batch_under_any_name() -> None:
    found = signature(("left", FLOAT, ["N", "patch", 8]), ("right", FLOAT, ["M", "patch"]))
    assert [spec.shape for spec in found.inputs] == [("patch", 8), ("patch",)]
    assert found.symbols == ("patch",)
    assert found.fixed_batch is None


def test_nameless_axes_of_data_are_named_after_their_input() -> None:
    assert signature(("image", FLOAT, ["N", None, None])).symbols == ("image_axis_1", "image_axis_2")


def test_initializers_listed_as_inputs_are_no_inputs() -> None:
    assert [spec.name for spec in signature(("x", FLOAT, ["N"]), ("w", FLOAT, [1]), constants=("w",)).inputs] == ["x"]


def test_token_names_on_other_shapes_and_types_are_data() -> None:
    found = signature(("input_ids", FLOAT, ["N", "seq"]), ("attention_mask", INT64, ["N", 1, "seq"]))
    assert {spec.role for spec in found.inputs} == {InputRole.DATA}
    assert {spec.fill for spec in found.inputs} == {None}


def test_padding_of_ids_is_the_tokenizers() -> None:
    found = signature(("input_ids", INT64, ["N", "seq"]), ("position_ids", INT64, ["N", "seq"]))
    assert [(spec.role, spec.padding) for spec in found.inputs] == [(InputRole.TOKEN_IDS, 3), (InputRole.DATA, 0)]


def looking_up(*inputs: tuple[str, list[Any], int]) -> Signature:
    """Return the signature of a graph; each input, given with its shape, looks up a table of so many rows, or none."""
    values = [helper.make_tensor_value_info(name, INT64, shape) for name, shape, _ in inputs]
    tables = [
        numpy_helper.from_array(np.zeros((rows, 4), np.float32), f"table of {name}") for name, _, rows in inputs if rows
    ]
    nodes = [
        helper.make_node("Gather", [f"table of {name}", name], [f"{name} found"]) for name, _, rows in inputs if rows
    ]
    return signature_of(helper.make_graph(nodes, "graph", values, [], tables), padding_id=3)


IDS, MASK, TYPES, DATA = InputRole.TOKEN_IDS, InputRole.ATTENTION_MASK, InputRole.TOKEN_TYPE_IDS, InputRole.DATA


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            {"input_ids": 90, "input_mask": 0, "segment_ids": 2},
            {"input_ids": IDS, "input_mask": MASK, "segment_ids": TYPES},
        ),
        ({"ids": 90, "mask": 0}, {"ids": IDS, "mask": MASK}),
        ({"tokens": 90, "padding_mask": 0}, {"tokens": IDS, "padding_mask": DATA}),
        ({"input_ids_0": 90, "attention_mask.1": 0}, {"input_ids_0": IDS, "attention_mask.1": MASK}),
        ({"serving_default_input_word_ids:0": 90}, {"serving_default_input_word_ids:0": IDS}),
        ({"input.1": 90, "input.3": 2, "input.5": 0}, {"input.1": IDS, "input.3": TYPES, "input.5": DATA}),
        ({"0": 2, "1": 90, "2": 40}, {"0": TYPES, "1": IDS, "2": DATA}),
        ({"input_ids": 9, "language_ids": 90}, {"input_ids": IDS, "language_ids": DATA}),
        ({"position_ids": 90}, {"position_ids": DATA}),
        ({"bins": 0}, {"bins": DATA}),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_roles_follow_from_names_and_from_the_tables_looked_up(
    rows: dict[str, int], expected: dict[str, InputRole]
) -> None:
    found = looking_up(*((name, ["N", "T"], count) for name, count in rows.items()))
    assert {spec.name: spec.role for spec in found.inputs} == expected
    for spec in found.inputs:
        assert spec.vocabulary_size == (rows[spec.name] if spec.role is IDS else 0)
        assert spec.padding == (3 if spec.role is IDS else 0)
        assert spec.fill == {MASK: 1, TYPES: 0}.get(spec.role)


def test_each_side_of_an_encoder_decoder_has_its_own_ids_mask_and_axis() -> None:
    named = looking_up(
        ("input_ids", ["N", "source"], 90),
        ("attention_mask", ["N", "source"], 0),
        ("decoder_input_ids", ["N", "target"], 70),
        ("decoder_attention_mask", ["N", "target"], 0),
    )
    assert [(spec.role, spec.shape, spec.vocabulary_size) for spec in named.inputs] == [
        (IDS, ("source",), 90), (MASK, ("source",), 0), (IDS, ("target",), 70), (MASK, ("target",), 0)
    ]  # fmt: skip
    nameless = looking_up(("src_tokens", ["N", None], 90), ("prev_output_tokens", ["N", None], 70))
    assert [(spec.role, spec.shape) for spec in nameless.inputs] == [(IDS, ("seq",)), (IDS, ("decoder_seq",))]


def test_text_fills_the_encoder_and_its_pair_the_decoder() -> None:
    lengths = {"source": 40, "target": 20}
    for order in (("input_ids", "decoder_input_ids"), ("decoder_input_ids", "input_ids")):
        axes = {"input_ids": "source", "decoder_input_ids": "target"}
        found = looking_up(*((name, ["N", axes[name]], 90) for name in order))
        assert text_of(found.inputs, lengths, 2) == TextSpec(
            axis="source", max_tokens=40, pair_axis="target", pair_max_tokens=20, pair_start=2
        )
    one = looking_up(("ids", ["N", "source"], 90))
    assert text_of(one.inputs, lengths) == TextSpec(axis="source", max_tokens=40)
    assert text_of((), lengths) is None
    with pytest.raises(BuildRefused, match="'ids' alone holds token ids"):
        text_of(one.inputs, lengths, 2)
    with pytest.raises(BuildRefused, match="fixed length of 16: text needs a dynamic axis"):
        text_of(looking_up(("ids", ["N", 16], 90)).inputs, {})
    three = looking_up(*((f"ids_{axis}", ["N", axis], 90) for axis in "abc"))
    with pytest.raises(BuildRefused, match="all hold token ids: text can fill two"):
        text_of(three.inputs, dict.fromkeys("abc", 8))


def test_inputs_that_are_no_tensors_are_refused_by_their_type() -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, ["N"]))
    values = [helper.make_value_info("many", kind)]
    with pytest.raises(BuildRefused, match="input 'many' is of type sequence; only tensors can be served"):
        signature_of(helper.make_graph([], "graph", values, []))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([("x", FLOAT, None)], "'x' has no known shape: name its axes in the file"),
        ([("x", FLOAT, ["N", -1])], "axis 1 has the size -1: name its axes in the file"),
        ([("x", FLOAT, [])], "'x' is a scalar"),
        ([("x", FLOAT, ["N", 0])], "axis 1 has the size 0"),
        ([("x", FLOAT, [4, "seq"])], "fixed at 4"),
        ([("x", FLOAT, ["N", "N"])], "'N' names the batch axis and another one"),
        ([("x", FLOAT, ["N", "batch"])], "'x' has its batch on axis 1: it must be the first axis"),
        (
            [("x", FLOAT, ["seq", "batch"]), ("mask", INT64, ["batch", "seq"])],
            "'x' has its batch on axis 1: it must be the first axis of all inputs; 'batch' is axis 0 of 'mask'",
        ),
        ([("x", FLOAT, ["batch", "batch"])], "'batch' names the batch axis and another one"),
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


def test_matmul_of_integers_makes_a_model_int8() -> None:
    node = helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    assert precision_of(helper.make_model(helper.make_graph([node], "graph", [], []))) == "int8"


def test_invalid_graph_is_refused_in_one_sentence() -> None:
    node = helper.make_node("NoSuchOperator", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, FLOAT, ["N"]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "graph", values[:1], values[1:]))
    with pytest.raises(BuildRefused, match=r"ranker\.onnx is not a valid ONNX model: .*NoSuchOperator") as refusal:
        checked(model, "ranker.onnx")
    assert "\n" not in str(refusal.value)
