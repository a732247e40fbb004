"""One sequence's inputs: what of text and tensors it is made from. The request as a whole is in `validation`."""

from __future__ import annotations

from collections.abc import Iterable

from attnserve.v1 import inference_service_pb2, tensor_pb2

from attnserve_server.domain.errors import Violations
from attnserve_server.transport.arrays import read_tensors
from attnserve_server.transport.intake import Inputs, Intake, fill_in
from attnserve_server.transport.structure import Blobs
from attnserve_server.transport.texts import from_text

__all__ = ["Inputs", "Intake", "inputs_of"]


def inputs_of(
    sequence: inference_service_pb2.Sequence, intake: Intake, path: str, violations: Violations, blobs: Blobs = ()
) -> Inputs | None:
    """One sequence's inputs, or None if anything was wrong and has been noted. `blobs`: of the message it came in.

    Raises:
        TextUnavailable: It is text, and the model has no tokenizer.
    """
    kind = sequence.WhichOneof("input")
    if kind == "text":
        return from_text(sequence.text, intake, f"{path}.text", violations, blobs)
    if kind == "tensors":
        return _from_tensors(sequence.tensors.tensors, intake, f"{path}.tensors.tensors", violations, blobs)
    violations.add(path, "neither text nor tensors is set")
    return None


def _from_tensors(
    messages: Iterable[tensor_pb2.Tensor], intake: Intake, path: str, violations: Violations, blobs: Blobs
) -> Inputs | None:
    before = len(violations)
    lengths = intake.manifest.fixed_lengths
    tensors, seen = read_tensors(messages, intake, path, lengths, violations, blobs)
    for name, spec in intake.inputs.items():
        if name not in seen and spec.fill is None:
            violations.add(path, f"input {name!r} is missing")
    if len(violations) > before or not fill_in(tensors, lengths, intake, path, violations):
        return None
    return Inputs(tensors, lengths)
