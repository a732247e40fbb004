"""Options shared by several commands. The variable `ATTNSERVE_SERVER` replaces the default of `--server`.

A value that an option does not take ends the command with exit code 2.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import typer

from attnserve_client._channel import targets_of


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
Version = Annotated[str, typer.Option("--model-version", help="The model's version.", show_default="the highest")]
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
