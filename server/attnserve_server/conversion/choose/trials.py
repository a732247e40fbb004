"""Benchmark alternatives of a graph: other exporters and the runtime's own rewritings. Keep what is right and faster.

Every alternative must give the same answers. The runtime's rewritings are timed on the tapped graph, as the server runs
it. `choose/fusion.py` chooses among fused operators in the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir

from attnserve_server.conversion.assemble import Assembled
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.base.tolerances import Tolerances
from attnserve_server.conversion.choose.comparing import Baseline, compared, tappable_sites, timed, workloads
from attnserve_server.conversion.choose.fusion import Rewritten, fused
from attnserve_server.conversion.graphs.reading import precision_of, save
from attnserve_server.conversion.inputs.signature import Signature
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.engine.providers import CPU
from attnserve_server.engine.session import LEFT_OUT, LoadFailed, write_optimised
from attnserve_server.model.report import TrialReport

_REWRITINGS: Final[dict[str, tuple[str, ...]]] = {
    "the runtime's SkipLayerNormalization": tuple(name for name in LEFT_OUT if name != "SkipLayerNormFusion"),
    "products and sums apart, not as Gemm": (*LEFT_OUT, "MatMulAddFusion"),
}
"""The optimizers of the runtime that each trial disables, by the description of its effect."""


@dataclass(frozen=True, slots=True)
class OtherExport:
    """Another export of the same model.

    Attributes:
        what: its description in the report.
        exporter: the program that writes it, for provenance.
        opset: its operator set.
        make: exports the graph, and returns it with its inputs. Raises BuildRefused if the exporter fails.
    """

    what: str
    exporter: str
    opset: int
    make: Callable[[], tuple[onnx.ModelProto, Signature]]


def faster_export(
    first: Rewritten,
    others: Sequence[OtherExport],
    sampler: Sampler,
    work: Path,
    *,
    fuse: bool,
    provider: str = CPU,
) -> tuple[OtherExport | None, Rewritten, tuple[TrialReport, ...]]:
    """Try other exports in order, and keep the first that gives the same answers and is faster.

    Args:
        first: the first export, fused where that is faster.
        others: the other exports.
        sampler: draws sequences for the graph.
        work: a folder for temporary files.
        fuse: whether to try fused operators in each export.
        provider: the execution provider on which they are run and timed.

    Returns:
        The export that is kept (None: the first), its fused graph, and the report of each trial. An export that
        fails is reported with the reason.

    Raises:
        BuildRefused: the runtime cannot load the first export.
    """
    if not others:
        return None, first, ()
    path = work / "first.onnx"
    save(ir.from_proto(first.proto), path)
    base, outputs = GraphRunner(path, provider=provider), [value.name for value in first.proto.graph.output]
    tolerance = Tolerances.of(precision_of(first.proto)).output
    baseline = Baseline(base, workloads(base, sampler, outputs), outputs, tolerance)
    trials: list[TrialReport] = []
    for position, other in enumerate(others):
        folder = work / f"export-{position}"
        folder.mkdir()
        try:
            proto, signature = other.make()
            if signature != sampler.signature:
                trials.append(TrialReport(what=other.what, reason="its inputs differ"))
                continue
            rewritten = fused(proto, sampler, folder, fuse=fuse, provider=provider)
            if tappable_sites(rewritten.proto) < tappable_sites(first.proto):
                trials.append(TrialReport(what=other.what, reason="fewer of its sites can be tapped"))
                continue
            save(ir.from_proto(rewritten.proto), folder / "other.onnx")
            trials.append(tried(other.what, GraphRunner(folder / "other.onnx", provider=provider), baseline))
        except BuildRefused as fault:
            trials.append(TrialReport(what=other.what, reason=str(fault)))
            continue
        if trials[-1].kept:
            return other, rewritten, tuple(trials)
    return None, first, tuple(trials)


def check_on_target(assembled: Assembled, provider: str, steps: Steps) -> None:
    """Compare the tapped graph's answers on an execution provider with those on the CPU.

    Args:
        assembled: the tapped graph.
        provider: the execution provider; nothing is compared for the CPU's.
        steps: receives a warning where the provider leaves nodes to another one.

    Raises:
        BuildRefused: the graph does not run there, or gives other outputs or weights.
    """
    if provider == CPU:
        return
    base, other = GraphRunner(assembled.model_path), GraphRunner(assembled.model_path, provider=provider)
    _, reason = compared(other, _tapped(assembled, base))
    if reason:
        raise BuildRefused(f"on {provider}, {reason}; convert without --target, and serve on the CPU provider")
    for name, nodes in other.nodes_by_provider.items():
        if name != provider:
            listed = ", ".join(f"{count} {operator}" for operator, count in nodes.items())
            steps.warn(f"{provider} leaves nodes to {name}: {listed}")


def _tapped(assembled: Assembled, base: GraphRunner) -> Baseline:
    """What other graphs are compared with: the tapped graph's outputs and weights."""
    outputs = [spec.name for spec in assembled.outputs]
    return Baseline(
        base,
        workloads(base, assembled.sampler, outputs),
        outputs,
        assembled.tolerances.output,
        tuple(assembled.weights.values()),
        assembled.tolerances.weight,
    )


