"""Spans of requests and batches, and their export by OTLP over gRPC. Loaded with `--tracing` only, by the extra `otel`.

The standard variables `OTEL_*` state the collector, the resource, the sampler and the bounds of the queue. A span holds
names, sizes and ids: never texts, tensors or messages of errors. No call waits for the collector: ended spans wait in a
bounded queue, and one that finds it full is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from attnserve_server import __version__
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import Metrics
from attnserve_server.observability.span_queue import BoundedSpans, resource_of_process
from attnserve_server.observability.spec import SPANS
from attnserve_server.observability.trace_context import CallContext

_log = logger(__name__)

Attributes = Mapping[str, AttributeValue]

_PROPAGATOR: Final = TraceContextTextMapPropagator()


class TracingUnavailable(AttnserveError):
    """The variables `OTEL_*` are invalid."""

    reason = "TRACING_UNAVAILABLE"

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"--tracing cannot start: {cause}; correct the variables OTEL_*, or leave --tracing out")


class Trace:
    """Where the spans of one request, or of one call, go: below a span that is sampled. Event loop only."""

    __slots__ = ("decoding_since_s", "is_failed", "link", "owns_span", "parent", "span", "streams")

    def __init__(self, link: SpanContext, span: Span | None = None, since_s: float | None = None) -> None:
        """Begin below a span.

        Args:
            link: identifies the span.
            span: itself; None in an engine, whose requests have theirs in a front.
            since_s: when it began, in monotonic seconds.
        """
        self.link, self.span = link, span
        self.parent = set_span_in_context(NonRecordingSpan(link), Context())
        self.decoding_since_s = since_s
        """When the decoding of the request began; None once that has its span."""
        self.streams = False
        """Whether the span is of a stream, with a span for each request below it."""
        self.owns_span = False
        """Whether the span is of one request of a stream, and ends with it."""
        self.is_failed = False
        """Whether the failure of the request has been noted."""

    @property
    def trace_id(self) -> str:
        """The id of the trace, 32 hexadecimal digits."""
        return f"{self.link.trace_id:032x}"

    @property
    def sent(self) -> tuple[str, str]:
        """`traceparent` and `tracestate` of the span, for another process."""
        parent = f"00-{self.trace_id}-{self.link.span_id:016x}-{self.link.trace_flags:02x}"
        state = self.link.trace_state.to_header()
        return parent, state if len(state) <= 512 else ""


class Tracing:
    """Makes and exports the spans of one process. Event loop only."""

    def __init__(self, metrics: Metrics, clock: Clock, exporter: SpanExporter | None = None) -> None:
        """Start the thread that exports.

        Args:
            metrics: of the process, which count the spans.
            clock: of the process.
            exporter: for tests; None: OTLP over gRPC, as `OTEL_EXPORTER_OTLP_*` state it.

        Raises:
            TracingUnavailable: A variable is invalid.
        """
        self._clock = clock
        self._offset_ns = 0
        try:
            self._exporter = exporter or OTLPSpanExporter()
            self._queue = BoundedSpans(self._exporter)
            provider = TracerProvider(resource=resource_of_process(), shutdown_on_exit=False)
            # A batch is the root of a separate trace: it is sampled where one of its members is.
            batches = TracerProvider(sampler=ALWAYS_ON, resource=resource_of_process(), shutdown_on_exit=False)
        except Exception as error:
            raise TracingUnavailable(error) from error
        for one in (provider, batches):
            one.add_span_processor(self._queue)
        self._tracer = provider.get_tracer("attnserve", __version__)
        self._batches = batches.get_tracer("attnserve", __version__)
        for outcome in ("exported", "queue_full", "failed"):
            metrics.counter(SPANS).labels(outcome).function = partial(self._queue.counts.__getitem__, outcome)
        self._closed = False
        _log.info("tracing", sampler=provider.sampler.get_description())

    def begin(self, name: str, attributes: Attributes, sent: CallContext | None) -> Trace | None:
        """Begin the span of a call now; None if it is not sampled.

        Args:
            name: of the span.
            attributes: of the span.
            sent: what came with the call, whose trace context is the parent.
        """
        self._offset_ns = time.time_ns() - round(self._clock.now() * 1e9)  # spans have wall time
        parent = Context()
        if sent is not None and sent.traceparent:
            carrier = {"traceparent": sent.traceparent, "tracestate": sent.tracestate}
            parent = _PROPAGATOR.extract(carrier, parent)
        now = self._clock.now()
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes, start_time=self._ns(now))
        link = span.get_span_context()
        return Trace(link, span, now) if link.trace_flags.sampled else None

    def request(self, call: Trace, request_id: str) -> Trace:
        """Return where the spans of a request of a call go; a request of a stream gets a span, which begins now."""
        since_s, call.decoding_since_s = call.decoding_since_s, None
        now = self._clock.now()
        if not call.streams:
            # A call with several requests: those after the first are decoded from now on.
            return Trace(call.link, call.span, now if since_s is None else since_s)
        named = {"attnserve.request.id": request_id}
        span = self._tracer.start_span("request", call.parent, SpanKind.INTERNAL, named, start_time=self._ns(now))
        made = Trace(span.get_span_context(), span, now)
        made.owns_span = True
        return made

    def remote(self, traceparent: str, tracestate: str) -> Trace:
        """Return where the spans of a request go whose span is in another process, from its `Trace.sent`."""
        found = _PROPAGATOR.extract({"traceparent": traceparent, "tracestate": tracestate}, Context())
        return Trace(get_current_span(found).get_span_context())

    def add(
        self, trace: Trace, name: str, began_s: float, ended_s: float, attributes: Attributes | None = None,
        batch: SpanContext | None = None, error: str = "",
    ) -> None:  # fmt: skip
        """Add a span below that of a request.

        Args:
            trace: of the request.
            name: of the span.
            began_s: in monotonic seconds.
            ended_s: the same.
            attributes: of the span.
            batch: a span that it is linked to.
            error: kind of what failed; empty: it did not fail.
        """
        links = () if batch is None else (Link(batch),)
        begin = self._ns(began_s)
        span = self._tracer.start_span(name, trace.parent, SpanKind.INTERNAL, attributes, links, begin)
        self._end(span, ended_s, error)

    def add_batch(
        self, members: Sequence[Trace], began_s: float, ended_s: float, attributes: Attributes, error: str = ""
    ) -> SpanContext:
        """Add the span of a batch, which is linked to the spans of its members. Arguments as `add`."""
        self._offset_ns = time.time_ns() - round(self._clock.now() * 1e9)
        links = [Link(one.link) for one in members]
        begin = self._ns(began_s)
        span = self._batches.start_span("batch", Context(), SpanKind.INTERNAL, attributes, links, begin)
        self._end(span, ended_s, error)
        return span.get_span_context()

    def end(self, trace: Trace, attributes: Attributes | None = None, error: str = "", *, failed: bool = False) -> None:
        """End the span of a call, or of a request of a stream, now.

        Args:
            trace: whose span ends.
            attributes: further ones.
            error: its kind; empty: it did not fail.
            failed: whether the error is the server's, so that the span's status is an error.
        """
        span, trace.span = trace.span, None
        if span is None:
            return
        if attributes:
            span.set_attributes(attributes)
        self._end(span, self._clock.now(), error, failed=failed)

    async def aclose(self, timeout_s: float) -> None:
        """Export what is left, in at most `timeout_s`. Later spans are dropped."""
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        flushed = asyncio.Event()

        def flush() -> None:
            self._queue.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(flushed.set)

        threading.Thread(target=flush, name="spans", daemon=True).start()
        try:
            async with asyncio.timeout(timeout_s):
                await flushed.wait()
        except TimeoutError:
            _log.warning("spans were not exported in time", waited_s=timeout_s, spans=self._queue.waiting)
            self._exporter.shutdown()  # ends the pauses between attempts

    def _ns(self, seconds: float) -> int:
        return self._offset_ns + round(seconds * 1e9)

    def _end(self, span: Span, ended_s: float, error: str, *, failed: bool = True) -> None:
        if error:
            span.set_attribute("error.type", error)
            if failed:
                span.set_status(StatusCode.ERROR)
        span.end(self._ns(ended_s))


def check() -> None:
    """Raise TracingUnavailable if the variables `OTEL_*` are invalid: before other processes depend on them."""
    try:
        BoundedSpans(OTLPSpanExporter()).shutdown()
        TracerProvider(resource=resource_of_process(), shutdown_on_exit=False)
    except Exception as error:
        raise TracingUnavailable(error) from error
