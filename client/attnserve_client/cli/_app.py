"""The commands `infer`, `explain`, `features` and `models`: read the command line, call the client, print results.

`--server`, or the variable `ATTNSERVE_SERVER`, names the server. A failed call ends a command with one sentence and an
exit code of `_errors`. A wrong option, and a file that cannot be read or written, end it with exit code 2.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console

from attnserve_client import (
    AttentionFeatures,
    AttentionMap,
    AttentionSelection,
    Client,
    InferenceResult,
    LabelSelection,
    ModelInfo,
    __version__,
)
from attnserve_client._credentials import Tls
from attnserve_client._selection import Feature
from attnserve_client.cli import _admin
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
    shown,
)
from attnserve_client.cli._reading import read_arrays, read_input, read_texts
from attnserve_client.cli._show import show_explanation, show_features, show_model, show_models, show_results

app = typer.Typer(
    name="attnserve",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Run models on an attnserve server, and show where they looked.",
    epilog="Example, with TLS and a token: attnserve --ca ca.pem --token-file token.txt models\n\n" + CODES_HELP,
)

app.command(epilog=EXAMPLES)(bench)
_admin.register(app)


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
    with reported(server, as_json=as_json), Client(server, **shown(context)) as client:
        labels = _labels(client.model(model, version), top_labels, label_unit)
        results = client.infer(
            model, inputs, version=version, outputs=output, labels=labels, prompt_name=prompt, timeout=timeout
        )
    if as_json:
        _print_json({"receipt": asdict(results[0].receipt), "results": [_plain(result) for result in results]})
    else:
        show_results(Console(highlight=False), texts, results)


@app.command(
    epilog="Examples:\n\n"
    'attnserve explain minilm "The buyer assumes all liabilities."\n\n'
    "attnserve explain minilm - --layer 3 --head 5 --html map.html < contract.txt\n\n"
    'attnserve explain translator "a red dog" --pair "ein roter Hund" --png map.png\n\n'
    'attnserve explain clip "a red dog" --tensor pixel_values=dog.npy --png map.png',
)
def explain(  # noqa: PLR0913, PLR0917 - the options of a command
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model's name.")],
    text: Annotated[str, typer.Argument(help="The text; `-` reads it from standard input.")],
    version: Version = "",
    pair: Annotated[
        str, typer.Option("--pair", help="A second text, for models that take pairs: a passage, or a decoder's text.")
    ] = "",
    tensor: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor", metavar="NAME=FILE.npy", help="An input that is not text, such as pixels; may be repeated."
        ),
    ] = None,
    layer: Annotated[
        str, typer.Option("--layer", help="A layer, -1 for the last; or `mean` or `rollout` over all of them.")
    ] = "-1",
    heads: Annotated[
        str, typer.Option("--heads", "--head", help="`mean`, `max`, `each`, one head, or several with commas.")
    ] = "mean",
    unit: Annotated[Literal["word", "token"], typer.Option("--unit", help="What a row represents.")] = "word",
    top: Annotated[int, typer.Option("--top", min=0, help="How many of the strongest links to list.")] = 10,
    all_links: Annotated[
        bool, typer.Option("--all-links", help="Also list links of punctuation, and of a unit to itself.")
    ] = False,
    keep_special: Annotated[bool, typer.Option("--keep-special", help="Keep tokens such as [CLS] and [SEP].")] = False,
    prompt: Prompt = None,
    top_labels: TopLabels = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Write an interactive page to this file.")] = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="Write a picture to this file (needs the extra `plot`).")
    ] = None,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Show where a model looks, and its labels: a heatmap and the strongest links, by default of the last layer."""
    (sentence,) = read_texts([text], whole=True)
    arrays = read_arrays(tensor or [])
    selection = _selection(layer, heads, unit, keep_special=keep_special)
    with reported(server, as_json=as_json), Client(server, **shown(context)) as client:
        one = read_input(sentence, pair, arrays)
        described = client.model(model, version)
        labels = _labels(described, top_labels, unit)
        result = client.infer(
            model,
            one,
            version=version,
            outputs=["embedding"] if described.similarity else [],
            attention=selection,
            labels=labels,
            prompt_name=prompt,
            timeout=timeout,
        )
    attention = result.attention[0]
    if html is not None:
        _write(html, attention.to_html().encode())
    if png is not None:
        _write_png(png, attention)
    links = attention.links(
        top=top, exclude_special=not keep_special, include_self=all_links, exclude_punctuation=not all_links
    )
    if as_json:
        found = [{"query": each.query, "key": each.key, "weight": each.weight, "head": each.head} for each in links]
        embedding = {name: array.tolist() for name, array in result.outputs.items()}
        answer = {"receipt": asdict(result.receipt), "links": found, "attention": attention.to_dict()}
        _print_json({**answer, **embedding})
    else:
        console = Console(highlight=False)
        show_explanation(console, f"{sentence}\n{pair}" if pair else sentence, result, links)
        for written in (html, png):
            if written is not None:
                console.print(f"wrote {written}", markup=False, style="dim")


