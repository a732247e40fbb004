"""The commands `queues` and `tokenizer`: what waits and runs of each model, and the tokenizer file of one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnserve_client import Client
from attnserve_client._gateways import ModelLoad
from attnserve_client.cli._errors import reported
from attnserve_client.cli._options import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
    AsJson,
    Server,
    Timeout,
    Version,
    shown,
)
from attnserve_client.cli._text import clean


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Examples:\n\nattnserve queues\n\nattnserve queues minilm --json")(queues)
    app.command(epilog="Examples:\n\nattnserve tokenizer minilm\n\nattnserve tokenizer minilm --out tokenizer.json")(
        tokenizer
    )


def queues(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="One model; without it, all of them.")] = "",
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Show what waits and runs of each model, and how long a request that arrives now would wait."""
    with reported(server, as_json=as_json), Client(server, **shown(context)) as client:
        loads = client.loads(name, timeout=timeout)
    if as_json:
        _print_json([asdict(each) for each in loads])
    else:
        _show(loads)


def tokenizer(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The model's name.")],
    version: Version = "",
    out: Annotated[Path | None, typer.Option("--out", help="Write the file here, as a `tokenizer.json`.")] = None,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Describe the tokenizer of a model, and write its file."""
    with reported(server, as_json=as_json), Client(server, **shown(context)) as client:
        found = client.tokenizer(name, version, timeout=timeout)
    if out is not None:
        try:
            out.write_bytes(found.content)
        except OSError as error:
            raise typer.BadParameter(f"cannot write {out}: {error.strerror}", param_hint="--out") from None
    facts = {key: value for key, value in asdict(found).items() if key != "content"} | {"bytes": len(found.content)}
    if as_json:
        _print_json(facts)
        return
    console = Console(highlight=False, markup=False)
    for key, value in facts.items():
        console.print(f"{key:<20}{clean(str(value))}", soft_wrap=True)
    if out is not None:
        console.print(f"wrote {out}", style="dim")


def _show(loads: list[ModelLoad]) -> None:
    table = Table("model", "version", "state", box=None, pad_edge=False)
    for column in ("waiting", "tokens", "bytes", "running", "instances", "wait"):
        table.add_column(column, justify="right")
    for each in loads:
        state = Text(each.state, style="green" if each.state == "ready" else "yellow")
        wait = "unknown" if each.predicted_wait_s is None else f"{1000 * each.predicted_wait_s:.1f} ms"
        numbers = (each.waiting_sequences, each.waiting_tokens, each.waiting_bytes, each.running_tokens, each.instances)
        table.add_row(Text(clean(each.model)), clean(each.version), state, *map(str, numbers), wait)
    Console(highlight=False, markup=False).print(table if loads else "The server has no models.")


def _print_json(value: object) -> None:
    # JSON escapes control characters, so that texts cannot control a terminal.
    sys.stdout.write(json.dumps(value) + "\n")
