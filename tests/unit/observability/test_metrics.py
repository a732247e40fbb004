"""Every metric is declared once, exported under its own name, and bounded in its labels.

`SPECS` has the declarations. A metric that is used as one of another kind raises TypeError.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attnserve_server.observability.metrics import (
    BATCH_SIZE,
    QUEUE_DEPTH,
    SEQUENCES,
    SPECS,
    Metrics,
    MetricSpec,
    resident_bytes,
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
