"""One sequence's inputs from text: one text, a pair on one axis, or two texts that each have an axis to themselves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from attnserve.v1 import inference_service_pb2

from attnserve_server.domain.errors import TextUnavailable, Violations
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import NUMPY_DTYPES, InputRole, InputSpec, TextSpec
from attnserve_server.model.tokenizer import TextTokenizer, TokenizedText, TruncationFailed
from attnserve_server.transport.arrays import read_tensors
from attnserve_server.transport.intake import Inputs, Intake, check_values, fill_in
from attnserve_server.transport.structure import Blobs


def from_text(
    message: inference_service_pb2.TextInput, intake: Intake, path: str, violations: Violations, blobs: Blobs = ()
) -> Inputs | None:
    """The inputs, or None if anything was wrong and has been noted.

    Raises:
        TextUnavailable: The model has no tokenizer.
    """
    spec, tokenizer = intake.manifest.text, intake.tokenizer
    if tokenizer is None or spec is None:
        raise TextUnavailable(intake.manifest.name)
    if not _check_text(message, spec, intake, path, violations):
        return None
    before = len(violations)
    try:
        encoded = _encoded(message, spec, tokenizer, intake.max_tokens)
    except TruncationFailed as why:
        violations.add(f"{path}.text", f"too long, and the tokenizer cannot cut it: {why}")
        return None
    field_of = {spec.axis: f"{path}.text", spec.pair_axis: f"{path}.text_pair"}
    for axis, tokens in encoded.items():
        count, most = len(tokens.ids), intake.max_tokens[axis]
        if not 1 <= count <= most:
            limit = f"exceed {most}" if count else "are less than 1"
            violations.add(field_of[axis], f"{count} tokens {limit}")
    if len(violations) > before:
        return None
    lengths = {**intake.manifest.fixed_lengths, **{axis: len(tokens.ids) for axis, tokens in encoded.items()}}
    tensors, sent = read_tensors(message.tensors, intake, f"{path}.tensors", lengths, violations, blobs)
    _add_tokens(tensors, encoded, field_of, intake, violations)
    if not fill_in(tensors, lengths, intake, path, violations, sent) or len(violations) > before:
        return None
    return Inputs(tensors, lengths, {axis: tokens.units for axis, tokens in encoded.items()})


def _add_tokens(
    tensors: dict[str, Array],
    encoded: Mapping[str, TokenizedText],
    field_of: Mapping[str, str],
    intake: Intake,
    violations: Violations,
) -> None:
    """Add the inputs that the texts make. Of those the caller may send none."""
    for wanted in intake.manifest.inputs:
        axis = str(wanted.shape[0]) if len(wanted.shape) == 1 else ""
        made = _made(wanted, encoded[axis], intake) if axis in encoded else None
        if made is None:
            continue
        if wanted.name in tensors:
            violations.add(field_of[axis], f"input {wanted.name!r} is made from the text, and came as a tensor too")
        tensors[wanted.name] = made
        if wanted.role is not InputRole.ATTENTION_MASK:
            # A bundle whose tokenizer knows more tokens, or more segments, than its model must not fail a whole batch.
            check_values(made, wanted, intake, field_of[axis], violations)


def _encoded(
    message: inference_service_pb2.TextInput, spec: TextSpec, tokenizer: TextTokenizer, limits: dict[str, int]
) -> dict[str, TokenizedText]:
    """The tokens along each axis."""
    if not spec.pair_axis:
        return {spec.axis: tokenizer.encode(message.text, message.text_pair, limit=limits[spec.axis])}
    second = tokenizer.encode_second(
        message.text_pair, spec.pair_axis, start=spec.pair_start, limit=limits[spec.pair_axis]
    )
    return {spec.axis: tokenizer.encode(message.text, limit=limits[spec.axis]), spec.pair_axis: second}


def _made(wanted: InputSpec, tokens: TokenizedText, intake: Intake) -> Array | None:
    """What an input along a text's axis holds; None where text does not tell."""
    dtype = NUMPY_DTYPES[wanted.dtype]
    if wanted.role is InputRole.TOKEN_IDS:
        return np.ascontiguousarray(tokens.ids, dtype)
    if wanted.role is InputRole.TOKEN_TYPE_IDS:
        return np.ascontiguousarray(tokens.type_ids, dtype)
    if wanted.role is InputRole.ATTENTION_MASK:
        constant = intake.constants.get(wanted.name)
        if constant is None or wanted.fill != 1 or not tokens.mask.all():
            return np.ascontiguousarray(tokens.mask, dtype)
        return constant[: len(tokens.ids)]
    return None


def _check_text(
    message: inference_service_pb2.TextInput, spec: TextSpec, intake: Intake, path: str, violations: Violations
) -> bool:
    """Checks what can be seen without tokenizing: the cost of a refusal must not grow with the text."""
    before = len(violations)
    if not message.text:
        violations.add(f"{path}.text", "empty: at least 1 character is needed")
    if not message.text_pair and spec.pair_axis and spec.pair_start is None:
        violations.add(f"{path}.text_pair", f"empty: the model needs a second text, along axis {spec.pair_axis!r}")
    for field, value in (("text", message.text), ("text_pair", message.text_pair)):
        size = len(value.encode())
        if size > intake.max_text_bytes:
            violations.add(f"{path}.{field}", f"{size} bytes exceed {intake.max_text_bytes}")
    return len(violations) == before
