"""Arrays, inputs, selections and errors on their way to the wire and back."""

from __future__ import annotations

import re
from typing import Any, get_args

import numpy as np
import pytest
from attnserve.v1 import inference_service_pb2 as wire
from attnserve.v1 import model_pb2, tensor_pb2
from attnserve_client import AttentionSelection, AttnserveError, InvalidRequest, ModelInfo, errors
from attnserve_client._inputs import request_of, sequence_of, split, takes_ids
from attnserve_client._models import is_ready, model_of
from attnserve_client._selection import HeadReduction, LayerReduction, SpecialTokens, Unit, WeightDtype, selection_of
from attnserve_client._status import BY_CODE, BY_REASON, from_status_bytes
from attnserve_client._tensors import dtype_name, to_array, to_tensor
from attnserve_client.errors import BadAnswer
from attnserve_client.testing._refusals import status_of
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

DTYPES = ("bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64")


@given(
    array=st.sampled_from(DTYPES).flatmap(
        lambda name: npst.arrays(np.dtype(name), npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    ),
    name=st.text(max_size=8),
)
def test_array_survives_the_wire(array: np.ndarray, name: str) -> None:
    tensor = to_tensor(name, array)
    back = to_array(tensor_pb2.Tensor.FromString(tensor.SerializeToString()))
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert tensor.name == name
    assert dtype_name(tensor.dtype) == array.dtype.name


def test_strides_and_byte_order_are_straightened_out() -> None:
    array = np.arange(12, dtype=">i4").reshape(3, 4).T
    np.testing.assert_array_equal(to_array(to_tensor("x", array)), array)


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([1 + 2j]), np.array([object()])])
def test_types_that_have_no_place_in_the_contract_are_refused(array: np.ndarray) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_tensor("x", array)
    assert caught.value.violations[0].field == "tensors[x].dtype"


@given(
    shape=st.lists(st.integers(-2, 5), max_size=4),
    dtype=st.sampled_from(sorted(tensor_pb2.DataType.values())),
    data=st.binary(max_size=64),
)
def test_tensor_that_does_not_fit_together_is_refused_and_any_other_read(
    shape: list[int], dtype: Any, data: bytes
) -> None:
    tensor = tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data)
    try:
        array = to_array(tensor)
    except BadAnswer:
        return
    assert array.nbytes == len(data)
    assert array.shape == tuple(shape)


@pytest.mark.parametrize(
    ("inputs", "count", "many"),
    [
        ("text", 1, False),
        (("a", "b"), 1, False),
        ([1, 2, 3], 1, False),
        ([np.int64(1), np.int64(2)], 1, False),
        (np.array([1, 2]), 1, False),
        ({"x": [1.0]}, 1, False),
        (["a", "b"], 2, True),
        ([("a", "b")], 1, True),
        ([[1, 2], [3]], 2, True),
        (np.array([[1, 2], [3, 4], [5, 6]]), 3, True),
        ([{"x": [1]}, "text"], 2, True),
        ([], 0, True),
    ],
)
def test_one_input_is_told_from_a_list_of_them(inputs: Any, count: int, many: bool) -> None:
    items, was_many = split(inputs)
    assert (len(items), was_many) == (count, many)


@pytest.mark.parametrize("wrong", [7, None, b"bytes", {1, 2}])
def test_inputs_of_other_types_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="text, a pair of texts, token ids or arrays"):
        split(wrong)
    with pytest.raises(TypeError, match="text, a pair of texts, token ids or arrays"):
        sequence_of(wrong, None)


@pytest.mark.parametrize(
    ("one", "texts"),
    [(("a", {"x": np.ones(2)}), ("a", "")), (("a", "b", {"x": np.ones(2)}), ("a", "b")), (("a", "b", {}), ("a", "b"))],
)
def test_arrays_may_stand_behind_texts(one: Any, texts: tuple[str, str]) -> None:
    sent = sequence_of(one, None).text
    assert (sent.text, sent.text_pair) == texts
    assert [(tensor.name, list(tensor.shape)) for tensor in sent.tensors] == [(name, [2]) for name in one[-1]]


@pytest.mark.parametrize("wrong", [("one",), ("a", "b", "c"), (1, 2), (), ({},), ("a", "b", "c", {}), (1, {})])
def test_tuple_that_is_no_pair_of_texts_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="a tuple must be one or two texts"):
        sequence_of(wrong, None)


