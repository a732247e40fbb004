"""Wire tensors to checked arrays: name, type, shape, size and values. Which inputs there must be is not said here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import repeat
from typing import Final

import numpy as np
from attnserve.v1 import tensor_pb2

from attnserve_server.domain.errors import Violations, quoted
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import NUMPY_DTYPES, InputSpec
from attnserve_server.transport.codec import DTYPE_NAMES, array_of
from attnserve_server.transport.intake import Intake, check_values
from attnserve_server.transport.structure import Blobs, data_of

MAX_RANK: Final = 8
MAX_ELEMENTS: Final = 2**63 - 1


def read_tensors(
    messages: Iterable[tensor_pb2.Tensor],
    intake: Intake,
    path: str,
    lengths: dict[str, int],
    violations: Violations,
    blobs: Blobs = (),
) -> tuple[dict[str, Array], set[str]]:
    """The arrays of tensors that are right, by input, and the inputs that were sent at all.

    Args:
        messages: the tensors, in any order.
        intake: of the model.
        path: of the field that holds them.
        lengths: of axes that are known; the lengths that the tensors tell are noted in it.
        violations: where all faults are noted.
        blobs: the data, where the messages hold places in it.
    """
    tensors: dict[str, Array] = {}
    seen: set[str] = set()
    for index, message in enumerate(messages):
        if violations.full:
            break
        where = f"{path}[{index}]"
        spec = intake.inputs.get(message.name)
        if spec is None:
            violations.add(
                f"{where}.name", f"no input {quoted(message.name)}; the model takes {', '.join(intake.inputs)}"
            )
        elif spec.name in seen:
            violations.add(f"{where}.name", f"input {spec.name!r} is given twice")
        else:
            seen.add(spec.name)
            array = _array(message, data_of(message, blobs), spec, intake, where, lengths, violations)
            if array is not None:
                tensors[spec.name] = array
    return tensors, seen


def _array(
    message: tensor_pb2.Tensor,
    data: bytes | memoryview,
    spec: InputSpec,
    intake: Intake,
    path: str,
    lengths: dict[str, int],
    violations: Violations,
) -> Array | None:
    """A read-only view of the tensor's `data`, which may lie at any address, or None if anything was wrong."""
    before = len(violations)
    dtype = DTYPE_NAMES.get(message.dtype)
    if dtype != spec.dtype:
        violations.add(f"{path}.dtype", f"{dtype or message.dtype}, but input {spec.name!r} is {spec.dtype}")
    shape: tuple[int, ...] | None = tuple(message.shape) if len(message.shape) == len(spec.shape) else None
    if shape is None or not all(map(_fits, shape, spec.shape, repeat(intake.max_lengths), repeat(lengths))):
        shape = _shape(message, spec, intake, path, lengths, violations)  # which says what is wrong with it
    if shape is None or len(violations) > before:
        return None
    wanted_bytes = math.prod(shape) * NUMPY_DTYPES[spec.dtype].itemsize
    if len(data) != wanted_bytes:
        violations.add(f"{path}.data", f"{len(data)} bytes; shape {list(shape)} of {spec.dtype} needs {wanted_bytes}")
        return None
    if spec.dtype == "bool":
        raw = np.frombuffer(data, np.uint8)
        if raw.max() > 1:
            at = int(np.argmax(raw > 1))
            violations.add(f"{path}.data", f"element {at} is byte {raw[at]}; a bool is 0 or 1")
            return None
    array = array_of(data, spec.dtype, shape)
    check_values(array, spec, intake, f"{path}.data", violations)
    return array if len(violations) == before else None


def _shape(
    message: tensor_pb2.Tensor,
    spec: InputSpec,
    intake: Intake,
    path: str,
    lengths: dict[str, int],
    violations: Violations,
) -> tuple[int, ...] | None:
    """The shape, or None if anything was wrong; nothing is allocated, and products are Python's, without overflow."""
    rank = len(message.shape)
    if rank > MAX_RANK:
        violations.add(f"{path}.shape", f"rank {rank} exceeds {MAX_RANK}")
        return None
    shape = tuple(message.shape)
    before = len(violations)
    for axis, length in enumerate(shape):
        if length < 1:
            violations.add(f"{path}.shape[{axis}]", f"length {length} is less than 1")
    if len(violations) > before:
        return None
    if (elements := math.prod(shape)) > MAX_ELEMENTS:
        violations.add(f"{path}.shape", f"{elements} elements exceed {MAX_ELEMENTS}")
        return None
    if rank != len(spec.shape):
        extents = ", ".join(str(extent) for extent in spec.shape)
        violations.add(
            f"{path}.shape",
            f"rank {rank}, but input {spec.name!r} has rank {len(spec.shape)} without batch: [{extents}]",
        )
        return None
    for axis, (length, extent) in enumerate(zip(shape, spec.shape, strict=True)):
        fault = _extent_fault(length, extent, intake, lengths)
        if fault:
            violations.add(f"{path}.shape[{axis}]", fault)
    return shape if len(violations) == before else None


def _fits(length: int, extent: int | str, max_lengths: Mapping[str, int], lengths: dict[str, int]) -> bool:
    """Whether one axis's length is right; notes the length of a symbol that is met first."""
    if isinstance(extent, int):
        return 0 < length == extent
    return 0 < length <= max_lengths[extent] and lengths.setdefault(extent, length) == length


def _extent_fault(length: int, extent: int | str, intake: Intake, lengths: dict[str, int]) -> str:
    """What is wrong with one axis's length, or nothing; notes the length of a symbol that is met first."""
    if isinstance(extent, int):
        return "" if length == extent else f"length {length}, but the model takes {extent}"
    if length > intake.max_lengths[extent]:
        return f"length {length} exceeds {intake.max_lengths[extent]} of axis {extent!r}"
    known = lengths.setdefault(extent, length)
    return "" if known == length else f"length {length} of axis {extent!r} differs from {known} of an input before it"