def fastest(assembled: Assembled, work: Path) -> tuple[tuple[str, ...] | None, tuple[TrialReport, ...]]:
    """Try the runtime's rewritings on the tapped graph.

    Args:
        assembled: the tapped graph.
        work: a folder for temporary files.

    Returns:
        The optimizers that the manifest disables (None: the server's default), and the report of each trial.

    Raises:
        BuildRefused: the runtime cannot load the tapped graph.
    """
    baseline = _tapped(assembled, GraphRunner(assembled.model_path))
    trials = [tried(what, _opened(assembled.model_path, left_out), baseline) for what, left_out in _REWRITINGS.items()]
    best = min((trial for trial in trials if trial.kept), key=lambda trial: trial.time or 1.0, default=None)
    slower = "it is faster, though not the fastest"
    reports = [
        trial if not trial.kept or trial is best else trial.model_copy(update={"kept": False, "reason": slower})
        for trial in trials
    ]
    reports.append(_ahead_of_time(assembled.model_path, work / "optimised.onnx", baseline))
    return (_REWRITINGS[best.what] if best else None), tuple(reports)


def tried(what: str, other: GraphRunner | BuildRefused, baseline: Baseline) -> TrialReport:
    """Compare and time one alternative, and report whether it is worth keeping.

    Args:
        what: its description in the report.
        other: the alternative, or the reason why it does not load.
        baseline: the graph that it is compared with.
    """
    report = TrialReport(what=what)
    if isinstance(other, BuildRefused):
        return report.model_copy(update={"reason": str(other)})
    error, reason = compared(other, baseline)
    if reason:
        return report.model_copy(update={"reason": reason})
    timing = timed(other, baseline)
    return report.model_copy(
        update={
            "kept": timing.pays,
            "time": timing.ratio,
            "output_max_abs_error": error,
            "reason": timing.reason("the"),
        }
    )


def _opened(path: Path, left_out: Sequence[str] | None = None) -> GraphRunner | BuildRefused:
    try:
        return GraphRunner(path, left_out)
    except BuildRefused as fault:
        return fault


def _ahead_of_time(model_path: Path, target: Path, baseline: Baseline) -> TrialReport:
    """Time the graph as the runtime optimizes it, written to a file. It is never kept: it would run on CPUs only."""
    what = "the graph as the runtime optimises it, ahead of time"
    try:
        write_optimised(model_path, target)
    except LoadFailed:
        return TrialReport(what=what, reason="the runtime cannot write it")
    loading_s: list[float] = []
    for path in (model_path, target):
        begun = time.perf_counter()
        other = _opened(path)
        loading_s.append(time.perf_counter() - begun)
    report = tried(what, other, baseline)
    reason = report.reason or f"it takes {report.time} of the time, but runs on CPUs only"
    load_time = round(loading_s[1] / loading_s[0], 3)
    return report.model_copy(update={"kept": False, "load_time": load_time, "reason": reason})
