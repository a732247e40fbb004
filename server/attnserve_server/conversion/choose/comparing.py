"""Compare two graphs: whether they give the same answers, and which is faster. Changes and keeps nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.tolerances import CHECK_LENGTHS, max_abs
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner, paired_seconds
from attnserve_server.domain.values import Array

WORTH = 0.98
"""Greatest ratio of times at which another graph is kept."""
_SLOWEST = 1.02
"""Greatest ratio of times on any single workload."""
_TIMED_LENGTHS = (CHECK_LENGTHS, (128,))
"""The workloads: a padded batch of short sequences, and one sequence of a usual length alone."""

Feeds = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Baseline:
    """The graph that others are compared with, the batches that both run on, and the tolerated differences.

    `outputs` and `weights` are names of outputs that both graphs have; without `weights` no weights are compared.
    """

    base: GraphRunner
    batches: Sequence[Feeds]
    outputs: Sequence[str]
    output_tolerance: float
    weights: Sequence[str] = ()
    weight_tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of a graph relative to another, and whether that is a reason to keep it.

    Attributes:
        ratio: the geometric mean, over all workloads, of the median ratio of times.
        pays: whether the ratio, the slowest workload and the upper quartile are all within their bounds.
        slowest: the median ratio of the slowest workload.
        upper_quartile: the geometric mean, over all workloads, of the upper quartile of the ratios.
    """

    ratio: float
    pays: bool
    slowest: float = 0.0
    upper_quartile: float = 0.0

    def reason(self, whose: str) -> str:
        """Return which bound failed, relative to `whose` time; empty if none did."""
        if self.pays:
            return ""
        took = f"it takes {self.ratio:.3f} of {whose} time"
        if self.slowest > _SLOWEST and self.ratio <= WORTH:
            return f"{took} over all, but {self.slowest:.3f} on one workload, where at most {_SLOWEST:g} is allowed"
        if self.upper_quartile >= 1 and self.ratio <= WORTH:
            return (
                f"{took} at the median, but {self.upper_quartile:.3f} or more in a quarter of the rounds, not below 1"
            )
        return f"{took}, more than the {WORTH:g} at which another graph is kept"


def timing_of(source_s: Sequence[Sequence[float]], other_s: Sequence[Sequence[float]]) -> Timing:
    """Return whether another graph pays: 2 % faster over all workloads, slower in none, and faster in most rounds.

    Args:
        source_s: CPU seconds of the source, for each workload one value for each round.
        other_s: CPU seconds of the other graph, measured in the same rounds.

    Raises:
        ValueError: there is no workload, or the numbers of workloads or rounds differ.
    """
    ratios = [
        sorted(other / max(source, 1e-9) for source, other in zip(*rounds, strict=True))
        for rounds in zip(source_s, other_s, strict=True)
    ]
    medians = [statistics.median(each) for each in ratios]
    # Noise alone can move a median below 1, but hardly three quarters of the rounds.
    quartile = statistics.geometric_mean(each[3 * len(each) // 4] for each in ratios)
    # Rounded first, so that the bounds hold for the numbers that the report shows.
    overall, slowest, upper = (round(each, 3) for each in (statistics.geometric_mean(medians), max(medians), quartile))
    return Timing(overall, overall <= WORTH and slowest <= _SLOWEST and upper < 1, slowest, upper)


def workloads(source: GraphRunner, sampler: Sampler, outputs: Sequence[str]) -> list[Feeds]:
    """Return the batches of the benchmark that the source runs on; empty where it runs on none."""
    found: list[Feeds] = []
    for lengths in _TIMED_LENGTHS:
        feeds, _ = sampler.mixed(lengths[:1] if sampler.signature.fixed_batch else lengths)
        try:
            source.run(feeds, outputs, tap=False)
        except BuildRefused:
            continue
        found.append(feeds)
    return found


def difference(
    source: GraphRunner, other: GraphRunner, feeds: Feeds, names: Sequence[str], *, tap: bool = False
) -> float:
    """Return the greatest absolute difference of these outputs. Raises BuildRefused where a graph does not run.

    `tap`: request every row's weights.
    """
    if not names:
        return 0.0
    expected, found = (runner.run(feeds, names, tap=tap) for runner in (source, other))
    return max(max_abs(found[name], expected[name]) for name in names)


def compared(other: GraphRunner, baseline: Baseline) -> tuple[float | None, str]:
    """Compare the answers of a graph with the baseline's.

    Returns:
        The greatest absolute difference of any output and an empty reason; or None and the reason why the answers are
        not the same.
    """
    if not baseline.batches:
        return None, "the source runs on none of the lengths that are compared"
    try:
        error = max(difference(baseline.base, other, feeds, baseline.outputs) for feeds in baseline.batches)
        off = max(difference(baseline.base, other, feeds, baseline.weights, tap=True) for feeds in baseline.batches)
    except BuildRefused as fault:
        return None, str(fault)
    for which, greatest, allowed in (
        ("outputs", error, baseline.output_tolerance),
        ("weights", off, baseline.weight_tolerance),
    ):
        if not greatest <= allowed:
            return None, f"its {which} differ by {greatest:.3g}, more than {allowed:g}"
    return error, ""


def timed(other: GraphRunner, baseline: Baseline) -> Timing:
    """Measure a graph against the baseline, which has a batch at least, on this machine."""
    seconds = [paired_seconds(baseline.base, other, feeds, baseline.outputs) for feeds in baseline.batches]
    return timing_of([pair[0] for pair in seconds], [pair[1] for pair in seconds])


def tappable_sites(proto: onnx.ModelProto) -> int:
    """Return the number of sites that the finders can tap in a graph."""
    return sum(site.tappable for site in find_sites(ir.from_proto(proto).graph).values())
