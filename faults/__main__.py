"""Inject each fault of the table into real servers, and judge what their callers get: `python -m faults`.

    python -m faults                         # all rows at reduced counts, in about six minutes on two cores
    python -m faults --rows 17,18            # some rows
    python -m faults --full --json full.json # the counts of the table; what is absent fails
    python -m faults --list

One line a row: number, result, fault, seconds, what was injected, what was measured. A row `holds`, `fails`, is
`absent` (the server lacks what it tests) or `skipped` (this machine does). Exit code 1 if a row fails, and with
`--full` if one is absent; 2 for an unknown row. After a failure, calls and logs stay in the folder that is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from faults import lab
from faults.history import line_of
from faults.lab import LATE, Bench, Outcome, Plan, Row, absent, by_number, run_row
from faults.rows import ROWS

SHOWN = 3
"""Problems that are printed with a row; the folder has all of them."""


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def flat(facts: dict[str, Any]) -> str:
    """Return figures in one line."""
    parts = []
    for name, value in facts.items():
        if isinstance(value, dict):
            parts += [f"{name} ({flat(value)})"]
        else:
            parts += [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"]
    return ", ".join(parts)


def line(outcome: Outcome) -> str:
    """Return the line of a row."""
    told = f"{outcome.number:>2} {outcome.result:<7} {outcome.fault} [{outcome.seconds:.1f} s]"
    for name, facts in (("injected", outcome.injected), ("measured", outcome.measured)):
        if facts:
            told += f" | {name}: {flat(facts)}"
    return told


async def run(rows: Sequence[Row], plan: Plan, results: Path | None) -> list[Outcome]:
    """Run rows, those that share a setup on the same servers. Print each, and write all so far as JSON."""
    outcomes: list[Outcome] = []
    begun = time.monotonic()

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if results is not None:
            results.write_text(as_json(outcomes, plan, time.monotonic() - begun))
        say(line(outcome))
        for problem in outcome.problems[:SHOWN]:
            say(f"     {problem}")

    for members in _groups(rows):
        if reason := absent(members[0].setup):
            for row in members:
                done(Outcome(row.number, row.fault, "absent", measured={"reason": reason}, seed=plan.seed))
            continue
        await _run_group(members, plan, done)
    return sorted(outcomes, key=lambda one: one.number)


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Return rows that share servers: those of one setup, unless a row starts its servers itself."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.setup if row.setup.starts else row, []).append(row)
    return list(groups.values())


async def _run_group(members: list[Row], plan: Plan, done: Any) -> None:
    bench = Bench(members[0].setup, plan)
    last: Outcome | None = None
    try:
        async with bench:
            for row in members:
                if last is not None:
                    done(last)
                last = await run_row(row, bench)
                if row.setup.starts and last.problems and all(one.startswith(LATE) for one in last.problems):
                    last = await run_row(row, bench)
                    last.measured["runs"] = 2
                if last.result == "fails":
                    _keep(bench, last)
    except Exception as error:  # noqa: BLE001 - servers that do not start or end are a failure of their row
        told = f"the servers did not start or end: {type(error).__name__}: {error}"
        if last is None:
            for row in members:
                done(Outcome(row.number, row.fault, "fails", problems=[told], seed=plan.seed))
            return
        last.result = "fails"
        last.problems.append(told)
    if last is not None:
        done(last)


def _keep(bench: Bench, outcome: Outcome) -> None:
    """Write the last calls and the problems of a row that failed."""
    place = bench.folder / f"row-{outcome.number}"
    place.mkdir(exist_ok=True)
    (place / "outcome.json").write_text(json.dumps(outcome.facts(), indent=2, default=str) + "\n")
    with (place / "history.jsonl").open("w") as file:
        file.writelines(line_of(event) + "\n" for event in bench.last.events)


def chosen(text: str) -> list[Row]:
    """Return the rows of a list of numbers and ranges. Raises ValueError for an unknown one."""
    known = by_number(ROWS)
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1)) if last else {int(first)}
    if unknown := numbers - known.keys():
        raise ValueError(f"no row {', '.join(map(str, sorted(unknown)))}; `--list` prints all")
    return [known[number] for number in sorted(numbers)]


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def as_json(outcomes: Sequence[Outcome], plan: Plan, seconds: float) -> str:
    """Return the results of rows as JSON, in the order of their numbers."""
    facts = {
        "seed": plan.seed,
        "full": plan.full,
        "isolation": plan.isolation,
        "seconds": round(seconds),
        "floor_ms": lab.FLOOR_S * 1e3,
        **machine(),
        "rows": [one.facts() for one in sorted(outcomes, key=lambda one: one.number)],
    }
    return json.dumps(facts, indent=2, default=float) + "\n"


def arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", metavar="LIST", help="numbers and ranges with commas, as 1-6,17; default: all")
    parser.add_argument("--full", action="store_true", help="the counts of the table; a row that is absent fails")
    parser.add_argument("--isolation", choices=("none", "process"), default="none", help="of servers that allow both")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random; default: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON, after each row")
    parser.add_argument("--folder", type=Path, help="for logs and histories; default: a new one, removed if all holds")
    parser.add_argument("--list", action="store_true", help="print the rows, and run none")
    return parser.parse_args()


def main() -> None:
    """Entry point."""
    options = arguments()
    try:
        rows = chosen(options.rows) if options.rows else list(ROWS)
    except ValueError as error:
        say(f"--rows: {error}")
        sys.exit(2)
    if options.list:
        for row in rows:
            say(f"{row.number:>2} {row.fault}{f' ({reason})' if (reason := absent(row.setup)) else ''}")
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65_536)), hard))
    folder = Path(options.folder or tempfile.mkdtemp(prefix="attnserve-faults-"))
    plan = Plan(options.seed, options.full, options.isolation, folder.absolute())
    say(f"seed {plan.seed}, {'full' if plan.full else 'reduced'} counts, isolation {plan.isolation}, folder {folder}")
    begun = time.monotonic()
    outcomes = asyncio.run(run(rows, plan, options.json))
    seconds = time.monotonic() - begun
    counts = {name: sum(one.result == name for one in outcomes) for name in ("holds", "fails", "absent", "skipped")}
    say(f"{len(outcomes)} rows in {seconds:.0f} s: {flat(counts)}")
    failed = counts["fails"] or (plan.full and counts["absent"])
    if failed:
        for one in outcomes:
            if one.problems:
                say(f"row {one.number} failed: {'; '.join(one.problems[:SHOWN])}")
        say(f"the calls and logs of rows that failed are in {folder}")
        sys.exit(1)
    if options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
