"""The command `bench`: read the command line, put load on the server, print the figures.

`--server`, or the variable `ATTNSERVE_SERVER`, names the server. Exit code 2 for a wrong option or a file of texts that
cannot be read, 12 for figures that describe the client rather than the server, and that of `_errors` for a failed call.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from rich.console import Console

from attnserve_client import InvalidRequest
from attnserve_client._channel import MAX_CONNECTIONS
from attnserve_client.bench.lengths import DEFAULT, FORMS, Lengths
from attnserve_client.bench.run import Plan, run
from attnserve_client.bench.workload import SELECTIONS, RequestOptions, of_lengths, of_texts
from attnserve_client.cli._bench_show import Display, show_report
from attnserve_client.cli._errors import EXIT_INVALID_RUN, reported
from attnserve_client.cli._options import DEFAULT_SERVER, AsJson, Server, Version, connect, shown

EXAMPLES: Final = (
    "Examples:\n\n"
    "attnserve bench minilm\n\n"
    "attnserve bench minilm --rate 80 --duration 60 --attention-share 0.25\n\n"
    "attnserve bench minilm --texts sentences.txt --stream --sequences 8 --json\n\n"
    "attnserve bench minilm --callers 256 --lengths uniform:4,512 --output embedding\n\n"
    "attnserve bench minilm --server 10.0.0.1:8001,10.0.0.2:8001 --connections 16"
)


def bench(  # noqa: PLR0913, PLR0917 - the options of a command
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model's name.")],
    version: Version = "",
    callers: Annotated[
        int,
        typer.Option("--callers", min=1, help="Closed loop: callers that each wait for their answer."),
    ] = 64,
    rate: Annotated[
        float | None,
        typer.Option("--rate", min=0.001, help="Open loop instead: arrivals a second, as a Poisson process."),
    ] = None,
    duration: Annotated[float, typer.Option("--duration", min=0.1, help="Seconds of sending requests.")] = 10.0,
    requests: Annotated[
        int | None,
        typer.Option("--requests", min=1, help="Closed loop: stop after this many requests.", show_default="no limit"),
    ] = None,
    warm_up: Annotated[
        float, typer.Option("--warm-up", min=0, help="Seconds of the same load before the measurement.")
    ] = 2.0,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="LENGTHS", help=f"Lengths in tokens of random sequences: {FORMS}.")
    ] = str(DEFAULT),
    texts: Annotated[
        Path | None, typer.Option("--texts", help="Send a file's lines as texts instead of random sequences.")
    ] = None,
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="Sequences in each request.")] = 1,
    attention_share: Annotated[
        float, typer.Option("--attention-share", min=0, max=1, help="Share of the requests that select attention.")
    ] = 0.0,
    attention: Annotated[
        Literal["mean", "top", "all"],
        typer.Option(
            "--attention",
            help="Their selection: the last layer's mean over heads, its 16 strongest links, or all maps.",
        ),
    ] = "mean",
    output: Annotated[
        list[str] | None,
        typer.Option("--output", help="An output to return; may be repeated.", show_default="all of the model's"),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Send all requests on one stream for each connection.")
    ] = False,
    connections: Annotated[
        int,
        typer.Option(
            "--connections",
            min=1,
            max=MAX_CONNECTIONS,
            help="Connections to each address, used in turn. A server with several fronts needs several.",
        ),
    ] = 1,
    timeout: Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds that each request may take.")] = 30.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of lengths, ids and arrivals.")] = 0,
    server: Server = DEFAULT_SERVER,
    as_json: AsJson = False,
) -> None:
    """Put load on a server and measure rates, latency percentiles, refusals and batches; judge whether they are valid.

    Latencies count from when a request was due, so that in an open loop (`--rate`) they include the delay of a late
    client. Errors count as refusals, never as answers.
    """
    distribution = _lengths(lengths)
    plan = Plan(
        callers=callers,
        rate=rate,
        duration_s=duration,
        requests=requests,
        warm_up_s=warm_up,
        timeout_s=timeout,
        connections=connections,
        stream=stream,
        seed=seed,
    )
    if rate is not None and requests is not None:
        raise typer.BadParameter("an open loop (--rate) has no --requests; set --duration", param_hint="--requests")
    options = RequestOptions(output, SELECTIONS[attention], attention_share, sequences)
    with reported(server, as_json=as_json), connect(server, context) as client:
        described = client.model(model, version, timeout=timeout)
        if sequences > described.max_batch_size:
            raise InvalidRequest.of("sequences", f"{sequences} exceeds the model's maximum, {described.max_batch_size}")
        workload = (
            of_lengths(described, distribution, options, seed=seed)
            if texts is None
            else of_texts(described, _lines(texts), options)
        )
        with Display(plan, Console(stderr=True)) as display:
            report = run(server, workload, plan, display.add, **shown(context))
    if as_json:
        sent = {"lengths": str(distribution)} if texts is None else {"texts": len(workload.requests) * sequences}
        facts = {"model": described.name, "version": described.version, "digest": described.digest, **sent}
        sys.stdout.write(json.dumps({**facts, "plan": asdict(plan), "report": asdict(report)}) + "\n")
    else:
        show_report(Console(highlight=False), f"{described.name} {described.version} at {server}", plan, report)
    if report.invalid:
        raise typer.Exit(EXIT_INVALID_RUN)


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--lengths") from None


def _lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror or error}", param_hint="--texts") from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{path} is not UTF-8 text", param_hint="--texts") from None
    if not lines:
        raise typer.BadParameter(f"{path} has no text; put one text on each line", param_hint="--texts")
    return lines
