"""Arrays of a JSON request as wire tensors. Conversion is exact, or the request is refused by name."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from math import prod
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from attnserve.v1 import tensor_pb2
from msgspec import Meta

from attnserve_server.domain.errors import InvalidRequest
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import NUMPY_DTYPES, InputSpec
from attnserve_server.transport.wire import WIRE_DTYPES, WIRE_NUMPY

_INFINITE: Final = {"Infinity": np.inf, "-Infinity": -np.inf}
_MAX_AXES: Final = 8
Dtype = Literal["bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64"]
_DATA_SCHEMA: Final = {
    "oneOf": [{"type": "array", "items": {}}, {"type": "string", "contentEncoding": "base64"}, {"type": "number"}]
}


class TensorIn(msgspec.Struct, forbid_unknown_fields=True):
    """An array for one input, without the batch axis."""

    name: Annotated[str, Meta(description="Name of the input.")]
    data: Annotated[
        msgspec.Raw,
        Meta(
            description="Nested lists, or with `shape` also one flat list, or the little-endian bytes as base64. "
            '"-Infinity" hides a key in an additive mask.',
            extra_json_schema=_DATA_SCHEMA,
        ),
    ]
    shape: Annotated[list[int], Meta(max_length=_MAX_AXES)] | None = None
    dtype: Dtype | None = None
    """The input's own if it is left out."""


def tensor_of(sent: TensorIn, specs: Sequence[InputSpec], field: str) -> tensor_pb2.Tensor:
    """Return a tensor as gRPC has it. That it fits the model is checked later, as for every request.

    Args:
        sent: of the request.
        specs: the model's inputs, whose dtypes are the defaults.
        field: its place in the request.

    Raises:
        InvalidRequest: Its data are no array, or have numbers that the dtype does not.
    """
    dtype: str = sent.dtype or next((spec.dtype for spec in specs if spec.name == sent.name), "float32")
    value = msgspec.json.decode(sent.data)
    shape = sent.shape
    if isinstance(value, str):
        if shape is None:
            raise InvalidRequest.of(f"{field}.shape", "missing: data in base64 need a shape")
        data = _decoded(value, field)
    else:
        array = _array(value, dtype, field)
        if shape is None:
            shape = list(array.shape)
        elif prod(shape) != array.size or min(shape, default=0) < 0:
            raise InvalidRequest.of(f"{field}.shape", f"{shape} does not hold the {array.size} elements of data")
        data = array.astype(WIRE_NUMPY[dtype], copy=False).tobytes()
    try:
        return tensor_pb2.Tensor(name=sent.name, dtype=WIRE_DTYPES[dtype], shape=shape, data=data)
    except ValueError:  # beyond int64
        raise InvalidRequest.of(f"{field}.shape", f"{shape} has an entry beyond 2^63") from None


def _decoded(text: str, field: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest.of(f"{field}.data", "the string is not base64") from None


def _array(value: Any, dtype: str, field: str) -> Array:
    """Return nested lists as an array of a dtype, whose numbers are the same."""
    wanted = NUMPY_DTYPES[dtype]
    if wanted.kind == "f":
        value = _with_infinities(value)
    try:
        found = np.asarray(value) if _depth(value) <= _MAX_AXES else np.asarray(None)
    except (ValueError, OverflowError):  # lists of different lengths
        found = np.asarray(None)
    if found.size == 0:
        return found.astype(wanted)
    if found.dtype.kind not in {"f": "fiu", "b": "b", "i": "iu", "u": "iu"}[wanted.kind]:
        raise InvalidRequest.of(f"{field}.data", f"no nested lists of {dtype}, all of equal lengths")
    with np.errstate(over="ignore"):
        converted: Array = found.astype(wanted)
    if wanted.kind in "iu" and not np.array_equal(converted, found):
        raise InvalidRequest.of(f"{field}.data", f"a number is out of the range of {dtype}")
    return converted


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list):
        depth, value = depth + 1, value[0] if value else None
    return depth


def _with_infinities(value: Any) -> Any:
    if isinstance(value, list):
        if value and isinstance(value[0], float | int):
            return [_INFINITE.get(one, one) if isinstance(one, str) else one for one in value]
        return [_with_infinities(one) for one in value]
    return _INFINITE.get(value, value) if isinstance(value, str) else value
