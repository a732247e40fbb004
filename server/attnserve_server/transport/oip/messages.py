"""gRPC messages of the protocol: what a ModelInferRequest holds, and results as a ModelInferResponse."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
from attnserve.oip import open_inference_pb2 as oip

from attnserve_server.domain.errors import Violations, quoted
from attnserve_server.transport.fields import varint
from attnserve_server.transport.oip.answer import Output
from attnserve_server.transport.oip.layout import BYTES, TIMINGS
from attnserve_server.transport.oip.wanted import (
    MAX_OUTPUTS,
    NONE,
    Given,
    Wanted,
    of_message,
    read_parameters,
    refuse_parameters,
)
from attnserve_server.transport.timings import Clocked, Timings
from attnserve_server.transport.wire import Received, Splice, as_sent

MAX_INPUTS: Final = 1024
_FIELDS: Final[Mapping[str, tuple[str, str]]] = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "<i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "<u1"),
    "UINT16": ("uint_contents", "<u2"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    BYTES: ("bytes_contents", ""),
}
"""The field of typed contents, and the dtype of its elements as bytes, by datatype."""
_RESPONSE: Final = oip.ModelInferResponse
_LENGTH: Final = struct.Struct("<I")


def wanted_of(received: Received[oip.ModelInferRequest]) -> Wanted:
    """Return the inputs, outputs and parameters of a message.

    Raises:
        InvalidRequest: With every violation of the form of the message.
    """
    message = received.message
    violations = Violations()
    found = NONE
    if message.parameters:
        found = read_parameters(of_message(message.parameters), violations)
    names = [one.name for one in message.outputs[:MAX_OUTPUTS]]
    for at, output in enumerate(message.outputs):
        if output.parameters:
            refuse_parameters(output.parameters, f"outputs[{at}]", violations)
    for name, most in (("outputs", MAX_OUTPUTS), ("inputs", MAX_INPUTS)):
        if len(getattr(message, name)) > most:
            violations.add(name, f"{len(getattr(message, name))} exceed {most}")
    inputs = _inputs(received, violations)
    violations.raise_any()
    return Wanted(inputs, names, found, received.size)


def _inputs(received: Received[oip.ModelInferRequest], violations: Violations) -> list[Given]:
    message = received.message
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        violations.add("raw_input_contents", f"{len(raw)} for {len(message.inputs)} inputs: send the bytes of each")
        return []
    found: list[Given] = []
    for at, tensor in enumerate(message.inputs[:MAX_INPUTS]):
        if tensor.parameters:
            refuse_parameters(tensor.parameters, f"inputs[{at}]", violations)
        datatype = tensor.datatype
        given = Given(tensor.name, datatype, tuple(tensor.shape), b"")
        found.append(given)
        if raw:
            if tensor.HasField("contents"):
                violations.add(f"inputs[{at}].contents", "set beside raw_input_contents: send one of the two")
            given.data = received.content(raw[at])
            if datatype == BYTES:
                given.texts = strings(given.data, f"raw_input_contents[{at}]", violations)
        else:
            _fill(given, tensor.contents, f"inputs[{at}]", violations)
    return found


def _fill(given: Given, contents: oip.InferTensorContents, path: str, violations: Violations) -> None:
    """Read typed contents."""
    if given.datatype not in _FIELDS:
        wrong = f"{quoted(given.datatype)} has no typed contents: send the bytes in raw_input_contents"
        violations.add(f"{path}.contents", wrong)
        return
    name, dtype = _FIELDS[given.datatype]
    others = [field.name for field, _ in contents.ListFields() if field.name != name]
    if others:
        violations.add(f"{path}.contents.{others[0]}", f"the elements of {given.datatype} belong into {name}")
        return
    if not dtype:
        given.texts = contents.bytes_contents
        return
    try:
        given.data = np.array(getattr(contents, name), dtype).tobytes()
    except OverflowError:
        violations.add(f"{path}.contents.{name}", f"an element is no {given.datatype}")


def strings(data: bytes | memoryview, path: str, violations: Violations) -> list[bytes]:
    """Read strings, each after its length in 4 bytes."""
    found: list[bytes] = []
    at = 0
    while at < len(data):
        begin = at + _LENGTH.size
        end = begin + _LENGTH.unpack_from(data, at)[0] if begin <= len(data) else begin
        if end > len(data) or len(found) >= MAX_OUTPUTS:
            wrong = (
                f"over {MAX_OUTPUTS} strings" if end <= len(data) else f"string {len(found)} is cut off at byte {at}"
            )
            violations.add(path, f"{wrong}; each string follows its length in 4 bytes, little-endian")
            return found
        found.append(bytes(data[begin:end]))
        at = end
    return found


def encoded(
    model: str, version: str, request_id: str, outputs: Sequence[Output], timings: Clocked, *, final: bool = False
) -> Splice:
    """Encode an answer (a ModelInferResponse). `final`: whether it states that it is the only one on its stream."""
    message = Splice(_named(model, version))
    if request_id:
        message.add(_RESPONSE.ID_FIELD_NUMBER, request_id.encode())
    if final:
        message.append(_FINAL)
    for output in outputs:
        message.append(_output_head(output.name, output.datatype, tuple(output.shape)))
    for output in outputs:
        message.append(_raw_head(sum([part.nbytes for part in output.parts])))
        for part in output.parts:
            message.append(as_sent(part))
    return message.append(_timings(timings()))


@lru_cache(maxsize=256)
def _named(model: str, version: str) -> bytes:
    return _RESPONSE(model_name=model, model_version=version).SerializeToString()


@lru_cache(maxsize=4096)
def _output_head(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    output = _RESPONSE.InferOutputTensor(name=name, datatype=datatype, shape=shape)
    return _RESPONSE(outputs=[output]).SerializeToString()


def _raw_head(size: int) -> bytes:
    return _RAW + varint(size)


def _timings(timings: Timings) -> bytes:
    """Return the times of a request as parameters of its answer, in nanoseconds. Event loop only."""
    for parameter, seconds in zip(_SPENT, timings, strict=True):
        parameter.int64_param = min(int(seconds * 1e9), _MOST_NS)
    return _TIMED.SerializeToString()


_MOST_NS: Final = 2**63 - 1
_TIMED: Final = _RESPONSE()
_SPENT: Final = tuple([_TIMED.parameters[name] for name in TIMINGS])
"""Parameters of `_TIMED`, set for each answer: to make a message takes several times as long."""


def _final() -> bytes:
    message = _RESPONSE()
    message.parameters["triton_final_response"].bool_param = True
    return message.SerializeToString()


_FINAL: Final = _final()
_RAW: Final = varint(_RESPONSE.RAW_OUTPUT_CONTENTS_FIELD_NUMBER << 3 | 2)


def failed(request_id: str, text: str, facts: Mapping[str, str]) -> bytes:
    """Encode an answer on a stream to a request that failed. `facts`: become parameters of the answer."""
    message = oip.ModelStreamInferResponse(error_message=text)
    message.infer_response.id = request_id
    known: Any = message.infer_response.parameters
    for name, value in facts.items():
        known[name].string_param = value
    return message.SerializeToString()


def streamed(answer: Splice) -> bytes:
    """Encode an answer on a stream."""
    return Splice().add(oip.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER, answer).joined()
