"""Every metric that the server exports, declared once. `docs/reference/metrics.md` is generated from this module.

Labels are models, versions and small closed sets; never text from a caller, so the number of series is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector

from attnserve_server.observability import spec as declared
from attnserve_server.observability.logs import dropped_lines
from attnserve_server.observability.process_metrics import ProcessMetrics
from attnserve_server.observability.tally import Counter, CounterSeries, Exported, Family, Gauge, Histogram, MetricSpec

if TYPE_CHECKING:
    from attnserve_server.observability.tracing import Tracing

MODEL: Final = ("model", "version")
CHECK_OUTCOMES: Final = ("equal", "different", "dropped", "failed")
RPC: Final = ("grpc_type", "grpc_service", "grpc_method")

MetricT = TypeVar("MetricT", Counter, Gauge, Histogram)


_LATENCY: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_WHY_LATENCY: Final = (
    "1 ms is a short sequence on a GPU, 10 s a long deadline; steps of about two keep a quantile within that factor"
)
_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128)

RPC_STARTED: Final = MetricSpec(Counter, "grpc_server_started_total", "RPCs started on the server.", RPC)
RPC_HANDLED: Final = MetricSpec(
    Counter, "grpc_server_handled_total", "RPCs completed on the server, by status code.", (*RPC, "grpc_code")
)
RPC_SECONDS: Final = MetricSpec(
    Histogram, "grpc_server_handling_seconds", "Time from the start to the end of an RPC.", RPC, _LATENCY, _WHY_LATENCY
)
REQUESTS: Final = MetricSpec(
    Counter,
    "attnserve_requests_total",
    "Unary and streamed requests by final status. `code` is a gRPC status name.",
    (*MODEL, "code"),
)
SEQUENCES: Final = MetricSpec(Counter, "attnserve_sequences_total", "Sequences that the runtime has computed.", MODEL)
QUEUE_SECONDS: Final = MetricSpec(
    Histogram,
    "attnserve_queue_seconds",
    "Time from a sequence's arrival to the start of its run.",
    MODEL,
    _LATENCY,
    _WHY_LATENCY,
)
COMPUTE_SECONDS: Final = MetricSpec(
    Histogram, "attnserve_compute_seconds", "Time of one run.", MODEL, _LATENCY, _WHY_LATENCY
)
WIDE_RUNS: Final = MetricSpec(
    Counter,
    "attnserve_wide_runs_total",
    "Runs that used all cores, because no other work waited or ran (`--wide-threads`).",
    MODEL,
)
BATCH_SIZE: Final = MetricSpec(
    Histogram,
    "attnserve_batch_size",
    "Sequences in one run.",
    MODEL,
    _SIZES,
    "powers of two, because batches range from 1 to 128 sequences",
)
USEFUL_TOKENS: Final = MetricSpec(
    Counter, "attnserve_useful_tokens_total", "Positions that carry data, over all runs.", MODEL
)
COMPUTED_TOKENS: Final = MetricSpec(
    Counter,
    "attnserve_computed_tokens_total",
    "Positions that the runtime computed, padding included, over all runs.",
    MODEL,
)
PADDING_TOKENS: Final = MetricSpec(
    Counter,
    "attnserve_padding_tokens_total",
    "Padding positions that the runtime computed, over all runs: computed tokens minus useful tokens.",
    MODEL,
)
PADDED_TOKENS: Final = MetricSpec(
    Counter,
    "attnserve_padded_tokens_total",
    "Deprecated, removed in the next release: all computed positions. Use `attnserve_computed_tokens_total`, or "
    "`attnserve_padding_tokens_total` for the padding alone.",
    MODEL,
)
QUEUE_DEPTH: Final = MetricSpec(Gauge, "attnserve_queue_depth", "Sequences that wait for a run.", MODEL)
QUEUE_BYTES: Final = MetricSpec(
    Gauge, "attnserve_queue_bytes", "Bytes of the waiting sequences and of their answers.", MODEL
)
RUNNING: Final = MetricSpec(Gauge, "attnserve_running_batches", "Runs in progress.", MODEL)
REFUSED: Final = MetricSpec(
    Counter,
    "attnserve_refused_total",
    "Requests refused before any work. `reason` is an ErrorInfo reason, or for overload its cause.",
    (*MODEL, "reason"),
)
DROPPED: Final = MetricSpec(
    Counter,
    "attnserve_dropped_total",
    "Sequences dropped after admission: `expired`, `cancelled` (before a run), `terminated` (run stopped), `failed`.",
    (*MODEL, "reason"),
)
BATCH_CHECKS: Final = MetricSpec(
    Counter,
    "attnserve_batch_checks_total",
    "Answers that `--verify-batches` selected, by the comparison with the sequence alone: `equal`, `different`, "
    "`dropped` (not repeated: work waited, the memory limit was reached, or the server drained), `failed`.",
    (*MODEL, "outcome"),
)
BATCH_MISMATCH: Final = MetricSpec(
    Counter,
    "attnserve_batch_mismatch_total",
    "Answers from batches that differ from those of the sequence alone by more than rounding.",
    MODEL,
)
BATCHING_ISOLATED: Final = MetricSpec(
    Gauge,
    "attnserve_batching_isolated",
    "1 if `--verify-action isolate` runs each sequence alone, from a mismatch until the next start; else 0.",
    MODEL,
)
ATTENTION_BYTES: Final = MetricSpec(
    Counter, "attnserve_attention_bytes_total", "Bytes of attention sent to callers.", (*MODEL, "form")
)
ATTENTION_SECONDS: Final = MetricSpec(
    Histogram,
    "attnserve_attention_seconds",
    "Time to reduce one sequence's attention to its selection.",
    MODEL,
    (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    "0.1 ms is the mean over one short layer, 250 ms all maps of a long sequence",
)
SESSION_BYTES: Final = MetricSpec(
    Gauge,
    "attnserve_session_memory_bytes",
    "Growth of the process's resident memory while the model was loaded.",
    MODEL,
)
EXECUTION_PROVIDER: Final = MetricSpec(
    Gauge,
    "attnserve_execution_provider_info",
    "1 for the onnxruntime execution provider and the precision in use.",
    (*MODEL, "provider", "precision"),
    is_fact=True,
)
MODEL_STATE: Final = MetricSpec(
    Gauge,
    "attnserve_model_state",
    "1 for the current state of the model: loading, ready, draining or failed.",
    (*MODEL, "state"),
    is_fact=True,
)
FRONT_REASONS: Final = ("crash", "hang")
ENGINE_REASONS: Final = (*FRONT_REASONS, "memory")
ENGINE_RESTARTS: Final = MetricSpec(
    Counter,
    "attnserve_engine_restarts_total",
    "Engines that were replaced: after a `crash`, a `hang`, or over the limit of `memory`.",
    (*MODEL, "reason"),
)
FRONT_RESTARTS: Final = MetricSpec(
    Counter, "attnserve_front_restarts_total", "Fronts that were replaced: after a `crash` or a `hang`.", ("reason",)
)
LOG_LINES_DROPPED: Final = MetricSpec(
    Counter,
    "attnserve_log_lines_dropped_total",
    "Log lines dropped because the log was not read as fast as lines came, or its disk was full.",
)
ACCESS_REFUSED: Final = MetricSpec(
    Counter,
    "attnserve_access_refused_total",
    "Calls refused on both ports: `missing`, `malformed` or `unknown` token, `backed_off` (not examined), `scope`, "
    "`quota`, `certificate` (HTTP without one).",
    ("cause",),
)
TLS_HANDSHAKES: Final = MetricSpec(
    Counter, "attnserve_tls_handshakes_total", "TLS handshakes that began. gRPC reports no end of one.", ("port",)
)

SPECS: Final[tuple[MetricSpec, ...]] = tuple(
    value for value in [*globals().values(), *vars(declared).values()] if isinstance(value, MetricSpec)
)


class ModelMetrics:
    """One model's series with their labels resolved once, so that a run looks up no label. Event loop only."""

    def __init__(self, metrics: Metrics, model: str, version: str) -> None:
        self.server = metrics
        self._labels = (model, version)
        self.tracing = metrics.tracing
        self.sequences = metrics.counter(SEQUENCES).labels(*self._labels)
        self.queue_seconds = metrics.histogram(QUEUE_SECONDS).labels(*self._labels)
        self.compute_seconds = metrics.histogram(COMPUTE_SECONDS).labels(*self._labels)
        self.wide_runs = metrics.counter(WIDE_RUNS).labels(*self._labels)
        self.batch_size = metrics.histogram(BATCH_SIZE).labels(*self._labels)
        self._useful_tokens = metrics.counter(USEFUL_TOKENS).labels(*self._labels)
        self._computed_tokens = metrics.counter(COMPUTED_TOKENS).labels(*self._labels)
        self._padding_tokens = metrics.counter(PADDING_TOKENS).labels(*self._labels)
        self._padded_tokens = metrics.counter(PADDED_TOKENS).labels(*self._labels)
        self.running = metrics.gauge(RUNNING).labels(*self._labels)
        self.attention_seconds = metrics.histogram(ATTENTION_SECONDS).labels(*self._labels)
        self.batch_mismatches = metrics.counter(BATCH_MISMATCH).labels(*self._labels)
        self.isolated = metrics.gauge(BATCHING_ISOLATED).labels(*self._labels)
        self.session_bytes = metrics.gauge(SESSION_BYTES).labels(*self._labels)
        self._attention_bytes = {
            form: metrics.counter(ATTENTION_BYTES).labels(*self._labels, form)
            for form in ("dense", "windowed", "linear")
        }
        self._dropped = {
            reason: metrics.counter(DROPPED).labels(*self._labels, reason)
            for reason in ("expired", "cancelled", "terminated", "failed")
        }
        self._checked = {
            outcome: metrics.counter(BATCH_CHECKS).labels(*self._labels, outcome) for outcome in CHECK_OUTCOMES
        }
        self._ended: dict[str, CounterSeries] = {}

    def count_tokens(self, useful: int, computed: int) -> None:
        """Count the positions of one run.

        Args:
            useful: positions that carried data.
            computed: all positions of the run, padding included.
        """
        self._useful_tokens.inc(useful)
        self._computed_tokens.inc(computed)
        self._padding_tokens.inc(computed - useful)
        self._padded_tokens.inc(computed)

    def attention_bytes(self, form: str) -> CounterSeries:
        """Return the counter of bytes of attention sent, for one form. Raise KeyError for an unknown one."""
        return self._attention_bytes[form]

    def dropped(self, reason: str) -> CounterSeries:
        """Return the counter of dropped sequences, for one reason. Raise KeyError for an unknown one."""
        return self._dropped[reason]

    def checked(self, outcome: str) -> CounterSeries:
        """Return the counter of answers selected for a repeat, for one of `CHECK_OUTCOMES`; else raise KeyError."""
        return self._checked[outcome]

    def ended(self, code: str) -> None:
        """Count a request that ended with this gRPC status name."""
        counter = self._ended.get(code)
        if counter is None:
            counter = self._ended[code] = self.server.counter(REQUESTS).labels(*self._labels, code)
        counter.inc()

    def watch_queue(self, depth: Callable[[], float], size: Callable[[], float]) -> None:
        """Set the functions that a scrape calls for the queue's gauges: `depth` in sequences, `size` in bytes."""
        self.server.gauge(QUEUE_DEPTH).labels(*self._labels).set_function(depth)
        self.server.gauge(QUEUE_BYTES).labels(*self._labels).set_function(size)

    def refused(self, reason: str) -> None:
        """Count a request that was refused before any work."""
        self.server.counter(REFUSED).labels(*self._labels, reason).inc()

    def provider(self, provider: str, precision: str) -> None:
        """Set the execution provider and the precision in use."""
        self.server.gauge(EXECUTION_PROVIDER).labels(*self._labels, provider, precision).set(1)

    def state(self, state: str) -> None:
        """Set the state of the model."""
        for other in ("loading", "ready", "draining", "failed"):
            self.server.gauge(MODEL_STATE).labels(*self._labels, other).set(other == state)


