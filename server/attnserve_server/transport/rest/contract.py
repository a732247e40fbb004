"""The gRPC contract as JSON: types made from its messages, and the way between both. Nothing is declared twice.

A field keeps its name. An enum is its name in lower case, without the prefix: `ATTENTION_KIND_SELF` is "self". Fields
that are not set are left out. A tensor is `{"dtype", "shape", "data", "name"}`: `data` are its values, row by row, or
their bytes as base64. Numbers that JSON does not have are the strings "Infinity", "-Infinity" and "NaN", as in
protobuf's own mapping. Raises InvalidRequest for texts that are not Unicode.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
import numpy as np
from attnserve.v1 import tensor_pb2
from google.protobuf import message
from msgspec import UNSET, Meta, UnsetType

from attnserve_server.domain.errors import InvalidRequest
from attnserve_server.domain.values import Array
from attnserve_server.transport.wire import DTYPE_NAMES, array_of

T = TypeVar("T")

Encoding = Literal["values", "base64"]
_TENSOR: Final = tensor_pb2.Tensor.DESCRIPTOR.full_name
_INTEGERS: Final = {1: (-(2**63), 2**63 - 1), 2: (0, 2**64 - 1), 3: (-(2**31), 2**31 - 1), 4: (0, 2**32 - 1)}
"""Bounds of integers, by the number of their C++ type, of which 1 is int32: see `_CPP`."""
_CPP: Final = {1: _INTEGERS[3], 2: _INTEGERS[1], 3: _INTEGERS[4], 4: _INTEGERS[2]}
_DOUBLE, _FLOAT, _BOOL, _ENUM, _STRING, _MESSAGE = 5, 6, 7, 8, 9, 10


class Tensor(msgspec.Struct):
    """An array without the batch axis.

    `data`: its elements, row by row, or their little-endian bytes as base64, by `tensor_encoding` of the request.
    """

    dtype: Literal["bool", "uint8", "int8", "int32", "int64", "float16", "float32", "float64"]
    shape: list[int]
    data: list[float | int | bool | str] | str
    name: str = ""


@cache
def struct_of(kind: Any, *, whole: bool = False) -> type[msgspec.Struct]:
    """Return the type of a message, whose fields may all be left out.

    Args:
        kind: its descriptor.
        whole: as `whole_of` writes it: a field may be left out only if it has no default, and enums keep their names.
    """
    if kind.full_name == _TENSOR:
        return Tensor
    fields: list[Any] = [
        (field.name, _type_of(field, whole=True))
        if whole and not field.has_presence
        else (field.name, _type_of(field, whole=whole) | UnsetType, UNSET)
        for field in kind.fields
    ]
    return msgspec.defstruct(kind.name, fields, kw_only=True, forbid_unknown_fields=True, module=__name__)


def _type_of(field: Any, *, whole: bool) -> Any:
    one: Any
    if field.cpp_type == _MESSAGE:
        one = struct_of(field.message_type, whole=whole)
    elif field.cpp_type == _ENUM:
        one = Literal[tuple(sorted(field.enum_type.values_by_name if whole else _names(field.enum_type)))]
    elif field.cpp_type == _STRING:
        one = str
    elif field.cpp_type in _CPP:
        least, most = _CPP[field.cpp_type]
        # msgspec bounds integers by int64 only.
        one = Annotated[int, Meta(ge=least, le=min(most, 2**63 - 1))]
    else:
        one = bool if field.cpp_type == _BOOL else float
    return list[one] if field.is_repeated else one


@cache
def _names(kind: Any) -> dict[str, int]:
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.name).upper() + "_"
    return {value.name.removeprefix(prefix).lower(): value.number for value in kind.values if value.number}


@cache
def _own_names(kind: Any) -> dict[int, str]:
    return {value.number: value.name for value in kind.values}


@cache
def _names_out(kind: Any) -> dict[int, str]:
    return {number: name for name, number in _names(kind).items()}


def fill(to: message.Message, sent: msgspec.Struct) -> None:
    """Set the fields of a message to those of a struct of its type.

    Raises:
        InvalidRequest: A text is not Unicode.
    """
    for field in to.DESCRIPTOR.fields:
        value = getattr(sent, field.name)
        if value is UNSET:
            continue
        if field.cpp_type == _MESSAGE:
            getattr(to, field.name).SetInParent()
            fill(getattr(to, field.name), value)
        elif field.is_repeated:
            names = _names(field.enum_type) if field.cpp_type == _ENUM else {}
            getattr(to, field.name).extend([names[one] if names else checked(one, field.name) for one in value])
        else:
            found = _names(field.enum_type)[value] if field.cpp_type == _ENUM else checked(value, field.name)
            setattr(to, field.name, found)


def checked(value: T, field: str) -> T:
    """Return a value, or a text that UTF-8 has. Raises InvalidRequest for a text with half of a surrogate pair."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest.of(field, f"not Unicode: character {error.start} is half of a pair") from None
    return value


def plain_of(sent: message.Message, encoding: Encoding) -> dict[str, Any]:
    """Return a message as JSON's values. `encoding`: of the data of its tensors."""
    if isinstance(sent, tensor_pb2.Tensor):
        return tensor_of(sent, encoding)
    found: dict[str, Any] = {}
    for field, value in sent.ListFields():
        one: Callable[[Any], Any] = _same
        if field.cpp_type == _MESSAGE:
            one = _message_of(encoding)
        elif field.cpp_type == _ENUM:
            one = _names_out(field.enum_type).__getitem__
        elif field.cpp_type in {_FLOAT, _DOUBLE}:
            one = number_of
        found[field.name] = [one(item) for item in value] if field.is_repeated else one(value)
    return found


def whole_of(sent: message.Message) -> dict[str, Any]:
    """Return a message as JSON's values, with the fields that have their defaults, and enums by their own names."""
    found: dict[str, Any] = {}
    for field in sent.DESCRIPTOR.fields:
        if field.has_presence and not sent.HasField(field.name):
            continue
        value = getattr(sent, field.name)
        one: Callable[[Any], Any] = _same
        if field.cpp_type == _MESSAGE:
            one = whole_of
        elif field.cpp_type == _ENUM:
            one = _own_names(field.enum_type).__getitem__
        found[field.name] = [one(item) for item in value] if field.is_repeated else one(value)
    return found


def _same(value: Any) -> Any:
    return value


def _message_of(encoding: Encoding) -> Callable[[Any], Any]:
    return lambda value: plain_of(value, encoding)


def number_of(value: float) -> float | str:
    """Return a number, or the string for one that JSON does not have."""
    if np.isfinite(value):
        return value
    return "NaN" if np.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def tensor_of(sent: tensor_pb2.Tensor, encoding: Encoding) -> dict[str, Any]:
    """Return a tensor as `Tensor` describes it; an empty name is left out."""
    dtype = DTYPE_NAMES[sent.dtype]
    named = {"name": sent.name} if sent.name else {}
    data: Any
    if encoding == "base64":
        data = base64.b64encode(sent.data).decode()
    else:
        data = values_of(array_of(sent.data, dtype, tuple(sent.shape)))
    return {**named, "dtype": dtype, "shape": list(sent.shape), "data": data}


def values_of(array: Array) -> list[Any]:
    """Return the elements of an array, row by row. A float32 becomes the double of the same value."""
    flat: list[Any] = array.reshape(-1).tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return [number_of(value) for value in flat]
    return flat