@pytest.mark.parametrize("wrong", [[1.5, 2.5], [[1], [2]], np.array([[1]]), np.array(["a"])])
def test_ids_that_are_no_row_of_integers_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="integers of rank 1"):
        sequence_of(wrong, None)


def model(*inputs: tuple[str, str, int, bool], **fields: Any) -> ModelInfo:
    dimension = model_pb2.Dimension(symbol="seq")
    specs = [
        model_pb2.TensorSpec(
            name=name,
            dtype=tensor_pb2.DataType.Value(f"DATA_TYPE_{dtype.upper()}"),
            shape=[dimension] * rank,
            optional=optional,
        )
        for name, dtype, rank, optional in inputs
    ]
    return model_of(model_pb2.Model(inputs=specs, **fields))


def test_token_input_is_the_one_that_is_plainly_for_ids() -> None:
    assert model(("input_ids", "int64", 1, False), ("other", "int64", 1, False)).token_input == "input_ids"
    assert model(("tokens", "int32", 1, False), ("mask", "int64", 1, True)).token_input == "tokens"
    assert model(("one", "int64", 1, False), ("two", "int64", 1, False)).token_input is None
    assert model(("image", "float32", 2, False)).token_input is None


def test_ids_without_a_plain_input_name_the_models_inputs() -> None:
    with pytest.raises(InvalidRequest, match="arrays for: image"):
        sequence_of([1], model(("image", "float32", 2, False)))


def test_ids_past_the_inputs_type_are_refused_and_not_wrapped() -> None:
    with pytest.raises(InvalidRequest, match="int32"):
        sequence_of([2**31], model(("tokens", "int32", 1, False)))


def test_no_ids_at_all_are_sent_as_such_for_the_server_to_judge() -> None:
    (tensor,) = sequence_of(np.array([]), None).tensors.tensors
    assert list(tensor.shape) == [0]
    assert takes_ids([[1]])
    assert not takes_ids(["text"])


def build(**changes: Any) -> wire.InferRequest:
    arguments: dict[str, Any] = {
        "model": "m",
        "version": "",
        "sequences": [],
        "outputs": None,
        "attention": None,
        "priority": "normal",
        "request_id": "",
        "validate_only": False,
    }
    return request_of(**{**arguments, **changes})


def test_unknown_priority_and_misplaced_outputs_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="urgent"):
        build(priority="urgent")
    with pytest.raises(TypeError, match="list of names"):
        build(outputs="embedding")


INTEGERS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4).map(tuple)
SELECTIONS = st.builds(
    AttentionSelection,
    sites=st.lists(st.text(max_size=5), max_size=3),
    layers=INTEGERS,
    heads=INTEGERS,
    head_reduction=st.none() | st.sampled_from(get_args(HeadReduction)),
    layer_reduction=st.none() | st.sampled_from(get_args(LayerReduction)),
    queries=INTEGERS,
    unit=st.none() | st.sampled_from(get_args(Unit)),
    special_tokens=st.none() | st.sampled_from(get_args(SpecialTokens)),
    top_k=st.integers(0, 2**32 - 1),
    min_weight=st.floats(0, 1, width=32),
    dtype=st.none() | st.sampled_from(get_args(WeightDtype)),
)


@given(selection=SELECTIONS)
def test_selection_survives_the_wire(selection: AttentionSelection) -> None:
    assert AttentionSelection.from_wire(selection.to_wire()) == selection


@pytest.mark.parametrize("word", ["each", "mean", "max"])
def test_heads_may_be_a_word_for_all_of_them(word: Any) -> None:
    assert AttentionSelection(heads=word) == AttentionSelection(head_reduction=word)
    assert AttentionSelection(heads=word, head_reduction=word).heads == ()


def test_heads_may_be_joined_after_choosing_some() -> None:
    message = AttentionSelection(heads=[0, -1], head_reduction="mean", sites="encoder").to_wire()
    assert list(message.heads) == [0, -1]
    assert list(message.sites) == ["encoder"]


