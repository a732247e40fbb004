"""`attnserve-server recommend`: measure the ways to serve a bundle on this machine, and print the flags of the fastest.

A way that does not serve here is listed with the reason. The exit code is 2 if the bundle cannot be served at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from attnserve_server.cli._errors import EXIT_CODES, REFUSED, error_boundary
from attnserve_server.cli._options import AsJson

_EPILOG = (
    "Examples:\n\n"
    "attnserve-server recommend models/minilm/1\n\n"
    "attnserve-server recommend models/minilm/1 models/minilm-int8/1\n\n"
    "attnserve-server recommend models/minilm/1 --seconds 10 --json"
    f"{EXIT_CODES}"
)


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command("recommend", epilog=_EPILOG)(recommend)


def recommend(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            help="The folder of a bundle, and of siblings such as its int8 bundle. All are compared with the first.",
            metavar="BUNDLE...",
        ),
    ],
    *,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.1, help="Seconds for which each way is kept busy.")
    ] = 3.0,
    as_json: AsJson = False,
) -> None:
    """Measure providers, precisions, threads and instances on this machine, and print the flags of the fastest.

    Run it while nothing else runs here.
    """
    with error_boundary():
        from attnserve_server.cli._comparing import compared, show  # noqa: PLC0415 - imports the runtime
        from attnserve_server.conversion.base.steps import Steps  # noqa: PLC0415 - as above

        found = compared(bundles, seconds, Steps(Console(stderr=True)))
        if as_json:
            typer.echo(json.dumps(found.as_json(), indent=2))
        else:
            show(found, Console())
        if not found.rows:
            raise typer.Exit(REFUSED)
