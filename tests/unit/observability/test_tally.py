"""The page of metrics is the one that prometheus_client's own metrics would give for the same changes."""

from __future__ import annotations

import random
import re
from datetime import UTC, datetime

import prometheus_client
import pytest
from attnserve_server.observability import tally
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics

BOUNDS = (0.5, 1.0, 2.5)


def without_times(page: str) -> str:
    """A page without the values of `_created`, the time when a series began; these must be about now."""
    now = datetime.now(UTC).timestamp()  # noqa: TID251 - what the page holds
    for value in re.findall(r"^\w+_created(?:{[^}]*})? (\S+)", page, re.MULTILINE):
        assert 0 <= now - float(value) < 60
    return re.sub(r"(_created(?:{[^}]*})?) \S+", r"\1", page)


@pytest.mark.parametrize("render", [generate_latest, openmetrics], ids=["text", "OpenMetrics"])
def test_pages_equal_those_of_prometheus_client(render) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    families = (
        tally.Counter("calls_total", "Calls.", ("kind",)),
        tally.Gauge("depth", "Depth."),
        tally.Histogram("wait_seconds", "Waits.", ("kind",), BOUNDS),
    )
    calls, depth, waits = families
    ours.register(tally.Exported(families))
    their_calls = prometheus_client.Counter("calls_total", "Calls.", ("kind",), registry=theirs)
    their_depth = prometheus_client.Gauge("depth", "Depth.", registry=theirs)
    their_waits = prometheus_client.Histogram("wait_seconds", "Waits.", ("kind",), registry=theirs, buckets=BOUNDS)
    chance = random.Random(5)
    for _ in range(200):
        kind, value = chance.choice("ab"), chance.choice([0.1, 0.5, 0.75, 2.5, 9.0])
        for counter in (calls, their_calls):
            counter.labels(kind).inc(2)
        for histogram in (waits, their_waits):
            histogram.labels(kind).observe(value)
    for gauge in (depth.labels(), their_depth):
        gauge.set(7)
        gauge.inc(2)
        gauge.dec()
    page, their_page = (without_times(render(registry).decode()) for registry in (ours, theirs))
    assert page == their_page


def test_an_observation_counts_several_times() -> None:
    series = tally.HistogramSeries(BOUNDS)
    series.observe(1.0, 3)
    assert (series.counts, series.total) == ([0, 3, 0, 0], 3.0)


def test_a_gauge_is_read_from_its_function() -> None:
    gauge = tally.Gauge("depth", "Depth.")
    values = [3, 4]
    gauge.labels().set_function(lambda: values[0])
    assert gauge.labels().value == 3
    values[0] = 8
    assert gauge.labels().value == 8


def test_a_wrong_number_of_labels_raises_value_error() -> None:
    with pytest.raises(ValueError, match="calls_total has the labels kind; got 2 values"):
        tally.Counter("calls_total", "Calls.", ("kind",)).labels("a", "b")


def test_an_exemplar_is_on_pages_of_the_openmetrics_format_only() -> None:
    waits = tally.Histogram("wait_seconds", "Waits.", ("kind",), BOUNDS)
    registry = CollectorRegistry()
    registry.register(tally.Exported((waits,)))
    for value in (0.25, 0.75, 9.0):
        waits.labels("a").observe(value)
    waits.labels("a").exemplify(0.75, "ab12")
    waits.labels("a").exemplify(9.0, "cd34")
    page = openmetrics(registry).decode()
    assert re.search(r'le="1.0"} 2.0 # {trace_id="ab12"} 0.75 \d+', page)
    assert re.search(r'le="\+Inf"} 3.0 # {trace_id="cd34"} 9.0 \d+', page)
    assert page.count("trace_id") == 2
    assert "trace_id" not in generate_latest(registry).decode()


def test_of_the_exemplars_of_several_processes_the_newest_counts() -> None:
    one, other, joined = (tally.Histogram("wait_seconds", "Waits.", (), BOUNDS) for _ in range(3))
    for family, trace in ((one, "old"), (other, "new")):
        family.labels().observe(0.75)
        family.labels().exemplify(0.75, trace)
    other.labels().exemplify(0.25, "alone")
    at = other.labels().exemplars[1][2] + 1
    other.labels().exemplars[1] = "new", 0.75, at
    joined.add(other.values())
    joined.add(one.values())
    assert joined.labels().exemplars[1] == ("new", 0.75, at)
    assert joined.labels().exemplars[0][0] == "alone"
    assert joined.labels().counts == [0, 2, 0, 0]
