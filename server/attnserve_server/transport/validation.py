"""Checks a whole request before it may wait for a run, and reports all of its violations together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from attnserve.v1 import inference_service_pb2

from attnserve_server.attention import check_units, continued_units, pooled_units, predicted_bytes, resolve
from attnserve_server.domain.errors import (
    AttentionUnavailable,
    InvalidRequest,
    ResponseTooLarge,
    Violations,
    quoted,
)
from attnserve_server.domain.values import (
    AttentionUnit,
    AxisUnits,
    EffectiveSelection,
    LabelSelection,
    PreparedSequence,
    Priority,
)
from attnserve_server.model.manifest import (
    NUMPY_DTYPES,
    AxisSpec,
    InputRole,
    Manifest,
    is_model_name,
    is_model_version,
)
from attnserve_server.transport import labels
from attnserve_server.transport.codec import priority_of, selection_of
from attnserve_server.transport.inputs import InputReader, Inputs
from attnserve_server.transport.intake import Intake
from attnserve_server.transport.past import ContinuedReader, check_continued
from attnserve_server.transport.wire import Received

MAX_REQUEST_ID: Final = 128
_REQUEST_ID: Final = re.compile(r"[\x20-\x7e]{1,128}")


@dataclass(slots=True)
class ValidRequest:
    """A request that may run. Not changed once made."""

    sequences: tuple[PreparedSequence, ...]
    outputs: tuple[str, ...]
    effective: EffectiveSelection | None
    priority: Priority
    predicted_bytes: int
    """Tensor data in the response; with `min_weight` at most this."""


def is_request_id(request_id: str) -> bool:
    """Return whether an id is 1 to 128 printable ASCII characters, so that it may be echoed and logged."""
    return _REQUEST_ID.fullmatch(request_id) is not None


def check_request_id(request_id: str) -> None:
    """Raise InvalidRequest for a request id that may not be echoed."""
    if not is_request_id(request_id):
        count = len(request_id)
        wrong = f"{count} characters exceed {MAX_REQUEST_ID}" if count > MAX_REQUEST_ID else "not printable ASCII"
        raise InvalidRequest.of("request_id", f"{wrong}: {quoted(request_id)}")


def check_model_reference(model: str, version: str) -> None:
    """Raise InvalidRequest if no model can have this name or version. Looks nothing up."""
    violations = Violations()
    if not model:
        violations.add("model", "empty: a model's name is needed")
    elif not is_model_name(model):
        violations.add("model", f"{quoted(model)} is no model name: 1 to 128 of A-Z a-z 0-9 . _ -")
    if version and not is_model_version(version):
        violations.add("version", f"{quoted(version)} is no positive decimal integer of at most 9 digits")
    violations.raise_any()


def validate(received: Received[inference_service_pb2.InferRequest], intake: Intake) -> ValidRequest:
    """Check a whole request and make it ready for batching. Tokenizes text, and computes nothing else.

    Args:
        received: the request.
        intake: what its model accepts.

    Raises:
        InvalidRequest: With every violation, at most 16.
        TextUnavailable: A sequence is text, and the model has no tokenizer.
        AttentionUnavailable: The model cannot return the selected attention.
        ResponseTooLarge: The response would hold more tensor data than `max_response_bytes`.
    """
    message = received.message
    violations = Violations()
    priority = Priority.NORMAL
    with violations:
        priority = priority_of(message.priority)
    effective = _effective(message, intake, violations)
    outputs = _outputs(message, intake, violations)
    labelled = _labels(message, intake, violations)
    found = _all_inputs(received, intake, violations)
    violations.raise_any()
    if intake.derived:
        _check_derived(found, intake, violations)
        violations.raise_any()
    if intake.continuing is not None:
        check_continued(found, outputs, effective, intake.continuing, violations)
        violations.raise_any()
    sequences: list[PreparedSequence] = []
    fetched = outputs
    if labelled is not None:
        fetched += tuple(name for name in intake.head_outputs if name not in outputs)
    for index, inputs in enumerate(found):
        own = intake.continuing if inputs.past and intake.continuing is not None else intake
        units: dict[str, AxisUnits] = {}
        attention_bytes = label_bytes = 0
        if effective is not None:
            units = _units(effective, inputs, own)
            attention_bytes = _attention_bytes(effective, own, units, index, violations)
        selected = labelled
        if labelled is not None:
            selected = labels.with_texts(labelled, message.sequences[index], own.manifest)
            label_bytes = _label_bytes(selected, inputs, own, units, index, violations)
        sequences.append(
            PreparedSequence(
                tensors=inputs.tensors,
                lengths=inputs.lengths,
                outputs=fetched,
                attention=effective,
                labels=selected,
                units=units,
                response_bytes=_output_bytes(outputs, inputs.lengths, own) + attention_bytes + label_bytes,
                is_whole_request=len(found) == 1,
                unpadded=not all(check.passes(inputs.tensors[check.need.input]) for check in own.masks),
                past=inputs.past,
            )
        )
        if violations.full:
            break
    violations.raise_any()
    total = sum(sequence.response_bytes for sequence in sequences)
    if total > intake.max_response_bytes:
        raise ResponseTooLarge(total, intake.max_response_bytes)
    return ValidRequest(tuple(sequences), outputs, effective, priority, total)


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
        path = f"outputs.names[{index}]"
        if name not in intake.output_sizes:
            violations.add(path, f"no output {quoted(name)}; the model has {', '.join(intake.output_sizes)}")
        elif name in seen:
            violations.add(path, f"output {name!r} is selected twice")
        seen.add(name)
    if not names and not message.HasField("attention") and not message.HasField("labels"):
        violations.add("outputs.names", "empty, and no attention or label is selected: the response would be empty")
    return names


def _labels(
    message: inference_service_pb2.InferRequest, intake: Intake, violations: Violations
) -> LabelSelection | None:
    if intake.manifest.head is None and not message.HasField("labels"):
        return None
    with violations:
        return labels.selection_of(message, intake.manifest)
    return None


def _all_inputs(
    received: Received[inference_service_pb2.InferRequest], intake: Intake, violations: Violations
) -> list[Inputs]:
    """Return the inputs of all valid sequences."""
    sequences = received.message.sequences
    count = len(sequences)
    if not 1 <= count <= intake.max_batch_size:
        limit = f"exceed {intake.max_batch_size}" if count else "are less than 1"
        violations.add("sequences", f"{count} sequences {limit}")
        return []
    reader = InputReader(received, intake, violations)
    past, continuing = intake.manifest.past, intake.continuing
    continued = None
    if past is not None and continuing is not None:
        continued = ContinuedReader(received, continuing, past, violations)
    found: list[Inputs] = []
    for index, sequence in enumerate(sequences):
        path = f"sequences[{index}]"
        if continued is not None and continued.takes(sequence):
            inputs = continued.read(sequence, path)
        else:
            if sequence.past_tokens:
                without = f"{len(sequence.past_tokens)} labels for a sequence without a past: leave them out"
                violations.add(f"{path}.past_tokens", without)
            inputs = reader.read(sequence, path)
        if inputs is not None:
            found.append(inputs)
        if violations.full:
            break
    return found


def _check_derived(found: Sequence[Inputs], intake: Intake, violations: Violations) -> None:
    """Check that each sequence is long enough for the model's windows: a shorter one would fail its whole batch."""
    for index, inputs in enumerate(found):
        for axis in intake.derived:
            if axis.derived is None or axis.derived.source not in inputs.lengths:
                continue
            length = inputs.lengths[axis.derived.source]
            if axis.derived.of(length) < 1:
                least = axis.derived.stride - axis.derived.offset
                short = f"length {length} of axis {axis.derived.source!r} is less than {least}"
                violations.add(f"sequences[{index}]", f"{short}, which {axis.symbol!r} needs")


