"""The bounded queue of ended spans, the count of those that are exported or lost, and the resource that sends them."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Final

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from attnserve_server import __version__

_MAX_QUEUE: Final = 2048
"""Default of `OTEL_BSP_MAX_QUEUE_SIZE`, by its specification."""


class BoundedSpans(SpanProcessor):
    """The library's queue of ended spans, which drops without a count, behind a bound of its size that counts.

    `counts`: of spans that were exported, that found the queue full, and whose export failed. Any thread.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self.counts = {"exported": 0, "queue_full": 0, "failed": 0}
        self.waiting = 0
        self._lock = threading.Lock()
        self._most = int(os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE") or _MAX_QUEUE)
        self._processor = BatchSpanProcessor(_Counted(exporter, self), max_queue_size=self._most)

    def on_end(self, span: ReadableSpan) -> None:
        """Queue an ended span."""
        with self._lock:
            if self.waiting >= self._most:
                self.counts["queue_full"] += 1
                return
            self.waiting += 1
        self._processor.on_end(span)

    def taken(self, count: int) -> None:
        """Note that so many spans have left the queue."""
        with self._lock:
            self.waiting -= count

    def count(self, outcome: str, count: int) -> None:
        """Count spans."""
        with self._lock:
            self.counts[outcome] += count

    def shutdown(self) -> None:
        """Export what is left."""
        self._processor.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Export what waits now."""
        return self._processor.force_flush(timeout_millis)


class _Counted(SpanExporter):
    """An exporter whose outcomes are counted. The exporting thread only."""

    def __init__(self, inner: SpanExporter, queue: BoundedSpans) -> None:
        self._inner = inner
        self._queue = queue

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export spans."""
        self._queue.taken(len(spans))
        found = SpanExportResult.FAILURE
        try:
            found = self._inner.export(spans)
        finally:
            self._queue.count("exported" if found is SpanExportResult.SUCCESS else "failed", len(spans))
        return found

    def shutdown(self) -> None:
        """End."""
        self._inner.shutdown()


def resource_of_process() -> Resource:
    """Return the resource that `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME` state, with defaults."""
    stated = Resource.create({"service.version": __version__, "process.pid": os.getpid()})
    if not str(stated.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        return stated
    return stated.merge(Resource({SERVICE_NAME: "attnserve"}))
