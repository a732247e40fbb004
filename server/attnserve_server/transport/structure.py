"""How much of a message is structure, told from its bytes before any of it is built. Building is in wire.

A field of two bytes on the wire takes dozens once it is built, so that a message within the size limit could take
gigabytes. Text and tensor data stay as long as they are; everything beside them is bounded here.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from google.protobuf import descriptor_pb2

from attnserve_server.domain.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_STRUCTURE_BYTES: Final = 2**19
"""Most bytes of a message beside text and tensor data: a request of 4,096 sequences has half of that."""
_MAX_PEEKED: Final = 10_000
"""Fields that are looked at for a request's name: one with more has none."""
_STRING: Final = descriptor_pb2.FieldDescriptorProto.TYPE_STRING
_BYTES: Final = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
_FIXED: Final = {1: 8, 5: 4}
_VARINT, _DELIMITED = 0, 2


class _Over(Exception):
    """The bound was passed, in the field of this path."""


def check_structure(kind: Any, data: bytes) -> None:
    """Looks at `data`, a message of the descriptor `kind`, whatever else is wrong with it.

    Raises:
        InvalidRequest: It has more structure than is built; the field in which the bound was passed is named.
    """
    if len(data) <= MAX_STRUCTURE_BYTES:
        return
    try:
        _left_of(data, 0, len(data), kind, "", MAX_STRUCTURE_BYTES)
    except _Over as over:
        raise InvalidRequest.of(
            str(over), f"over {MAX_STRUCTURE_BYTES} of the message's {len(data)} bytes are no text or tensor data"
        ) from None


def peek(data: bytes, *path: int) -> bytes:
    """The content of the field at `path`, numbers from the outside in, of a message that is not built; empty: none."""
    for number in path:
        found = b""
        for field, wire_type, begin, end in islice(_fields(data, 0, len(data)), _MAX_PEEKED):
            if field == number and wire_type == _DELIMITED:
                found = data[begin:end]
        data = found
    return data


def _left_of(data: bytes, begin: int, end: int, kind: Any, path: str, left: int) -> int:
    """What is left of a bound of `left` bytes after the structure in data[begin:end]. Raises _Over."""
    at = begin
    for number, wire_type, content, after in _fields(data, begin, end):
        field = kind.fields_by_number.get(number)
        where = path if field is None else f"{path}{field.name}"
        left -= content - at
        if wire_type == _DELIMITED and field is not None and field.message_type is not None:
            left = _left_of(data, content, after, field.message_type, f"{where}.", left)
        elif wire_type != _DELIMITED or field is None or field.type not in (_STRING, _BYTES):
            left -= after - content
        if left < 0:
            raise _Over(where.removesuffix(".") or kind.name)
        at = after
    return left


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field's number, wire type, and where its content begins and ends; up to the first that is malformed."""
    while at < end:
        tag, at = _varint(data, at, end)
        wire_type = tag & 7
        begin = at
        if wire_type == _VARINT:
            _, at = _varint(data, at, end)
        elif wire_type == _DELIMITED:
            length, begin = _varint(data, at, end)
            at = begin + length
        else:
            # Groups, which the contract has none of, begin and end with a bare tag.
            at += _FIXED.get(wire_type, 0)
        if at > end:
            return
        yield tag >> 3, wire_type, begin, at


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The number at `at` and the place behind it; behind `end` if it is cut off."""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            break
    return value, end + 1
