"""The figures of a load test, and what makes it invalid.

A load test is invalid if its client was too busy or too late to measure the server, or if no request was answered.
Samples are made by hand; nothing is sent.
"""

from __future__ import annotations

from typing import Any

import pytest
from attnserve_client.bench.load import Outcome, Sample
from attnserve_client.bench.report import Effort, report_of, spread
from attnserve_client.bench.workload import Workload


def sample(index: int, due: float, took: float, *, late: float = 0.0, error: str = "", **run: Any) -> Sample:
    return Sample(index, due, due + late, due + took, Outcome(error=error, **run))


IDLE = Effort(begun_s=0.0, window_s=10.0, wall_s=10.0, cpu_s=1.0, loop_cpu_s=1.0)
PLAIN = Workload(requests=(), sequences=2, tokens=None)


def test_percentiles_are_observed_values() -> None:
    values = [float(number) for number in range(1, 1001)]
    assert spread(values) == {"mean": 500.5, "p50": 500, "p95": 950, "p99": 990, "p99.9": 999, "max": 1000}
    assert spread([]) == {}


def test_percentiles_above_the_samples_resolution_are_omitted() -> None:
    assert list(spread([1.0] * 99)) == ["mean", "p50", "p95", "max"]
    assert list(spread([1.0] * 100)) == ["mean", "p50", "p95", "p99", "max"]
    assert list(spread([1.0])) == ["mean", "p50", "max"]


def test_refusals_count_apart_from_answers() -> None:
    answers = [sample(index, float(index), 0.5) for index in range(9)]
    refusals = [sample(9, 1.0, 0.001, error="OVERLOADED"), sample(10, 1.0, 0.001, error="OVERLOADED")]
    report = report_of([*answers, *refusals], IDLE, PLAIN)
    assert (report.requests, report.answered, report.errors) == (11, 9, {"OVERLOADED": 2})
    assert report.requests_per_s == pytest.approx(0.9)
    assert report.sequences_per_s == pytest.approx(1.8)
    assert report.latency_s["max"] == 0.5
    assert report.error_latency_s["max"] == pytest.approx(0.001)
    assert report.invalid == ()


def test_answers_after_the_window_count_in_latencies_only() -> None:
    report = report_of([sample(0, 9.0, 0.5), sample(1, 9.0, 2.0)], IDLE, PLAIN)
    assert report.requests_per_s == pytest.approx(0.1)
    assert report.latency_s["max"] == 2.0


def test_runs_count_once_for_all_their_sequences() -> None:
    shared = {"batch_size": 4, "useful_tokens": 100, "computed_tokens": 120}
    alone = {"batch_size": 1, "useful_tokens": 50, "computed_tokens": 50}
    samples = [sample(index, 0.0, 0.1, **shared) for index in range(4)] + [sample(4, 0.0, 0.1, **alone)]
    report = report_of(samples, IDLE, PLAIN)
    assert report.batch_size == pytest.approx(2.5)
    assert report.computed_over_useful == pytest.approx(170 / 150)


@pytest.mark.parametrize(
    ("effort", "samples", "words"),
    [
        (Effort(0.0, 10.0, 10.0, 9.6, 9.5), [sample(0, 0.0, 0.1)], "event loop was busy for 95%"),
        (IDLE, [sample(index, 0.0, 0.1, late=0.05) for index in range(20)], "ms late (95th"),
        (IDLE, [sample(0, 0.0, 0.1, error="OVERLOADED")], "no request was answered"),
    ],
)
def test_busy_or_late_client_makes_a_load_test_invalid(effort: Effort, samples: list[Sample], words: str) -> None:
    (doubt,) = report_of(samples, effort, PLAIN).invalid
    assert words in doubt