@app.command(
    epilog="Examples:\n\n"
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
        layers=_numbers(layer, "--layer") if layer else (),
        unit=unit,
        special_tokens="drop" if drop_special else "keep",
        features=cast("list[Feature]", feature) or get_args(Feature),
    )
    with reported(server, as_json=as_json), Client(server, **shown(context)) as client:
        result = client.infer(model, sentence, version=version, outputs=[], attention=selection, timeout=timeout)
    assert result.features is not None, "the client checks that features came"
    if png is not None:
        _write_png(png, result.features)
    if as_json:
        _print_json({"receipt": asdict(result.receipt), **result.features.to_dict()})
        return
    console = Console(highlight=False)
    show_features(console, sentence, result.features)
    if png is not None:
        console.print(f"wrote {png}", markup=False, style="dim")


@app.command(epilog="Examples:\n\nattnserve models\n\nattnserve models minilm --json")
def models(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="One model; without it, all of them.")] = None,
    version: Version = "",
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """List the server's models, or describe one: inputs, outputs, axes, attention sites and limits."""
    console = Console(highlight=False)
    with reported(server, as_json=as_json), Client(server, **shown(context)) as client:
        if name is None:
            listed = client.models(timeout=timeout)
            if as_json:
                _print_json([asdict(each) for each in listed])
            else:
                show_models(console, listed)
        else:
            described = client.model(name, version, timeout=timeout)
            if as_json:
                _print_json(asdict(described))
            else:
                show_model(console, described)


def _labels(model: ModelInfo, top: int, unit: Literal["word", "token"]) -> LabelSelection | None:
    """Return the labels to request; None for a model without a head."""
    return None if model.head is None else LabelSelection(top_k=top, unit=unit)


def _selection(layer: str, heads: str, unit: Literal["word", "token"], *, keep_special: bool) -> AttentionSelection:
    special: Literal["keep", "drop"] = "keep" if keep_special else "drop"
    chosen: Any = heads if heads in ("mean", "max", "each") else _numbers(heads, "--heads")
    if layer in ("mean", "rollout"):
        joined = cast("Literal['mean', 'rollout']", layer)
        return AttentionSelection(heads=chosen, layer_reduction=joined, unit=unit, special_tokens=special)
    layers = _numbers(layer, "--layer")
    if len(layers) != 1:
        raise typer.BadParameter(
            f"{layer!r} has {len(layers)} layers; give one layer, `mean` or `rollout`", param_hint="--layer"
        )
    return AttentionSelection(layers=layers, heads=chosen, unit=unit, special_tokens=special)


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number and no choice of this option", param_hint=option) from None


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


def _print_json(value: Any) -> None:
    # JSON escapes control characters, so that texts cannot control a terminal.
    sys.stdout.write(json.dumps(value) + "\n")


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from None


def _write_png(path: Path, shown: AttentionMap | AttentionFeatures) -> None:
    try:
        figure = shown.plot()
    except ImportError as error:
        raise typer.BadParameter(str(error), param_hint="--png") from None
    try:
        figure.savefig(path, format="png", dpi=120, bbox_inches="tight")
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from None
