"""Counters, gauges and histograms for one event loop, which cost a call a few additions, and their export on a scrape.

prometheus_client's own metrics take a lock for each change, and compare an observation with each bucket. Here, a change
is an addition without a lock, so that only the event loop may make it; an instance's thread returns what it has to
count with its results. `Exported` gives prometheus_client the values for a page.

A wrong number of labels raises ValueError.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, ClassVar, Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

S = TypeVar("S")


def _now() -> float:
    """Return the wall clock's time, in seconds of the epoch: when a series began, for `_created`."""
    return datetime.now(UTC).timestamp()  # noqa: TID251 - of the format: scrapers compare it with their own clocks


class CounterSeries:
    """A number that only grows."""

    __slots__ = ("created", "function", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.function: Callable[[], float] | None = None
        """Counted elsewhere, by any thread; added to the number when it is exported."""
        self.created = _now()

    @property
    def total(self) -> float:
        """The number now."""
        return self.value if self.function is None else self.value + self.function()

    def inc(self, amount: float = 1) -> None:
        """Add to the number."""
        self.value += amount


class GaugeSeries:
    """A number that is set, or read from a function when it is exported."""

    __slots__ = ("_function", "_value")

    def __init__(self) -> None:
        self._value = 0.0
        self._function: Callable[[], float] | None = None

    @property
    def value(self) -> float:
        """The number now."""
        return self._value if self._function is None else float(self._function())

    def inc(self, amount: float = 1) -> None:
        """Add to the number."""
        self._value += amount

    def dec(self, amount: float = 1) -> None:
        """Subtract from the number."""
        self._value -= amount

    def set(self, value: float) -> None:
        """Set the number."""
        self._value = float(value)

    def set_function(self, function: Callable[[], float]) -> None:
        """Read the number from a function from now on."""
        self._function = function


class HistogramSeries:
    """Observations, counted by bucket, and their sum. `exemplars`: the newest of each bucket that has one."""

    __slots__ = ("bounds", "counts", "created", "exemplars", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0
        self.created = _now()
        self.exemplars: dict[int, tuple[str, float, float]] = {}
        """By bucket: the id of a trace, the value, and when it was observed, in seconds of the epoch."""

    def observe(self, value: float, times: int = 1) -> None:
        """Add an observation, or the same one several times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def add(self, counts: Sequence[int], total: float) -> None:
        """Add observations that were counted elsewhere. `counts`: by bucket, the last one without a bound."""
        self.counts = [own + other for own, other in zip(self.counts, counts, strict=True)]
        self.total += total

    def exemplify(self, value: float, trace_id: str) -> None:
        """Name the trace of an observation, in addition to `observe`."""
        self.exemplars[bisect_left(self.bounds, value)] = trace_id, value, _now()


class Family(Generic[S]):
    """All series of one metric, by the values of its labels."""

    kind: ClassVar[str]

    def __init__(self, name: str, text: str, labels: Sequence[str] = (), buckets: Sequence[float] = ()) -> None:
        """Begin without series.

        Args:
            name: the exported name.
            text: the help text.
            labels: names of the labels.
            buckets: upper bounds of a histogram, ascending; the last bucket has none.
        """
        self.name, self.text, self.label_names, self.buckets = name, text, tuple(labels), tuple(buckets)
        self.series: dict[tuple[str, ...], S] = {}

    def labels(self, *values: str) -> S:
        """Return the series of these values, at zero the first time."""
        if len(values) != len(self.label_names):
            raise ValueError(f"{self.name} has the labels {', '.join(self.label_names)}; got {len(values)} values")
        found = self.series.get(values)
        if found is None:
            found = self.series[values] = self._new()
        return found

    def _new(self) -> S:
        raise NotImplementedError

    def exported(self) -> Metric:
        """Return the family as prometheus_client exports it."""
        raise NotImplementedError

    def clear(self) -> None:
        """Remove all series."""
        self.series.clear()

    def remove(self, *first: str) -> None:
        """Remove the series whose labels begin with these values."""
        for labels in [one for one in self.series if one[: len(first)] == first]:
            del self.series[labels]

    def values(self) -> list[Any]:
        """Return each series as its labels and its numbers, for `add` in another process."""
        return [(labels, *self._numbers(one)) for labels, one in self.series.items()]

    def add(self, values: Sequence[Any]) -> None:
        """Add the numbers of another process's series to those of the same labels."""
        for labels, *numbers in values:
            self._join(self.labels(*labels), *numbers)

    def _numbers(self, one: S) -> tuple[Any, ...]:
        raise NotImplementedError

    def _join(self, one: S, *numbers: Any) -> None:
        raise NotImplementedError


class Counter(Family[CounterSeries]):
    """A family of counters."""

    kind = "counter"

    def _new(self) -> CounterSeries:
        return CounterSeries()

    def clear(self) -> None:
        """Remove all series; one that is counted elsewhere begins again at that count."""
        self.series = {labels: one for labels, one in self.series.items() if one.function is not None}
        for one in self.series.values():
            one.value = 0.0

    def _numbers(self, one: CounterSeries) -> tuple[Any, ...]:
        return one.total, one.created

    def _join(self, one: CounterSeries, *numbers: Any) -> None:
        value, created = numbers
        one.value += value
        one.created = min(one.created, created)

    def exported(self) -> Metric:
        """Return the family as prometheus_client exports it."""
        made = CounterMetricFamily(self.name, self.text, labels=self.label_names)
        for values, one in list(self.series.items()):
            made.add_metric(values, one.total, created=one.created)
        return made


class Gauge(Family[GaugeSeries]):
    """A family of gauges."""

    kind = "gauge"

    def _new(self) -> GaugeSeries:
        return GaugeSeries()

    def _numbers(self, one: GaugeSeries) -> tuple[Any, ...]:
        return (one.value,)

    def _join(self, one: GaugeSeries, *numbers: Any) -> None:
        one.inc(numbers[0])

    def exported(self) -> Metric:
        """Return the family as prometheus_client exports it."""
        made = GaugeMetricFamily(self.name, self.text, labels=self.label_names)
        for values, one in list(self.series.items()):
            made.add_metric(values, one.value)
        return made


class Histogram(Family[HistogramSeries]):
    """A family of histograms."""

    kind = "histogram"

    def _new(self) -> HistogramSeries:
        return HistogramSeries(self.buckets)

    def _numbers(self, one: HistogramSeries) -> tuple[Any, ...]:
        return one.counts, one.total, one.created, list(one.exemplars.items())

    def _join(self, one: HistogramSeries, *numbers: Any) -> None:
        counts, total, created, exemplars = numbers
        one.counts = [mine + other for mine, other in zip(one.counts, counts, strict=True)]
        one.total += total
        one.created = min(one.created, created)
        for bucket, found in exemplars:
            if bucket not in one.exemplars or one.exemplars[bucket][2] < found[2]:
                one.exemplars[bucket] = tuple(found)

    def exported(self) -> Metric:
        """Return the family as prometheus_client exports it: cumulative counts, `+Inf` last.

        Exemplars are on pages of the OpenMetrics format only.
        """
        made = HistogramMetricFamily(self.name, self.text, labels=self.label_names)
        names = [*map(floatToGoString, self.buckets), "+Inf"]
        for values, one in list(self.series.items()):
            cumulative: list[Any] = list(zip(names, accumulate(one.counts), strict=True))
            for bucket, (trace_id, value, at) in one.exemplars.items():
                cumulative[bucket] += (Exemplar({"trace_id": trace_id}, value, at),)
            made.add_metric(values, cumulative, one.total)
            labels = dict(zip(self.label_names, values, strict=True))
            made.add_sample(f"{self.name}_created", labels, one.created)
        return made


class Exported(Collector):
    """Gives a registry the families when it renders a page."""

    def __init__(self, families: Sequence[Family[Any]]) -> None:
        self._families = tuple(families)

    def collect(self) -> Iterator[Metric]:
        """Yield each family with its values now."""
        for family in self._families:
            yield family.exported()


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    Args:
        kind: Counter, Gauge or Histogram.
        name: exported name.
        help: one sentence.
        labels: label names.
        buckets: upper bounds, of a histogram.
        why_buckets: the reason for the bounds.
        is_fact: whether a supervisor states it once for all processes; else it is added up over them.
    """

    kind: type[Family[Any]]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    why_buckets: str = ""
    is_fact: bool = False