def _units(effective: EffectiveSelection, inputs: Inputs, intake: Intake) -> dict[str, AxisUnits]:
    """Return the units of every axis that a selected map has. Raises AttentionUnavailable."""
    lengths = intake.manifest.with_derived(inputs.lengths) if intake.derived else inputs.lengths
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
            derived = intake.axes[axis].derived
            if axis in intake.formulas:
                units[axis] = AxisUnits(axis=axis, length=lengths[axis])
                continue
            if derived is None:
                units[axis] = axis_units(axis, inputs, intake, words=words)
                continue
            source = units.get(derived.source) or axis_units(derived.source, inputs, intake, words=words)
            if derived.plus:
                units[axis] = continued_units(axis, source, inputs.past, inputs.past_labels)
            else:
                units[axis] = pooled_units(axis, source, derived)
    return units


def axis_units(axis: str, inputs: Inputs, intake: Intake, *, words: bool) -> AxisUnits:
    """Return what the positions along an axis are: tokens, patches of an image, or positions that nothing describes.

    `words`: whether the words of token ids are needed, which takes time; those of text are known anyway.
    """
    if axis in inputs.units:
        return inputs.units[axis]
    text = intake.manifest.text
    ids = intake.manifest.input_of_role(InputRole.TOKEN_IDS, axis)
    if intake.tokenizer and ids and text and axis in text.axes:
        return intake.tokenizer.units_of_ids(inputs.tensors[ids.name], axis, words=words)
    spec = intake.axes[axis]
    if spec.grid is not None:
        return patch_units(spec)
    length = inputs.lengths[axis]
    if text is not None and _holds_no_text(spec, intake.manifest):
        # Without words here, words could not be selected for the other side of cross-attention.
        return AxisUnits(axis=axis, length=length, special=(False,) * length, word_ids=(-1,) * length)
    return AxisUnits(axis=axis, length=length)


