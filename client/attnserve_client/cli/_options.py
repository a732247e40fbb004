"""Options shared by several commands, and what they show the server.

The variable `ATTNSERVE_SERVER` replaces the default of `--server`.

A value that an option does not take ends the command with exit code 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from attnserve_client import Client, RetryPolicy
from attnserve_client._channel import targets_of
from attnserve_client._credentials import Tls, TokenFile


def _checked(server: str) -> str:
    """Return the value of `--server`. A value without an address ends the command with exit code 2."""
    try:
        targets_of(server)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return server


Server = Annotated[
    str,
    typer.Option(
        "--server",
        envvar="ATTNSERVE_SERVER",
        metavar="HOST:PORT[,...]",
        callback=_checked,
        help="The server's address, or those of its replicas with commas.",
    ),
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.001, help="Seconds until the command fails, retries included.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON; errors too, on stderr.")]
Version = Annotated[
    str, typer.Option("--model-version", help="The model's version.", show_default="the highest that is ready")
]
TopLabels = Annotated[
    int, typer.Option("--top-labels", min=0, help="How many labels of each text, word or mask. 0: the model's default.")
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", help="Name of the model's prompt to put before the text; '' for none.", show_default="the model's"
    ),
]
LabelUnit = Annotated[Literal["word", "token"], typer.Option("--label-unit", help="What token classification labels.")]

DEFAULT_SERVER: Final = "localhost:8001"
DEFAULT_TIMEOUT_S: Final = 30.0

UseTls = Annotated[bool, typer.Option("--tls", envvar="ATTNSERVE_TLS", help="Encrypt; --ca and --cert imply it.")]
Authority = Annotated[
    Path | None,
    typer.Option(
        "--ca", envvar="ATTNSERVE_CA", help="PEM file of the server's authority.", show_default="the system's"
    ),
]
Certificate = Annotated[
    Path | None, typer.Option("--cert", envvar="ATTNSERVE_CERT", help="PEM file of your own certificate.")
]
PrivateKey = Annotated[Path | None, typer.Option("--key", envvar="ATTNSERVE_KEY", help="PEM file of its key.")]
BearerToken = Annotated[
    str,
    typer.Option(
        "--token",
        envvar="ATTNSERVE_TOKEN",
        help="Your token. Other users of this machine can see it: use the variable.",
    ),
]
BearerFile = Annotated[
    Path | None, typer.Option("--token-file", envvar="ATTNSERVE_TOKEN_FILE", help="File with your token, read again.")
]


@dataclass(frozen=True, slots=True)
class Shown:
    """What the command shows the server."""

    credentials: Tls | None = None
    token: str | TokenFile | None = None

    @classmethod
    def of(cls, tls: Tls | None, token: str, token_file: Path | None) -> Shown:
        """Read the files.

        Raises:
            typer.BadParameter: Both `token` and `token_file` are given, or a file cannot be used.
        """
        if token and token_file:
            raise typer.BadParameter("give --token or --token-file, not both", param_hint="--token")
        try:
            if tls is not None:
                tls.credentials()
            return cls(tls, TokenFile(token_file) if token_file else token or None)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from None


def connect(server: str, context: typer.Context) -> Client:
    """Return a client with the credentials of the options, which does not wait for a server that is not there.

    A mistyped address is reported at once; `attnserve models --wait` waits.
    """
    return Client(server, **shown(context), retry=RetryPolicy(wait_for_ready=False))


def shown(context: typer.Context) -> dict[str, Any]:
    """Return the arguments of a client: those of the options that precede the command."""
    found = context.find_object(Shown) or Shown()
    return {"credentials": found.credentials, "token": found.token}
