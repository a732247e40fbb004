"""Bytes to messages. Bytes that are no message become InvalidRequest, naming the field whose UTF-8 is broken."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Final, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from attnserve_server.domain.errors import MAX_VIOLATIONS, FieldViolation, InvalidRequest
from attnserve_server.transport.structure import Blobs, check_structure, without_data

M = TypeVar("M", bound=message.Message)

_STRING: Final = descriptor_pb2.FieldDescriptorProto.TYPE_STRING
_BYTES: Final = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES


def parse(kind: type[M], data: bytes) -> M:
    """The message in `data`.

    Raises:
        InvalidRequest: `data` is no such message; a field that is not UTF-8 is named, with the byte. Or it would take
            far more memory as a message than it has bytes.
    """
    check_structure(kind.DESCRIPTOR, data)
    return _built(kind, data, data)


def parse_in_place(kind: type[M], data: bytes) -> tuple[M, Blobs]:
    """As `parse`, but where `data` is long, its tensors' data stays there: see `data_of`."""
    short, blobs = without_data(kind.DESCRIPTOR, data)
    return _built(kind, short, data), blobs


def _built(kind: type[M], data: bytes, received: bytes) -> M:
    """The message in `data`. Raises InvalidRequest, which tells of the bytes as they were `received`."""
    try:
        return kind.FromString(data)
    except message.DecodeError:
        pass
    lenient = parse_leniently(kind, received)
    broken = [] if lenient is None else list(_not_utf8(lenient, kind.DESCRIPTOR, ""))
    if not broken:
        broken = [FieldViolation(kind.DESCRIPTOR.name, f"the bytes are no {kind.DESCRIPTOR.full_name} message")]
    raise InvalidRequest(*broken[:MAX_VIOLATIONS])


def parse_leniently(kind: type[message.Message], data: bytes) -> Any:
    """`data` with every string field as bytes, so that broken UTF-8 can be looked at; None if it cannot be built."""
    hashable: Any = kind  # message classes are, though their declared type says otherwise
    try:
        check_structure(kind.DESCRIPTOR, data)
        return _twin(hashable).FromString(data)
    except (InvalidRequest, message.DecodeError):
        return None


@cache
def _twin(kind: Any) -> Any:
    """The class `kind` in a private copy of its contract, in which every string is bytes."""
    pool = descriptor_pool.DescriptorPool()
    _add(pool, kind.DESCRIPTOR.file, set())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(kind.DESCRIPTOR.full_name))


def _add(pool: descriptor_pool.DescriptorPool, file: Any, added: set[str]) -> None:
    """Adds a file to the pool, after the files that it imports."""
    if file.name in added:
        return
    added.add(file.name)
    for imported in file.dependencies:
        _add(pool, imported, added)
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    del proto.service[:]
    for kind in proto.message_type:
        for field in kind.field:
            if field.type == _STRING:
                field.type = _BYTES
    pool.Add(proto)


def _not_utf8(twin: message.Message, kind: Any, path: str) -> Iterator[FieldViolation]:
    """The fields of `twin` that are strings in the descriptor `kind` (each runtime has its own class) and no UTF-8."""
    for field, value in twin.ListFields():
        declared = kind.fields_by_name[field.name]
        values = list(value) if field.is_repeated else [value]
        for index, item in enumerate(values):
            where = f"{path}{field.name}[{index}]" if field.is_repeated else f"{path}{field.name}"
            if declared.message_type is not None:
                yield from _not_utf8(item, declared.message_type, f"{where}.")
            elif declared.type == _STRING:
                yield from _broken(where, item)


def _broken(where: str, item: bytes) -> Iterator[FieldViolation]:
    try:
        item.decode()
    except UnicodeDecodeError as error:
        yield FieldViolation(where, f"not UTF-8: byte {error.start} is 0x{item[error.start]:02x}")
