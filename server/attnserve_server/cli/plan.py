"""`attnserve-server plan`: how many replicas carry a traffic, with how much memory, and the latency to expect.

Exit code 2: the bundle cannot be served here, the file of traffic is wrong, or no number of replicas is enough.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from attnserve_server.cli._errors import EXIT_CODES, error_boundary
from attnserve_server.cli._options import AsJson

_EPILOG = (
    "Example of a file of traffic; all but rate and lengths have a default:\n\n"
    "rate: 200  # sequences a second at the busiest time\n\n"
    "lengths: {min: 4, p50: 32, p90: 89, p99: 206, max: 256}  # tokens\n\n"
    "attention: 0.1  # share that selects attention\n\n"
    "p99_ms: 150  # objective for the latency\n\n"
    "load: 0.6  # share of its peak that a replica carries\n\n"
    "spare: 1  # replicas that may fail\n\n"
    "Examples:\n\n"
    "attnserve-server plan models/minilm/1 --traffic traffic.yaml\n\n"
    "attnserve-server plan models/minilm/1 --traffic traffic.yaml --instances 4 --json"
    f"{EXIT_CODES}"
)


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command("plan", epilog=_EPILOG)(plan)


def plan(
    bundle: Annotated[Path, typer.Argument(help="The folder of a bundle.", metavar="BUNDLE")],
    *,
    traffic: Annotated[Path, typer.Option("--traffic", help="A YAML file of rate, lengths and objective.")],
    instances: Annotated[
        int,
        typer.Option("--instances", min=0, max=256, help="Runs at a time in a replica; 0: as the server's default."),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Plan replicas, memory and latency for a traffic, from the costs of a bundle on this machine.

    Run it on a machine like those that will serve, while nothing else runs there.
    """
    with error_boundary():
        from attnserve_server.cli._planning import planned, read_traffic, show  # noqa: PLC0415 - imports the runtime

        console = Console(stderr=True)
        with console.status("planning") as status:
            found = planned(bundle, read_traffic(traffic), instances, status.update)
        if as_json:
            typer.echo(json.dumps(found.as_json(), indent=2))
        else:
            show(found, Console())
