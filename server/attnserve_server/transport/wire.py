"""Protobuf's wire format: read messages without copying their tensor data, and write messages from pieces.

A message is its fields one after another, each a tag and a value; strings, bytes and messages have their length in
between (protobuf.dev, "Encoding"). protobuf's own runtime copies tensor data once for each message around it, and turns
a field of two bytes into dozens in memory. `receive` avoids the copies and bounds the memory, and raises InvalidRequest
for bytes that are no message; `Splice` writes without copies, and so do the heads of tensors, which are kept. Encoding
fails only for an array of a dtype that the contract does not have, with KeyError. What the fields mean is in `codec`.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, repeat
from operator import length_hint
from typing import Any, Final, Generic, TypeVar

import numpy as np
from attnserve.oip import open_inference_pb2
from attnserve.v1 import inference_service_pb2, tensor_pb2
from google.protobuf import descriptor_pb2, message

from attnserve_server.domain.errors import FieldViolation, InvalidRequest, Violations
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import NUMPY_DTYPES
from attnserve_server.transport.fields import DELIMITED, delimiter, fields, varint

M = TypeVar("M", bound=message.Message)
N = TypeVar("N", bound=message.Message)

MAX_STRUCTURE_BYTES: Final = 2**19
"""Most bytes of a message beside text and tensor data: a request of 4,096 sequences has half of that."""
_FIELD_BYTES: Final = 6
"""Bytes that a field counts at least, because the scan takes as long for a short one as for a long one."""
_MAX_TENSORS: Final = 2**13
"""From this many tensors on the message holds their data: a view of each would take more memory than the data."""
_MAX_FIELDS: Final = 10_000
"""Fields of a message that are searched for one field, or for one that is not UTF-8: the search runs in Python."""
_TURN_FIELDS: Final = 256
"""Fields after which a scan in a separate thread lets other threads run: half a millisecond. Otherwise each of them
waits for the interpreter's switch interval, 5 ms, several times in a call."""
_STRING: Final = descriptor_pb2.FieldDescriptorProto.TYPE_STRING
_BYTES: Final = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
_RAW: Final = open_inference_pb2.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
DATA_FIELDS: Final = {
    (tensor_pb2.Tensor.DESCRIPTOR.full_name, tensor_pb2.Tensor.DATA_FIELD_NUMBER),
    (open_inference_pb2.ModelInferRequest.DESCRIPTOR.full_name, _RAW),
}
"""Message and number of each field of tensor data, which is not copied."""


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


class ManyFields(Exception):
    """The scan of a message would take long."""


class NotAMessage(InvalidRequest):
    """The bytes cannot be parsed as a message of the expected type."""


@dataclass(slots=True)
class Received(Generic[M]):
    """A message as it was received, not changed once made.

    Read a tensor's data with `data_of`: the field itself may not hold it.
    """

    message: M
    size: int
    """Bytes on the wire, of the outermost message."""
    _views: Sequence[memoryview] = ()
    """Tensor data in the received bytes, at the index that the field `data` then holds; empty: the fields hold it."""

    def data_of(self, tensor: tensor_pb2.Tensor) -> bytes | memoryview:
        """Return the data of one of the message's tensors, at any address."""
        return self.content(tensor.data)

    def content(self, data: bytes) -> bytes | memoryview:
        """Return the content of a field of `DATA_FIELDS`, at any address; `data`: what the message holds."""
        return self._views[int.from_bytes(data, "little")] if self._views and data else data

    def part(self, inner: N) -> Received[N]:
        """Return `inner`, a message inside this one, as received with it."""
        return Received(inner, self.size, self._views)


def receive(kind: type[M], data: bytes, most: float = math.inf, *, aside: bool = False) -> Received[M]:
    """Parse a message; tensor data of a long one is not copied.

    A message of at most `MAX_STRUCTURE_BYTES` is parsed whole, because copying its data twice takes less time than
    scanning it. `aside`: in a separate thread, which lets others run in between.

    Raises:
        NotAMessage: `data` is no message of this kind.
        InvalidRequest: With each string that is not UTF-8, or the field that exceeds `MAX_STRUCTURE_BYTES`. Also if
            only a part of the message was searched for such strings, because it has more than `_MAX_FIELDS` fields.
        ManyFields: A scan, or the search for a string that is not UTF-8, meets more than `most` and is not `aside`.
    """
    turns = None
    short: bytes = data
    views: Sequence[memoryview] = ()
    if len(data) > MAX_STRUCTURE_BYTES:
        turns = _Turns(most, aside=aside)
        short, views = _Scan(data, turns).without_data(kind.DESCRIPTOR)
    try:
        return Received(kind.FromString(short), len(data), views)
    except message.DecodeError:
        pass
    violations = Violations()
    budget = repeat(None, _MAX_FIELDS)
    violations.extend(_not_utf8(data, 0, len(data), kind.DESCRIPTOR, "", budget, turns or _Turns(most, aside=aside)))
    violations.raise_any()
    name = kind.DESCRIPTOR
    if not length_hint(budget):
        raise InvalidRequest.of(name.name, f"malformed, or a string after the first {_MAX_FIELDS} fields is not UTF-8")
    raise NotAMessage(FieldViolation(name.name, f"the bytes are no {name.full_name} message"))


def find_field(data: bytes, *path: int) -> bytes:
    """Return the content of the field at `path`, numbers from the outside in, without parsing; empty if not there."""
    for number in path:
        found = b""
        for field, wire_type, begin, end in islice(fields(data, 0, len(data)), _MAX_FIELDS):
            if field == number and wire_type == DELIMITED:
                found = data[begin:end]
        data = found
    return data


