"""One sequence's inputs: wire tensors or text to checked arrays. Checks of the request as a whole are in validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from attnserve.v1 import inference_service_pb2, tensor_pb2

from attnserve_server.domain.errors import TextUnavailable
from attnserve_server.domain.values import Array, AxisUnits
from attnserve_server.model.manifest import NUMPY_DTYPES, InputRole, InputSpec, Manifest
from attnserve_server.model.tokenizer import TextTokenizer
from attnserve_server.transport.codec import DTYPE_NAMES, array_of
from attnserve_server.transport.violations import Violations, shown

MAX_RANK: Final = 8
MAX_ELEMENTS: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Intake:
    """What one model accepts, laid out once for checking every request against."""

    manifest: Manifest
    tokenizer: TextTokenizer | None
    inputs: Mapping[str, InputSpec]
    max_lengths: Mapping[str, int]
    outputs: tuple[str, ...]
    output_shapes: Mapping[str, tuple[tuple[int | str, ...], int]]
    """By output: its extents and the bytes of one element."""
    max_batch_size: int
    max_text_bytes: int
    max_response_bytes: int

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        tokenizer: TextTokenizer | None,
        *,
        max_batch_size: int,
        max_text_bytes: int,
        max_response_bytes: int,
    ) -> Intake:
        """The intake of one loaded model."""
        return cls(
            manifest=manifest,
            tokenizer=tokenizer,
            inputs={spec.name: spec for spec in manifest.inputs},
            max_lengths={axis.symbol: axis.max_length for axis in manifest.axes},
            outputs=tuple(spec.name for spec in manifest.outputs),
            output_shapes={spec.name: (spec.shape, NUMPY_DTYPES[spec.dtype].itemsize) for spec in manifest.outputs},
            max_batch_size=max_batch_size,
            max_text_bytes=max_text_bytes,
            max_response_bytes=max_response_bytes,
        )

    @property
    def max_tokens(self) -> int:
        """Most tokens that one text may have."""
        text = self.manifest.text
        return min(text.max_tokens, self.max_lengths[text.axis]) if text else 0


@dataclass(frozen=True, slots=True)
class Inputs:
    """One sequence's model inputs, the lengths of its axes, and the units of its token axis where they are known."""

    tensors: dict[str, Array]
    lengths: dict[str, int]
    units: AxisUnits | None = None


def inputs_of(
    sequence: inference_service_pb2.Sequence, intake: Intake, path: str, violations: Violations
) -> Inputs | None:
    """One sequence's inputs, or None if anything was wrong and has been noted.

    Raises:
        TextUnavailable: It is text, and the model has no tokenizer.
    """
    kind = sequence.WhichOneof("input")
    if kind == "text":
        return _from_text(sequence.text, intake, f"{path}.text", violations)
    if kind == "tensors":
        return _from_tensors(sequence.tensors.tensors, intake, f"{path}.tensors.tensors", violations)
    violations.add(path, "neither text nor tensors is set")
    return None


def _from_text(
    message: inference_service_pb2.TextInput, intake: Intake, path: str, violations: Violations
) -> Inputs | None:
    spec = intake.manifest.text
    if intake.tokenizer is None or spec is None:
        raise TextUnavailable(intake.manifest.name)
    if not _check_text(message, intake, path, violations):
        return None
    before = len(violations)
    encoded = intake.tokenizer.encode(message.text, message.text_pair, limit=intake.max_tokens)
    count = len(encoded.ids)
    if not 1 <= count <= intake.max_tokens:
        limit = f"exceed {intake.max_tokens}" if count else "are less than 1"
        violations.add(f"{path}.text", f"{count} tokens {limit}")
        return None
    lengths = {**intake.manifest.fixed_lengths, spec.axis: count}
    tensors: dict[str, Array] = {}
    made = {InputRole.TOKEN_IDS: encoded.ids, InputRole.TOKEN_TYPE_IDS: encoded.type_ids}
    for wanted in intake.manifest.inputs:
        if wanted.role in made:
            tensors[wanted.name] = np.ascontiguousarray(made[wanted.role], NUMPY_DTYPES[wanted.dtype])
        elif wanted.role is InputRole.ATTENTION_MASK:
            tensors[wanted.name] = np.ones(count, NUMPY_DTYPES[wanted.dtype])
    _check_ids(intake, tensors, path, violations)
    if not _fill(tensors, lengths, intake, path, violations) or len(violations) > before:
        return None
    return Inputs(tensors, lengths, encoded.units)


def _check_text(message: inference_service_pb2.TextInput, intake: Intake, path: str, violations: Violations) -> bool:
    """Checks what can be seen without tokenizing: the cost of a refusal must not grow with the text."""
    before = len(violations)
    if not message.text:
        violations.add(f"{path}.text", "empty: at least 1 character is needed")
    for field, value in (("text", message.text), ("text_pair", message.text_pair)):
        size = len(value.encode())
        if size > intake.max_text_bytes:
            violations.add(f"{path}.{field}", f"{size} bytes exceed {intake.max_text_bytes}")
    return len(violations) == before


