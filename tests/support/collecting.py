"""A collector of OpenTelemetry: its gRPC service of traces, on loopback, which keeps the spans that it receives."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """A span as it was received. Ids are hexadecimal, times nanoseconds of the epoch."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    begin: int
    end: int
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    failed: bool
    message: str
    resource: dict[str, Any]


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps spans. Any thread."""

    endpoint: str = ""
    _spans: list[Span] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def Export(self, request: Any, context: Any) -> service.ExportTraceServiceResponse:  # noqa: N802 - of the service
        del context
        found = [
            Span(
                one.name, one.trace_id.hex(), one.span_id.hex(), one.parent_span_id.hex(), one.kind,
                one.start_time_unix_nano, one.end_time_unix_nano, _values(one.attributes),
                tuple((link.trace_id.hex(), link.span_id.hex()) for link in one.links),
                one.status.code == 2, one.status.message, _values(group.resource.attributes),
            )
            for group in request.resource_spans
            for scope in group.scope_spans
            for one in scope.spans
        ]  # fmt: skip
        with self._changed:
            self._spans += found
            self._changed.notify_all()
        return service.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[Span]:
        """All spans so far."""
        with self._changed:
            return list(self._spans)

    def named(self, name: str) -> list[Span]:
        """The spans of a name."""
        return [one for one in self.spans if one.name == name]

    def wait(self, holds: Callable[[list[Span]], bool], timeout_s: float = 15.0) -> list[Span]:
        """Wait until the spans satisfy a condition, and return them. AssertionError after `timeout_s`."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while not holds(self._spans):
                left = until - time.monotonic()
                assert left > 0, f"not in {sorted(one.name for one in self._spans)}"
                self._changed.wait(left)
            return list(self._spans)


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """Runs a collector until the block ends."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()


def variables(endpoint: str, **others: str) -> dict[str, str]:
    """The variables of a server that exports to a collector a few milliseconds after each span."""
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "20", **others}
