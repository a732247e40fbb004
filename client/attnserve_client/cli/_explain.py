"""The command `explain`: read the command line, request attention, and show where the model looks.

`--server`, or the variable `ATTNSERVE_SERVER`, names the server. A failed call ends the command with one sentence and
an exit code of `_errors`. A wrong option, and a file that cannot be read or written, end it with exit code 2.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.console import Console

from attnserve_client import AttentionMap, Client, InferenceResult, Link
from attnserve_client._svg_views import View
from attnserve_client.cli._compare import Comparison, compare, show_comparison
from attnserve_client.cli._errors import reported
from attnserve_client.cli._options import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
    AsJson,
    Prompt,
    Server,
    Timeout,
    TopLabels,
    Version,
    connect,
)
from attnserve_client.cli._reading import read_arrays, read_input, read_texts
from attnserve_client.cli._selecting import labels_for, selection
from attnserve_client.cli._show import show_explanation
from attnserve_client.cli._writing import print_json, write, write_png, write_svg

EXAMPLES: Final = (
    "Examples:\n\n"
    'attnserve explain minilm "The buyer assumes all liabilities."\n\n'
    "attnserve explain minilm - --layer 3 --head 5 --html map.html < contract.txt\n\n"
    'attnserve explain minilm "The buyer pays." --layers 0,5 --compare minilm/2\n\n'
    'attnserve explain minilm "The buyer pays." --rollout --json\n\n'
    'attnserve explain translator "a red dog" --pair "ein roter Hund" --png map.png\n\n'
    'attnserve explain minilm "The buyer pays." --svg map.svg --view arcs\n\n'
    'attnserve explain clip "a red dog" --tensor pixel_values=dog.npy --png map.png'
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
    layers: Annotated[
        str,
        typer.Option(
            "--layers", "--layer", help="Layers with commas, -1 for the last; or `mean` or `rollout` over all of them."
        ),
    ] = "-1",
    rollout: Annotated[bool, typer.Option("--rollout", help="The same as `--layers rollout`.")] = False,
    heads: Annotated[
        str, typer.Option("--heads", "--head", help="`mean`, `max`, `each`, one head, or several with commas.")
    ] = "mean",
    unit: Annotated[Literal["word", "token"], typer.Option("--unit", help="What a row represents.")] = "word",
    top: Annotated[int, typer.Option("--top", min=0, help="How many of the strongest links to list.")] = 10,
    all_links: Annotated[
        bool, typer.Option("--all-links", help="Also list links of punctuation, and of a unit to itself.")
    ] = False,
    keep_special: Annotated[bool, typer.Option("--keep-special", help="Keep tokens such as [CLS] and [SEP].")] = False,
    compare_with: Annotated[
        str,
        typer.Option("--compare", metavar="MODEL[/VERSION]", help="A second model, or version, over the same text."),
    ] = "",
    prompt: Prompt = None,
    top_labels: TopLabels = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Write an interactive page to this file.")] = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="Write a picture to this file (needs the extra `plot`).")
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Write a drawing to this file.")] = None,
    view: Annotated[
        View, typer.Option("--view", help="What `--svg` draws: all weights, or the strongest links as lines or arcs.")
    ] = "heatmap",
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Show where a model looks, and its labels: a heatmap and the strongest links, by default of the last layer."""
    (sentence,) = read_texts([text], whole=True)
    one = read_input(sentence, pair, read_arrays(tensor or []))
    chosen = selection("rollout" if rollout else layers, heads, unit, keep_special=keep_special)
    other, _, other_version = compare_with.partition("/")

    def ask(client: Client, name: str, number: str) -> InferenceResult:
        described = client.model(name, number)
        return client.infer(
            name,
            one,
            version=number,
            outputs=["embedding"] if described.similarity else [],
            attention=chosen,
            labels=labels_for(described, top_labels, unit),
            prompt_name=prompt,
            timeout=timeout,
        )

    with reported(server, as_json=as_json), connect(server, context) as client:
        results = [ask(client, model, version)]
        if other:
            results.append(ask(client, other, other_version))
    if html is not None:
        write(html, results[0].attention[0].to_html().encode())
    if png is not None:
        write_png(png, results[0].attention[0])
    if svg is not None:
        write_svg(svg, results[0].attention[0], view, keep_special=keep_special, all_links=all_links)

    def links_of(attention: AttentionMap) -> list[Link]:
        return attention.links(
            top=top, exclude_special=not keep_special, include_self=all_links, exclude_punctuation=not all_links
        )

    links = [[links_of(each) for each in result.attention] for result in results]
    pairs = zip(*(each.attention for each in results), strict=False) if other else ()
    compared = [compare(first, second, top) for first, second in pairs]
    if as_json:
        answers = [_plain(*each) for each in zip(results, links, strict=True)]
        changes = [None if each is None else each.to_dict() for each in compared]
        print_json({**answers[0], "compare": {**answers[1], "changes": changes}} if other else answers[0])
        return
    console = Console(highlight=False)
    _show(console, [sentence, pair] if pair else [sentence], results, links, compared)
    for written in (html, png, svg):
        if written is not None:
            console.print(f"wrote {written}", markup=False, style="dim")


def _show(
    console: Console,
    texts: list[str],
    results: list[InferenceResult],
    links: list[list[list[Link]]],
    compared: list[Comparison | None],
) -> None:
    for result, found in zip(results, links, strict=True):
        show_explanation(console, texts, result, found)
    named = [f"{each.receipt.model} {each.receipt.version}" for each in results]
    for each in compared:
        show_comparison(console, (named[0], named[1]), each)


def _plain(result: InferenceResult, links: list[list[Link]]) -> dict[str, Any]:
    """Return an answer in plain types: the first map under `attention` and `links`, and all under `maps`."""
    maps = [
        {
            "links": [
                {"query": each.query, "key": each.key, "weight": each.weight, "head": each.head} for each in found
            ],
            "attention": attention.to_dict(),
        }
        for attention, found in zip(result.attention, links, strict=True)
    ]
    embedding = {name: array.tolist() for name, array in result.outputs.items()}
    return {"receipt": asdict(result.receipt), **maps[0], **({"maps": maps} if len(maps) > 1 else {}), **embedding}
