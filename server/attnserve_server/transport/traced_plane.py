"""A data plane that adds spans of decoding and encoding to the traces of requests. With `--tracing` only."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, TypeVar

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import SequenceResult
from attnserve_server.scheduling.catalog import Catalog, ServedModel
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport.dataplane import DataPlane, Encoder
from attnserve_server.transport.prepared import Opened, Prepared
from attnserve_server.transport.status import name_of_code
from attnserve_server.transport.wire import Splice

if TYPE_CHECKING:
    from attnserve_server.observability.tracing import Trace, Tracing

T = TypeVar("T")

TRACE: Final[ContextVar[Trace | None]] = ContextVar("attnserve_trace", default=None)
"""Of the call whose task this is; None if it is not sampled."""
SERVER_FAULTS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Codes that make the span of a server an error. Source: semantic conventions for gRPC spans."""


class TracedPlane(DataPlane):
    """A data plane that adds the spans of decoding and encoding. Event loop only."""

    def __init__(self, catalog: Catalog, settings: Settings, clock: Clock, tracing: Tracing) -> None:
        """As `DataPlane`. `tracing`: takes the spans."""
        super().__init__(catalog, settings, clock)
        self.tracing = self._spans = tracing

    def open(self, request: Request, model: str, version: str, *, runs: bool = True) -> Opened:
        """Find the model of a request, as `DataPlane.open`."""
        call = TRACE.get()
        if call is not None:
            request.trace = self._spans.request(call, request.request_id)
        try:
            return super().open(request, model, version, runs=runs)
        except Exception as error:
            self._failed(request, error)
            raise

    def start(self, prepared: Prepared) -> asyncio.Future[list[SequenceResult]]:
        """Submit a prepared request, as `DataPlane.start`."""
        trace = prepared.request.trace
        if trace is not None and trace.decoding_since_s is not None:
            served, sequences = prepared.served, prepared.valid.sequences
            named = {"attnserve.model.name": served.name, "attnserve.model.version": served.version}
            facts: dict[str, str | int] = {
                **named,
                "attnserve.sequences": len(sequences),
                "attnserve.tokens": sum([one.tokens for one in sequences]),
                "attnserve.request.bytes": prepared.request.received_bytes,
            }
            if trace.span is not None:
                trace.span.set_attributes({**named, "attnserve.request.id": prepared.request.request_id})
            self._spans.add(trace, "decode", trace.decoding_since_s, self._clock.now(), facts)
            trace.decoding_since_s = None
        return super().start(prepared)

    def answer(self, prepared: Prepared, results: list[SequenceResult], encode: Encoder[T]) -> T:
        """Encode the results of a request, as `DataPlane.answer`."""
        trace = prepared.request.trace
        if trace is None:
            return super().answer(prepared, results, encode)
        began_s = self._clock.now()
        answer = super().answer(prepared, results, encode)
        size = answer.size if isinstance(answer, Splice) else len(answer) if isinstance(answer, bytes) else 0
        facts = {"attnserve.response.bytes": size} if size else None
        self._spans.add(trace, "encode", began_s, self._clock.now(), facts)
        if trace.owns_span:
            self._spans.end(trace)
        return answer

    def count_failure(self, served: ServedModel, request: Request, error: BaseException) -> None:
        """Count a request that ended with an error, as `DataPlane.count_failure`."""
        super().count_failure(served, request, error)
        self._failed(request, error)

    def count_refusal(self, prepared: Prepared, cause: str) -> None:
        """Count a prepared request that is refused, as `DataPlane.count_refusal`."""
        super().count_refusal(prepared, cause)
        self._end(prepared.request, cause, "RESOURCE_EXHAUSTED")

    def _failed(self, request: Request, error: BaseException) -> None:
        left_s = None if request.deadline_s is None else request.deadline_s - self._clock.now()
        code = name_of_code(error, left_s)
        self._end(request, error.reason if isinstance(error, AttnserveError) else code, code)

    def _end(self, request: Request, reason: str, code: str) -> None:
        """Note why a request failed; once, because what fails below is counted again above."""
        trace = request.trace
        if trace is None or trace.is_failed:
            return
        trace.is_failed = True
        if trace.decoding_since_s is not None:
            self._spans.add(trace, "decode", trace.decoding_since_s, self._clock.now(), error=reason)
        if trace.span is not None:
            trace.span.set_attribute("attnserve.error.reason", reason)
        if trace.owns_span:
            self._spans.end(trace, error=code, failed=code in SERVER_FAULTS)