@pytest.mark.parametrize(
    ("selection", "field"),
    [
        (lambda: AttentionSelection(heads="mean", head_reduction="max"), "attention.head_reduction"),
        (lambda: AttentionSelection(heads="median").to_wire(), "attention.head_reduction"),  # type: ignore[arg-type]
        (lambda: AttentionSelection(unit="letter").to_wire(), "attention.unit"),  # type: ignore[arg-type]
        (lambda: AttentionSelection(dtype="int8").to_wire(), "attention.dtype"),  # type: ignore[arg-type]
        (lambda: AttentionSelection(layer_reduction="sum").to_wire(), "attention.layer_reduction"),  # type: ignore[arg-type]
        (lambda: AttentionSelection(special_tokens="hide").to_wire(), "attention.special_tokens"),  # type: ignore[arg-type]
        (lambda: AttentionSelection(layers=[0, 2**31]).to_wire(), "attention.layers[1]"),
        (lambda: AttentionSelection(top_k=-1).to_wire(), "attention.top_k"),
    ],
    ids=["two heads", "heads", "unit", "dtype", "layers", "special", "layer number", "top_k"],
)
def test_selection_that_cannot_be_sent_names_its_field(selection: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        selection()
    assert caught.value.violations[0].field == field


def test_attention_is_a_selection_or_yes_or_no() -> None:
    assert selection_of(None) is None
    assert selection_of(False) is None
    assert selection_of(True) is not None
    with pytest.raises(TypeError, match="AttentionSelection, a bool or None"):
        selection_of("all")  # type: ignore[arg-type]


def test_ready_looks_at_the_highest_version_of_each_model() -> None:
    def version(number: str, state: int, name: str = "m") -> ModelInfo:
        return model(name=name, version=number, state=state)

    ready, loading = model_pb2.MODEL_STATE_READY, model_pb2.MODEL_STATE_LOADING
    assert not is_ready([])
    assert is_ready([version("10", ready), version("9", loading)])
    assert not is_ready([version("9", ready), version("10", loading)])
    assert not is_ready([version("1", ready), version("1", loading, "other")])
    assert not is_ready([version("odd", loading)])


def test_every_class_of_the_tree_is_in_the_drawing_and_in_a_table_or_named_here() -> None:
    tree = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AttnserveError)}
    public = {kind.__name__ for kind in tree if not kind.__name__.startswith("_")}
    drawn = set(re.findall(r"^\s+(?:[|+\- ]*)([A-Z]\w+)", errors.__doc__ or "", flags=re.MULTILINE))
    assert drawn == public
    mapped = {kind.__name__ for kind in (*BY_REASON.values(), *BY_CODE.values())}
    assert public - mapped == {"AttnserveError", "BadAnswer"}


@pytest.mark.parametrize("reason", sorted(BY_REASON))
def test_each_reason_comes_back_as_its_class_with_all_its_facts(reason: str) -> None:
    sent = BY_REASON[reason](
        "what went wrong",
        code="UNAVAILABLE",
        reason=reason,
        metadata={"model": "m", "state": "draining", "cause": "queue_full", "version": "2"},
        violations=(errors.FieldViolation("text", "length 0 is below 1"),),
        retry_delay_s=1.5,
    )
    came = from_status_bytes(status_of(sent, "mine").SerializeToString())
    assert type(came) is type(sent)
    assert (came.message, came.reason, came.code, came.request_id) == ("what went wrong", reason, "UNAVAILABLE", "mine")
    assert dict(came.metadata) == dict(sent.metadata)
    assert came.violations == sent.violations
    assert came.retry_delay_s == 1.5


def test_facts_of_errors_have_names() -> None:
    assert errors.NotServing("x", metadata={"state": "draining"}).state == "draining"
    assert errors.Overloaded("x", metadata={"cause": "queue_full"}).cause == "queue_full"
    assert errors.ResponseTooLarge("x", metadata={"predicted_bytes": "many"}).predicted_bytes == 0


def test_reasons_of_other_services_are_not_taken_for_ours() -> None:
    status = status_of(AttnserveError("busy", code="RESOURCE_EXHAUSTED", reason="OVERLOADED"), "")
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    info.domain = "elsewhere.example"
    status.details[0].Pack(info)
    assert type(from_status_bytes(status.SerializeToString())) is AttnserveError


def test_broken_details_do_not_hide_the_error() -> None:
    broken = any_pb2.Any(type_url="type.googleapis.com/google.rpc.BadRequest", value=b"\xff\xff")
    unknown = any_pb2.Any(type_url="type.googleapis.com/some.Thing", value=b"")
    status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message="wrong", details=[broken, unknown])
    error = from_status_bytes(status.SerializeToString(), "mine")
    assert type(error) is InvalidRequest
    assert (error.message, error.request_id, error.violations) == ("wrong", "mine", ())


def test_statuses_that_are_none_are_bad_answers_or_unknown() -> None:
    assert isinstance(from_status_bytes(b"\xff\xff"), BadAnswer)
    assert from_status_bytes(status_pb2.Status(code=99).SerializeToString()).code == "UNKNOWN"
