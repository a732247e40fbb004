"""The fields of a protobuf message on the wire: tags, lengths and varints, read and written in place.

Source: the encoding of protobuf, https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

_FIXED: Final = {1: 8, 5: 4}
VARINT, DELIMITED = 0, 2
"""Wire types."""
_SMALL: Final = tuple(bytes((value,)) for value in range(1 << 7))
_TAGS: Final = tuple(_SMALL[number << 3 | DELIMITED] for number in range(16))
"""Of length-delimited fields, by field number."""


def delimiter(number: int, size: int) -> bytes:
    """Write what precedes the content of a length-delimited field: its tag and the length of its content."""
    return (_TAGS[number] if number < len(_TAGS) else varint(number << 3 | DELIMITED)) + varint(size)


def varint(value: int) -> bytes:
    """Write `value` as protobuf writes tags and lengths: seven bits a byte, least significant first."""
    if value < 1 << 14:
        return _SMALL[value] if value < 1 << 7 else bytes((value & 0x7F | 0x80, value >> 7))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield each field's number, wire type, and where its content begins and ends, up to the first malformed one."""
    while at < end:
        tag = data[at]  # most numbers have one byte: reading them here halves the time of the scan
        at += 1
        if tag > 0x7F:
            tag, at = read_varint(data, at - 1, end)
        wire_type = tag & 7
        begin = at
        if wire_type == VARINT:
            _, at = read_varint(data, at, end)
        elif wire_type == DELIMITED:
            if at < end and data[at] < 0x80:
                begin = at + 1
                at = begin + data[at]
            else:
                length, begin = read_varint(data, at, end)
                at = begin + length
        else:
            # Groups, which the contract does not have, begin and end with a bare tag.
            at += _FIXED.get(wire_type, 0)
        if at > end:
            return
        yield tag >> 3, wire_type, begin, at


def read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Return the number at `at` and the position behind it, which is behind `end` if the number is cut off."""
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
