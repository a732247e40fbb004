"""Reads bodies of the Open Inference Protocol: JSON, and after it the bytes of tensors that are not in the JSON.

The header `Inference-Header-Content-Length` has the length of the JSON, of requests and of answers, where bytes follow.
Sources: the Open Inference Protocol, version 2, HTTP/REST; Triton's extension "Binary tensor data".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from attnserve_server.domain.errors import InvalidRequest, Violations, quoted
from attnserve_server.transport.oip.layout import BYTES, BYTES_ONLY, DATATYPES
from attnserve_server.transport.oip.messages import strings
from attnserve_server.transport.oip.wanted import (
    ALL_BINARY,
    BINARY,
    SIZE,
    Given,
    Wanted,
    read_parameters,
    refuse_parameters,
)
from attnserve_server.transport.rest.bodies import parsed
from attnserve_server.transport.rest.contract import checked
from attnserve_server.transport.rest.oip_types import InferBody, InferInput
from attnserve_server.transport.rest.tensors import array_of, elements_of, rank_of
from attnserve_server.transport.wire import WIRE_NUMPY

JSON_BYTES: Final = "inference-header-content-length"
"""The header with the length of the JSON."""
_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {name: WIRE_NUMPY[ours] for ours, name in DATATYPES.items()} | {
    name: np.dtype(dtype) for name, dtype in {"UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT16": "<i2"}.items()
}
_BODY: Final = msgspec.json.Decoder(InferBody)


@dataclass(slots=True)
class Sent:
    """A request as it was sent. `id`: its own; empty without one."""

    wanted: Wanted
    id: str


def json_bytes(header: str | None) -> int | None:
    """Return the length of the JSON as a header states it; None without one. Raises InvalidRequest."""
    if header is None:
        return None
    if not (header.isascii() and header.isdigit() and len(header) < 19 and int(header)):
        raise InvalidRequest.of(JSON_BYTES, f"{quoted(header)} is no positive number of bytes")
    return int(header)


def read(body: bytes, size: int | None, model: str, version: str) -> Sent:
    """Read a body.

    Args:
        body: JSON, and after it bytes.
        size: length of the JSON; None: there is nothing else.
        model: name of the model in the path.
        version: its version there; may be empty.

    Raises:
        InvalidRequest: With every violation of its form.
    """
    if size is not None and size > len(body):
        raise InvalidRequest.of(JSON_BYTES, f"{size} exceeds the {len(body)} bytes of the body")
    sent = parsed(body if size is None else body[:size], _BODY)
    violations = Violations()
    for name, given, path in (("model_name", sent.model_name, model), ("model_version", sent.model_version, version)):
        if given and given != path:
            violations.add(name, f"{quoted(given)}, but the path has {quoted(path)}: leave {name} out")
    parameters = sent.parameters or {}
    found = read_parameters(parameters, violations)
    if found.prompt is not None:
        with violations:
            checked(found.prompt, "parameters['prompt_name']")
    all_binary = _flag(parameters, ALL_BINARY, f"parameters[{ALL_BINARY!r}]", violations)
    binary: dict[str, bool] = {}
    for at, output in enumerate(sent.outputs or ()):
        if output.parameters:
            refuse_parameters(output.parameters, f"outputs[{at}]", violations)
            chosen = _flag(output.parameters, BINARY, f"outputs[{at}].parameters[{BINARY!r}]", violations)
            binary[output.name] = bool(all_binary) if chosen is None else chosen
    inputs = _inputs(sent.inputs, memoryview(body)[len(body) if size is None else size :], violations)
    violations.raise_any()
    names = [output.name for output in sent.outputs or ()]
    return Sent(Wanted(inputs, names, found, len(body), bool(all_binary), binary), sent.id or "")


def _flag(given: Mapping[str, Any], name: str, field: str, violations: Violations) -> bool | None:
    """Return a parameter that is true or false; None without one."""
    value = given.get(name)
    if value is None or isinstance(value, bool):
        return value
    violations.add(field, f"{quoted(str(value))} is neither true nor false")
    return None


def _inputs(tensors: Sequence[InferInput], after: memoryview, violations: Violations) -> list[Given]:
    """Return the inputs. `after`: what follows the JSON."""
    found: list[Given] = []
    taken = 0
    for at, tensor in enumerate(tensors):
        path = f"inputs[{at}]"
        parameters = tensor.parameters or {}
        refuse_parameters(parameters, path, violations)
        given = Given(tensor.name, tensor.datatype, tuple(tensor.shape), b"")
        found.append(given)
        size = parameters.get(SIZE)
        with violations:
            checked(tensor.name, f"{path}.name")
            if size is None:
                _fill(given, tensor.data, path)
                continue
            field = f"{path}.parameters[{SIZE!r}]"
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise InvalidRequest.of(field, f"{quoted(str(size))} is no number of bytes")
            if tensor.data is not UNSET:
                raise InvalidRequest.of(field, "set beside data: send one of the two")
            if size > len(after) - taken:
                left = f"{size}, but {len(after) - taken} bytes are left after the JSON"
                raise InvalidRequest.of(field, f"{left}, whose length is the header {JSON_BYTES}")
            given.data = after[taken : taken + size]
            taken += size
            if given.datatype == BYTES:
                given.texts = strings(given.data, path, violations)
    if not len(violations) and taken < len(after):
        violations.add("body", f"{len(after) - taken} bytes after those of the inputs; {SIZE} has the bytes of each")
    return found


def _fill(given: Given, sent: msgspec.Raw | UnsetType, path: str) -> None:
    """Read the elements of an input in JSON. Raises InvalidRequest."""
    if given.datatype in BYTES_ONLY:
        wrong = f"{given.datatype} is not read from JSON: send the bytes after it, and their number as {SIZE}"
        raise InvalidRequest.of(f"{path}.data", wrong)
    if isinstance(sent, UnsetType):
        raise InvalidRequest.of(f"{path}.data", f"missing, and the input has no parameter {SIZE}")
    if given.datatype not in _DTYPES and given.datatype != BYTES:
        return  # refused by name once the model is known
    data = bytes(sent)
    if given.datatype == BYTES:
        texts, nested = _texts(data, f"{path}.data")
        given.texts = [checked(one, f"{path}.data[{at}]").encode() for at, one in enumerate(texts)]
    else:
        array = array_of(data, _DTYPES[given.datatype], f"{path}.data")
        given.data, nested = array.tobytes(), array.shape
    if math.prod(nested) != math.prod(given.shape) or (len(nested) > 1 and nested != given.shape):
        has = f"{math.prod(nested)} elements" if len(nested) < 2 else f"lists of shape {list(nested)}"
        raise InvalidRequest.of(f"{path}.data", f"{has}, but shape is {list(given.shape)[:16]}")


def _texts(data: bytes, field: str) -> tuple[list[str], tuple[int, ...]]:
    """Return the strings of nested lists, and the shape of these."""
    found: Any = elements_of(data, str, field)
    if isinstance(found, str):
        return [found], ()
    shape = [len(found)]
    for _ in range(rank_of(data) - 1):
        widths = {len(one) for one in found}
        if len(widths) > 1:
            raise InvalidRequest.of(field, "lists of different lengths")
        shape.append(max(widths, default=0))
        found = [one for row in found for one in row]
    return found, tuple(shape)