class _TooMuchStructure(Exception):
    """`MAX_STRUCTURE_BYTES` is exceeded in the field of this path."""


class _Turns:
    """Counts the fields that one thread reads: on the event loop up to `most`, in a thread aside with pauses."""

    __slots__ = ("_aside", "_left")

    def __init__(self, most: float, *, aside: bool) -> None:
        self._aside, self._left = aside, _TURN_FIELDS if aside else most

    def count(self) -> None:
        """Count a field. Raises ManyFields if too many were read."""
        self._left -= 1
        if self._left < 0:
            if not self._aside:
                raise ManyFields
            self._left = _TURN_FIELDS
            time.sleep(0)  # releases the interpreter


class _Scan:
    """One pass over a message: bounds its structure and takes tensor data out of it."""

    def __init__(self, data: bytes, turns: _Turns) -> None:
        self._data, self._count = data, turns.count
        self._view = memoryview(data)
        self._left = MAX_STRUCTURE_BYTES
        self._found: list[memoryview] = []

    def without_data(self, kind: Any) -> tuple[bytes, list[memoryview]]:
        """Return the message with an index in place of each tensor's data, and the data by index.

        Malformed bytes stay malformed. A message of `_MAX_TENSORS` or more comes back as it is, without an index.

        Raises:
            InvalidRequest: There is too much structure.
        """
        try:
            short = b"".join(self._message(0, len(self._data), kind, ""))
        except _TooMuchStructure as field:
            over = f"over {MAX_STRUCTURE_BYTES} of the message's {len(self._data)} bytes are no text or tensor data"
            raise InvalidRequest.of(str(field), over) from None
        return (short, self._found) if len(self._found) < _MAX_TENSORS else (self._data, [])

    def _message(self, begin: int, end: int, kind: Any, path: str) -> list[memoryview | bytes]:
        """Return the pieces that replace data[begin:end], a message of the descriptor `kind`."""
        pieces: list[memoryview | bytes] = []
        at = kept = begin  # scanned, and copied to the pieces, up to here
        for number, wire_type, content, after in fields(self._data, begin, end):
            field = kind.fields_by_number.get(number)
            where = path if field is None else f"{path}{field.name}"
            self._left -= max(content - at, _FIELD_BYTES)
            self._count()
            changed: list[memoryview | bytes] = []
            if wire_type == DELIMITED and field is not None and field.message_type is not None:
                known = len(self._found)
                inner = self._message(content, after, field.message_type, f"{where}.")
                changed = inner if len(self._found) > known else []
            elif wire_type == DELIMITED and (kind.full_name, number) in DATA_FIELDS:
                if len(self._found) < _MAX_TENSORS:
                    changed = [len(self._found).to_bytes(4, "little")]
                    self._found.append(self._view[content:after])
            elif wire_type != DELIMITED or field is None or field.type not in (_STRING, _BYTES):
                self._left -= after - content
            if self._left < 0:
                raise _TooMuchStructure(where.removesuffix(".") or kind.name)
            if changed:
                head = varint(number << 3 | DELIMITED) + varint(sum(map(len, changed)))
                pieces += (self._view[kept:at], head, *changed)
                kept = after
            at = after
        pieces.append(self._view[kept:end])
        return pieces


def _not_utf8(
    data: bytes, begin: int, end: int, kind: Any, path: str, budget: Iterator[None], turns: _Turns
) -> Iterator[FieldViolation]:
    """Yield the strings in data[begin:end], a message of the descriptor `kind`, that are not UTF-8.

    Each field takes one item of `budget`; the search ends when that is used up.
    """
    seen: Counter[int] = Counter()
    for (number, wire_type, content, after), _ in zip(fields(data, begin, end), budget, strict=False):
        turns.count()
        field = kind.fields_by_number.get(number)
        if field is None or wire_type != DELIMITED:
            continue
        where = f"{path}{field.name}[{seen[number]}]" if field.is_repeated else f"{path}{field.name}"
        seen[number] += 1
        if field.message_type is not None:
            yield from _not_utf8(data, content, after, field.message_type, f"{where}.", budget, turns)
        elif field.type == _STRING:
            try:
                data[content:after].decode()
            except UnicodeDecodeError as error:
                yield FieldViolation(where, f"not UTF-8: byte {error.start} is 0x{data[content + error.start]:02x}")


class Splice:
    """The bytes of one message, in pieces that are joined once, at the end. Arrays must not change until `joined`."""

    __slots__ = ("pieces", "size")

    def __init__(self, *fields: bytes) -> None:
        """Begin with fields that are serialized already."""
        # Bytes, and arrays, whose type does not declare that they are buffers.
        self.pieces: list[Any] = list(fields)
        self.size = sum(map(len, fields))

    def add(self, number: int, content: Splice | bytes | Array) -> Splice:
        """Append a length-delimited field: a message, bytes, or the data of a C-contiguous array."""
        if isinstance(content, Splice):
            head = delimiter(number, content.size)
            self.pieces.append(head)
            self.pieces += content.pieces
            self.size += len(head) + content.size
            return self
        size = len(content) if isinstance(content, bytes) else content.nbytes
        return self.append(delimiter(number, size)).append(content)

    def append(self, content: bytes | Array) -> Splice:
        """Append bytes as they are, or the data of a C-contiguous array: whole fields, or a part of one."""
        self.pieces.append(content)
        self.size += len(content) if isinstance(content, bytes) else content.nbytes
        return self

    def joined(self) -> bytes:
        """Return the message's bytes."""
        return b"".join(self.pieces)


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
