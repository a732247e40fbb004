"""Arrays of a JSON request as wire tensors. Conversion is exact, or the request is refused by name."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from functools import cache
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
_Float = float | Literal["Infinity", "-Infinity"]
_MAX_AXES: Final = 8
_LISTS: Final = re.compile(rb"[\s\[]*")
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
    shape = sent.shape
    given = bytes(sent.data)
    if given.startswith(b'"'):
        if shape is None:
            raise InvalidRequest.of(f"{field}.shape", "missing: data in base64 need a shape")
        data = _decoded(msgspec.json.decode(given), field)
    else:
        array = array_of(given, NUMPY_DTYPES[dtype], f"{field}.data")
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


def array_of(data: bytes, dtype: np.dtype[Any], field: str) -> Array:
    """Return nested lists of JSON, or one number, as an array.

    Args:
        data: valid JSON, which begins without a space.
        dtype: of the array, whose numbers are the same: those of floats are rounded.
        field: its place in the request.

    Raises:
        InvalidRequest: They are no lists of equal lengths, or have values that the dtype does not.
    """
    value = elements_of(data, {"f": _Float, "b": bool, "i": int, "u": int}[dtype.kind], field)
    if dtype.kind == "f" and b'"' in data:
        value = _with_infinities(value)
    try:
        found = np.asarray(value)
    except ValueError:
        raise InvalidRequest.of(field, "lists of different lengths") from None
    if found.size == 0:
        return found.astype(dtype)
    # Integers that no dtype has become floats or objects.
    if found.dtype.kind in {"f": "fiu", "b": "b", "i": "iu", "u": "iu"}[dtype.kind]:
        with np.errstate(over="ignore"):
            converted: Array = found.astype(dtype)
        if np.all(np.isinf(converted) == np.isinf(found) if dtype.kind == "f" else converted == found):
            return converted
    raise InvalidRequest.of(field, f"a number is out of the range of {dtype.name}")


def elements_of(data: bytes, kind: Any, field: str) -> Any:
    """Read nested lists whose elements are of one kind, or one element.

    Args:
        data: valid JSON, which begins without a space.
        kind: type of the elements, for msgspec: NumPy would make a list of texts as wide as the longest of them.
        field: its place in the request.

    Raises:
        InvalidRequest: An element is of another kind, or the lists are nested too deeply.
    """
    try:
        return _decoder(kind, rank_of(data)).decode(data)
    except msgspec.ValidationError as error:
        what, _, where = str(error).rpartition(" - at `$")
        raise InvalidRequest.of(f"{field}{where.rstrip('`')}", what or str(error)) from None


def rank_of(data: bytes) -> int:
    """Return how deeply lists of JSON are nested, at most one more than a tensor may have axes."""
    opened = _LISTS.match(data)
    return 0 if opened is None else min(opened[0].count(b"["), _MAX_AXES + 1)


@cache
def _decoder(kind: Any, rank: int) -> msgspec.json.Decoder[Any]:
    for _ in range(min(rank, _MAX_AXES)):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def _with_infinities(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_infinities(one) for one in value]
    return _INFINITE[value] if isinstance(value, str) else value
