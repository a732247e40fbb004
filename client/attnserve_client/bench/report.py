"""What came of a run: rates, percentiles, how busy the client itself was, and whether the figures may be believed."""

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
"""Of the client's event loop, the share of time from which on it was the bottleneck."""
LATE_LIMIT: Final = 0.1
"""How late requests may be sent, as a share of the median latency; a few milliseconds are always fine."""
_LATE_FLOOR_S: Final = 0.005


@dataclass(frozen=True, slots=True)
class Effort:
    """What a run took of the client, in seconds.

    Attributes:
        begun_s: when the first request was due, on the samples' clock.
        window_s: from then on, what rates are taken over: while requests were sent, not while the last were awaited.
        wall_s: until the last answer.
        cpu_s: of the whole process.
        loop_cpu_s: of the thread that all callers share.
    """

    begun_s: float
    window_s: float
    wall_s: float
    cpu_s: float
    loop_cpu_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one run. Times are in seconds; latencies, of answers alone, count from when requests were due.

    Attributes:
        requests: how many were sent.
        answered: how many were answered.
        errors: how many were not, by reason.
        duration_s: what rates are taken over; answers that came later count for nothing but their latency.
        requests_per_s: answered ones.
        sequences_per_s: their sequences.
        tokens_per_s: their tokens; None where only the server knows them.
        bytes_per_s: of answers, as messages.
        latency_s: mean, percentiles and greatest; empty where nothing was answered.
        error_latency_s: the same of refusals.
        sent_late_s: how late requests were sent, percentiles; 0 in closed loops.
        queue_s: what first sequences waited in the server, percentiles.
        batch_size: sequences that shared a run, mean over runs.
        computed_over_useful: computed tokens (padding included) divided by useful tokens.
        client_cores: cores that the client kept busy.
        client_loop_busy: share of the time that the thread of all callers was busy.
        invalid: why the figures tell more of the client than of the server; empty where they do not.
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
    """Joins what was measured of a workload's requests."""
    answered = [sample for sample in samples if not sample.outcome.error]
    refused = [sample for sample in samples if sample.outcome.error]
    in_time = [sample for sample in answered if sample.done_s <= effort.begun_s + effort.window_s]
    window, wall = max(effort.window_s, 1e-9), max(effort.wall_s, 1e-9)
    latencies = spread([sample.latency_s for sample in answered])
    late = spread([sample.sent_s - sample.due_s for sample in samples])
    known = workload.tokens is not None
    # A run appears once for each of its sequences, hence the weights.
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
        invalid=tuple(_doubts(busy, late, latencies)),
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and greatest; empty for no values. A percentile is a value that was seen (nearest rank).

    Percentiles that too few values reach are left out: of 500 values, the 99.9th would be the greatest.
    """
    if not values:
        return {}
    seen = np.sort(np.asarray(values, np.float64))
    quantiles = {
        name: float(np.quantile(seen, share, method="inverted_cdf"))
        for name, share in QUANTILES.items()
        if share == QUANTILES["p50"] or len(seen) * (1 - share) >= 1 - 1e-9
    }
    return {"mean": float(seen.mean()), **quantiles, "max": float(seen[-1])}


def _doubts(busy: float, late: dict[str, float], latencies: dict[str, float]) -> list[str]:
    doubts = []
    if busy > BUSY_LIMIT:
        said = f"the client's event loop was busy for {busy:.0%} of the time, more than {BUSY_LIMIT:.0%}"
        doubts.append(f"{said}: run it from more processes or machines")
    allowed = max(_LATE_FLOOR_S, LATE_LIMIT * latencies.get("p50", 0.0))
    worst = late.get("p95", late.get("max", 0.0))
    if worst > allowed:
        said = f"requests were sent late, the 95th percentile by {1e3 * worst:.1f} ms, more than {1e3 * allowed:.1f} ms"
        doubts.append(f"{said}: the client lacks processor time")
    if not latencies:
        doubts.append("nothing was answered")
    return doubts
