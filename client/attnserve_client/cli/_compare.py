"""Compare the maps of two models, or versions, over one text: how far their rows differ, and where most."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnserve_client import AttentionMap
from attnserve_client.cli._text import clean


@dataclass(frozen=True, slots=True)
class Change:
    """A link whose weight differs: texts with positions where they repeat, and the weight in each model."""

    query: str
    key: str
    first: float
    second: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far two maps differ.

    Attributes:
        distance: Total variation distance of two rows, from 0 (equal) to 1, as the mean over the rows.
        changes: The links that differ most, greatest difference first.
    """

    distance: float
    changes: tuple[Change, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison in plain types for JSON."""
        return asdict(self)


def compare(first: AttentionMap, second: AttentionMap, top: int) -> Comparison | None:
    """Compare two maps, each as the mean over its heads. None if the models split the text into different units.

    Raises:
        ValueError: A map holds scores.
    """
    for axis in ("query_tokens", "key_tokens"):
        units = [[(token.text, token.start, token.end) for token in getattr(each, axis)] for each in (first, second)]
        if units[0] != units[1]:
            return None
    one, other = (each.head_weights().astype(np.float64) for each in (first, second))
    names, difference = first.names(), np.abs(one - other)
    order = np.argsort(-difference, axis=None, kind="stable")[:top]
    changes = []
    for row, column in zip(*np.unravel_index(order, difference.shape), strict=True):
        if difference[row, column] > 0:
            query, key = first.query_tokens[row], first.key_tokens[column]
            changes.append(Change(names[query], names[key], float(one[row, column]), float(other[row, column])))
    return Comparison(float(0.5 * difference.sum(axis=1).mean()) if len(one) else 0.0, tuple(changes))


def show_comparison(console: Console, models: tuple[str, str], found: Comparison | None) -> None:
    """Print a comparison, or that there is none."""
    if found is None:
        console.print("The models split the text into different units: compare the maps by eye, or with --unit word.")
        return
    line = f"rows differ by {found.distance:.3f} on average (total variation distance: 0 equal, 1 disjoint)"
    console.print(Text(line, style="bold"))
    if not found.changes:
        return
    table = Table(title="greatest changes", title_justify="left", box=None, pad_edge=False)
    for name, justify in (("query", "left"), ("looks at", "left"), *((clean(each), "right") for each in models)):
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    table.add_column("change", justify="right")
    for each in found.changes:
        numbers = (f"{each.first:.3f}", f"{each.second:.3f}", f"{each.second - each.first:+.3f}")
        table.add_row(Text(clean(each.query)), Text(clean(each.key)), *numbers)
    console.print(table)
