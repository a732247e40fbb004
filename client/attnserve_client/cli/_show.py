"""Print results, explanations and models on a terminal. Nothing here calls the server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnserve_client import AttentionFeatures, InferenceResult, Labels, Link, ModelInfo, Token
from attnserve_client.cli._heatmap import heatmap, shade
from attnserve_client.cli._text import clean, size_text
from attnserve_client.data_types import TensorSpec

_SHOWN_VALUES = 5
_BAR_CELLS = 16
"""Terminal cells of the strongest link's bar."""


def show_results(console: Console, texts: list[str], results: list[InferenceResult]) -> None:
    """Print each text with its outputs: type, shape, norm and first values. Raise ValueError if a result is missing."""
    for text, result in zip(texts, results, strict=True):
        console.print(Text(clean(text), style="bold"))
        _show_answer(console, result)
        run = result.run
        took = f"queue {1000 * run.queue_s:.1f} ms, compute {1000 * run.compute_s:.1f} ms, batch of {run.batch_size}"
        console.print(Text(f"  {took}", style="dim"))


def _show_answer(console: Console, result: InferenceResult) -> None:
    """Print the outputs and the labels of one text."""
    for name, array in result.outputs.items():
        shape = " × ".join(map(str, array.shape)) or "scalar"
        line = Text(f"  {clean(name)}  ").append(f"{array.dtype.name} {shape}", style="dim")
        if array.ndim == 1 and array.dtype.kind == "f":
            values = "  ".join(f"{value: .4f}" for value in array[:_SHOWN_VALUES])
            more = " …" if array.size > _SHOWN_VALUES else ""
            line.append(f"  norm {float(np.linalg.norm(array)):.4f}  [{values}{more}]")
        console.print(line)
    if result.labels is not None:
        show_labels(console, result.labels)


