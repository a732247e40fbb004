"""Messages put together from pieces, so that tensor data goes straight from an array into the bytes of an answer.

Protobuf writes a message as its fields one after another, each length-delimited one as tag, length and content, and
joins fields that follow one another (protobuf.dev, "Encoding"). So a large field need not be copied into a message, and
from there into the bytes, and on from one message into the one around it: all pieces are joined once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attnserve_server.domain.values import Array

_DELIMITED = 2
"""The wire type of strings, bytes and messages."""


class Splice:
    """The bytes of one message, in pieces. Arrays must stay as they are until `joined`."""

    __slots__ = ("pieces", "size")

    def __init__(self, *fields: bytes) -> None:
        """Begins with fields that were serialised already."""
        # Bytes, and arrays, whose type does not tell that they are buffers.
        self.pieces: list[Any] = list(fields)
        self.size = sum(map(len, fields))

    def add(self, number: int, content: Splice | bytes | Array) -> Splice:
        """Appends a length-delimited field: a message, or bytes; an array, C-contiguous, gives those of its data."""
        pieces: Iterable[Any]
        if isinstance(content, Splice):
            pieces, size = content.pieces, content.size
        elif isinstance(content, bytes):
            pieces, size = (content,), len(content)
        else:
            pieces, size = (content,), content.nbytes
        head = varint(number << 3 | _DELIMITED) + varint(size)
        self.pieces.append(head)
        self.pieces.extend(pieces)
        self.size += len(head) + size
        return self

    def joined(self) -> bytes:
        """The message's bytes."""
        return b"".join(self.pieces)


def varint(value: int) -> bytes:
    """`value` as protobuf writes tags and lengths: seven bits a byte, least first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
