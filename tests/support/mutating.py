"""Changes of valid inputs at random: bytes, protobuf messages by their fields, and JSON or msgpack values.

Each function takes its randomness from the `random.Random` that it is given, and raises nothing.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor, message

NUMBERS = (0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, -(2**31), 2**31, 2**32, 2**62, 2**63 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    "a",
    "\0",
    "\r\n",
    "\x1b[31m",
    "../x",
    "/",
    "\ud7ff",
    "\U0001f600",
    "x" * 300,
    "[CLS]",
    "input_ids",
    "seq",
    "1",
)
BYTES = (b"\0", b"\xff", b"\x80", b"\xff" * 9 + b"\x01", b"\x80" * 10, b"\x0a\x7f", b"\x1a\x00", b"\xfb\x07", b"\xc3")


def changed_bytes(chance: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return bytes with one to four changes: flips, cuts, insertions, repetitions, and parts of other inputs."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(out) + 1)
        end = min(len(out), at + chance.choice((1, 2, 8, 64)))
        match chance.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(out):
                out[at] = chance.randrange(256)
            case 2:
                del out[at:end]
            case 3:
                del out[at:]
            case 4:
                out[at:at] = chance.choice(BYTES)
            case 5:
                out[at:at] = bytes(out[at:end]) * chance.choice((1, 2, 50))
            case _:
                other = chance.choice(others)
                begin = chance.randrange(len(other) + 1)
                out[at:end] = other[begin : begin + chance.choice((4, 32, 400))]
    return bytes(out)


def change_message(chance: random.Random, proto: message.Message) -> None:
    """Change a few fields of a protobuf message, at any depth."""
    for _ in range(chance.choice((1, 1, 2, 3, 6))):
        _change_field(chance, proto)


def _change_field(chance: random.Random, proto: message.Message) -> None:
    fields = list(proto.DESCRIPTOR.fields)
    given = [field for field, _ in proto.ListFields()]
    nested = [field for field in given if field.message_type is not None]
    chosen = nested if nested and chance.random() < 0.7 else given if given and chance.random() < 0.8 else fields
    field = chance.choice(chosen)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return
    if field.is_repeated:
        _change_list(chance, proto, field)
    elif chance.random() < 0.1:
        proto.ClearField(field.name)
    elif field.message_type is not None:
        inner = getattr(proto, field.name)
        inner.SetInParent()
        _change_field(chance, inner)
    else:
        setattr(proto, field.name, _scalar(chance, field))


def _change_list(chance: random.Random, proto: message.Message, field: descriptor.FieldDescriptor) -> None:
    items = getattr(proto, field.name)
    what = chance.randrange(6)
    if items and what == 0:
        del items[chance.randrange(len(items))]
    elif field.message_type is not None:
        if items and what <= 4:
            _change_field(chance, chance.choice(items))
        elif items and what == 5:
            items.add().CopyFrom(chance.choice(items))
        else:
            items.add()
    elif items and what <= 3:
        items[chance.randrange(len(items))] = _scalar(chance, field)
    else:
        items.extend(_scalar(chance, field) for _ in range(chance.choice((1, 1, 2, 9))))


def _scalar(chance: random.Random, field: descriptor.FieldDescriptor) -> Any:
    kinds = descriptor.FieldDescriptor
    if field.cpp_type in (kinds.CPPTYPE_FLOAT, kinds.CPPTYPE_DOUBLE):
        return chance.choice(FLOATS)
    if field.cpp_type == kinds.CPPTYPE_BOOL:
        return chance.random() < 0.5
    if field.cpp_type == kinds.CPPTYPE_STRING:
        return (
            chance.choice(TEXTS) if field.type == kinds.TYPE_STRING else chance.randbytes(chance.choice((0, 1, 8, 24)))
        )
    if field.cpp_type == kinds.CPPTYPE_ENUM:
        unknown = [] if field.enum_type.is_closed else [99]
        return chance.choice([*(value.number for value in field.enum_type.values), *unknown])
    bits = 32 if field.cpp_type in (kinds.CPPTYPE_INT32, kinds.CPPTYPE_UINT32) else 64
    low = 0 if field.cpp_type in (kinds.CPPTYPE_UINT32, kinds.CPPTYPE_UINT64) else -(2 ** (bits - 1))
    high = 2**bits - 1 if low == 0 else 2 ** (bits - 1) - 1
    return min(high, max(low, chance.choice(NUMBERS)))


def changed_value(chance: random.Random, value: Any) -> Any:
    """Return a copy of a JSON or msgpack value with a few changes, at any depth."""
    out = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 2, 3))):
        out = _change_value(chance, out)
    return out


def _change_value(chance: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = _place(chance, value)
        match chance.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[chance.choice(TEXTS)] = value[key]
            case _:
                value[key] = _change_value(chance, value[key])
        return value
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = _place(chance, dict(enumerate(value)))
        match chance.randrange(8):
            case 0:
                del value[at]
            case 1:
                value.append(copy.deepcopy(value[at]))
            case _:
                value[at] = _change_value(chance, value[at])
        return value
    kind = (
        type(value) if chance.random() < 0.7 else chance.choice((int, float, str, bool, bytes, list, dict, type(None)))
    )
    fresh: dict[type, Any] = {
        int: chance.choice(NUMBERS),
        float: chance.choice(FLOATS),
        str: chance.choice(TEXTS),
        bool: chance.random() < 0.5,
        bytes: chance.randbytes(chance.choice((0, 1, 8, 24))),
        list: [],
        dict: {},
        type(None): None,
    }
    return fresh.get(kind)


def _place(chance: random.Random, value: dict[Any, Any]) -> Any:
    """Choose a key, mostly of a value that holds others: most of a message lies deep."""
    nested = [key for key, part in value.items() if isinstance(part, dict | list) and part]
    return chance.choice(nested if nested and chance.random() < 0.7 else list(value))
