"""Everything that is checked before a request may wait for a run: all faults of a request are told together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from attnserve.v1 import inference_service_pb2

from attnserve_server.attention import check_units, pooled_units, predicted_bytes, resolve
from attnserve_server.domain.errors import AttentionUnavailable, InvalidRequest, ResponseTooLarge, Violations, quoted
from attnserve_server.domain.selection import AttentionUnit, EffectiveSelection
from attnserve_server.domain.values import AxisUnits, PreparedSequence, Priority
from attnserve_server.model.manifest import is_model_name, is_model_version
from attnserve_server.transport.codec import priority_of, selection_of
from attnserve_server.transport.inputs import Inputs, Intake, inputs_of
from attnserve_server.transport.structure import Blobs
from attnserve_server.transport.units import axis_units

MAX_REQUEST_ID: Final = 128
_REQUEST_ID: Final = re.compile(r"[\x20-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that may run."""

    sequences: tuple[PreparedSequence, ...]
    outputs: tuple[str, ...]
    effective: EffectiveSelection | None
    priority: Priority
    predicted_bytes: int


def is_request_id(request_id: str) -> bool:
    """Whether `request_id` may be echoed, logged and matched by: 1 to 128 printable ASCII characters."""
    return _REQUEST_ID.fullmatch(request_id) is not None


def check_request_id(request_id: str) -> None:
    """Raises InvalidRequest for a request id that may not be echoed."""
    if not is_request_id(request_id):
        count = len(request_id)
        fault = f"{count} characters exceed {MAX_REQUEST_ID}" if count > MAX_REQUEST_ID else "not printable ASCII"
        raise InvalidRequest.of("request_id", f"{fault}: {quoted(request_id)}")


def check_model_reference(model: str, version: str) -> None:
    """Raises InvalidRequest where `model` or `version` could name none; nothing is looked up or opened by then."""
    violations = Violations()
    if not model:
        violations.add("model", "empty: a model's name is needed")
    elif not is_model_name(model):
        violations.add("model", f"{quoted(model)} is no model name: 1 to 128 of A-Z a-z 0-9 . _ -")
    if version and not is_model_version(version):
        violations.add("version", f"{quoted(version)} is no positive decimal integer of at most 9 digits")
    violations.raise_any()


def prepare(message: inference_service_pb2.InferRequest, intake: Intake, blobs: Blobs = ()) -> PreparedRequest:
    """Checks a whole request and makes it ready for batching. Computes nothing but tokens.

    Args:
        message: the request.
        intake: of the model.
        blobs: its tensors' data, where it was parsed in place.

    Raises:
        InvalidRequest: With every fault found, at most 16.
        TextUnavailable: Text was sent, and the model has no tokenizer.
        AttentionUnavailable: The model cannot give the wanted attention.
        ResponseTooLarge: The answer would hold more tensor data than is allowed.
    """
    violations = Violations()
    priority = Priority.NORMAL
    with violations:
        priority = priority_of(message.priority)
    effective = _effective(message, intake, violations)
    outputs = _outputs(message, intake, violations)
    found = _all_inputs(message.sequences, intake, violations, blobs)
    violations.raise_any()
    if intake.derived:
        _check_derived(found, intake, violations)
        violations.raise_any()
    sequences: list[PreparedSequence] = []
    for index, inputs in enumerate(found):
        units: dict[str, AxisUnits] = {}
        attention_bytes = 0
        if effective is not None:
            units = _units(effective, inputs, intake)
            attention_bytes = _attention_bytes(effective, intake, units, index, violations)
        sequences.append(
            PreparedSequence(
                tensors=inputs.tensors,
                lengths=inputs.lengths,
                outputs=outputs,
                attention=effective,
                units=units,
                response_bytes=_output_bytes(outputs, inputs.lengths, intake) + attention_bytes,
                lone=len(found) == 1,
                unpadded=not all(check.passes(inputs.tensors[check.need.input]) for check in intake.masks),
            )
        )
        if violations.full:
            break
    violations.raise_any()
    total = sum(sequence.response_bytes for sequence in sequences)
    if total > intake.max_response_bytes:
        raise ResponseTooLarge(total, intake.max_response_bytes)
    return PreparedRequest(tuple(sequences), outputs, effective, priority, total)


