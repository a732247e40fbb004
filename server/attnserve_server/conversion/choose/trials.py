"""The fastest graph that is right: exporters and the runtime's own rewritings are tried on the spot, and told.

Which operators attention becomes is decided in `fusion`, in the same way: what answers alike and is clearly faster is
kept. The runtime's rewritings are timed on the tapped graph, as the server will run it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from attnserve_server.conversion.assemble import Assembled
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.choose.comparing import Beside, compared, timed, workloads
from attnserve_server.conversion.probing.runtime import GraphRunner
from attnserve_server.engine.session import LEFT_OUT, LoadFailed, write_optimised
from attnserve_server.model.report import TrialReport

_REWRITINGS: Final[dict[str, tuple[str, ...]]] = {
    "the runtime's SkipLayerNormalization": tuple(name for name in LEFT_OUT if name != "SkipLayerNormFusion"),
    "products and sums apart, not as Gemm": (*LEFT_OUT, "MatMulAddFusion"),
}
"""What the runtime is told to leave out, by what that comes to."""


def fastest(assembled: Assembled, work: Path, steps: Steps) -> tuple[tuple[str, ...] | None, tuple[TrialReport, ...]]:
    """Tries the runtime's rewritings.

    Args:
        assembled: the tapped graph.
        work: a folder for the files.
        steps: is told.

    Returns:
        What the manifest says is left out, and what came of each trial.
    """
    steps.begin("trying what is faster")
    outputs = [spec.name for spec in assembled.outputs]
    base = GraphRunner(assembled.model_path)
    beside = Beside(
        base,
        workloads(base, assembled.sampler, outputs),
        outputs,
        assembled.tolerances.output,
        tuple(assembled.weights.values()),
        assembled.tolerances.weight,
    )
    trials = [tried(what, _opened(assembled.model_path, left_out), beside) for what, left_out in _REWRITINGS.items()]
    best = min((trial for trial in trials if trial.kept), key=lambda trial: trial.time or 1.0, default=None)
    slower = "it is faster, though not the fastest"
    told = [
        trial if not trial.kept or trial is best else trial.model_copy(update={"kept": False, "reason": slower})
        for trial in trials
    ]
    told.append(_ahead_of_time(assembled.model_path, work / "optimised.onnx", beside))
    return (_REWRITINGS[best.what] if best else None), tuple(told)


def tried(what: str, other: GraphRunner | BuildRefused, beside: Beside) -> TrialReport:
    """Compares and times one graph, or one way to run it, beside another; kept where it pays.

    Args:
        what: it is called in the report.
        other: the graph, or why there is none.
        beside: what it is compared with.
    """
    report = TrialReport(what=what)
    if isinstance(other, BuildRefused):
        return report.model_copy(update={"reason": str(other)})
    error, reason = compared(other, beside)
    if reason:
        return report.model_copy(update={"reason": reason})
    judged = timed(other, beside)
    return report.model_copy(
        update={
            "kept": judged.pays,
            "time": judged.ratio,
            "output_max_abs_error": error,
            "reason": judged.reason("the"),
        }
    )


def _opened(path: Path, left_out: Sequence[str] | None = None) -> GraphRunner | BuildRefused:
    try:
        return GraphRunner(path, left_out)
    except BuildRefused as fault:
        return fault


def _ahead_of_time(model_path: Path, target: Path, beside: Beside) -> TrialReport:
    """What the runtime makes of the graph, written down. Never kept: a bundle is for every provider."""
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
    report = tried(what, other, beside)
    reason = report.reason or f"it takes {report.time} of the time, but could be served on a CPU alone"
    load_time = round(loading_s[1] / loading_s[0], 3)
    return report.model_copy(update={"kept": False, "load_time": load_time, "reason": reason})
