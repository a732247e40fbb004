"""Time and memory of every pattern of attention over the length: `make complexity`, or `python -m bench.complexity`.

Each pattern is a model of the zoo, this project's small torch models, of one layer, exported as any model is. Each
point is a separate process of one thread, over a graph with taps, the nodes that return attention weights, none of
which is selected. A point that fails is listed with its reason, and the longer lengths of its pattern are left out; one
that takes ten minutes raises `subprocess.TimeoutExpired`, and a failed export raises. Both end the bench. It needs
torch, and Linux, because memory is read from `/proc`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.progress import track

from bench import complexity_page
from bench.runtime import TAP_PREFIXES

PATTERNS = ("self", "causal", "sliding-window", "top-k", "linear", "multi-scale", "cross", "cross-modal")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
HEADS, WIDTH = 4, 64
TIME_BUDGET_S, MEMORY_BUDGET_MIB = 40.0, 6144.0
"""A point is left out where the point before it predicts more: four times as much for twice the length."""
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Point:
    """One pattern at one length.

    Args:
        seconds: CPU time of a run, the minimum of several. None where the point was left out.
        mib: The maximum memory beyond idle. None where the point was left out.
        skipped: Why the point was left out.
    """

    pattern: str
    length: int
    seconds: float | None = None
    mib: float | None = None
    skipped: str = ""


def export_patterns(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Export a tapped graph of each pattern, of one layer."""
    from attnserve_server.conversion.convert import ExportRequest, export_bundle  # noqa: PLC0415 - torch: not in each point
    from attnserve_server.conversion.sources.source import ZooOptions  # noqa: PLC0415 - as above

    options = ZooOptions(layers=1, heads=HEADS, width=WIDTH)
    return {
        pattern: export_bundle(
            ExportRequest(source=f"zoo:{pattern}", name=pattern, repository=folder, zoo_options=options)
        ).path
        / "model.onnx"
        for pattern in track(patterns, description="exporting", transient=True)
    }


def measure(model: Path, length: int) -> tuple[float, float]:
    """Return CPU seconds of a run on sequences of one length, and the MiB that it takes beyond the idle session.

    It measures this process, which must do nothing else: the memory is the kernel's count of resident pages.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # An arena keeps its memory, in powers of two. That would be the arena's size, not the graph's.
    options.enable_cpu_mem_arena = False
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs() if not value.name.startswith(TAP_PREFIXES)]
    session.run(outputs, _feeds(session, 16))
    feeds = _feeds(session, length)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
    idle = _resident("VmRSS")
    spent: list[float] = []
    while len(spent) < 5 and sum(spent) < 2:
        begun = time.process_time()
        session.run(outputs, feeds)
        spent.append(time.process_time() - begun)
    return min(spent), max(_resident("VmHWM") - idle, 0.0)


def sweep(models: dict[str, Path], lengths: Sequence[int]) -> list[Point]:
    """Return all points, each from a fresh process, pattern by pattern, lengths ascending."""
    points: list[Point] = []
    for pattern, model in track(models.items(), description="measuring", transient=True):
        last: Point | None = None
        for length in lengths:
            reason = _too_much(last)
            if reason:
                points.append(Point(pattern, length, skipped=reason))
                continue
            line = [sys.executable, "-m", "bench.complexity", "--point", str(model), str(length)]
            done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=600)
            if done.returncode:
                points.append(Point(pattern, length, skipped="it did not run: " + done.stderr.strip().splitlines()[-1]))
                break
            last = Point(pattern, length, *json.loads(done.stdout))
            points.append(last)
    return points


def slopes(points: Sequence[Point]) -> dict[str, dict[str, float]]:
    """Return the exponents of time and memory by pattern, fitted to its three longest points on log scales."""
    found: dict[str, dict[str, float]] = {}
    for pattern in dict.fromkeys(point.pattern for point in points):
        longest = [point for point in points if point.pattern == pattern and point.seconds][-3:]
        if len(longest) < 2:
            continue
        lengths = np.log([point.length for point in longest])
        found[pattern] = {
            what: round(float(np.polyfit(lengths, np.log(values), 1)[0]), 2)
            for what, values in (
                ("time", [point.seconds for point in longest]),
                ("memory", [max(point.mib or 0.0, 1e-3) for point in longest]),
            )
        }
    return found


def _too_much(last: Point | None) -> str:
    if last is None or last.seconds is None or last.mib is None:
        return ""
    if 4 * last.seconds > TIME_BUDGET_S:
        return f"{last.seconds:.3g} s at {last.length} predict more than {TIME_BUDGET_S:g} s"
    if 4 * last.mib > MEMORY_BUDGET_MIB:
        return f"{last.mib:.0f} MiB at {last.length} predict more than {MEMORY_BUDGET_MIB:g} MiB"
    return ""


def _feeds(session: Any, length: int) -> dict[str, Any]:
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        shape = [1, *(extent if isinstance(extent, int) else length for extent in value.shape[1:])]
        if value.name.startswith("attention_items."):
            feeds[value.name] = np.empty(0, np.int64)
        elif value.name.endswith("_ids"):
            feeds[value.name] = np.arange(np.prod(shape)).reshape(shape) % 256 + 3
        elif value.name.endswith("_mask"):
            feeds[value.name] = np.ones(shape, np.int64)
        else:
            feeds[value.name] = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    return feeds


def _resident(name: str) -> float:
    """Return a line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / _MIB for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Measure, print, and write the page and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--point", nargs=2, metavar=("MODEL", "LENGTH"), help="measure one point and print it")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs")
    arguments = parser.parse_args()
    if arguments.point:
        model, length = arguments.point
        print(json.dumps(measure(Path(model), int(length))))
        return
    with tempfile.TemporaryDirectory(prefix="attnserve-complexity-") as folder:
        points = sweep(export_patterns(Path(folder), arguments.patterns), arguments.lengths)
    report = {
        "command": "python -m bench.complexity",
        "machine": f"{platform.machine()}, {platform.system()}, onnxruntime {ort.__version__}, one thread",
        "heads": HEADS,
        "width": WIDTH,
        "points": [asdict(point) for point in points],
        "slopes": slopes(points),
    }
    complexity_page.write(report, arguments.docs)
    Console().print(complexity_page.table(report), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
