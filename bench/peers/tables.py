"""Summaries of the runs of all systems, and tables of them that fit 80 columns.

`summed_up` and `against` compute; `show` prints. A run is a dictionary with the figures of `load.Measured`, or of a
bare runtime, beside the rate and processor time of the bare runtime that was measured right before it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench.finding import Finding

ATTNSERVE: Final = "attnserve"
RIVAL: Final = ("mosec", "single")
"""The other server that takes the least processor time: two workers of one thread, one sequence at a time."""
RATE_LIMIT, P99_LIMIT = 1.12, 1.2
"""Least rate and greatest p99 of this server, over those of that server."""
UNBATCHED: Final = "single"
LEGEND: Final = """\
Figures are medians over rounds, (least to greatest). / bare: over onnxruntime without a server, measured right before.
ms each: processor time of all processes of a system for a sequence. MiB: their memory after the load, where shared
pages count once. client: cores that the client took. fp32, int8, bf16: precisions. single: one sequence at a time, on
two workers of one thread. dynamic: its documented batcher. bare: no server, two threads, batches sorted by length.
"""

Rows = dict[tuple[str, str], dict[str, Any]]
Interval = tuple[float, float, float]


def interval(values: Iterable[float]) -> Interval:
    """Return the median, the least and the greatest of the values of the rounds."""
    seen = list(values)
    return statistics.median(seen), min(seen), max(seen)


def summed_up(rows: Rows) -> list[dict[str, Any]]:
    """Return a summary of each system: medians over its rounds, and over those of the bare runtime.

    `per_s_least` and `per_s_greatest` are the limits of the interval of `per_s`, and so on. The fastest system comes
    first.
    """
    summary = []
    for row in rows.values():
        runs = row["runs"]
        facts = {key: row[key] for key in ("name", "form", "version")}
        facts["why_not"] = "" if runs else row.get("why_not", "")
        if runs:
            measures = {
                "per_s": [run["rate"] for run in runs],
                "rate_over_bare": [run["rate"] / run["bare_rate"] for run in runs],
                "server_ms": [1e3 * run["server_s"] for run in runs],
                "cpu_over_bare": [run["server_s"] / run["bare_s"] for run in runs],
                "memory_mb": [run["memory_mb"] for run in runs],
            }
            for key, unit in (("p50_s", 1e3), ("p99_s", 1e3), ("client_cores", 1.0)):
                if key in runs[0]:
                    measures[key.replace("_s", "_ms")] = [unit * run[key] for run in runs]
            for key, values in measures.items():
                facts[key], facts[f"{key}_least"], facts[f"{key}_greatest"] = interval(values)
            facts["errors"] = sum(run.get("errors", 0) for run in runs)
            facts["wrong"] = sum(run.get("wrong", 0) for run in runs)
            facts["first_error"] = next((run["first_error"] for run in runs if run.get("first_error")), "")
        summary.append(facts)
    return sorted(summary, key=lambda facts: -facts.get("per_s", 0.0))


def against(rows: Rows) -> list[Finding]:
    """Return rate and p99 of this server, in each precision, over those of mosec's two workers in the same round.

    Empty if the other server did not run.
    """
    found = []
    rivals = {run["round"]: run for run in rows.get(RIVAL, {"runs": ()})["runs"]}
    for (name, form), row in rows.items():
        pairs = [(run, rivals[run["round"]]) for run in row["runs"] if run["round"] in rivals]
        if name != ATTNSERVE or form == UNBATCHED or not pairs:
            continue
        rates = [own["rate"] / other["rate"] for own, other in pairs]
        latencies = [own["p99_s"] / other["p99_s"] for own, other in pairs]
        found.append(Finding(f"{form}: rate", rates, RATE_LIMIT, most=False))
        found.append(Finding(f"{form}: p99", latencies, P99_LIMIT))
    return found


def show(console: Console, summary: Sequence[dict[str, Any]], findings: Sequence[Finding]) -> None:
    """Print a table for each measure, the ratios to mosec, a legend, and what did not run."""
    ran = [facts for facts in summary if "per_s" in facts]
    rates = _table("Rate", "sequences/s", "/ bare")
    times = _table("Latency of 64 callers", "p50 ms", "p99 ms", "client")
    costs = _table("Cost", "ms each", "/ bare", "MiB")
    for facts in ran:
        rates.add_row(_name(facts), _cell(facts, "per_s", 1), _cell(facts, "rate_over_bare", 2))
        if "p50_ms" in facts:
            p50, client = f"{facts['p50_ms']:.0f}", f"{facts['client_cores']:.2f}"
            times.add_row(_name(facts), p50, _cell(facts, "p99_ms", 0), client)
        each, memory = f"{facts['server_ms']:.1f}", f"{facts['memory_mb']:.0f}"
        costs.add_row(_name(facts), each, _cell(facts, "cpu_over_bare", 2), memory)
    ratios = _table(f"{ATTNSERVE} / {', '.join(RIVAL)}", "ratio", "limit", "holds")
    for finding in findings:
        limit = f"{'at most' if finding.most else 'at least'} {finding.limit:g}"
        ratios.add_row(finding.what, _span(interval(finding.values), 2), limit, _verdict(finding))
    for table in (rates, times, costs, *([ratios] if findings else [])):
        console.print(table)
        console.print()
    for line in (" ".join(LEGEND.split()), *_notes(summary)):
        console.print(line, markup=False, highlight=False)


def _table(what: str, *measures: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(what, overflow="fold")
    for measure in measures:
        table.add_column(measure, no_wrap=True, justify="right")
    return table


def _name(facts: dict[str, Any]) -> str:
    return f"{facts['name']}, {facts['form']}"


def _cell(facts: dict[str, Any], key: str, digits: int) -> str:
    return _span((facts[key], facts[f"{key}_least"], facts[f"{key}_greatest"]), digits)


def _span(values: Interval, digits: int) -> str:
    median, least, greatest = (f"{value:.{digits}f}" for value in values)
    return f"{median} ({least} to {greatest})"


def _verdict(finding: Finding) -> str:
    verdict = "yes" if finding.holds else "no"
    _, least, greatest = interval(finding.values)
    return f"{verdict}, within noise" if least <= finding.limit <= greatest else verdict


def _notes(summary: Sequence[dict[str, Any]]) -> list[str]:
    ran = [facts for facts in summary if "per_s" in facts]
    versions = ", ".join(sorted({f"{facts['name']} {facts['version'].split()[-1]}" for facts in ran}))
    notes = [f"Versions: {versions}."]
    faults = [facts for facts in ran if facts["wrong"] or facts["errors"]]
    if not faults:
        notes.append("No checked answer was wrong, and no call failed.")
    notes += [
        f"{_name(facts)}: {facts['wrong']} wrong, {facts['errors']} failed: {facts['first_error']}" for facts in faults
    ]
    return notes + [f"{_name(facts)}: not run: {facts['why_not']}" for facts in summary if facts["why_not"]]
