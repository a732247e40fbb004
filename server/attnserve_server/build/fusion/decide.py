"""Fuse where it pays: tries the rewritten graphs on the spot, and keeps one that answers alike and is faster.

Rewriting itself is done in `candidates`; this decides.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir as ir

from attnserve_server.build.assemble import Assembled, assemble
from attnserve_server.build.checking.check import CHECK_LENGTHS, Tolerances
from attnserve_server.build.errors import BuildRefused
from attnserve_server.build.finders import find_sites
from attnserve_server.build.fusion.candidates import Fused, candidates
from attnserve_server.build.graphs.graph import expose, precision_of, save
from attnserve_server.build.inputs.feeds import Sampler
from attnserve_server.build.learning.probe import max_abs
from attnserve_server.build.progress import Steps
from attnserve_server.build.runtime import Runner, paired_seconds
from attnserve_server.domain.values import Array
from attnserve_server.model.report import FusionReport

WORTH = 0.98
"""The ratio of times from which another graph is worth having."""
_TIMED_LENGTHS = (CHECK_LENGTHS, (128,))
"""What is run to compare: a padded batch of short sequences, and one of a usual length alone."""

Feeds = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How long a fused graph takes in parts of its source's time, and whether that is reason to keep it."""

    ratio: float
    pays: bool


def verdict(source_s: Sequence[Sequence[float]], fused_s: Sequence[Sequence[float]]) -> Verdict:
    """Whether a fused graph pays: 2 % faster over all workloads, slower in none, and that in most of the rounds.

    Args:
        source_s: CPU seconds of the source, for each workload one for each round.
        fused_s: the fused graph's, measured in the same rounds.
    """
    ratios = [
        sorted(fused / max(source, 1e-9) for source, fused in zip(*rounds, strict=True))
        for rounds in zip(source_s, fused_s, strict=True)
    ]
    medians = [statistics.median(each) for each in ratios]
    overall = statistics.geometric_mean(medians)
    # Three quarters of the rounds: a median that noise alone has moved below 1 does not take them along.
    steady = statistics.geometric_mean(each[3 * len(each) // 4] for each in ratios) < 1
    return Verdict(round(overall, 3), pays=overall <= WORTH and max(medians) <= 2 - WORTH and steady)


def assemble_fused(
    proto: onnx.ModelProto, sampler: Sampler, work: Path, steps: Steps, *, fuse: bool = True
) -> tuple[Assembled, FusionReport | None]:
    """Assemble a graph, or its fused form where that answers alike and is faster.

    Args:
        proto: the source, with inferred shapes.
        sampler: makes sequences for it.
        work: a folder for the files.
        steps: is told of every step.
        fuse: whether to try at all.

    Returns:
        What was assembled, whose `source` is the graph as it came in either case; and the report on the rewriting that
        is kept or came nearest to it, None where nothing was tried.
    """
    steps.begin("fusing attention")
    rewritten = candidates(proto) if fuse else iter(())
    first = next(rewritten, None)
    if first is None:
        return assemble(proto, sampler, work, steps), None
    source_path = work / "unfused.onnx"
    save(ir.from_proto(proto), source_path)
    source = Runner(source_path)
    reports: list[FusionReport] = []
    for fused in itertools.chain((first,), rewritten):
        reports.append(tried(fused, proto, source, sampler, work / "fused.onnx"))
        if reports[-1].kept:
            return replace(assemble(fused.proto, sampler, work, steps), source=source), reports[-1]
    # What came nearest: a rewriting without a time was refused before it was timed.
    nearest = min(reports, key=lambda report: report.fused_over_source_time or float("inf"))
    return assemble(proto, sampler, work, steps), nearest


def tried(fused: Fused, proto: onnx.ModelProto, source: Runner, sampler: Sampler, path: Path) -> FusionReport:
    """Load, compare and time one rewritten graph beside its source."""
    report = FusionReport(operator=fused.operator, sites=fused.sites, kept=False)
    if _tappable(fused.proto) < _tappable(proto):
        return report.model_copy(update={"reason": "its sites could not be tapped"})
    outputs = [value.name for value in proto.graph.output]
    workloads = _workloads(source, sampler, outputs)
    if not workloads:
        return report.model_copy(update={"reason": "the source runs on none of the lengths that are compared"})
    save(ir.from_proto(fused.proto), path)
    try:
        runner = Runner(path)
        errors = [_difference(source, runner, feeds, outputs) for feeds in workloads]
    except BuildRefused as fault:
        return report.model_copy(update={"reason": str(fault)})
    tolerance, error = Tolerances.of(precision_of(proto)).output, max(errors)
    if not error <= tolerance:
        return report.model_copy(update={"reason": f"its outputs differ by {error:.3g}, more than {tolerance:g}"})
    if not _batched(fused.proto, workloads[0], path):
        return report.model_copy(update={"reason": "its sites attend within windows, which it folds into the batch"})
    seconds = [paired_seconds(source, runner, feeds, outputs) for feeds in workloads]
    judged = verdict([pair[0] for pair in seconds], [pair[1] for pair in seconds])
    slower = f"it takes {judged.ratio:.3f} of the source's time: not clearly less than {WORTH}"
    return report.model_copy(
        update={
            "kept": judged.pays,
            "fused_over_source_time": judged.ratio,
            "output_max_abs_error": error,
            "reason": "" if judged.pays else slower,
        }
    )


def _batched(proto: onnx.ModelProto, feeds: Feeds, path: Path) -> bool:
    """Whether each fused operator's first axis is the batch, without which its weights belong to nobody."""
    model = ir.from_proto(proto)
    sites = [site for site in find_sites(model.graph).values() if site.scores is not None]
    expose(model, sites)
    save(model, path)
    names = [str(site.output.value.name) for site in sites if site.output is not None]
    found = Runner(path).run(feeds, names, tap=False)
    rows = len(next(iter(feeds.values())))
    return all(found[name].shape[0] == rows for name in names)


def _workloads(source: Runner, sampler: Sampler, outputs: Sequence[str]) -> list[Feeds]:
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


def _difference(source: Runner, fused: Runner, feeds: Feeds, outputs: Sequence[str]) -> float:
    expected, found = source.run(feeds, outputs, tap=False), fused.run(feeds, outputs, tap=False)
    return max(max_abs(found[name], expected[name]) for name in outputs)


def _tappable(proto: onnx.ModelProto) -> int:
    return sum(site.tappable for site in find_sites(ir.from_proto(proto).graph).values())
