"""Reads the usual request over gRPC in one pass: raw contents, no parameters, nothing padded, no virtual outputs.

It makes no native message. Any other request is left to `messages` and `request`, which refuse what is invalid; a test
compares both on random requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from attnserve.oip import open_inference_pb2 as oip
from attnserve.v1 import inference_service_pb2

from attnserve_server.transport.dataplane import OFFLOAD_TENSOR_BYTES
from attnserve_server.transport.oip.layout import ATTENTION, BYTES, Layout
from attnserve_server.transport.oip.messages import MAX_INPUTS
from attnserve_server.transport.oip.request import Read
from attnserve_server.transport.oip.wanted import MAX_OUTPUTS, NONE, Parameters
from attnserve_server.transport.prepared import Opened, Prepared, Reader
from attnserve_server.transport.quick import Given
from attnserve_server.transport.validation import ValidRequest
from attnserve_server.transport.wire import Received

_UNUSED: Final = Received(inference_service_pb2.InferRequest(), 0)


@dataclass(slots=True)
class Usual:
    """A request of the usual form, whose values may be invalid. `inputs`: with the protocol's datatypes."""

    received: Received[oip.ModelInferRequest]
    inputs: list[tuple[str, str, tuple[int, ...], bytes | memoryview]]
    outputs: list[str]

    @property
    def parameters(self) -> Parameters:
        """Those of a request without any."""
        return NONE

    @property
    def rows(self) -> int:
        """As `Wanted.rows`."""
        return min(max(self.inputs[0][2][0], 1), MAX_OUTPUTS)

    @property
    def attention(self) -> bool:
        """As `Wanted.attention`, of outputs whose names are not checked yet."""
        return any(name.startswith(ATTENTION) for name in self.outputs)

    def prepared(self, opened: Opened, layout: Layout) -> tuple[Read, Prepared] | None:
        """Return the request ready to run; None if it is not plainly valid, and must be read as any other."""
        found = self.read(opened.reader, layout)
        if found is None:
            return None
        opened.served.prepared += 1
        return found[0], Prepared(opened.request, found[1], opened.served, opened.manifest, opened.scheduler, False)

    def read(self, reader: Reader, layout: Layout) -> tuple[Read, ValidRequest] | None:
        """Return the request as `request.read` and validation would; None if it is not plainly valid."""
        if reader.quick is None:
            return None
        given: list[Given] = []
        for name, datatype, shape, data in self.inputs:
            known = layout.inputs.get(name)
            if known is None or known.datatype != datatype:
                return None
            given.append((name, known.wire, shape, data))
        if not all(name in layout.outputs for name in self.outputs):
            return None
        valid = reader.quick.rows(given, self.outputs)
        if valid is None or not all(_shown(layout, name, valid) for name, *_ in given):
            return None
        first = valid.sequences[0].lengths
        axes = [one for name, *_ in given for one in layout.inputs[name].spec.shape if isinstance(one, str)]
        padded_to = {one: first[one] for one in axes}
        return Read(_UNUSED, tuple(self.outputs) or layout.answered, padded_to=padded_to), valid


def usual_of(received: Received[oip.ModelInferRequest]) -> Usual | None:
    """Return a request of the usual form; None for any other."""
    message = received.message
    raw, outputs = message.raw_input_contents, message.outputs
    if not raw or len(raw) != len(message.inputs) or message.parameters or received.size > OFFLOAD_TENSOR_BYTES:
        return None
    if len(raw) > MAX_INPUTS or len(outputs) > MAX_OUTPUTS or any(one.parameters for one in outputs):
        return None
    inputs: list[tuple[str, str, tuple[int, ...], bytes | memoryview]] = []
    for tensor, content in zip(message.inputs, raw, strict=True):
        shape, datatype = tuple(tensor.shape), tensor.datatype
        if not shape or datatype == BYTES or tensor.parameters or tensor.HasField("contents"):
            return None
        inputs.append((tensor.name, datatype, shape, received.content(content)))
    return Usual(received, inputs, [one.name for one in outputs])


def _shown(layout: Layout, name: str, valid: ValidRequest) -> bool:
    """Return whether an input is no mask, or one that hides nothing."""
    known = layout.inputs[name]
    if not known.mask:
        return True
    marks = [one.tensors[name] for one in valid.sequences]
    return not any(one.any() for one in marks) if known.spec.inverted else all(one.all() for one in marks)