class Metrics:
    """All metrics of one server in one registry, with those of its processes and of the interpreter."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.processes = ProcessMetrics()
        self.tracing: Tracing | None = None  # takes spans, with `--tracing`; set before models
        self.registry.register(self.processes)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._made: dict[str, Family[Any]] = {
            spec.name: spec.kind(spec.name, spec.help, spec.labels, spec.buckets) for spec in SPECS
        }
        self._ended: dict[str, Family[Any]] = {
            spec.name: spec.kind(spec.name, spec.help, spec.labels, spec.buckets)
            for spec in SPECS
            if spec.kind is not Gauge
        }
        self.counter(LOG_LINES_DROPPED).labels().function = dropped_lines
        self.registry.register(Exported(tuple(self._made.values())))

    def model(self, model: str, version: str) -> ModelMetrics:
        """Return one model's series. Call it for loaded models only, so that the number of series is bounded."""
        return ModelMetrics(self, model, version)

    def forget(self, model: str, version: str) -> None:
        """Remove one model's series, after its last request, also from what ended processes have counted."""
        for spec in SPECS:
            if spec.labels[:2] == MODEL:
                for families in (self._made, self._ended):
                    if spec.name in families:
                        families[spec.name].remove(model, version)

    def snapshot(self) -> dict[str, list[Any]]:
        """Return the values of all series but facts, for `merge` in another process."""
        return {spec.name: self._made[spec.name].values() for spec in SPECS if not spec.is_fact}

    def keep(self, snapshot: dict[str, list[Any]]) -> None:
        """Add what a process has counted that has ended to all later merges, without its gauges."""
        for name, family in self._ended.items():
            family.add(snapshot.get(name, ()))

    def merge(self, snapshots: Iterable[dict[str, list[Any]]]) -> None:
        """Replace all series but facts by the sums of those of other processes, and of those that have ended."""
        for spec in SPECS:
            if not spec.is_fact:
                self._made[spec.name].clear()
        for name, family in self._ended.items():
            self._made[name].add(family.values())
        for snapshot in snapshots:
            for name, values in snapshot.items():
                self._made[name].add(values)

    def counter(self, spec: MetricSpec) -> Counter:
        """Return the counter of `spec`. Raise TypeError if it is another kind of metric."""
        return self._get(spec, Counter)

    def gauge(self, spec: MetricSpec) -> Gauge:
        """Return the gauge of `spec`. Raise TypeError if it is another kind of metric."""
        return self._get(spec, Gauge)

    def histogram(self, spec: MetricSpec) -> Histogram:
        """Return the histogram of `spec`. Raise TypeError if it is another kind of metric."""
        return self._get(spec, Histogram)

    def _get(self, spec: MetricSpec, kind: type[MetricT]) -> MetricT:
        metric = self._made[spec.name]
        if not isinstance(metric, kind):
            raise TypeError(f"{spec.name} is not a {kind.__name__}")
        return metric
