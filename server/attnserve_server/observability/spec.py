"""The metrics of bounds, refusals, files that are loaded again, and row features; all others are in `metrics`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attnserve_server.domain.values import AttentionFeature
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
_SITE_KIND: Final = ("model", "version", "kind")
_SHARES: Final = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
ATTENTION_ENTROPY: Final = MetricSpec(
    Histogram,
    "attnserve_attention_entropy_nats",
    "Entropy of each row of attention weights of each head, of requests that select features of each head, and of "
    "those that `--feature-sample` draws. `kind`: self, causal or cross.",
    _SITE_KIND,
    (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0),
    "a row over S keys has at most ln S nats: 3.5 for 32 keys, 6.2 for 512",
)
ATTENTION_TOP1: Final = MetricSpec(
    Histogram,
    "attnserve_attention_top1_ratio",
    "Greatest weight of each of these rows.",
    _SITE_KIND,
    _SHARES,
    "a share: tenths, and finer where rows are flat or attend to one key",
)
ATTENTION_FIRST: Final = MetricSpec(
    Histogram,
    "attnserve_attention_first_token_ratio",
    "Weight of the first key, which is often an attention sink, in each of these rows.",
    _SITE_KIND,
    _SHARES,
    "as for the greatest weight",
)
ATTENTION_DISTANCE: Final = MetricSpec(
    Histogram,
    "attnserve_attention_distance_tokens",
    "Mean distance of the keys from the query, by weight, of each of these rows. None for cross-attention.",
    _SITE_KIND,
    (0.5, 1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0),
    "steps of about two: heads attend to neighbours, or over a whole text",
)
FEATURES: Final[Mapping[AttentionFeature, MetricSpec]] = {
    AttentionFeature.ENTROPY: ATTENTION_ENTROPY,
    AttentionFeature.TOP1_SHARE: ATTENTION_TOP1,
    AttentionFeature.FIRST_TOKEN: ATTENTION_FIRST,
    AttentionFeature.MEAN_DISTANCE: ATTENTION_DISTANCE,
}
"""The histogram of each row feature."""
ATTENTION_OBSERVED: Final = MetricSpec(
    Counter,
    "attnserve_attention_observed_total",
    "Sequences whose row features were counted: those that `selected` features, and those that were `sampled`; and "
    "those that were drawn and `skipped`, because the maps of one site exceed the memory limit.",
    ("model", "version", "source"),
)
ATTENTION_DRIFT: Final = MetricSpec(
    Gauge,
    "attnserve_attention_drift",
    "Population stability index of a row feature: of the last sequences that were counted, against "
    "`reference_features` of the bundle, as the mean over its sites. Below 0.1: the same distribution; above 0.25: "
    "another one.",
    ("model", "version", "feature"),
)
