"""Every metric is declared once, exported under its own name, and bounded in its labels."""

from __future__ import annotations

import pytest
from attnserve_server.observability.metrics import BATCH_SIZE, QUEUE_DEPTH, SEQUENCES, SPECS, Metrics, MetricSpec
from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

NAMES = [spec.name for spec in SPECS]


def test_names_are_unique_and_prefixed() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(name.startswith(("attnserve_", "grpc_server_")) for name in NAMES)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_a_metric_says_what_it_is(spec: MetricSpec) -> None:
    assert spec.help.endswith(".")
    assert spec.kind in (Counter, Gauge, Histogram)
    assert (spec.kind is Counter) == spec.name.endswith("_total")
    assert bool(spec.buckets) == bool(spec.why_buckets) == (spec.kind is Histogram)
    assert list(spec.buckets) == sorted(set(spec.buckets))


def test_what_is_declared_is_what_is_exported() -> None:
    metrics = Metrics()
    for spec in SPECS:
        series = metrics._made[spec.name].labels(*["x"] * len(spec.labels))
        if isinstance(series, Histogram):
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


def test_asking_for_a_metric_as_what_it_is_not_is_a_programming_error() -> None:
    metrics = Metrics()
    for get, spec in ((metrics.gauge, SEQUENCES), (metrics.counter, BATCH_SIZE), (metrics.histogram, QUEUE_DEPTH)):
        with pytest.raises(TypeError, match=spec.name):
            get(spec)


def test_one_models_series_are_its_own() -> None:
    metrics = Metrics()
    metrics.model("a", "1").sequences.inc(2)
    metrics.model("b", "1").sequences.inc(3)
    value = metrics.registry.get_sample_value
    assert value("attnserve_sequences_total", {"model": "a", "version": "1"}) == 2
    assert value("attnserve_sequences_total", {"model": "b", "version": "1"}) == 3


def test_a_loaded_model_shows_its_closed_sets_before_anything_happened() -> None:
    metrics = Metrics()
    metrics.model("a", "1")
    value = metrics.registry.get_sample_value
    for reason in ("expired", "cancelled", "terminated", "failed"):
        assert value("attnserve_dropped_total", {"model": "a", "version": "1", "reason": reason}) == 0
