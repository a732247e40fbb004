"""Conversion of NumPy arrays to tensor messages, and back without copies."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from attnserve.v1 import tensor_pb2

from attnserve_client._status import bad_answer
from attnserve_client.errors import InvalidRequest

Array = npt.NDArray[Any]

_TYPES: Final[dict[tensor_pb2.DataType.ValueType, np.dtype[Any]]] = {
    tensor_pb2.DATA_TYPE_BOOL: np.dtype(np.bool_),
    tensor_pb2.DATA_TYPE_UINT8: np.dtype("<u1"),
    tensor_pb2.DATA_TYPE_INT8: np.dtype("<i1"),
    tensor_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    tensor_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
_CODES: Final = {(dtype.kind, dtype.itemsize): code for code, dtype in _TYPES.items()}


def dtype_name(code: tensor_pb2.DataType.ValueType) -> str:
    """Return the NumPy name of a wire type, for example `float32`; `unspecified` for an unknown one."""
    return _TYPES[code].name if code in _TYPES else "unspecified"


def to_tensor(name: str, array: Array) -> tensor_pb2.Tensor:
    """Encode an array of any shape as little-endian, row-major bytes.

    Raises:
        InvalidRequest: The array's element type is not in the contract.
    """
    code = _CODES.get((array.dtype.kind, array.dtype.itemsize))
    if code is None:
        known = ", ".join(dtype.name for dtype in _TYPES.values())
        raise InvalidRequest.of(f"tensors[{name}].dtype", f"{array.dtype} is not one of {known}")
    little = array.astype(_TYPES[code], copy=False)
    return tensor_pb2.Tensor(name=name, dtype=code, shape=little.shape, data=little.tobytes())


def to_array(tensor: tensor_pb2.Tensor) -> Array:
    """Return a read-only view of a tensor's bytes, in its type and shape.

    Raises:
        BadAnswer: The type is unknown, or type and shape do not match the number of bytes.
    """
    dtype = _TYPES.get(tensor.dtype)
    if dtype is None:
        raise bad_answer(f"tensor {tensor.name!r} has the unknown type {tensor.dtype}")
    shape, data = tuple(tensor.shape), tensor.data
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise bad_answer(f"tensor {tensor.name!r} of shape {shape} and type {dtype} has {len(data)} bytes")
    return np.frombuffer(data, dtype=dtype).reshape(shape)
