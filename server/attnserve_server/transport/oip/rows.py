"""The rows of a batch as native sequences: cut where a mask hides the rest, and errors with the protocol's fields."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from attnserve.v1 import inference_service_pb2, tensor_pb2

from attnserve_server.domain.errors import FieldViolation, InvalidRequest, Violations
from attnserve_server.domain.values import Array
from attnserve_server.transport.oip.layout import BF16, Input, Layout
from attnserve_server.transport.oip.wanted import Given, Wanted
from attnserve_server.transport.wire import Received

SMALL_BYTES: Final = 65_536
"""Tensors of requests up to this size are copied into the native message, which is faster than views of them."""


def lengths_of(inputs: Sequence[Given], layout: Layout) -> dict[str, int]:
    """Return the lengths of axes as the tensors have them."""
    found: dict[str, int] = {}
    for given in inputs:
        known = layout.inputs.get(given.name)
        if known is not None and len(known.spec.shape) == len(given.shape) - 1:
            for symbol, length in zip(known.spec.shape, given.shape[1:], strict=True):
                if isinstance(symbol, str):
                    found[symbol] = max(length, found.get(symbol, 0))
    return layout.manifest.with_derived(found) if found else found


def cuts_of(inputs: Sequence[Given], layout: Layout) -> dict[str, Array]:
    """Return the length of each row along the axes whose masks hide the ends of rows.

    A row that its mask hides wholly stays as it is, and so does what a mask hides before the end of a row.
    """
    if any(given.name not in layout.inputs and given.name not in layout.texts for given in inputs):
        return {}  # a past, after which masks count from its start; or an unknown name, which is refused later
    cuts: dict[str, Array] = {}
    for given in inputs:
        known = layout.inputs.get(given.name)
        if known is None or not known.mask or len(given.shape) != 2:
            continue
        marks = np.frombuffer(given.data, known.dtype)
        if (not marks.any()) if known.spec.inverted else marks.all():
            continue
        shown = (marks == 0 if known.spec.inverted else marks != 0).reshape(given.shape)
        lengths = given.shape[1] - np.argmax(shown[:, ::-1], axis=1)
        axis = str(known.spec.shape[0])
        cuts[axis] = np.maximum(cuts[axis], lengths) if axis in cuts else lengths
    return cuts


class Rows:
    """Adds the rows of one request to its native form."""

    def __init__(self, wanted: Wanted, layout: Layout, message: inference_service_pb2.InferRequest) -> None:
        self._asked = wanted
        self._layout = layout
        self._message = message
        self._views: list[memoryview] = []
        self._copies = wanted.size <= SMALL_BYTES

    def add(
        self, rows: int, cuts: Mapping[str, Array], violations: Violations
    ) -> Received[inference_service_pb2.InferRequest]:
        """Add all rows, and return the request. `cuts`: the length of each row along an axis."""
        layout = self._layout
        texts = [(layout.texts[one.name], one.texts) for one in self._asked.inputs if one.name in layout.texts]
        tensors = [
            (one, _row_of(one, layout.inputs.get(one.name), cuts))
            for one in self._asked.inputs
            if one.name not in layout.texts
        ]
        for row in range(rows):
            sequence = self._message.sequences.add()
            if not texts:
                into = sequence.tensors.tensors
            else:
                into = sequence.text.tensors
                self._add_texts(sequence.text, texts, row, violations)
            for given, row_of in tensors:
                self._add_tensor(into, given, *row_of(row))
        return Received(self._message, self._asked.size, self._views)

    def _add_texts(
        self,
        into: inference_service_pb2.TextInput,
        texts: Sequence[tuple[str, Sequence[bytes]]],
        row: int,
        violations: Violations,
    ) -> None:
        for name, given in texts:
            try:
                setattr(into, name, bytes(given[row]).decode())
            except UnicodeDecodeError as error:
                violations.add(f"inputs.{name}", f"row {row} is not UTF-8: byte {error.start}")

    def _add_tensor(self, into: Any, given: Given, shape: Sequence[int], data: bytes | memoryview) -> None:
        known = self._layout.inputs.get(given.name)
        wire: Any = known.wire if known is not None else _WIRE.get(given.datatype, 0)
        if self._copies:
            held = bytes(data)
        else:
            held = len(self._views).to_bytes(4, "little")
            self._views.append(memoryview(data))
        into.append(tensor_pb2.Tensor(name=given.name, dtype=wire, shape=shape, data=held))


RowOf = Callable[[int], tuple[Sequence[int], "bytes | memoryview"]]


def _row_of(given: Given, known: Input | None, cuts: Mapping[str, Array]) -> RowOf:
    """Return a function that returns the shape and the bytes of one row, without its padding."""
    shape, data = given.shape[1:], given.data
    if given.datatype == BF16:
        wide = np.frombuffer(data, "<u2").astype("<u4") << 16
        data = memoryview(wide.view(np.uint8))  # type: ignore[arg-type] # numpy's stubs omit that it is a buffer
    axes = [(at, cuts[str(one)]) for at, one in enumerate(known.spec.shape) if one in cuts] if known is not None else []
    size = len(data) // given.shape[0]
    if not axes:
        if given.shape[0] == 1:
            return lambda _: (shape, data)
        return lambda row: (shape, data[row * size : (row + 1) * size])
    array = np.frombuffer(data, f"V{size // math.prod(shape)}").reshape(given.shape)

    def cut(row: int) -> tuple[Sequence[int], bytes]:
        part: list[Any] = [row, *[slice(None)] * len(shape)]
        for at, lengths in axes:
            part[at + 1] = slice(int(lengths[row]))
        kept = array[tuple(part)]
        return kept.shape, kept.tobytes()

    return cut


_WIRE: Final = {
    "BOOL": tensor_pb2.DATA_TYPE_BOOL, "UINT8": tensor_pb2.DATA_TYPE_UINT8, "INT8": tensor_pb2.DATA_TYPE_INT8,
    "INT32": tensor_pb2.DATA_TYPE_INT32, "INT64": tensor_pb2.DATA_TYPE_INT64, "FP16": tensor_pb2.DATA_TYPE_FLOAT16,
    "FP32": tensor_pb2.DATA_TYPE_FLOAT32, "FP64": tensor_pb2.DATA_TYPE_FLOAT64,
}  # fmt: skip
_PATH: Final = re.compile(r"sequences\[(\d+)\](?:\.(?:text|tensors)\.tensors\[(\d+)\])?(.*)")


def in_protocol(error: InvalidRequest, wanted: Wanted, layout: Layout) -> InvalidRequest:
    """Return an error of the native form of a request with the fields of the protocol: inputs first, then rows."""
    tensors = [at for at, given in enumerate(wanted.inputs) if given.name not in layout.texts]
    texts = {layout.texts[given.name]: at for at, given in enumerate(wanted.inputs) if given.name in layout.texts}
    seen: dict[tuple[str, str], FieldViolation] = {}
    for violation in error.violations:
        found = _PATH.fullmatch(violation.field)
        if found is None:
            seen[violation.field, violation.description] = violation
            continue
        row, tensor, rest = found.groups()
        if tensor is not None and int(tensor) < len(tensors):
            axis = re.fullmatch(r"\.shape\[(\d+)\]", rest)
            rest = f".shape[{int(axis[1]) + 1}]" if axis else rest.replace(".data", "")
            place = f"inputs[{tensors[int(tensor)]}]{rest}"
        else:
            place = next((f"inputs[{at}]" for name, at in texts.items() if rest == f".text.{name}"), "inputs")
        known = seen.get((place, violation.description))
        if known is None:  # what is wrong with every row is reported once
            seen[place, violation.description] = FieldViolation(place, f"row {row}: {violation.description}")
    return InvalidRequest(*seen.values())
