"""Every metric is declared once, exported under its own name, and bounded in its labels.

`SPECS` has the declarations. A metric that is used as one of another kind raises TypeError.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from attnserve_server.domain.machine import resident_bytes
from attnserve_server.observability.metrics import (
    BATCH_SIZE,
    QUEUE_DEPTH,
    QUEUE_SECONDS,
    RUNNING,
    SEQUENCES,
    SPECS,
    Metrics,
    MetricSpec,
)
from attnserve_server.observability.tally import Counter, Gauge, Histogram, HistogramSeries
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

NAMES = [spec.name for spec in SPECS]


def test_names_are_unique_and_prefixed() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(name.startswith(("attnserve_", "grpc_server_")) for name in NAMES)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_every_metric_has_a_help_text_and_reasons_for_its_buckets(spec: MetricSpec) -> None:
    assert spec.help.endswith(".")
    assert spec.kind in (Counter, Gauge, Histogram)
    assert (spec.kind is Counter) == spec.name.endswith("_total")
    assert bool(spec.buckets) == bool(spec.why_buckets) == (spec.kind is Histogram)
    assert list(spec.buckets) == sorted(set(spec.buckets))


def test_declared_metrics_are_exported() -> None:
    metrics = Metrics()
    for spec in SPECS:
        series = metrics._made[spec.name].labels(*["x"] * len(spec.labels))
        if isinstance(series, HistogramSeries):
            series.observe(1)
        else:
            series.inc()
    exported = {
        sample.name
        for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
        for sample in family.samples
    }
    for spec in SPECS:
        assert (f"{spec.name}_bucket" if spec.kind is Histogram else spec.name) in exported


def test_metric_of_another_kind_raises_type_error() -> None:
    metrics = Metrics()
    for get, spec in ((metrics.gauge, SEQUENCES), (metrics.counter, BATCH_SIZE), (metrics.histogram, QUEUE_DEPTH)):
        with pytest.raises(TypeError, match=spec.name):
            get(spec)


def test_each_model_has_its_own_series() -> None:
    metrics = Metrics()
    metrics.model("a", "1").sequences.inc(2)
    metrics.model("b", "1").sequences.inc(3)
    value = metrics.registry.get_sample_value
    assert value("attnserve_sequences_total", {"model": "a", "version": "1"}) == 2
    assert value("attnserve_sequences_total", {"model": "b", "version": "1"}) == 3


def test_loaded_model_exports_its_closed_label_sets_at_zero() -> None:
    metrics = Metrics()
    metrics.model("a", "1")
    value = metrics.registry.get_sample_value
    for reason in ("expired", "cancelled", "terminated", "failed"):
        assert value("attnserve_dropped_total", {"model": "a", "version": "1", "reason": reason}) == 0


def test_resident_bytes_grow_with_allocated_memory() -> None:
    before = resident_bytes()
    allocated = np.ones(8 * 2**20, np.uint64)
    # 64 MiB are written; meanwhile the interpreter may return some pages.
    assert resident_bytes() - before > 48 * 2**20
    del allocated


def test_resident_bytes_are_0_if_the_system_does_not_report_them(tmp_path: Path) -> None:
    assert resident_bytes(tmp_path / "missing") == 0


def filled(amount: float) -> Metrics:
    """Metrics of a process that counted, observed and holds `amount` in every family."""
    metrics = Metrics()
    for spec in SPECS:
        series = metrics._made[spec.name].labels(*["x"] * len(spec.labels))
        if isinstance(series, HistogramSeries):
            series.observe(amount, 3)
        else:
            series.inc(amount)
    return metrics


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels.get("le", "")): sample.value
        for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
        for sample in family.samples
        if sample.name.startswith(("attnserve_", "grpc_")) and not sample.name.endswith("_created")
    }


def test_merged_metrics_are_the_sums_of_all_processes_and_facts_stay() -> None:
    merged, facts = Metrics(), {spec.name for spec in SPECS if spec.is_fact}
    assert len(facts) == 2
    for _ in range(2):  # a second scrape counts nothing twice
        merged.merge(one.snapshot() for one in (filled(2), filled(5)))
    two, five, both = samples(filled(2)), samples(filled(5)), samples(merged)
    assert both == {key: two[key] + five[key] for key in two if key[0] not in facts}


def test_a_merged_counter_begins_when_the_first_process_did() -> None:
    one, other, merged = filled(1), filled(1), Metrics()
    for metrics, created in ((one, 50.0), (other, 20.0)):
        metrics.counter(SEQUENCES).labels("x", "x").created = created
    merged.merge((one.snapshot(), other.snapshot()))
    assert merged.counter(SEQUENCES).labels("x", "x").created == 20.0


def test_what_an_ended_process_counted_stays_and_its_gauges_do_not() -> None:
    ended, running, merged = Metrics(), Metrics(), Metrics()
    ended.model("plain", "1").running.set(7)
    labels = "plain", "1"
    for metrics, count in ((ended, 4), (running, 5)):
        model = metrics.model(*labels)
        model.sequences.inc(count)
        model.queue_seconds.observe(0.1, count)
    merged.keep(ended.snapshot())
    for _ in range(2):
        merged.merge([running.snapshot()])
        assert merged.counter(SEQUENCES).labels(*labels).value == 9
        assert sum(merged.histogram(QUEUE_SECONDS).labels(*labels).counts) == 9
        assert merged.gauge(RUNNING).labels(*labels).value == 0, "the ended process has no runs"


def test_a_process_is_removed_unless_another_has_its_name() -> None:
    metrics = Metrics()
    metrics.processes.rename("supervisor")
    metrics.processes.add("front 0", os.getpid())
    metrics.processes.remove("front 0", os.getpid() + 1)
    assert processes(metrics) == {"supervisor", "front 0"}
    metrics.processes.remove("front 0", os.getpid())
    assert processes(metrics) == {"supervisor"}


def test_each_process_has_its_series_until_it_ends() -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    metrics = Metrics()
    assert processes(metrics) == {"server"}
    metrics.processes.rename("supervisor")
    metrics.processes.add("front 0", other.pid)
    assert processes(metrics) == {"supervisor", "front 0"}
    other.kill()
    other.communicate()
    assert processes(metrics) == {"supervisor"}


def processes(metrics: Metrics) -> set[str]:
    """The names of the processes; each has each of the usual metrics once."""
    names = {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_start_time_seconds"}
    found = {
        (sample.name, sample.labels["process"])
        for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
        for sample in family.samples
        if sample.name in names
    }
    kinds = {process for _, process in found}
    assert found == {(name, process) for name in names for process in kinds}
    return kinds
