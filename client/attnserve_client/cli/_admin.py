"""The commands `load`, `unload` and `reload`: change the models of a running server, which needs `serve --admin`.

`--server`, or the variable `ATTNSERVE_SERVER`, names the server. A failed call ends a command with one sentence and an
exit code of `_errors`. `reload` ends with exit code 8 if a version could not be loaded.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnserve_client._models import ModelChange
from attnserve_client._retry import LOAD_TIMEOUT_S
from attnserve_client.cli._errors import reported
from attnserve_client.cli._options import DEFAULT_SERVER, AsJson, Server, connect
from attnserve_client.cli._text import clean

EXIT_FAILED: Final = 8
"""Exit code of a reload after which a version is failed."""

Patience = Annotated[
    float, typer.Option("--timeout", min=0.001, help="Seconds to wait; the server continues after that.")
]
Name = Annotated[str, typer.Argument(help="The model's name.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Examples:\n\nattnserve load minilm\n\nattnserve load minilm 3 --server 10.0.0.1:8001")(load)
    app.command(epilog="Example:\n\nattnserve unload minilm 2")(unload)
    app.command(epilog="Examples:\n\nattnserve reload\n\nattnserve --token-file admin.txt reload --json")(reload)


def load(
    context: typer.Context,
    name: Name,
    version: Annotated[str, typer.Argument(help="Its version; without it, the highest of the repository.")] = "",
    server: Server = DEFAULT_SERVER,
    timeout: Patience = LOAD_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Load a version from the server's repository, and wait until it is ready."""
    with reported(server, as_json=as_json), connect(server, context) as client:
        model = client.load_model(name, version, timeout=timeout)
    if as_json:
        _print_json(asdict(model))
    else:
        line = f"{clean(model.name)} {clean(model.version)} is {model.state}, digest {clean(model.digest)}"
        _console().print(line, soft_wrap=True)


def unload(
    context: typer.Context,
    name: Name,
    version: Annotated[str, typer.Argument(help="Its version.")],
    server: Server = DEFAULT_SERVER,
    timeout: Patience = LOAD_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Unload a version after its pending requests. It stays unloaded until `load` names it."""
    with reported(server, as_json=as_json), connect(server, context) as client:
        client.unload_model(name, version, timeout=timeout)
    if as_json:
        _print_json({"name": name, "version": version, "outcome": "unloaded"})
    else:
        _console().print(f"{clean(name)} {clean(version)} is unloaded")


def reload(
    context: typer.Context,
    server: Server = DEFAULT_SERVER,
    timeout: Patience = LOAD_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Load what is new, changed or failed before in the server's repository, and unload what was removed."""
    with reported(server, as_json=as_json), connect(server, context) as client:
        changes = client.reload_repository(timeout=timeout)
    if as_json:
        _print_json([asdict(change) for change in changes])
    else:
        _show(changes)
    if any(change.outcome == "failed" for change in changes):
        raise typer.Exit(EXIT_FAILED)


def _show(changes: list[ModelChange]) -> None:
    if not changes:
        _console().print("Nothing has changed.")
        return
    table = Table("model", "version", "outcome", "reason", box=None, pad_edge=False)
    for change in changes:
        outcome = Text(change.outcome, style="red" if change.outcome == "failed" else "green")
        table.add_row(Text(clean(change.name)), clean(change.version), outcome, Text(clean(change.reason)))
    _console().print(table)


def _console() -> Console:
    return Console(highlight=False, markup=False)


def _print_json(value: object) -> None:
    # JSON escapes control characters, so that texts cannot control a terminal.
    sys.stdout.write(json.dumps(value) + "\n")
