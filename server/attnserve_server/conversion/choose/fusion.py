"""Benchmark graphs with fused attention operators, and keep the first that gives the same answers and is faster.

`rewrite/fuse/candidates.py` writes the candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir as ir

from attnserve_server.conversion.assemble import Assembled, assemble
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.sites import Scores
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.base.tolerances import Tolerances
from attnserve_server.conversion.choose.comparing import Baseline, Feeds, compared, tappable_sites, timed, workloads
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.graphs.reading import precision_of, save
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.conversion.rewrite.fuse.candidates import Fused, candidates, unfused_sites
from attnserve_server.conversion.rewrite.taps import expose
from attnserve_server.engine.providers import CPU
from attnserve_server.model.report import FusionReport, UnfusedSite


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A graph, in its fused form if that gives the same answers and is faster.

    Attributes:
        proto: the graph to assemble.
        source: the graph before fusion, if it was loaded for the comparison.
        report: on the candidate that is kept, or the fastest one that is not; None if the graph has no site to fuse.
    """

    proto: onnx.ModelProto
    source: GraphRunner | None = None
    report: FusionReport | None = None

    def assembled(self, sampler: Sampler, work: Path, steps: Steps) -> Assembled:
        """Tap the graph, and keep the graph before fusion as its source. Raises BuildRefused if it does not run."""
        made = assemble(self.proto, sampler, work, steps)
        return made if self.source is None else replace(made, source=self.source)


def fused(proto: onnx.ModelProto, sampler: Sampler, work: Path, *, fuse: bool = True, provider: str = CPU) -> Rewritten:
    """Fuse the attention of a graph if that gives the same answers and is faster.

    Args:
        proto: the graph, with inferred shapes.
        sampler: draws sequences for the graph.
        work: a folder for temporary files.
        fuse: False returns the graph as it is.
        provider: the execution provider on which both are run and timed.

    Raises:
        BuildRefused: the graph does not run.
    """
    rewritten = candidates(proto) if fuse else iter(())
    first = next(rewritten, None)
    if first is None:
        return Rewritten(proto, report=_without_candidates(proto) if fuse else None)
    source_path = work / "unfused.onnx"
    save(ir.from_proto(proto), source_path)
    source = GraphRunner(source_path, provider=provider)
    reports: list[FusionReport] = []
    for candidate in itertools.chain((first,), rewritten):
        reports.append(tried(candidate, proto, source, sampler, work / "fused.onnx", provider))
        if reports[-1].kept:
            return Rewritten(candidate.proto, _on_cpu(source, provider), reports[-1])
    # A candidate without a time failed before it was timed.
    nearest = min(reports, key=lambda report: report.fused_over_source_time or float("inf"))
    return Rewritten(proto, _on_cpu(source, provider), nearest)


def _on_cpu(runner: GraphRunner, provider: str) -> GraphRunner:
    """Return a runner of the same graph on the CPU, which later steps compare with."""
    return runner if provider == CPU else GraphRunner(runner.path)


def _without_candidates(proto: onnx.ModelProto) -> FusionReport | None:
    unfused = _listed(unfused_sites(proto))
    return FusionReport(operator="", sites=0, kept=False, unfused=unfused) if unfused else None


def _listed(reasons: Mapping[str, str]) -> tuple[UnfusedSite, ...]:
    return tuple(UnfusedSite(site=name, reason=reason) for name, reason in reasons.items())


def tried(
    candidate: Fused,
    proto: onnx.ModelProto,
    source: GraphRunner,
    sampler: Sampler,
    path: Path,
    provider: str = CPU,
) -> FusionReport:
    """Load one candidate, compare it with its source and time both; report whether it is kept.

    The candidate is written to `path`, and runs on `provider`, as `source` does. One that does not load or answers
    otherwise is reported with the reason.
    """
    unfused = _listed(candidate.unfused)
    report = FusionReport(operator=candidate.operator, sites=candidate.sites, kept=False, unfused=unfused)
    if tappable_sites(candidate.proto) < tappable_sites(proto):
        return report.model_copy(update={"reason": "its sites cannot be tapped"})
    outputs = [value.name for value in proto.graph.output]
    tolerance = Tolerances.of(precision_of(proto)).output
    baseline = Baseline(source, workloads(source, sampler, outputs), outputs, tolerance)
    save(ir.from_proto(candidate.proto), path)
    try:
        runner = GraphRunner(path, provider=provider)
    except BuildRefused as fault:
        return report.model_copy(update={"reason": str(fault)})
    error, reason = compared(runner, baseline)
    if reason:
        return report.model_copy(update={"reason": reason})
    if not _batched(candidate.proto, baseline.batches[0], path):
        return report.model_copy(
            update={"reason": "its sites attend within windows, which it folds into the batch axis"}
        )
    timing = timed(runner, baseline)
    return report.model_copy(
        update={
            "kept": timing.pays,
            "fused_over_source_time": timing.ratio,
            "output_max_abs_error": error,
            "reason": timing.reason("the source's"),
        }
    )


def _batched(proto: onnx.ModelProto, feeds: Feeds, path: Path) -> bool:
    """Return whether the first axis of each fused operator is the batch, so that its weights belong to a sequence."""
    model = ir.from_proto(proto)
    sites = find_sites(model.graph).values()
    expose(model, [site for site in sites if isinstance(site.attention, Scores)])
    save(model, path)
    names = [str(site.attention.output.value.name) for site in sites if isinstance(site.attention, Scores)]
    found = GraphRunner(path).run(feeds, names, tap=False)
    rows = len(next(iter(feeds.values())))
    return all(found[name].shape[0] == rows for name in names)
