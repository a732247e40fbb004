"""`attnserve-server healthcheck`: asks the server beside it whether it is ready, for a container's HEALTHCHECK.

It runs every few seconds, so it takes nothing but the standard library and typer, and reads the server's own variables.
"""

from __future__ import annotations

import ipaddress
from http.client import HTTPConnection, HTTPException
from typing import Annotated

import typer

UNSPECIFIED_TO_LOOPBACK = {4: "127.0.0.1", 6: "::1"}


def reachable_host(host: str) -> str:
    """Where to ask a server that listens on `host`: one that listens everywhere is asked on loopback."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return UNSPECIFIED_TO_LOOPBACK[address.version] if address.is_unspecified else host


def why_not_ready(host: str, port: int, timeout_s: float) -> str:
    """Asks `/readyz` once, past any proxy. Returns the reason why the server is not ready; empty if it is."""
    connection = HTTPConnection(reachable_host(host), port, timeout=timeout_s)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read(4096).decode("utf-8", "replace").strip()
    except (OSError, HTTPException) as error:
        return f"no answer from port {port}: {type(error).__name__}"
    finally:
        connection.close()
    return "" if answer.status == 200 else f"/readyz answered {answer.status}: {body}"


def healthcheck(
    host: Annotated[str, typer.Option(envvar="ATTNSERVE_HOST", help="Where the server listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--http-port", envvar="ATTNSERVE_HTTP_PORT", help="Its HTTP port.")] = 8002,
    timeout_s: Annotated[float, typer.Option(help="How long to wait for the answer, in seconds.")] = 2.0,
) -> None:
    """Ask a running server whether it is ready: exit code 0 if so, 1 if not."""
    reason = why_not_ready(host, port, timeout_s)
    if reason:
        typer.echo(f"not ready: {reason}", err=True)
        raise typer.Exit(1)
    typer.echo("ready")


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(healthcheck)