def patch_units(spec: AxisSpec) -> AxisUnits:
    """Return the patches of an image, row by row, named by row and column; positions before them count as special."""
    assert spec.grid is not None
    rows, columns = spec.grid
    leading = tuple(f"[{position}]" for position in range(spec.leading))
    patches = tuple(f"r{row} c{column}" for row in range(1, rows + 1) for column in range(1, columns + 1))
    return AxisUnits(
        axis=spec.symbol,
        length=spec.max_length,
        texts=leading + patches,
        special=(True,) * len(leading) + (False,) * len(patches),
        word_ids=(-1,) * spec.max_length,
        grid=spec.grid,
        leading=spec.leading,
    )


def _holds_no_text(spec: AxisSpec, manifest: Manifest) -> bool:
    """Return whether an axis is fixed, or one of features, such as audio frames."""
    return spec.fixed or any(
        spec.symbol in given.shape and np.issubdtype(NUMPY_DTYPES[given.dtype], np.floating)
        for given in manifest.inputs
    )


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


def _label_bytes(
    selection: LabelSelection,
    inputs: Inputs,
    intake: Intake,
    units: dict[str, AxisUnits],
    index: int,
    violations: Violations,
) -> int:
    """Add the units that the head labels to `units`, and return the greatest size of the labels."""
    axis, labelled = intake.labelled_axis, None
    if axis:
        labelled = units[axis] = axis_units(axis, inputs, intake, words=selection.words or axis in units)
        with violations:
            labels.check_words(selection, labelled, index)
    return labels.predicted_bytes(selection, inputs, labelled, intake.manifest, intake.longest_token)


def _output_bytes(outputs: Sequence[str], lengths: Mapping[str, int], intake: Intake) -> int:
    if intake.derived:
        lengths = intake.manifest.with_derived(lengths)
    return sum(intake.output_sizes[name].bytes(lengths) for name in outputs)
