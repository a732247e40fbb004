"""The command `features`: read the command line, request features of rows, and show them by layer and head.

`--server`, or the variable `ATTNSERVE_SERVER`, names the server. A failed call ends the command with one sentence and
an exit code of `_errors`. A wrong option, and a file that cannot be read or written, end it with exit code 2.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final, Literal, cast, get_args

import typer
from rich.console import Console

from attnserve_client import AttentionSelection
from attnserve_client._selection import Feature
from attnserve_client.cli._errors import reported
from attnserve_client.cli._options import DEFAULT_SERVER, DEFAULT_TIMEOUT_S, AsJson, Server, Timeout, Version, connect
from attnserve_client.cli._reading import read_texts
from attnserve_client.cli._selecting import numbers
from attnserve_client.cli._show import show_features
from attnserve_client.cli._writing import print_json, write_png

EXAMPLES: Final = (
    "Examples:\n\n"
    'attnserve features minilm "The buyer assumes all liabilities."\n\n'
    "attnserve features minilm - --feature entropy --layer 0,1 --png entropy.png < contract.txt"
)


def features(  # noqa: PLR0913, PLR0917 - the options of a command
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model's name.")],
    text: Annotated[str, typer.Argument(help="The text; `-` reads it from standard input.")],
    version: Version = "",
    feature: Annotated[
        list[str] | None,
        typer.Option("--feature", help=f"{', '.join(get_args(Feature))}; may be repeated. All of them by default."),
    ] = None,
    layer: Annotated[str, typer.Option("--layer", help="Layers with commas, -1 for the last; all by default.")] = "",
    unit: Annotated[Literal["word", "token"], typer.Option("--unit", help="What a row represents.")] = "token",
    drop_special: Annotated[bool, typer.Option("--drop-special", help="Drop tokens such as [CLS] and [SEP].")] = False,
    png: Annotated[
        Path | None, typer.Option("--png", help="Write a picture of the first feature (needs the extra `plot`).")
    ] = None,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Show features of each layer and head, such as the entropy of its rows, as means over the rows."""
    (sentence,) = read_texts([text], whole=True)
    selection = AttentionSelection(
        layers=numbers(layer, "--layer") if layer else (),
        unit=unit,
        special_tokens="drop" if drop_special else "keep",
        features=cast("list[Feature]", feature) or get_args(Feature),
    )
    with reported(server, as_json=as_json), connect(server, context) as client:
        result = client.infer(model, sentence, version=version, outputs=[], attention=selection, timeout=timeout)
    assert result.features is not None, "the client checks that features came"
    if png is not None:
        write_png(png, result.features)
    if as_json:
        print_json({"receipt": asdict(result.receipt), **result.features.to_dict()})
        return
    console = Console(highlight=False)
    show_features(console, sentence, result.features)
    if png is not None:
        console.print(f"wrote {png}", markup=False, style="dim")
