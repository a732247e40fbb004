"""The page, the numbers and the plot of `bench.complexity` in docs/. Measures nothing.

The input is the report that `bench.complexity` makes: heads, width, machine, points and slopes. A missing entry raises
KeyError; the plot needs matplotlib.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_WHAT = {
    "self": "scaled dot-product",
    "causal": "causal",
    "sliding-window": "sliding window of 8, one global token",
    "top-k": "top-k sparse, k = 8",
    "linear": "linear, elu + 1",
    "multi-scale": "multi-scale, strides 1, 2 and 4",
    "cross": "encoder-decoder: self, causal and cross",
    "cross-modal": "text self and cross to 16 patches",
}
_HEAD = """# What each pattern of attention costs

Written by `make complexity`; do not edit. One layer, {heads} heads, d_model {width}, one sequence of T tokens (two for
the encoder-decoder), float32, taps in the graph and no attention selected. Each point is a separate process: CPU time
of a run, the minimum of up to five, and the maximum memory that the process held beyond its idle memory. The exponents
are fitted to the three longest points of a pattern: 1 is linear in T, 2 quadratic. Each layer also has parts that are
linear in T, so that all patterns take similar times at short lengths.

Measured on: {machine}.

![Time and memory over T](../images/complexity.png)
"""


def table(report: dict[str, Any]) -> str:
    """Return two tables in Markdown, time and memory, with a pattern in each row."""
    lengths = sorted({point["length"] for point in report["points"]})
    patterns = list(dict.fromkeys(point["pattern"] for point in report["points"]))
    at = {(point["pattern"], point["length"]): point for point in report["points"]}
    parts = []
    for title, field, unit, exponent in (
        ("CPU time of a run", "seconds", "ms", "time"),
        ("Memory of a run", "mib", "MiB", "memory"),
    ):
        scale = 1e3 if field == "seconds" else 1.0
        rows = [
            f"## {title}, {unit}",
            "",
            "| pattern | " + " | ".join(f"T = {length:,}" for length in lengths) + " | exponent |",
            "|---|" + "---:|" * (len(lengths) + 1),
        ]
        for pattern in patterns:
            cells = [_cell(at.get((pattern, length)), field, scale) for length in lengths]
            fitted = report["slopes"].get(pattern, {}).get(exponent)
            rows.append(f"| {_WHAT.get(pattern, pattern)} | " + " | ".join(cells) + f" | {fitted or '-'} |")
        parts.append("\n".join(rows))
    skipped = [
        f"- {_WHAT.get(point['pattern'], point['pattern'])} at {point['length']:,}: {point['skipped']}"
        for point in report["points"]
        if point["skipped"]
    ]
    if skipped:
        parts.append("\n".join(["## Left out", "", *skipped]))
    return "\n\n".join(parts)


def write(report: dict[str, Any], docs: Path) -> None:
    """Write reference/complexity.md, reference/complexity.json and images/complexity.png into a folder."""
    for folder in ("images", "reference"):
        (docs / folder).mkdir(parents=True, exist_ok=True)
    head = _HEAD.format(**{name: report[name] for name in ("heads", "width", "machine")})
    (docs / "reference" / "complexity.md").write_text(f"{head}\n{table(report)}\n", encoding="utf-8")
    (docs / "reference" / "complexity.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _plot(report, docs / "images" / "complexity.png")


def _cell(point: dict[str, Any] | None, field: str, scale: float) -> str:
    if point is None or point[field] is None:
        return "-"
    return f"{point[field] * scale:.3g}" if point[field] * scale < 1000 else f"{point[field] * scale:,.0f}"


def _plot(report: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, field, title, exponent in (
        (left, "seconds", "CPU seconds of a run", "time"),
        (right, "mib", "MiB of a run", "memory"),
    ):
        for number, pattern in enumerate(dict.fromkeys(point["pattern"] for point in report["points"])):
            points = [point for point in report["points"] if point["pattern"] == pattern and point[field]]
            slope = report["slopes"].get(pattern, {}).get(exponent)
            label = pattern if slope is None else f"{pattern} (T^{slope})"
            lengths = [point["length"] for point in points]
            marker = "osDv^<>P"[number % 8]
            axes.loglog(lengths, [point[field] for point in points], marker=marker, markersize=4, label=label)
        lengths = sorted({point["length"] for point in report["points"]})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_xlabel("T, tokens")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
