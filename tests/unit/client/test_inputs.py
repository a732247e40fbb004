"""Inputs of calls and their encoding as requests.

An input is a text, two texts, token ids, or arrays by name. One of another type raises TypeError; one with values that
the model cannot take raises InvalidRequest before it is sent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attnserve.v1 import inference_service_pb2 as wire
from attnserve.v1 import model_pb2, tensor_pb2
from attnserve_client import InvalidRequest, ModelInfo
from attnserve_client._inputs import request_of, sequence_of, split, takes_ids
from attnserve_client._models import model_of


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
def test_one_input_is_distinguished_from_several(inputs: Any, count: int, many: bool) -> None:
    items, was_many = split(inputs)
    assert (len(items), was_many) == (count, many)


@pytest.mark.parametrize("wrong", [7, None, b"bytes", {1, 2}])
def test_inputs_of_other_types_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="text, a pair of texts, token ids, arrays"):
        split(wrong)
    with pytest.raises(TypeError, match="text, a pair of texts, token ids, arrays"):
        sequence_of(wrong, None)


@pytest.mark.parametrize(
    ("one", "texts"),
    [(("a", {"x": np.ones(2)}), ("a", "")), (("a", "b", {"x": np.ones(2)}), ("a", "b")), (("a", "b", {}), ("a", "b"))],
)
def test_arrays_may_follow_texts(one: Any, texts: tuple[str, str]) -> None:
    sent = sequence_of(one, None).text
    assert (sent.text, sent.text_pair) == texts
    assert [(tensor.name, list(tensor.shape)) for tensor in sent.tensors] == [(name, [2]) for name in one[-1]]


@pytest.mark.parametrize("wrong", [("one",), ("a", "b", "c"), (1, 2), (), ({},), ("a", "b", "c", {}), (1, {})])
def test_tuple_without_texts_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="a tuple must be one or two texts"):
        sequence_of(wrong, None)


@pytest.mark.parametrize("wrong", [[1.5, 2.5], [[1], [2]], np.array([[1]]), np.array(["a"])])
def test_ids_must_be_integers_of_rank_1(wrong: Any) -> None:
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


def test_token_input_is_input_ids_or_the_only_integer_input() -> None:
    assert model(("input_ids", "int64", 1, False), ("other", "int64", 1, False)).token_input == "input_ids"
    assert model(("tokens", "int32", 1, False), ("mask", "int64", 1, True)).token_input == "tokens"
    assert model(("one", "int64", 1, False), ("two", "int64", 1, False)).token_input is None
    assert model(("image", "float32", 2, False)).token_input is None


def test_ids_for_a_model_without_a_token_input_list_its_inputs() -> None:
    with pytest.raises(InvalidRequest, match="arrays for: image"):
        sequence_of([1], model(("image", "float32", 2, False)))


def test_ids_that_overflow_the_inputs_type_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="int32"):
        sequence_of([2**31], model(("tokens", "int32", 1, False)))


def test_empty_ids_are_sent_for_the_server_to_check() -> None:
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


def test_unknown_priority_and_single_output_name_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="urgent"):
        build(priority="urgent")
    with pytest.raises(TypeError, match="list of names"):
        build(outputs="embedding")
