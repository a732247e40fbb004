"""The command `payload`: write one request as a file that other load tools, such as h2load, send again and again."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Annotated, Final

import typer
from attnserve.v1 import inference_service_pb2 as wire
from rich.console import Console

from attnserve_client import Client, InvalidRequest
from attnserve_client.bench.lengths import Lengths
from attnserve_client.bench.workload import SELECTIONS, RequestOptions, of_lengths, of_texts
from attnserve_client.cli._errors import reported
from attnserve_client.cli._options import DEFAULT_SERVER, DEFAULT_TIMEOUT_S, Server, Timeout, Version, shown

_PREFIX: Final = struct.Struct(">BI")
"""What precedes a message in the body of a call: 0, for not compressed, and its length. Source: gRPC over HTTP2."""


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        epilog="Examples:\n\n"
        'attnserve payload minilm request.bin "A sentence."\n\n'
        "attnserve payload minilm request.bin --length 128 --sequences 8"
    )(payload)


def payload(  # noqa: PLR0913, PLR0917 - the options of a command
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model's name.")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    text: Annotated[str, typer.Argument(help="The text; without one, random ids of --length.")] = "",
    version: Version = "",
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of a random sequence.")] = 32,
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="Sequences in the request.")] = 1,
    output: Annotated[list[str] | None, typer.Option("--output", help="An output to return; may be repeated.")] = None,
    attention: Annotated[bool, typer.Option("--attention", help="Select the last layer's mean over heads.")] = False,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Write the body of one `Infer` call to a file. It reads the model's inputs and limits only."""
    options = RequestOptions(output, SELECTIONS["mean"], float(attention), sequences)
    with reported(server, as_json=False), Client(server, **shown(context)) as client:
        described = client.model(model, version, timeout=timeout)
        if sequences > described.max_batch_size:
            raise InvalidRequest.of("sequences", f"{sequences} exceeds the model's maximum, {described.max_batch_size}")
        workload = (
            of_texts(described, [text], options)
            if text
            else of_lengths(described, Lengths.parse(str(length)), options, seed=0, kinds=1)
        )
    body = body_of(workload.requests[0])
    try:
        out.write_bytes(body)
    except OSError as error:
        raise typer.BadParameter(f"cannot write {out}: {error.strerror}", param_hint="OUT") from None
    facts = f"wrote {out}: {len(body)} bytes, one request of {sequences} sequences"
    Console(highlight=False, markup=False).print(facts, soft_wrap=True)


def body_of(request: wire.InferRequest) -> bytes:
    """Return the body of a unary call with this request, uncompressed."""
    message = request.SerializeToString()
    return _PREFIX.pack(0, len(message)) + message
