"""Two graphs side by side: whether they answer alike, and which is faster. Changes and keeps nothing."""

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
"""The ratio of times from which another graph is worth having."""
_SLOWEST = 1.02
"""The ratio up to which one workload may be slower, where others make up for it."""
_TIMED_LENGTHS = (CHECK_LENGTHS, (128,))
"""What is run to compare: a padded batch of short sequences, and one of a usual length alone."""

Feeds = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Beside:
    """What a graph is compared with: another one, the batches that both are run on, by how much answers may differ."""

    base: GraphRunner
    batches: Sequence[Feeds]
    outputs: Sequence[str]
    output_tolerance: float
    weights: Sequence[str] = ()
    weight_tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """How long a graph takes in parts of another's time, and whether that is reason to keep it.

    Attributes:
        ratio: over all workloads, the geometric mean of their medians.
        pays: whether all three bounds hold.
        slowest: the median of the workload that gains least, or loses most.
        upper_quartile: over all workloads, of the rounds: a quarter of them took this, or more.
    """

    ratio: float
    pays: bool
    slowest: float = 0.0
    upper_quartile: float = 0.0

    def reason(self, whose: str) -> str:
        """Which bound failed, in parts of `whose` time; empty where it pays."""
        if self.pays:
            return ""
        took = f"it takes {self.ratio:.3f} of {whose} time"
        if self.slowest > _SLOWEST and self.ratio <= WORTH:
            return f"{took} over all, but {self.slowest:.3f} on one workload, where at most {_SLOWEST:g} is allowed"
        if self.upper_quartile >= 1 and self.ratio <= WORTH:
            return (
                f"{took} at the median, but {self.upper_quartile:.3f} or more in a quarter of the rounds, not below 1"
            )
        return f"{took}, and at most {WORTH:g} is worth another graph"


def verdict(source_s: Sequence[Sequence[float]], other_s: Sequence[Sequence[float]]) -> Verdict:
    """Whether another graph pays: 2 % faster over all workloads, slower in none, and that in most of the rounds.

    Args:
        source_s: CPU seconds of the source, for each workload one for each round.
        other_s: the other graph's, measured in the same rounds.
    """
    ratios = [
        sorted(other / max(source, 1e-9) for source, other in zip(*rounds, strict=True))
        for rounds in zip(source_s, other_s, strict=True)
    ]
    medians = [statistics.median(each) for each in ratios]
    # Three quarters of the rounds: a median that noise alone has moved below 1 does not take them along.
    quartile = statistics.geometric_mean(each[3 * len(each) // 4] for each in ratios)
    # Rounded first, so that the bounds hold for the numbers that the report shows.
    overall, slowest, upper = (round(each, 3) for each in (statistics.geometric_mean(medians), max(medians), quartile))
    return Verdict(overall, overall <= WORTH and slowest <= _SLOWEST and upper < 1, slowest, upper)


def workloads(source: GraphRunner, sampler: Sampler, outputs: Sequence[str]) -> list[Feeds]:
    """Those batches that are compared on which the source runs."""
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
    """The greatest difference of any of these outputs; `tap` asks for every row's weights."""
    if not names:
        return 0.0
    expected, found = (runner.run(feeds, names, tap=tap) for runner in (source, other))
    return max(max_abs(found[name], expected[name]) for name in names)


def compared(other: GraphRunner, beside: Beside) -> tuple[float | None, str]:
    """The greatest difference of any output, None where it did not come to that; and why the graph is not alike."""
    if not beside.batches:
        return None, "the source runs on none of the lengths that are compared"
    try:
        error = max(difference(beside.base, other, feeds, beside.outputs) for feeds in beside.batches)
        off = max(difference(beside.base, other, feeds, beside.weights, tap=True) for feeds in beside.batches)
    except BuildRefused as fault:
        return None, str(fault)
    for which, greatest, allowed in (
        ("outputs", error, beside.output_tolerance),
        ("weights", off, beside.weight_tolerance),
    ):
        if not greatest <= allowed:
            return None, f"its {which} differ by {greatest:.3g}, more than {allowed:g}"
    return error, ""


def timed(other: GraphRunner, beside: Beside) -> Verdict:
    """How long a graph takes in parts of the other's time, measured here and now."""
    seconds = [paired_seconds(beside.base, other, feeds, beside.outputs) for feeds in beside.batches]
    return verdict([pair[0] for pair in seconds], [pair[1] for pair in seconds])


def tappable_sites(proto: onnx.ModelProto) -> int:
    """Of how many sites the weights can be had, as far as the graph tells."""
    return sum(site.tappable for site in find_sites(ir.from_proto(proto).graph).values())
