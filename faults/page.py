"""Write the last run into docs/reliability.md, as its last section, from the JSON of a run: `python -m faults.page`.

python -m faults --full --json docs/reliability.json
python -m faults.page            # docs/reliability.md from docs/reliability.json
python -m faults.page --results docs/reliability.json again.json  # rows of a later run replace those of an earlier one
python -m faults.page --check    # exit code 1 if the page differs
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

DOCS: Final = Path(__file__).parents[1] / "docs"
HEAD: Final = """
## The last run

<!-- Written by faults/page.py from reliability.json: run the faults again, then `python -m faults.page`. -->

Made by `python -m faults --json docs/reliability.json` and `python -m faults.page`:
"""
SHARED: Final = ("canary", "statuses", "memory_mb", "reason")


def figures(facts: dict[str, Any]) -> str:
    """Return figures as text of one cell."""
    parts = []
    for name, value in facts.items():
        shown = name.replace("_", " ")
        if isinstance(value, dict):
            parts.append(f"{shown}: {figures(value)}")
        elif isinstance(value, list):
            parts.append(f"{shown} {' to '.join(f'{one:g}' if isinstance(one, float) else str(one) for one in value)}")
        else:
            parts.append(f"{shown} {value:g}" if isinstance(value, float) else f"{shown} {value}")
    return ", ".join(parts).replace("|", "\\|")


def table(results: dict[str, Any]) -> str:
    """Return the section's text."""
    counts = "full" if results["full"] else "reduced"
    held = sum(row["result"] == "holds" for row in results["rows"])
    head = (
        f"{held} of {len(results['rows'])} rows hold, with {counts} counts and seed {results['seed']}, in "
        f"{results['seconds']} s on {results['cores']} cores ({results['machine']}, Python {results['python']}). The "
        "canary's p99 stands beside that of its baseline, in ms."
    )
    lines = [head, "", "| row | fault | result | injected | measured | canary: failed of calls, p99 | s |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in results["rows"]:
        measured = row["measured"]
        canary = measured.get("canary")
        shown = "none"
        if canary:
            shown = f"{canary['failed']} of {canary['calls']}, {canary['p99_ms']:g} ({canary['baseline_p99_ms']:g})"
        own = {name: value for name, value in measured.items() if name not in SHARED}
        if row["result"] in {"absent", "skipped"}:
            own = {"because": measured["reason"]}
        cells = (row["row"], row["fault"], row["result"], figures(row["injected"]), figures(own), shown, row["seconds"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def merged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one result of several runs: the last of each row, and the seconds of these.

    Raises:
        ValueError: the runs differ in counts, seed or machine.
    """
    for name in ("full", "seed", "cores", "machine", "python"):
        if len(found := {run[name] for run in runs}) > 1:
            raise ValueError(f"the runs differ in {name}: {', '.join(map(str, sorted(found)))}")
    rows = {row["row"]: row for run in runs for row in run["rows"]}
    seconds = round(sum(row["seconds"] for row in rows.values()))
    return {**runs[0], "rows": [rows[number] for number in sorted(rows)], "seconds": seconds}


def written(page: str, results: dict[str, Any]) -> str:
    """Return the page with the section of these results, which replaces an earlier one."""
    return f"{page.partition(HEAD)[0]}{HEAD}\n{table(results)}\n"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m faults.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, nargs="+", default=[DOCS / "reliability.json"], metavar="FILE")
    parser.add_argument("--page", type=Path, default=DOCS / "reliability.md")
    parser.add_argument("--check", action="store_true", help="write nothing, and exit with 1 if the page differs")
    options = parser.parse_args()
    old = options.page.read_text(encoding="utf-8")
    new = written(old, merged([json.loads(one.read_text(encoding="utf-8")) for one in options.results]))
    if options.check:
        sys.exit(f"{options.page.name} is out of date: run `python -m faults.page`" if old != new else 0)
    options.page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
