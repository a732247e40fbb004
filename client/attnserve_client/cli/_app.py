"""The commands `infer` and `models`, and what all commands share: read the command line, call, print.

`--server`, or the variable `ATTNSERVE_SERVER`, names the server. A failed call ends a command with one sentence and an
exit code of `_errors`. A wrong option, and a file that cannot be read or written, end it with exit code 2.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console

from attnserve_client import (
    InferenceResult,
    __version__,
)
from attnserve_client._credentials import Tls
from attnserve_client.cli import _admin, _explain, _faithful, _features, _gateways, _payload, _top
from attnserve_client.cli._bench import EXAMPLES, bench
from attnserve_client.cli._errors import CODES_HELP, reported
from attnserve_client.cli._options import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
    AsJson,
    Authority,
    BearerFile,
    BearerToken,
    Certificate,
    LabelUnit,
    PrivateKey,
    Prompt,
    Server,
    Shown,
    Timeout,
    TopLabels,
    UseTls,
    Version,
    connect,
)
from attnserve_client.cli._reading import read_input, read_texts
from attnserve_client.cli._selecting import labels_for
from attnserve_client.cli._show import show_model, show_models, show_results
from attnserve_client.cli._writing import print_json

app = typer.Typer(
    name="attnserve",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Run models on an attnserve server, and show where they looked.",
    epilog="Example, with TLS and a token: attnserve --ca ca.pem --token-file token.txt models\n\n" + CODES_HELP,
)

app.command(epilog=EXAMPLES)(bench)
app.command(epilog=_explain.EXAMPLES)(_explain.explain)
app.command(epilog=_features.EXAMPLES)(_features.features)
app.command(epilog=_faithful.EXAMPLES)(_faithful.faithfulness)
app.command(epilog=_top.EXAMPLES)(_top.top)
for commands in (_admin, _gateways, _payload):
    commands.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"attnserve {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    tls: UseTls = False,
    ca: Authority = None,
    cert: Certificate = None,
    key: PrivateKey = None,
    token: BearerToken = "",
    token_file: BearerFile = None,
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Read what all commands show the server."""
    try:
        files = Tls(ca, cert, key) if tls or ca or cert or key else None
    except ValueError:
        raise typer.BadParameter("give both --cert and --key, or neither", param_hint="--cert") from None
    context.obj = Shown.of(files, token, token_file)


@app.command(
    epilog="Examples:\n\n"
    'attnserve infer minilm "first text" "second text"\n\n'
    "cat texts.txt | attnserve infer minilm - --json",
)
def infer(  # noqa: PLR0913, PLR0917 - the options of a command
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model's name.")],
    text: Annotated[list[str], typer.Argument(help="Texts; `-` reads one text from each line of standard input.")],
    version: Version = "",
    pair: Annotated[str, typer.Option("--pair", help="A second text beside each text, such as a passage.")] = "",
    output: Annotated[list[str] | None, typer.Option("--output", help="An output to return; may be repeated.")] = None,
    prompt: Prompt = None,
    top_labels: TopLabels = 0,
    label_unit: LabelUnit = "word",
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Run texts through a model and print its outputs and labels."""
    texts = read_texts(text)
    inputs: list[Any] = [read_input(each, pair, {}) for each in texts]
    with reported(server, as_json=as_json), connect(server, context) as client:
        labels = labels_for(client.model(model, version), top_labels, label_unit)
        results = client.infer(
            model, inputs, version=version, outputs=output, labels=labels, prompt_name=prompt, timeout=timeout
        )
    if as_json:
        print_json({"receipt": asdict(results[0].receipt), "results": [_plain(result) for result in results]})
    else:
        show_results(Console(highlight=False), texts, results)


@app.command(
    epilog="Examples:\n\nattnserve models\n\nattnserve models minilm --json\n\nattnserve models minilm --wait 60"
)
def models(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="One model; without it, all of them.")] = None,
    version: Version = "",
    wait: Annotated[
        float,
        typer.Option("--wait", min=0, help="Wait up to so many seconds until it, or every model, is ready."),
    ] = 0.0,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """List the server's models, or describe one: inputs, outputs, axes, attention sites and limits."""
    console = Console(highlight=False)
    with reported(server, as_json=as_json), connect(server, context) as client:
        if wait:
            client.wait_ready(name, timeout=wait)
        if name is None:
            listed = client.models(timeout=timeout)
            if as_json:
                print_json([asdict(each) for each in listed])
            else:
                show_models(console, listed)
        else:
            described = client.model(name, version, timeout=timeout)
            if as_json:
                print_json(asdict(described))
            else:
                show_model(console, described)


def _plain(result: InferenceResult) -> dict[str, Any]:
    outputs = {
        name: {"dtype": array.dtype.name, "shape": list(array.shape), "data": _json_data(array)}
        for name, array in result.outputs.items()
    }
    labels = {} if result.labels is None else {"labels": result.labels.to_dict()}
    return {"outputs": outputs, **labels, "run": asdict(result.run)}


def _json_data(array: npt.NDArray[Any]) -> Any:
    """Return nested lists of numbers. Infinities, which JSON lacks, become the strings "Infinity" and "-Infinity"."""
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return array.tolist()
    data = array.astype(object)
    data[np.isposinf(array)], data[np.isneginf(array)] = "Infinity", "-Infinity"
    return data.tolist()
