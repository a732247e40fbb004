"""`attnserve-server inspect`: print what a bundle or an ONNX file contains, or what a bundle's certificate states.

A bundle is the folder of one converted model. A path that is neither ends the command with exit code 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from attnserve_server.cli._errors import EXIT_CODES, error_boundary
from attnserve_server.cli._options import AsJson
from attnserve_server.model.manifest import BATCH

if TYPE_CHECKING:
    from attnserve_server.conversion.inspect import (
        BatchingDescription,
        ClauseDescription,
        ModelDescription,
        SiteDescription,
    )
    from attnserve_server.model.certificate import AttackReport, MaskNeed

_NO_CERTIFICATE = (
    "no certificate (format 1): only sequences of equal lengths share a batch; "
    "`attnserve-server check BUNDLE --certify` writes a version with one"
)
_EPILOG = (
    f"Examples:\n\nattnserve-server inspect models/minilm/1\n\nattnserve-server inspect models/minilm/1 --batching\n\n"
    f"attnserve-server inspect ranker.onnx --json{EXIT_CODES}"
)


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command("inspect", epilog=_EPILOG)(inspect)


def inspect(
    path: Annotated[Path, typer.Argument(help="The folder of a bundle, or an ONNX file.")],
    *,
    batching: Annotated[
        bool,
        typer.Option(
            "--batching", help="Show the bundle's batching certificate instead, with the path behind each verdict."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List inputs, outputs, axis symbols and attention sites of a bundle or an ONNX file."""
    with error_boundary():
        from attnserve_server.conversion.base.errors import BuildRefused  # noqa: PLC0415 - slow to import
        from attnserve_server.conversion.inspect import inspect_model  # noqa: PLC0415 - as above

        description = inspect_model(path)
        if batching and description.batching is None:
            raise BuildRefused(
                f"{path.name} is an ONNX file, not a bundle: `prepare` converts it and makes its certificate"
            )
        if as_json:
            typer.echo(description.model_dump_json(indent=2))
        elif batching and description.batching is not None:
            _show_batching(f"{description.name}/{description.version}", description.batching, Console())
        else:
            _show(description, Console())


def _show(description: ModelDescription, console: Console) -> None:
    """Print a description as tables."""
    title = f"{description.name}/{description.version}" if description.version else description.name
    symbols = ", ".join(description.axis_symbols) or "none"
    console.print(f"[bold]{title}[/bold]  {description.digest}".rstrip(), highlight=False, soft_wrap=True)
    if description.what == "bundle":
        facts = "\n".join((_facts(description), *_task(description)))
        console.print(facts, highlight=False, markup=False, soft_wrap=True)
    console.print(f"axis symbols: {symbols}", highlight=False, markup=False)
    tensors = _table("inputs and outputs", "", "name", "dtype", "shape")
    for what, entries in (("input", description.inputs), ("output", description.outputs)):
        for entry in entries:
            kind = f"{what}, on request" if entry.on_request else what
            tensors.add_row(kind, entry.name, entry.dtype, " x ".join(str(extent) for extent in entry.shape))
    console.print(tensors)
    _show_axes(description, console)
    if not description.sites:
        console.print("no attention sites")
        return
    operators = ", ".join(sorted({site.operator for site in description.sites}))
    sites = _table(f"attention sites ({operators})", "layer", "site", "kind", "heads", "query, key", "weights")
    for site in description.sites:
        heads = str(site.heads or "?") if site.heads == site.kv_heads else f"{site.heads} over {site.kv_heads}"
        sides = f"{site.query_axis}, {site.key_axis}" if site.query_axis else "?"
        sites.add_row(str(site.layer), site.name, f"{site.kind}, {site.form}", heads, sides, _weights(site))
    console.print(sites)
    if description.fusion is not None:
        console.print(str(description.fusion), highlight=False, markup=False)
    for trial in description.trials:
        console.print(str(trial), highlight=False, markup=False)


