"""`attnserve-server healthcheck`: asks a server whether it is ready, with its own variables or with flags."""

from __future__ import annotations

from typing import Annotated

import typer

from attnserve_server.observability import probe


def healthcheck(
    host: Annotated[
        str, typer.Option(envvar=probe.HOST_VARIABLE, help="Where the server listens.")
    ] = probe.DEFAULT_HOST,
    port: Annotated[
        int, typer.Option("--http-port", envvar=probe.PORT_VARIABLE, help="Its HTTP port.")
    ] = probe.DEFAULT_PORT,
    timeout_s: Annotated[
        float, typer.Option(help="How long to wait for the answer, in seconds.")
    ] = probe.DEFAULT_TIMEOUT_S,
) -> None:
    """Ask a running server whether it is ready: exit code 0 if so, 1 if not."""
    reason = probe.why_not_ready(host, port, timeout_s)
    if reason:
        typer.echo(f"not ready: {reason}", err=True)
        raise typer.Exit(1)
    typer.echo("ready")


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(healthcheck)
