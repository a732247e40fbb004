"""The metrics of bounds, refusals, files that are loaded again, and audit lines; all others are in `metrics`."""

from __future__ import annotations

from typing import Final

from attnserve_server.observability.tally import Counter, Gauge, Histogram, MetricSpec

CONNECTIONS_DROPPED: Final = MetricSpec(
    Counter,
    "attnserve_connections_dropped_total",
    "Connections that the server closed, because their callers do not read (`unread`, `--unread-timeout-s`), or begin "
    "messages that do not arrive (`unsent`).",
    ("cause",),
)
UNREAD_BYTES: Final = MetricSpec(
    Gauge, "attnserve_unread_bytes", "Bytes of answers of over 64 KiB that are computed or not read yet."
)
REFUSAL_SECONDS: Final = MetricSpec(
    Histogram,
    "attnserve_refusal_seconds",
    "Time from the message of a call that is refused for overload, or because a model does not serve, to its status.",
    (),
    (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0),
    "a refusal costs about 0.2 ms, and 25 ms is its limit",
)
HTTP_REQUESTS: Final = MetricSpec(
    Counter,
    "attnserve_http_requests_total",
    "Requests to REST, by path and HTTP status; 499: the client left before its answer.",
    ("path", "status"),
)
HTTP_SECONDS: Final = MetricSpec(
    Histogram,
    "attnserve_http_seconds",
    "Time from the head of a request to REST until its answer is sent.",
    ("path",),
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    "as those of RPCs",
)
MODEL_LOADS: Final = MetricSpec(
    Counter,
    "attnserve_model_loads_total",
    "Versions of models that were `loaded`, `replaced` by new files, or `unloaded`, or whose load `failed`.",
    ("outcome",),
)
RELOADS: Final = MetricSpec(
    Counter,
    "attnserve_reloads_total",
    "Reloads of `certificates` and `tokens`: `ok`, or `failed`, after which the earlier ones stay in use.",
    ("files", "outcome"),
)
STALE: Final = MetricSpec(
    Gauge, "attnserve_reload_failed", "1 while files are not usable, and those read before are in use.", ("files",)
)
CERTIFICATE_END: Final = MetricSpec(
    Gauge,
    "attnserve_certificate_not_after_timestamp_seconds",
    "When the server's certificate expires, in seconds of the epoch.",
)
SPANS: Final = MetricSpec(
    Counter,
    "attnserve_spans_total",
    "Spans of `--tracing` that were `exported`, or lost: `queue_full`, as the collector is too slow, or `failed`.",
    ("outcome",),
)
AUDIT_LINES: Final = MetricSpec(
    Counter,
    "attnserve_audit_lines_total",
    "Lines of `--audit-log` that were `written`, or `dropped`, because the disk was full or slower than requests came.",
    ("result",),
)