def show_labels(console: Console, labels: Labels) -> None:
    """Print the labels of one text as a table: of the whole text, of its parts, or its answers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    if labels.labels:
        for name in ("label", "score"):
            table.add_column(name, justify="right" if name == "score" else "left", overflow="fold")
        for label in labels.labels:
            table.add_row(Text(clean(label.text) or str(label.index)), f"{label.score:.4f}")
    else:
        for name in ("answer",) if labels.kind == "spans" else ("text", "labels"):
            table.add_column(name, overflow="fold")
        table.add_column("characters" if labels.kind == "spans" else "at", justify="right")
        if labels.kind == "spans":
            table.add_column("score", justify="right")
        for span in labels.spans:
            shown = [Text(clean(span.text) or str(span.first_token))]
            if labels.kind == "spans":
                table.add_row(*shown, f"{span.start}-{span.end}", f"{span.score:.4f}")
            else:
                found = ", ".join(f"{clean(each.text) or each.index} {each.score:.3f}" for each in span.labels)
                table.add_row(*shown, Text(found), f"{span.start}-{span.end}")
    console.print(table if len(labels) else Text("  no labels", style="dim"))


def show_explanation(console: Console, texts: Sequence[str], result: InferenceResult, links: list[list[Link]]) -> None:
    """Print outputs and labels of one text, or of a pair, and heatmap and strongest links of each map.

    Raises:
        ValueError: A map holds scores, or `links` has not one list for each map.
    """
    for text in texts:
        console.print(Text("\n".join(map(clean, text.splitlines())), style="italic"))
    _show_answer(console, result)
    for attention, found in zip(result.attention, links, strict=True):
        console.print(Text(f"{clean(attention.model)}, {clean(attention.title)}", style="dim"))
        if not attention.is_joined and len(attention.heads) > 1:
            console.print(Text("The heatmap is the mean of these heads; each link names its own.", style="dim"))
        for line in heatmap(attention, attention.head_weights(), console):
            console.print(line, soft_wrap=attention.query_axis == attention.key_axis)
        if found:
            console.print(_links_table(found, attention.names(*texts)))


def show_features(console: Console, text: str, features: AttentionFeatures) -> None:
    """Print a table for each feature: layers down, heads across, each cell the mean over the rows and its shade."""
    console.print(Text(clean(text), style="italic"))
    console.print(Text(f"{clean(features.model)}, means over the rows of each head", style="dim"))
    for name in features.names:
        means = features.by_head(name)
        greatest = float(np.nanmax(means, initial=0.0)) or 1.0
        table = Table(title=name, title_justify="left", box=None, pad_edge=False)
        for column in ("layer", *map(str, features.heads)):
            table.add_column(column, justify="right")
        for each, row in zip(features.sites, means, strict=True):
            cells = [
                Text("·", style="dim") if np.isnan(mean) else Text(f"{mean:.3f} ").append(*shade(mean / greatest))
                for mean in row
            ]
            table.add_row(str(each.layer), *cells)
        console.print(table)


def _links_table(links: list[Link], names: dict[Token, str]) -> Table:
    table = Table(title="strongest links", title_justify="left", box=None, pad_edge=False)
    with_heads = any(link.head is not None for link in links)
    for name in ("query", "looks at", *(("head",) if with_heads else ()), "weight", ""):
        table.add_column(name, justify="right" if name in ("weight", "head") else "left", overflow="fold")
    for link in links:
        bar = "━" * max(1, round(_BAR_CELLS * link.weight / links[0].weight))
        head = (str(link.head),) if with_heads else ()
        texts = (Text(clean(names[link.query_token])), Text(clean(names[link.key_token])))
        table.add_row(*texts, *head, f"{link.weight:.3f}", Text(bar, style="magenta"))
    return table


def show_models(console: Console, listed: list[ModelInfo]) -> None:
    """Print one line for each model."""
    table = Table("model", "version", "state", "text", "sites", "precision", "runs on", box=None, pad_edge=False)
    for model in listed:
        state = Text(model.state, style="green" if model.ready else "yellow")
        facts = (
            "yes" if model.accepts_text else "no",
            str(len(model.sites)),
            model.precision,
            model.execution_provider,
        )
        table.add_row(Text(clean(model.name)), clean(model.version), state, *facts)
    console.print(table if listed else "The server has no models.")


def show_model(console: Console, model: ModelInfo) -> None:
    """Print one model: inputs, outputs, axes, sites and limits."""
    console.print(
        Text(f"{clean(model.name)} {clean(model.version)}", style="bold").append(f"  {model.state}", style="dim")
    )
    if model.state_reason:
        console.print(Text(f"  {clean(model.state_reason)}", style="yellow"))
    for what, specs in (("input", model.inputs), ("output", model.outputs)):
        for spec in specs:
            console.print(Text(f"  {what:<7}{_spec(spec)}"))
    if model.head is not None:
        named = ", ".join(map(clean, model.head.labels)) or clean(model.head.mask_token)
        kind = f"{model.head.kind}, {model.head.activation} of {', '.join(map(clean, model.head.outputs))}"
        console.print(Text(f"  head   {kind}{': ' + named if named else ''}"))
    for name, text in model.prompts.items():
        default = ", the default" if name == model.default_prompt_name else ""
        console.print(Text(f"  prompt {clean(name)}: {clean(text)!r}{default}"))
    for axis in model.axes:
        pads = ("padded" if axis.paddable else "not padded") + _known(axis.padding_status, axis.padding_reason)
        pads = f"always {clean(axis.formula)}" if axis.formula else pads
        patches = f", {axis.grid.rows} × {axis.grid.columns} patches" if axis.grid else ""
        console.print(Text(f"  axis   {clean(axis.symbol)}, at most {axis.max_length}, {pads}{patches}"))
    if model.batching:
        joined = "rows share runs" if model.batched else "every sequence runs alone"
        known = _known(model.batch_status, model.batch_reason)
        console.print(Text(f"  batch  {joined}{known}, under the policy {model.batching!r}"))
    for site in model.sites:
        why = f", unavailable: {clean(site.unavailable_reason)}" if site.unavailable_reason else ""
        facts = f"{site.kind}, {site.form}, {site.heads} heads, {clean(site.query_axis)} × {clean(site.key_axis)}"
        console.print(Text(f"  site   {site.layer}: {clean(site.name)} ({facts}{why})"))
    if model.text_pair_axis != model.text_axis:
        console.print(Text(f"  texts  along {clean(model.text_axis)} and, of a pair, {clean(model.text_pair_axis)}"))
    text, answer = size_text(model.max_text_bytes), size_text(model.max_response_bytes)
    console.print(Text(f"  limits {model.max_batch_size} sequences, {text} of text, {answer} out"))
    console.print(
        Text(f"  runs   {model.precision} on {model.execution_provider or 'nothing yet'}, {model.digest}", style="dim")
    )


def _known(status: str, reason: str) -> str:
    """Return the batching status and its reason in parentheses; empty if the server reports none."""
    if not status:
        return ""
    return f" ({status}: {clean(reason)})" if reason else f" ({status})"


def _spec(spec: TensorSpec) -> str:
    shape = " × ".join(clean(str(dimension)) for dimension in spec.shape) or "scalar"
    note = " (optional)" if spec.optional else " (on request)" if spec.on_request else ""
    return f"{clean(spec.name)}  {spec.dtype} {shape}{note}"
