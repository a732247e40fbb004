"""What a message's bytes tell before any of it is built: how much is structure, and where tensor data lies.

A field of two bytes on the wire takes dozens once it is built, so that a message within the size limit could take
gigabytes. Text and tensor data stay as long as they are; everything beside them is bounded here. Tensor data need not
be built at all: it can be read where it was received. Building is in wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from attnserve.v1 import tensor_pb2
from google.protobuf import descriptor_pb2

from attnserve_server.domain.errors import InvalidRequest
from attnserve_server.transport.splice import varint

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_STRUCTURE_BYTES: Final = 2**19
"""Most bytes of a message beside text and tensor data: a request of 4,096 sequences has half of that."""
_MAX_BLOBS: Final = 2**13
"""A message of more tensors is built whole: looking after each of their places takes more than it holds."""
_MAX_PEEKED: Final = 10_000
"""Fields that are looked at for a request's name: one with more has none."""
_STRING: Final = descriptor_pb2.FieldDescriptorProto.TYPE_STRING
_BYTES: Final = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
_FIXED: Final = {1: 8, 5: 4}
_VARINT, _DELIMITED = 0, 2
_TENSOR: Final = tensor_pb2.Tensor.DESCRIPTOR.full_name
_DATA: Final = tensor_pb2.Tensor.DATA_FIELD_NUMBER

Blobs = Sequence[memoryview]
"""Tensor data of a message, where it was received; the message's tensors hold places in it. Empty: they hold data."""


class _Over(Exception):
    """The bound was passed, in the field of this path."""


def check_structure(kind: Any, data: bytes) -> None:
    """Looks at `data`, a message of the descriptor `kind`, whatever else is wrong with it.

    Raises:
        InvalidRequest: It has more structure than is built; the field in which the bound was passed is named.
    """
    without_data(kind, data)


def without_data(kind: Any, data: bytes) -> tuple[bytes, Blobs]:
    """`data`, a message of the descriptor `kind`, with a place in the blobs for each tensor's data; and these.

    A message that has no room for too much structure is not looked through: copying its data twice takes less. What is
    malformed stays so.

    Raises:
        InvalidRequest: As `check_structure`.
    """
    if len(data) <= MAX_STRUCTURE_BYTES:
        return data, ()
    walk = _Walk(data)
    short = walk.whole(kind)
    return (short, walk.blobs) if len(walk.blobs) < _MAX_BLOBS else (data, ())


def data_of(tensor: tensor_pb2.Tensor, blobs: Blobs) -> bytes | memoryview:
    """A tensor's data, of a message that came with these blobs."""
    data = tensor.data
    return blobs[int.from_bytes(data, "little")] if blobs and data else data


def peek(data: bytes, *path: int) -> bytes:
    """The content of the field at `path`, numbers from the outside in, of a message that is not built; empty: none."""
    for number in path:
        found = b""
        for field, wire_type, begin, end in islice(_fields(data, 0, len(data)), _MAX_PEEKED):
            if field == number and wire_type == _DELIMITED:
                found = data[begin:end]
        data = found
    return data


class _Walk:
    """One look through a message: bounds its structure, and takes tensor data out."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._view = memoryview(data)
        self._left = MAX_STRUCTURE_BYTES
        self.blobs: list[memoryview] = []

    def whole(self, kind: Any) -> bytes:
        """The message with places for tensor data. Raises InvalidRequest if it has too much structure."""
        try:
            return b"".join(self._message(0, len(self._data), kind, ""))
        except _Over as over:
            said = f"over {MAX_STRUCTURE_BYTES} of the message's {len(self._data)} bytes are no text or tensor data"
            raise InvalidRequest.of(str(over), said) from None

    def _message(self, begin: int, end: int, kind: Any, path: str) -> list[memoryview | bytes]:
        """The pieces of what data[begin:end] becomes. Raises _Over."""
        pieces: list[memoryview | bytes] = []
        at = kept = begin  # up to where it was looked at, and up to where it is in the pieces
        for number, wire_type, content, after in _fields(self._data, begin, end):
            field = kind.fields_by_number.get(number)
            where = path if field is None else f"{path}{field.name}"
            self._left -= content - at
            changed: list[memoryview | bytes] = []
            if wire_type == _DELIMITED and field is not None and field.message_type is not None:
                known = len(self.blobs)
                inner = self._message(content, after, field.message_type, f"{where}.")
                changed = inner if len(self.blobs) > known else []
            elif wire_type == _DELIMITED and number == _DATA and kind.full_name == _TENSOR:
                if len(self.blobs) < _MAX_BLOBS:
                    changed = [len(self.blobs).to_bytes(4, "little")]
                    self.blobs.append(self._view[content:after])
            elif wire_type != _DELIMITED or field is None or field.type not in (_STRING, _BYTES):
                self._left -= after - content
            if self._left < 0:
                raise _Over(where.removesuffix(".") or kind.name)
            if changed:
                head = varint(number << 3 | _DELIMITED) + varint(sum(map(len, changed)))
                pieces += (self._view[kept:at], head, *changed)
                kept = after
            at = after
        pieces.append(self._view[kept:end])
        return pieces


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
