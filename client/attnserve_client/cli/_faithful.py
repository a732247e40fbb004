"""The command `faithfulness`: leave words out of a text, and print whether a map shows what the output depends on.

`--server`, or the variable `ATTNSERVE_SERVER`, names the server. A failed call ends the command with one sentence and
an exit code of `_errors`, and a wrong option with exit code 2.
"""

from __future__ import annotations

from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnserve_client._faithfulness import Faithfulness, Interval
from attnserve_client.cli._errors import reported
from attnserve_client.cli._options import DEFAULT_SERVER, AsJson, Server, Timeout, Version, connect
from attnserve_client.cli._reading import read_texts
from attnserve_client.cli._selecting import selection
from attnserve_client.cli._text import clean
from attnserve_client.cli._writing import print_json

EXAMPLES: Final = (
    "Examples:\n\n"
    'attnserve faithfulness classifier "A wonderful film about nothing."\n\n'
    "attnserve faithfulness minilm - --layer 3 --head 5 --draws 50 --json < contract.txt"
)


def faithfulness(  # noqa: PLR0913, PLR0917 - the options of a command
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model's name.")],
    text: Annotated[str, typer.Argument(help="The text; `-` reads it from standard input.")],
    version: Version = "",
    layer: Annotated[str, typer.Option("--layer", help="A layer; or `mean` or `rollout` over all of them.")] = "-1",
    heads: Annotated[str, typer.Option("--heads", "--head", help="`mean`, `max`, or one head.")] = "mean",
    output: Annotated[
        str, typer.Option("--output", help="Output to compare by its cosine.", show_default="the best label")
    ] = "",
    draws: Annotated[int, typer.Option("--draws", min=2, help="Random choices of words.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the choices and of the bootstrap.")] = 0,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Measure whether a map shows what the output depends on: leave out its strongest words, and random ones."""
    (sentence,) = read_texts([text], whole=True)
    chosen = selection(layer, heads, "word", keep_special=False)
    with reported(server, as_json=as_json), connect(server, context) as client:
        found = client.faithfulness(
            model, sentence, version=version, attention=chosen, output=output, draws=draws, seed=seed, timeout=timeout
        )
    if as_json:
        print_json(found.to_dict())
    else:
        _show(Console(highlight=False), found)


def _show(console: Console, found: Faithfulness) -> None:
    words = Table(box=None, pad_edge=False)
    for name in ("word", "weight", "drop without it"):
        words.add_column(name, justify="left" if name == "word" else "right", overflow="fold")
    for word, weight, drop in zip(found.words, found.weights, found.leave_one_out, strict=True):
        words.add_row(Text(clean(word)), f"{weight:.3f}", f"{drop:+.4f}")
    console.print(words)
    console.print(f"rank agreement of weight and drop: {found.rank_agreement:.2f} (Spearman)")
    shares = ", ".join(f"{share:.0%}" for share in found.shares)
    line = f"Drops of the {clean(found.measure)}, means over {shares} of the words:"
    console.print(Text(line, style="bold"))
    figures = Table(box=None, pad_edge=False)
    for name in ("", "by weight", "random words", "gain [95 %, bootstrap]"):
        figures.add_column(name, justify="right" if name else "left")
    rows = (
        ("without them", found.comprehensiveness, found.random_comprehensiveness, found.comprehensiveness_gain),
        ("with them alone", found.sufficiency, found.random_sufficiency, found.sufficiency_gain),
    )
    for name, value, random, gain in rows:
        figures.add_row(name, f"{value:+.4f}", f"{random.mean:+.4f}", _interval(gain))
    console.print(figures)
    console.print("A gain whose interval is above 0: the strongest words matter more to the output than random ones.")


def _interval(value: Interval) -> str:
    return f"{value.mean:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"
