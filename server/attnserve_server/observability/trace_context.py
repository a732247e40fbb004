"""What a caller sends along to follow its call: a request id, and the W3C trace context. Its log lines carry both.

Each call is one task, so a context variable holds what belongs to the call. What is not valid is ignored,
as the specification demands of `traceparent`: a proxy in between must not make calls fail.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.observability.metrics import Metrics

if TYPE_CHECKING:
    from attnserve_server.observability.tracing import Tracing

MAX_TRACESTATE: Final = 512
"""Characters of the longest `tracestate` that is passed on. Source: W3C Trace Context, 3.3.1.5."""
FLUSH_S: Final = 2.0
"""Seconds that the spans of a process have at its end, within its grace period."""
KEYS: Final = frozenset({"x-request-id", "traceparent", "tracestate"})
_REQUEST_ID: Final = re.compile(r"[\x20-\x7e]{1,128}")
_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})(?P<span>[0-9a-f]{16})-[0-9a-f]{2}(?P<rest>-.*)?"
)
"""Source: W3C Trace Context, 3.2.2."""


@dataclass(frozen=True, slots=True)
class CallContext:
    """What came with one call, each empty if nothing valid did."""

    request_id: str = ""
    traceparent: str = ""
    tracestate: str = ""

    @property
    def trace_id(self) -> str:
        """The id of the trace, 32 hexadecimal digits; empty without one."""
        return self.traceparent[3:35]

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What the answer returns: the same, as keys and values."""
        pairs = (
            ("x-request-id", self.request_id), ("traceparent", self.traceparent), ("tracestate", self.tracestate)
        )  # fmt: skip
        return tuple(pair for pair in pairs if pair[1])


CALL: Final[ContextVar[CallContext | None]] = ContextVar("attnserve_call", default=None)
"""Of the call whose task this is; None if nothing came with it."""


def request_id_of_call() -> str:
    """Return the request id that came with the call of this task; empty if none did."""
    found = CALL.get()
    return "" if found is None else found.request_id


def is_traceparent(value: str) -> bool:
    """Return whether a `traceparent` is valid: of version 00 exactly, of a later one by its first four fields."""
    found = _TRACEPARENT.fullmatch(value)
    return found is not None and (found["rest"] is None or not value.startswith("00-"))


def context_of(pairs: Iterable[tuple[str, str | bytes]]) -> CallContext | None:
    """Read the metadata of a call, or the headers of an HTTP request with names in lower case; None if it has none.

    `tracestate` counts only beside a valid `traceparent`; several of them are joined, as its specification states.
    """
    request_id = traceparent = ""
    states: list[str] = []
    for key, value in pairs:
        if key not in KEYS or not isinstance(value, str):
            continue
        if key == "x-request-id" and _REQUEST_ID.fullmatch(value):
            request_id = value
        elif key == "traceparent" and is_traceparent(value):
            traceparent = value
        elif key == "tracestate":
            states.append(value)
    if not request_id and not traceparent:
        return None
    state = ",".join(states) if traceparent else ""
    return CallContext(request_id, traceparent, state if len(state) <= MAX_TRACESTATE else "")


def enter(context: CallContext) -> None:
    """Let a context hold for this task, and for the lines that it logs."""
    CALL.set(context)
    fields = {"request_id": context.request_id, "trace_id": context.trace_id}
    structlog.contextvars.bind_contextvars(**{key: value for key, value in fields.items() if value})


def tracing_of(settings: Settings, metrics: Metrics, clock: Clock) -> Tracing | None:
    """Return what makes and exports the spans of this process, also as `metrics.tracing`; None without `--tracing`.

    Call it before models are loaded. Raises TracingUnavailable.
    """
    if not settings.tracing or not is_exported(os.environ):
        return None
    from attnserve_server.observability.tracing import Tracing  # noqa: PLC0415 - needs the extra `otel`

    metrics.tracing = Tracing(metrics, clock)
    return metrics.tracing


def check_tracing(settings: Settings) -> None:
    """Raise TracingUnavailable if `tracing_of` will in another process of this server."""
    if settings.tracing and is_exported(os.environ):
        from attnserve_server.observability import tracing  # noqa: PLC0415 - as above

        tracing.check()


def is_exported(environment: Mapping[str, str]) -> bool:
    """Return whether spans are exported, by the standard variables that turn that off for all programs."""
    disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return not disabled and environment.get("OTEL_TRACES_EXPORTER", "").strip() != "none"
