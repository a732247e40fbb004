"""The figures of a load test: rates, percentiles, the client's own processor time, and whether they are valid.

Nothing here fails: without answers, latencies are empty, and the report is invalid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from attnserve_client.bench.load import Sample
from attnserve_client.bench.workload import Workload

QUANTILES: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
BUSY_LIMIT: Final = 0.9
"""Share of time that the client's event loop may be busy; above it, the client was the bottleneck."""
LATE_LIMIT: Final = 0.1
"""How late requests may be sent, as a share of the median latency."""
_LATE_FLOOR_S: Final = 0.005
"""Seconds by which requests may be sent late at any latency."""


@dataclass(frozen=True, slots=True)
class Effort:
    """Time that a load test took, and processor time of the client, in seconds.

    Attributes:
        begun_s: When the first request was due, on the samples' clock.
        window_s: Time during which requests were sent; rates are taken over it, not over the wait for the last answers.
        wall_s: Time until the last answer.
        cpu_s: Processor time of the whole process.
        loop_cpu_s: Processor time of the thread that all callers share.
    """

    begun_s: float
    window_s: float
    wall_s: float
    cpu_s: float
    loop_cpu_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one load test. Times are in seconds; latencies are those of answers, from when requests were due.

    Attributes:
        requests: Requests sent.
        answered: Requests answered.
        errors: Requests refused, by reason.
        duration_s: Time over which rates are taken; later answers count in the latencies only.
        requests_per_s: Answered requests a second.
        sequences_per_s: Their sequences a second.
        tokens_per_s: Their tokens a second; None if only the server knows the lengths.
        bytes_per_s: Bytes of response messages a second.
        latency_s: Mean, percentiles and maximum; empty if nothing was answered.
        error_latency_s: The same of refusals.
        sent_late_s: How late requests were sent: mean, percentiles and maximum; 0 in closed loops.
        queue_s: Time that the first sequence of each request waited in the server's queue, likewise.
        batch_size: Sequences in a run, mean over runs.
        computed_over_useful: Computed tokens (all positions, padding included) over positions that carry data.
        client_cores: Cores that the client kept busy.
        client_loop_busy: Share of time that the thread of all callers was busy.
        invalid: Reasons why the figures describe the client rather than the server; empty for a valid run.
    """

    requests: int
    answered: int
    errors: dict[str, int]
    duration_s: float
    requests_per_s: float
    sequences_per_s: float
    tokens_per_s: float | None
    bytes_per_s: float
    latency_s: dict[str, float]
    error_latency_s: dict[str, float]
    sent_late_s: dict[str, float]
    queue_s: dict[str, float]
    batch_size: float | None
    computed_over_useful: float | None
    client_cores: float
    client_loop_busy: float
    invalid: tuple[str, ...]


def report_of(samples: Sequence[Sample], effort: Effort, workload: Workload) -> Report:
    """Compute the report from the samples of a workload's requests."""
    answered = [sample for sample in samples if not sample.outcome.error]
    refused = [sample for sample in samples if sample.outcome.error]
    in_time = [sample for sample in answered if sample.done_s <= effort.begun_s + effort.window_s]
    window, wall = max(effort.window_s, 1e-9), max(effort.wall_s, 1e-9)
    latencies = spread([sample.latency_s for sample in answered])
    late = spread([sample.sent_s - sample.due_s for sample in samples])
    known = workload.tokens is not None
    # A run appears once for each of its sequences, so each sample weighs 1 / batch_size.
    runs = [sample.outcome for sample in answered if sample.outcome.batch_size]
    shares = np.array([1 / run.batch_size for run in runs])
    useful = float(np.sum([run.useful_tokens for run in runs] * shares)) if runs else 0.0
    busy = effort.loop_cpu_s / wall
    return Report(
        requests=len(samples),
        answered=len(answered),
        errors=dict(Counter(sample.outcome.error for sample in refused).most_common()),
        duration_s=effort.window_s,
        requests_per_s=len(in_time) / window,
        sequences_per_s=len(in_time) * workload.sequences / window,
        tokens_per_s=sum(workload.tokens_of(sample.index) for sample in in_time) / window if known else None,
        bytes_per_s=sum(sample.outcome.bytes_received for sample in in_time) / window,
        latency_s=latencies,
        error_latency_s=spread([sample.latency_s for sample in refused]),
        sent_late_s=late,
        queue_s=spread([run.queue_s for run in runs]),
        batch_size=len(runs) / float(shares.sum()) if runs else None,
        computed_over_useful=float(np.sum([run.computed_tokens for run in runs] * shares)) / useful if useful else None,
        client_cores=effort.cpu_s / wall,
        client_loop_busy=busy,
        invalid=tuple(_invalidities(busy, late, latencies)),
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean, percentiles (observed values, by nearest rank) and maximum by name; empty for no values.

    Percentiles above the resolution of the sample are omitted: of 500 values, the 99.9th would be the maximum.
    """
    if not values:
        return {}
    ranked = np.sort(np.asarray(values, np.float64))
    quantiles = {
        name: float(np.quantile(ranked, share, method="inverted_cdf"))
        for name, share in QUANTILES.items()
        if share == QUANTILES["p50"] or len(ranked) * (1 - share) >= 1 - 1e-9
    }
    return {"mean": float(ranked.mean()), **quantiles, "max": float(ranked[-1])}


def _invalidities(busy: float, late: dict[str, float], latencies: dict[str, float]) -> list[str]:
    reasons = []
    if busy > BUSY_LIMIT:
        loop = f"the client's event loop was busy for {busy:.0%} of the time, more than {BUSY_LIMIT:.0%}"
        reasons.append(f"{loop}: run it from more processes or machines")
    allowed = max(_LATE_FLOOR_S, LATE_LIMIT * latencies.get("p50", 0.0))
    worst = late.get("p95", late.get("max", 0.0))
    if worst > allowed:
        delay = f"requests were sent {1e3 * worst:.1f} ms late (95th percentile), more than {1e3 * allowed:.1f} ms"
        reasons.append(f"{delay}: give the client more processor time")
    if not latencies:
        reasons.append("no request was answered: see the refusals")
    return reasons
