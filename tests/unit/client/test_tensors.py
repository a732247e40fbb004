"""Conversion of arrays to tensor messages and back.

An array of a type outside the contract raises InvalidRequest, and a malformed message BadAnswer. Nothing is sent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attnserve.v1 import tensor_pb2
from attnserve_client import InvalidRequest
from attnserve_client._tensors import dtype_name, to_array, to_tensor
from attnserve_client.errors import BadAnswer
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
def test_array_round_trips_through_the_wire(array: np.ndarray, name: str) -> None:
    tensor = to_tensor(name, array)
    back = to_array(tensor_pb2.Tensor.FromString(tensor.SerializeToString()))
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert tensor.name == name
    assert dtype_name(tensor.dtype) == array.dtype.name


def test_strides_and_byte_order_are_normalized() -> None:
    array = np.arange(12, dtype=">i4").reshape(3, 4).T
    np.testing.assert_array_equal(to_array(to_tensor("x", array)), array)


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([1 + 2j]), np.array([object()])])
def test_element_types_outside_the_contract_are_refused(array: np.ndarray) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_tensor("x", array)
    assert caught.value.violations[0].field == "tensors[x].dtype"


@given(
    shape=st.lists(st.integers(-2, 5), max_size=4),
    dtype=st.sampled_from(sorted(tensor_pb2.DataType.values())),
    data=st.binary(max_size=64),
)
def test_tensor_is_decoded_or_a_bad_answer(shape: list[int], dtype: Any, data: bytes) -> None:
    tensor = tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data)
    try:
        array = to_array(tensor)
    except BadAnswer:
        return
    assert array.nbytes == len(data)
    assert array.shape == tuple(shape)