def _check_ids(intake: Intake, tensors: Mapping[str, Array], path: str, violations: Violations) -> None:
    """A bundle whose tokenizer knows more tokens than its model must not fail a whole batch."""
    spec = intake.manifest.input_of_role(InputRole.TOKEN_IDS)
    if spec is not None:
        _check_values(tensors[spec.name], spec, intake, f"{path}.text", violations)


def _from_tensors(
    messages: Iterable[tensor_pb2.Tensor], intake: Intake, path: str, violations: Violations
) -> Inputs | None:
    before = len(violations)
    tensors: dict[str, Array] = {}
    lengths = intake.manifest.fixed_lengths
    seen: set[str] = set()
    for index, message in enumerate(messages):
        if violations.full:
            break
        where = f"{path}[{index}]"
        spec = intake.inputs.get(message.name)
        if spec is None:
            violations.add(
                f"{where}.name", f"no input {shown(message.name)}; the model takes {', '.join(intake.inputs)}"
            )
        elif spec.name in seen:
            violations.add(f"{where}.name", f"input {spec.name!r} is given twice")
        else:
            seen.add(spec.name)
            array = _array(message, spec, intake, where, lengths, violations)
            if array is not None:
                tensors[spec.name] = array
    for name, spec in intake.inputs.items():
        if name not in seen and spec.fill is None:
            violations.add(path, f"input {name!r} is missing")
    if len(violations) > before or not _fill(tensors, lengths, intake, path, violations):
        return None
    return Inputs(tensors, lengths)


def _array(
    message: tensor_pb2.Tensor,
    spec: InputSpec,
    intake: Intake,
    path: str,
    lengths: dict[str, int],
    violations: Violations,
) -> Array | None:
    """A read-only view of the tensor's data, or None if anything was wrong."""
    before = len(violations)
    dtype = DTYPE_NAMES.get(message.dtype)
    if dtype != spec.dtype:
        violations.add(f"{path}.dtype", f"{dtype or message.dtype}, but input {spec.name!r} is {spec.dtype}")
    shape = _shape(message, spec, intake, path, lengths, violations)
    if shape is None or len(violations) > before:
        return None
    data = message.data
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
    _check_values(array, spec, intake, f"{path}.data", violations)
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


def _extent_fault(length: int, extent: int | str, intake: Intake, lengths: dict[str, int]) -> str:
    """What is wrong with one axis's length, or nothing; notes the length of a symbol that is met first."""
    if isinstance(extent, int):
        return "" if length == extent else f"length {length}, but the model takes {extent}"
    if length > intake.max_lengths[extent]:
        return f"length {length} exceeds {intake.max_lengths[extent]} of axis {extent!r}"
    known = lengths.setdefault(extent, length)
    return "" if known == length else f"length {length} of axis {extent!r} differs from {known} of an input before it"


def _check_values(array: Array, spec: InputSpec, intake: Intake, path: str, violations: Violations) -> None:
    """Values that would poison a batch: ids outside the vocabulary, marks that are no 0 or 1, NaN and infinity."""
    if array.dtype.kind == "f":
        finite = np.isfinite(array)
        if not finite.all():
            at = int(np.argmin(finite))
            violations.add(path, f"element {at} is {array.flat[at]}; floats must be finite")
        return
    if array.dtype.kind == "b":
        return
    limit = {
        InputRole.TOKEN_IDS: intake.manifest.vocabulary_size or np.iinfo(array.dtype).max,
        InputRole.ATTENTION_MASK: 2,
        InputRole.TOKEN_TYPE_IDS: 2,
    }.get(spec.role)
    if limit is not None and (array.min() < 0 or array.max() >= limit):
        at = int(np.argmax((array < 0) | (array >= limit)))
        violations.add(path, f"element {at} is {array.flat[at]}; input {spec.name!r} runs from 0 to {limit - 1}")


def _fill(
    tensors: dict[str, Array], lengths: Mapping[str, int], intake: Intake, path: str, violations: Violations
) -> bool:
    """Fills inputs that were left out with the value that the manifest gives; whether all are there now."""
    before = len(violations)
    for name, spec in intake.inputs.items():
        if name in tensors:
            continue
        unknown = [extent for extent in spec.shape if isinstance(extent, str) and extent not in lengths]
        if spec.fill is None:
            violations.add(path, f"input {name!r} cannot be made from text: send tensors")
        elif unknown:
            violations.add(path, f"input {name!r} is missing, and nothing else tells the length of axis {unknown[0]!r}")
        else:
            shape = [lengths[extent] if isinstance(extent, str) else extent for extent in spec.shape]
            tensors[name] = np.full(shape, spec.fill, NUMPY_DTYPES[spec.dtype])
    return len(violations) == before
