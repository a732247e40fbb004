"""Arrays to wire tensors, and back, without copies of their data.

Encoding fails only for an array of a dtype that the contract does not have, with KeyError.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
from attnserve.v1 import inference_service_pb2, tensor_pb2

from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import NUMPY_DTYPES
from attnserve_server.transport.wire import Splice, delimiter

DTYPE_NAMES: Final[Mapping[int, str]] = {
    tensor_pb2.DATA_TYPE_BOOL: "bool",
    tensor_pb2.DATA_TYPE_UINT8: "uint8",
    tensor_pb2.DATA_TYPE_INT8: "int8",
    tensor_pb2.DATA_TYPE_INT32: "int32",
    tensor_pb2.DATA_TYPE_INT64: "int64",
    tensor_pb2.DATA_TYPE_FLOAT16: "float16",
    tensor_pb2.DATA_TYPE_FLOAT32: "float32",
    tensor_pb2.DATA_TYPE_FLOAT64: "float64",
}
WIRE_DTYPES: Final = {name: tensor_pb2.DataType.ValueType(number) for number, name in DTYPE_NAMES.items()}
# The contract is little-endian on every machine; on a little-endian one these are the native dtypes.
WIRE_NUMPY: Final = {name: dtype.newbyteorder("<") for name, dtype in NUMPY_DTYPES.items()}

_NAMES: Final = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
"""NumPy rebuilds the name of a dtype at each access."""


def array_of(data: bytes | memoryview, dtype: str, shape: Sequence[int]) -> Array:
    """Return a read-only view of `data`. Raise ValueError if it has other bytes than `dtype` and `shape` need."""
    if dtype == "bool":
        return np.frombuffer(data, np.uint8).view(np.bool_).reshape(shape)
    return np.frombuffer(data, WIRE_NUMPY[dtype]).reshape(shape)


def tensor_of(array: Array, name: str = "") -> Splice:
    """Encode an array as a wire tensor; its data is copied once, when the message around it is joined."""
    return Splice(_head(name, array.dtype, array.shape)).append(as_sent(array))


def as_sent(array: Array) -> Array:
    """Return the array as its bytes are sent: C-contiguous and little-endian. Nothing is copied if it is so."""
    if array.flags.c_contiguous and sys.byteorder == "little":
        return array
    return np.ascontiguousarray(array, WIRE_NUMPY[dtype_name(array.dtype)])


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the manifest's name of a dtype."""
    return _NAMES.get(dtype) or dtype.name


@lru_cache(maxsize=4096)
def _head(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Serialize a tensor up to its data; cached, because outputs of the same lengths recur."""
    tensor = tensor_pb2.Tensor(name=name, dtype=WIRE_DTYPES[dtype_name(dtype)], shape=shape).SerializeToString()
    return tensor + delimiter(tensor_pb2.Tensor.DATA_FIELD_NUMBER, math.prod(shape) * dtype.itemsize)


@lru_cache(maxsize=4096)
def output_head(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Serialize a tensor up to its data, as an output in a SequenceResult."""
    head = _head(name, dtype, shape)
    size = len(head) + math.prod(shape) * dtype.itemsize
    return delimiter(inference_service_pb2.SequenceResult.OUTPUTS_FIELD_NUMBER, size) + head
