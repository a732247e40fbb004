"""Reads the usual request in one pass: tensors, outputs, no selection of attention. Any other is left to `validation`.

What is valid here is valid there, with the same result, which a test compares on random requests. What is not plainly
valid here is read again there, where every violation is described; so this module refuses nothing and explains nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from attnserve.v1 import inference_service_pb2, tensor_pb2

from attnserve_server.domain.values import Array, PreparedSequence, Priority
from attnserve_server.model.manifest import NUMPY_DTYPES, InputRole, InputSpec
from attnserve_server.transport.codec import PRIORITIES
from attnserve_server.transport.intake import Intake, fits
from attnserve_server.transport.validation import ValidRequest
from attnserve_server.transport.wire import WIRE_DTYPES, WIRE_NUMPY, Received

Given = tuple[str, int, tuple[int, ...], bytes | memoryview]
"""A tensor of a batch: its name, its dtype on the wire, its shape with the batch first, and its data."""


@dataclass(frozen=True, slots=True)
class _Input:
    """One input, laid out for one comparison of each property."""

    wire: int
    """Its dtype on the wire."""
    dtype: np.dtype[Any]
    """Its dtype as the wire has it, little-endian."""
    extents: tuple[int | str, ...]
    unsigned: np.dtype[Any] | None
    """Integers are compared as unsigned numbers of this dtype, because negative ones are then large; None: floats."""
    limit: int | None
    """The least integer that is too large; None where any will do."""

    @classmethod
    def of(cls, spec: InputSpec, limit: int | None) -> _Input:
        """Lay out one input."""
        dtype = WIRE_NUMPY[spec.dtype]
        unsigned = None if dtype.kind == "f" else np.dtype(f"<u{dtype.itemsize}")
        return cls(WIRE_DTYPES[spec.dtype], dtype, spec.shape, unsigned, limit)


class QuickReader:
    """Reads requests to one model. Immutable."""

    def __init__(self, intake: Intake) -> None:
        """Lay out one model."""
        self._intake = intake
        self._inputs = {name: _Input.of(spec, intake.limits[name]) for name, spec in intake.inputs.items()}
        self._optional = [
            (name, intake.constants[name], str(spec.shape[0]))
            for name, spec in intake.inputs.items()
            if name in intake.constants
        ]
        self._masks = tuple((check.need.input, check) for check in intake.masks)

    @classmethod
    def of(cls, intake: Intake) -> QuickReader | None:
        """Return the reader of a model; None for one whose inputs depend on each other, or have special rules."""
        ruled = any(
            spec.role is InputRole.POSITION_IDS
            or spec.counted
            or spec.index_ranges
            or NUMPY_DTYPES[spec.dtype].kind == "b"
            for spec in intake.inputs.values()
        )
        depends = intake.derived or intake.formulas or intake.continuing is not None or intake.manifest.head is not None
        return None if ruled or depends else cls(intake)

    def read(self, received: Received[inference_service_pb2.InferRequest]) -> ValidRequest | None:
        """Return a request that is plainly valid; None if `validation` must read it."""
        message, intake = received.message, self._intake
        priority = PRIORITIES.get(message.priority)
        sequences, count = message.sequences, len(message.sequences)
        outputs = intake.outputs
        if message.HasField("outputs"):
            outputs = self._chosen(message.outputs.names)
        unusual = message.HasField("attention") or message.HasField("labels") or message.HasField("prompt_name")
        if unusual or priority is None or not outputs or not 1 <= count <= intake.max_batch_size:
            return None
        read: list[PreparedSequence] = []
        total = 0
        for sequence in sequences:
            if sequence.WhichOneof("input") != "tensors" or sequence.past_tokens:
                return None
            one = self._sequence(sequence.tensors.tensors, received, outputs, alone=count == 1)
            if one is None:
                return None
            total += one.response_bytes
            read.append(one)
        return None if total > intake.max_response_bytes else ValidRequest(tuple(read), outputs, None, priority, total)

    def rows(self, given: Sequence[Given], names: Sequence[str] = ()) -> ValidRequest | None:
        """Return a batch of plainly valid rows of equal lengths, as `read` would return one sequence for each.

        Args:
            given: one or more tensors.
            names: of the outputs; empty: all.
        """
        intake, count = self._intake, given[0][2][0]
        outputs = self._chosen(names) if names else intake.outputs
        if not outputs or not 1 <= count <= intake.max_batch_size:
            return None
        lengths = dict(intake.fixed_lengths)
        whole: dict[str, Array] = {}
        for name, wire, shape, data in given:
            known = self._inputs.get(name)
            if known is None or name in whole or wire != known.wire or shape[0] != count:
                return None
            array = _array(shape[1:], known, data, intake, lengths, count)
            if array is None:
                return None
            whole[name] = array
        read: list[PreparedSequence] = []
        total = 0
        for row in range(count):
            tensors = whole if count == 1 else {name: array[row] for name, array in whole.items()}
            one = self._prepared(tensors, lengths if count == 1 else dict(lengths), outputs, alone=count == 1)
            if one is None:
                return None
            total += one.response_bytes
            read.append(one)
        if total > intake.max_response_bytes:
            return None
        return ValidRequest(tuple(read), outputs, None, Priority.NORMAL, total)

    def _chosen(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the outputs of these names; nothing if one is unknown or repeated."""
        chosen = tuple(names)
        known = self._intake.output_sizes
        return chosen if len(set(chosen)) == len(chosen) and all(name in known for name in chosen) else ()

    def _sequence(
        self,
        messages: Iterable[tensor_pb2.Tensor],
        received: Received[inference_service_pb2.InferRequest],
        outputs: tuple[str, ...],
        *,
        alone: bool,
    ) -> PreparedSequence | None:
        intake = self._intake
        lengths = dict(intake.fixed_lengths)
        tensors: dict[str, Array] = {}
        for message in messages:
            name = message.name
            known = self._inputs.get(name)
            if known is None or name in tensors or message.dtype != known.wire:
                return None
            array = _array(message.shape, known, received.data_of(message), intake, lengths)
            if array is None:
                return None
            tensors[name] = array
        return self._prepared(tensors, lengths, outputs, alone=alone)

    def _prepared(
        self, tensors: dict[str, Array], lengths: dict[str, int], outputs: tuple[str, ...], *, alone: bool
    ) -> PreparedSequence | None:
        """Return a sequence of valid tensors, with those that may be left out; None if another one is missing."""
        for name, constant, axis in self._optional:
            if name not in tensors and axis in lengths:
                tensors[name] = constant[: lengths[axis]]
        if len(tensors) < len(self._inputs):
            return None
        size = sum([self._intake.output_sizes[name].bytes(lengths) for name in outputs])
        unpadded = not all(check.passes(tensors[name]) for name, check in self._masks)
        return PreparedSequence(
            tensors, lengths, outputs, response_bytes=size, is_whole_request=alone, unpadded=unpadded
        )


def _array(
    shape: Sequence[int], known: _Input, data: bytes | memoryview, intake: Intake, lengths: dict[str, int],
    rows: int = 1,
) -> Array | None:  # fmt: skip
    """Return a read-only view of a tensor's data, which may be unaligned; None if it is not plainly valid.

    `rows`: that many tensors of this shape, one after another; more than one become the first axis of the view.
    """
    extents = known.extents
    if len(shape) != len(extents):
        return None
    size = known.dtype.itemsize * rows
    for length, extent in zip(shape, extents, strict=True):
        if not fits(length, extent, intake.max_lengths, lengths):
            return None
        size *= length
    if len(data) != size:
        return None
    array: Array = np.frombuffer(data, known.dtype)
    if known.unsigned is None:
        if not np.isfinite(array).all():
            return None
    elif known.limit is not None and array.view(known.unsigned).max() >= known.limit:
        return None
    whole = (rows, *shape) if rows > 1 else tuple(shape)
    return array if len(whole) == 1 else array.reshape(whole)