def _show_axes(description: ModelDescription, console: Console) -> None:
    """Print the axes with what bounds each, then what was solved for."""
    if description.axes:
        axes = _table("axes", "axis", "longest", "padding", "")
        for axis in description.axes:
            how = "; ".join(part for part in (axis.how, axis.bound) if part)
            axes.add_row(axis.symbol, str(axis.max_length), "yes" if axis.paddable else "no", how)
        console.print(axes)
    for fact in description.solved:
        console.print(fact, highlight=False, markup=False, soft_wrap=True)


def _facts(description: ModelDescription) -> str:
    """Return source, precision, text and batch size of a bundle as one line."""
    text = f"takes text along {' and '.join(description.text_axes)}" if description.text_axes else "takes no text"
    batch = f"batches of up to {description.max_batch_size}"
    return f"made from {description.source}; {description.precision}, {text}, {batch}"


def _task(description: ModelDescription) -> Iterator[str]:
    """Yield a line for the head, the embedding and the prompts of a bundle, if it has them."""
    head = description.head
    if head is not None:
        named = f": {', '.join(head.labels)}" if head.labels else ""
        yield f"head: {head.kind}, {head.activation} of {', '.join(head.outputs)}{named}"
    if description.embedding is not None:
        sizes = "".join(f", or the first {size} values" for size in description.embedding.sizes)
        yield f"embedding: {description.embedding.pooling}{sizes}"
    for name, text in description.prompts.items():
        yield f"prompt {name}: {text!r}"


def _weights(site: SiteDescription) -> str:
    """Return whether clients can request the site's weights, and in which form."""
    if not site.available:
        return f"no: {site.unavailable_reason}"
    return f"band of {site.band_width}" if site.band else "yes"


def _table(title: str, *columns: str) -> Table:
    """Return a table without lines, so that long names of a model still fit into 80 columns."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _show_batching(name: str, described: BatchingDescription, console: Console) -> None:
    """Print the certificate, clause by clause, then its mask needs and its noise."""

    def line(words: str) -> None:
        console.print(words, highlight=False, markup=False, soft_wrap=True)

    line(name)
    if not described.clauses:
        line(_NO_CERTIFICATE)
        return
    for clause in described.clauses:
        for words in _clause(clause):
            line(words)
    for need in described.masks:
        line(_need(need))
    if described.noise:
        worst = max(described.noise, key=lambda target: described.noise[target])
        line(f"noise among batch shapes, identical neighbours: at most {described.noise[worst]:.2g}, at {worst}")


def _clause(clause: ClauseDescription) -> list[str]:
    """Return the lines of one clause: its verdict, then, indented, its reason, path, targets and attack."""
    allowed = [policy for policy, holds in clause.under.items() if holds]
    effect = ("rows share runs" if clause.axis == BATCH else "padded") + (
        f" under {' and '.join(allowed)}" if allowed else " under no policy"
    )
    title = "batch neighbours" if clause.axis == BATCH else f"padding along {clause.axis}"
    verdict = clause.status if clause.status == clause.verdict else f"{clause.status} (verdict {clause.verdict})"
    lines = [f"{title}: {verdict}, {effect}"]
    lines += [f"  why: {clause.reason}"] if clause.reason else []
    if clause.path:
        start = "the neighbour's row" if clause.axis == BATCH else "the padded position"
        lines.append(f"  path from {start}:")
        lines += [f"    {step.node} ({step.operator}): {step.words}" for step in clause.path]
    lines += [f"  {target}: {found}" for target, found in clause.targets.items()]
    if clause.attack is not None:
        lines.append(f"  attack: {_attack(clause.attack)}")
    return lines


def _attack(attack: AttackReport) -> str:
    words = f"{attack.probes} probes in {attack.seconds:.1f} s, worst {attack.worst:.2g} of the allowed difference"
    return f"{words}; changed an answer with {attack.broke}" if attack.broke else words


def _need(need: MaskNeed) -> str:
    """Return the condition under which a sequence is padded."""
    value = "" if need.allowed_value is None else f" equal to {need.allowed_value:g}"
    which = f"every position of {need.input}" if need.need == "all" else f"a position in each row of {need.input}"
    return f"padded only with {which} allowed{value}; other sequences run with equal lengths"
