"""Make files with other people's tools, serve them, and compare: `make foreign`, or `python -m bench.foreign`.

An environment is a virtual environment with some of these tools. `--short` makes a few files in this project's own
alone, as CI does, and writes nothing. Other runs write `docs/foreign.md`; `--only` selects environments, and keeps the
tables of the others. Exit code 1 if an environment cannot be installed, a script that makes files fails, a server does
not start, an answer is wrong without an error, or an empty cell has no reason; 2 if `--only` matches no environment.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from attnserve_client import AsyncClient
from attnserve_client.errors import AttnserveError
from rich.console import Console
from rich.table import Table

from bench import service
from bench.foreign.case import Case, cases_in
from bench.foreign.compare import Row, compared, converted
from bench.foreign.environments import ENVIRONMENTS, PLACE, ROOT, Environment, installed, made
from bench.foreign.page import COLUMNS, cells_of, is_explained, rendered

PAGE = ROOT / "docs" / "foreign.md"


def make_cases(environment: Environment, folder: Path, console: Console, *, short: bool) -> tuple[list[Case], str]:
    """Make an environment and its cases. Return them, and why some are missing."""
    console.print(f"{environment.name}: installing")
    if why := installed(environment):
        return [], f"{environment.name} cannot be installed: {why}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    console.print(f"{environment.name}: making files")
    why = made(environment, folder, short=short)
    return cases_in(folder), f"{environment.name}: {why}" if why else ""


def served(cases: list[Case], repository: Path, console: Console) -> list[Row]:
    """Convert all cases, serve those that convert, and compare their answers."""
    manifests: dict[str, tuple[dict[str, Any], str]] = {}
    rows: dict[str, Row] = {}
    for number, case in enumerate(cases, start=1):
        begun = time.monotonic()
        manifest, why = (None, f"the tool fails: {case.failed}") if case.failed else converted(case, repository)
        if manifest is None:
            rows[case.name] = Row(case, notes=[why])
        else:
            manifests[case.name] = manifest, why
        took = time.monotonic() - begun
        console.print(
            f"{number}/{len(cases)} {case.name}: {why if manifest is None else 'converted'} ({took:.0f} s)",
            soft_wrap=True,
        )
    if manifests:
        with service.running(repository) as server:
            rows |= asyncio.run(_compare(server.target, [case for case in cases if case.name in manifests], manifests))
    return [rows[case.name] for case in cases]


async def _compare(target: str, cases: list[Case], manifests: dict[str, tuple[dict[str, Any], str]]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    async with AsyncClient(target) as client:
        for case in cases:
            try:
                rows[case.name] = await compared(client, case, *manifests[case.name])
            except AttnserveError as error:
                rows[case.name] = Row(case, notes=[f"converted, and the server answers: {error}"], wrong=True)
    return rows


def show(rows: list[Row], console: Console) -> None:
    """Print the rows as a table."""
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*cells_of(row), style=None if is_explained(row) else "red")
    console.print(table)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few files, in this project's environment alone")
    parser.add_argument("--only", default="", help=f"of {', '.join(each.name for each in ENVIRONMENTS)}, with commas")
    options = parser.parse_args()
    wanted = set(options.only.split(",")) if options.only else {each.name for each in ENVIRONMENTS}
    chosen = [each for each in ENVIRONMENTS if each.name in wanted and (each.short or not options.short)]
    if not chosen:
        parser.error(f"--only {options.only}: no such environment")
    console = Console(width=None if sys.stdout.isatty() else 200)
    tables: dict[str, list[Row]] = {}
    missing: list[str] = []
    with tempfile.TemporaryDirectory(prefix="attnserve-foreign-") as work:
        for environment in chosen:
            place = Path(work) / "cases" / environment.name if options.short else PLACE / "cases" / environment.name
            cases, why = make_cases(environment, place, console, short=options.short)
            missing += [why] if why else []
            tables[environment.name] = served(cases, Path(work) / "models" / environment.name, console)
    rows = [row for table in tables.values() for row in table]
    show(rows, console)
    if not options.short:
        stored = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        PAGE.write_text(rendered(tables, stored, [each.name for each in ENVIRONMENTS]), encoding="utf-8")
        console.print(f"wrote {PAGE.relative_to(ROOT)}")
    faults = [
        f"{row.case.name}: {cells_of(row)[-1] or 'a blank without a reason'}" for row in rows if not is_explained(row)
    ]
    if missing or faults:
        raise SystemExit("\n".join((*missing, *faults)))


if __name__ == "__main__":
    main()
