"""One request of the protocol on the data plane, over gRPC or REST: admit, read, run, and write its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Final, TypeVar
from uuid import uuid4

from attnserve_server.access.guard import Caller
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError, InvalidRequest, ResponseTooLarge
from attnserve_server.domain.values import SequenceResult
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.oip.answer import Output, answer_bytes, outputs_of
from attnserve_server.transport.oip.layout import Layout
from attnserve_server.transport.oip.messages import wanted_of
from attnserve_server.transport.oip.request import Read, read
from attnserve_server.transport.oip.rows import in_protocol
from attnserve_server.transport.oip.usual import Usual
from attnserve_server.transport.oip.wanted import Wanted
from attnserve_server.transport.prepared import Opened, Prepared
from attnserve_server.transport.timings import Clocked, timings_of

T = TypeVar("T")
Encode = Callable[[str, str, list[Output], Clocked], T]
"""Writes an answer, from the name and version of the model, the outputs and the timings."""
_PROCESS: Final = uuid4().hex[:16]
_NUMBERS: Final = count()


def new_id() -> str:
    """Name a request without an id, for errors and logs; the protocol's answer leaves its id empty."""
    return f"{_PROCESS}{next(_NUMBERS):016x}"


@dataclass(slots=True)
class Call:
    """One request that may run. `bytes`: tensor data of its answer."""

    plane: DataPlane
    prepared: Prepared
    read: Read
    layout: Layout
    bytes: int

    async def run(self, encode: Encode[T]) -> T:
        """Run it, and return its answer. Raises AttnserveError as in the status table."""

        def write(prepared: Prepared, results: list[SequenceResult], clock: Clock) -> T:
            begun = clock.now()
            served = prepared.served
            outputs = outputs_of(self.read, self.layout, prepared, results)
            return encode(served.name, served.version, outputs, lambda: timings_of(results, clock.now() - begun))

        return await self.plane.run_as(self.prepared, write)


async def prepare(
    plane: DataPlane,
    request: Request,
    caller: Caller | None,
    content: Wanted | Usual,
    model: str,
    version: str,
    method: str,
) -> Call:
    """Check a request against quotas and its model, and return it ready to run.

    Args:
        plane: runs it.
        request: in state RECEIVED.
        caller: who sent it; None where no token is needed.
        content: its inputs, outputs and parameters.
        model: the model's name.
        version: its version; empty: the default one.
        method: for the log.

    Raises:
        AttnserveError: As in the status table; with the fields of the protocol, not those of the native contract.
    """
    if caller is not None:
        caller.admit(content.rows, method, attention=content.attention)
    opened = plane.open(request, model, version)
    layout = Layout.of(opened.reader)
    if isinstance(content, Usual):
        usual = content.prepared(opened, layout)
        if usual is not None:
            return _call(plane, opened, *usual)
        content = wanted_of(content.received)
    try:
        found = read(content, layout, opened.reader.intake, model, version)
    except AttnserveError as error:
        plane.refuse(opened, error)
        raise
    try:
        prepared = plane.read(opened, found.received) or await plane.prepare_large(request, found.received)
    except InvalidRequest as error:
        raise in_protocol(error, content, layout) from None
    return _call(plane, opened, found, prepared)


def _call(plane: DataPlane, opened: Opened, found: Read, prepared: Prepared) -> Call:
    """Return a request that may run. Raises ResponseTooLarge."""
    layout, most = Layout.of(opened.reader), opened.reader.intake.max_response_bytes
    size = answer_bytes(found, layout, prepared)
    if size > most:
        plane.count_refusal(prepared, ResponseTooLarge.reason)
        raise ResponseTooLarge(size, most)
    return Call(plane, prepared, found, layout, size)