def _effective(
    message: inference_service_pb2.InferRequest, intake: Intake, violations: Violations
) -> EffectiveSelection | None:
    if not message.HasField("attention"):
        return None
    with violations:
        return resolve(selection_of(message.attention), intake.manifest.sites, intake.manifest.name)
    return None


def _outputs(message: inference_service_pb2.InferRequest, intake: Intake, violations: Violations) -> tuple[str, ...]:
    if not message.HasField("outputs"):
        return intake.outputs
    names = tuple(message.outputs.names)
    seen: set[str] = set()
    for index, name in enumerate(names):
        if violations.full:
            break
        if name not in intake.output_sizes:
            violations.add(
                f"outputs.names[{index}]", f"no output {quoted(name)}; the model gives {', '.join(intake.outputs)}"
            )
        elif name in seen:
            violations.add(f"outputs.names[{index}]", f"output {name!r} is asked for twice")
        seen.add(name)
    if not names and not message.HasField("attention"):
        violations.add("outputs.names", "empty, and no attention is asked for: there is nothing to answer")
    return names


def _all_inputs(
    sequences: Sequence[inference_service_pb2.Sequence], intake: Intake, violations: Violations, blobs: Blobs
) -> list[Inputs]:
    """The inputs of all sequences, without those that were wrong."""
    count = len(sequences)
    if not 1 <= count <= intake.max_batch_size:
        limit = f"exceed {intake.max_batch_size}" if count else "are less than 1"
        violations.add("sequences", f"{count} sequences {limit}")
        return []
    found: list[Inputs] = []
    for index, sequence in enumerate(sequences):
        inputs = inputs_of(sequence, intake, f"sequences[{index}]", violations, blobs)
        if inputs is not None:
            found.append(inputs)
        if violations.full:
            break
    return found


def _check_derived(found: Sequence[Inputs], intake: Intake, violations: Violations) -> None:
    """What is too short for a window of the model would fail a whole batch."""
    for index, inputs in enumerate(found):
        for axis in intake.derived:
            if axis.derived is None or axis.derived.source not in inputs.lengths:
                continue
            length = inputs.lengths[axis.derived.source]
            if axis.derived.of(length) < 1:
                least = axis.derived.stride - axis.derived.offset
                said = f"length {length} of axis {axis.derived.source!r} is less than {least}"
                violations.add(f"sequences[{index}]", f"{said}, which {axis.symbol!r} needs")


def _units(effective: EffectiveSelection, inputs: Inputs, intake: Intake) -> dict[str, AxisUnits]:
    """The units of every axis that a wanted map names."""
    lengths = intake.manifest.with_derived(inputs.lengths)
    units: dict[str, AxisUnits] = {}
    words = effective.unit is AttentionUnit.WORD
    for layer in effective.layers:
        site = intake.manifest.sites[layer]
        for axis in (site.query_axis, site.key_axis):
            if axis in units:
                continue
            if axis not in lengths:
                raise AttentionUnavailable(
                    intake.manifest.name, f"the length of axis {axis!r} of site {site.name!r} is not known before a run"
                )
            derived = intake.manifest.axis(axis).derived
            if derived is None:
                units[axis] = axis_units(axis, inputs, intake, words=words)
            else:
                units[axis] = pooled_units(axis, axis_units(derived.source, inputs, intake, words=words), derived)
    return units


def _attention_bytes(
    effective: EffectiveSelection,
    intake: Intake,
    units: Mapping[str, AxisUnits],
    index: int,
    violations: Violations,
) -> int:
    with violations:
        check_units(effective, intake.manifest.sites, units, intake.manifest.name, index)
        return predicted_bytes(effective, intake.manifest.sites, units)
    return 0


def _output_bytes(outputs: Sequence[str], lengths: Mapping[str, int], intake: Intake) -> int:
    if intake.derived:
        lengths = intake.manifest.with_derived(lengths)
    return sum(intake.output_sizes[name].bytes(lengths) for name in outputs)
