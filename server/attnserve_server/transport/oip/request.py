"""Requests of the Open Inference Protocol to native ones: a batch becomes one sequence for each of its rows.

A row ends where its attention mask hides the rest, so that its answer does not depend on the padding of its batch. All
checks of values are those of native requests; here is only what the protocol adds, over gRPC and REST alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from attnserve.v1 import attention_pb2, inference_service_pb2

from attnserve_server.domain.errors import Violations, quoted
from attnserve_server.transport.inputs import MAX_RANK
from attnserve_server.transport.intake import Intake
from attnserve_server.transport.oip.layout import (
    ATTENTION,
    BF16,
    BYTES,
    BYTES_ONLY,
    DATATYPES,
    KNOWN,
    Layout,
    Virtual,
    item_bytes,
)
from attnserve_server.transport.oip.rows import Rows, cuts_of, lengths_of
from attnserve_server.transport.oip.wanted import ALL_BINARY, BINARY, MAX_OUTPUTS, Given, Wanted
from attnserve_server.transport.wire import Received


@dataclass(slots=True)
class Read:
    """A request in its native form, and what its answer needs.

    Args:
        received: the native request.
        names: the outputs of the answer, in order.
        virtual: those of attention among them.
        padded_to: the length of each axis as the request has it; empty for texts.
        top_k: number of links; 0: none.
    """

    received: Received[inference_service_pb2.InferRequest]
    names: tuple[str, ...]
    virtual: Mapping[str, Virtual] = field(default_factory=dict)
    padded_to: Mapping[str, int] = field(default_factory=dict)
    top_k: int = 0


def read(wanted: Wanted, layout: Layout, intake: Intake, model: str, version: str) -> Read:
    """Return a request in its native form.

    Raises:
        InvalidRequest: With every violation that the protocol adds to those of native requests.
    """
    violations = Violations()
    message = inference_service_pb2.InferRequest(model=model, version=version, priority=wanted.parameters.priority)
    if wanted.parameters.prompt is not None:
        message.prompt_name = wanted.parameters.prompt
    found = Read(Received(message, wanted.size), layout.all_outputs, top_k=wanted.parameters.top_k)
    _read_outputs(wanted, layout, found, violations)
    _check_forms(wanted, layout, found.names, violations)
    rows = _count_rows(wanted.inputs, intake, violations)
    for at, given in enumerate(wanted.inputs):
        _check(given, layout, f"inputs[{at}]", violations)
    if len(set(wanted.outputs)) < len(wanted.outputs):
        violations.add("outputs", "an output is requested twice")
    violations.raise_any()
    found.padded_to = lengths_of(wanted.inputs, layout)
    found.received = Rows(wanted, layout, message).add(rows, cuts_of(wanted.inputs, layout), violations)
    violations.raise_any()
    return found


def _read_outputs(wanted: Wanted, layout: Layout, found: Read, violations: Violations) -> None:
    message = found.received.message
    if not wanted.outputs:
        if wanted.parameters.top_k:
            violations.add("parameters['top_k']", f"no output has links; request {ATTENTION}<layer>:query and the like")
        if layout.has_head:  # no labels, which the answer has no place for
            message.outputs.names.extend(layout.all_outputs)
        found.names = layout.answered
        return
    found.names = names = tuple(wanted.outputs)
    virtual: dict[str, Virtual] = {}
    for at, name in enumerate(names[:MAX_OUTPUTS]):
        if name in layout.virtual:
            virtual[name] = layout.virtual[name]
        elif name not in layout.outputs and name not in layout.lengths:
            has = ", ".join([*layout.outputs, *layout.lengths, *layout.virtual][:20])
            violations.add(f"outputs[{at}]", f"no output {quoted(name)}; the model has {has}")
    own = [name for name in names if name in layout.outputs]
    if not own and not virtual:  # lengths alone: one output is fetched and not sent
        own = list(layout.all_outputs[:1])
    message.outputs.names.extend(own)
    message.outputs.SetInParent()
    if virtual:
        found.virtual = virtual
        _select(message.attention, virtual, wanted.parameters.top_k, violations)
    elif wanted.parameters.top_k:
        violations.add("parameters['top_k']", "no requested output has links")


def _check_forms(wanted: Wanted, layout: Layout, names: Sequence[str], violations: Violations) -> None:
    """Check that no output is to be answered as JSON that has no form there."""
    for at, name in enumerate(names):
        spec = layout.outputs.get(name)
        if spec is not None and DATATYPES[spec.dtype] in BYTES_ONLY and not wanted.is_binary(name):
            place, remedy = (f"outputs[{at}]", BINARY) if wanted.outputs else ("outputs", ALL_BINARY)
            violations.add(
                place, f"{name!r} is {DATATYPES[spec.dtype]}, which is not sent as JSON: set {remedy} to true"
            )


def _select(
    selection: attention_pb2.AttentionSelection, virtual: Mapping[str, Virtual], top_k: int, violations: Violations
) -> None:
    """Fill in the native selection whose answer has all requested outputs."""
    links = [name for name, one in virtual.items() if one.link]
    if links and not top_k:
        violations.add("parameters['top_k']", f"missing, and output {links[0]!r} has the top_k greatest weights")
    if top_k and not links:
        violations.add("parameters['top_k']", f"no requested output has links; request {next(iter(virtual))}:query")
    rolled = [one for one in virtual.values() if one.layer < 0]
    if rolled and len(rolled) < len(virtual):
        violations.add("outputs", "attention:rollout and attention of a layer need two requests")
    if rolled:
        selection.layer_reduction = attention_pb2.LAYER_REDUCTION_ROLLOUT
    else:
        selection.layers.extend(sorted({one.layer for one in virtual.values()}))
    if len(links) == len(virtual):
        selection.top_k = top_k
        selection.head_reduction = attention_pb2.HEAD_REDUCTION_MEAN
    elif not rolled:
        selection.head_reduction = attention_pb2.HEAD_REDUCTION_EACH


def _count_rows(inputs: Sequence[Given], intake: Intake, violations: Violations) -> int:
    """Return the rows of the batch, the first dimension of every input."""
    rows = 0
    for at, given in enumerate(inputs):
        if not given.shape:
            violations.add(f"inputs[{at}].shape", "empty: the first dimension is the batch")
        elif not rows:
            rows = given.shape[0]
            if not 1 <= rows <= intake.max_batch_size:
                violations.add(f"inputs[{at}].shape[0]", f"{rows} rows are not from 1 to {intake.max_batch_size}")
        elif given.shape[0] != rows:
            violations.add(f"inputs[{at}].shape[0]", f"{given.shape[0]} rows, but input {inputs[0].name!r} has {rows}")
    if not inputs:
        violations.add("inputs", "empty: at least one input is needed")
    return rows


def _check(given: Given, layout: Layout, path: str, violations: Violations) -> None:
    """Check what native requests do not have: the datatype's name, and the bytes of a whole batch."""
    if given.name in layout.texts:
        _check_texts(given, path, violations)
        return
    datatype, shape = given.datatype, given.shape
    if datatype not in KNOWN or datatype == BYTES:
        need = layout.inputs[given.name].datatype if given.name in layout.inputs else "one of " + ", ".join(KNOWN)
        violations.add(f"{path}.datatype", f"{quoted(datatype)}, but input {quoted(given.name)} is {need}")
        return
    if given.name in layout.inputs:
        wanted = layout.inputs[given.name].datatype
        if datatype != wanted and not (datatype == BF16 and wanted == "FP32"):
            violations.add(f"{path}.datatype", f"{datatype}, but input {given.name!r} is {wanted}")
    if len(shape) > MAX_RANK + 1:
        violations.add(f"{path}.shape", f"rank {len(shape)} exceeds {MAX_RANK + 1}")
    elif any(length < 1 for length in shape[1:]):
        violations.add(f"{path}.shape", f"{list(shape)}: every length must be at least 1")
    elif len(given.data) != (size := math.prod(shape) * item_bytes(datatype)):
        violations.add(path, f"{len(given.data)} bytes; shape {list(shape)} of {datatype} needs {size}")


def _check_texts(given: Given, path: str, violations: Violations) -> None:
    if given.datatype != BYTES:
        violations.add(f"{path}.datatype", f"{quoted(given.datatype)}, but input {given.name!r} is BYTES")
    elif len(given.shape) not in {1, 2} or given.shape[1:] not in {(), (1,)}:
        violations.add(
            f"{path}.shape", f"{list(given.shape)[:MAX_RANK]}; one text a row is needed: [rows] or [rows, 1]"
        )
    elif len(given.texts) != given.shape[0]:
        violations.add(path, f"{len(given.texts)} texts for {given.shape[0]} rows")
