"""The cost of unused taps, and the size of answers on the wire: `make bench`, or `python -m bench.run`.

A tap is a graph's output with the attention weights of one place that computes attention. `bench.acceptance` measures
the server as a whole against the bare runtime. Exit code 1 if unused taps cost more than their limit, if the repository
has no bundle of MiniLM, or if the server does not start. A failed call raises an ExceptionGroup.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import service
from bench.runtime import BareSession, minilm_of, untapped
from bench.workload import sequence, sequences, sorted_batches

VOCABULARY_SIZE = 30_522
WIRE_TOKENS = 128
TAPPED_LIMIT = 1.03
"""The limit of unused taps: `make bench` fails above it."""


def spread(values: list[float]) -> dict[str, float]:
    """Return minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def tapped_over_untapped(model: Path, rounds: int, count: int) -> dict[str, Any]:
    """Return CPU time of the tapped session without selected attention over the untapped one's, round by round."""
    batches = sorted_batches(sequences(count, VOCABULARY_SIZE))
    tapped, plain = BareSession(str(model)), BareSession(untapped(model))
    for session in (tapped, plain):
        session.cpu_seconds(batches[::4])
    ratios = []
    for number in track(range(rounds), description="tapped / untapped", transient=True):
        # Batches alternate, in reverse order every second time, so that drift affects both equally.
        first, second = (tapped, plain) if number % 2 else (plain, tapped)
        times = {tapped: 0.0, plain: 0.0}
        for batch in batches:
            times[first] += first.cpu_seconds([batch])
            times[second] += second.cpu_seconds([batch])
        ratios.append(times[tapped] / times[plain])
    return {"ratio": spread(ratios), "rounds": rounds, "sequences": count}


def bytes_on_wire(repository: Path) -> dict[str, int]:
    """Return the bytes of one serialised answer, for a text of 128 tokens with the embedding as its only output."""
    ids = sequence(WIRE_TOKENS, VOCABULARY_SIZE, np.random.default_rng(0))
    sizes = {}
    with service.running(repository) as server:
        for name, selection in service.wire_selections().items():
            message = service.request(ids, selection)
            message.outputs.names[:] = ["embedding"]
            (answer,) = asyncio.run(service.drive(server.target, [message], 1))
            sizes[name] = answer.ByteSize()
    return sizes


def show(console: Console, report: dict[str, Any]) -> None:
    """Print the report as tables."""
    ratio = report["tapped_over_untapped"]["ratio"]
    table = Table("ratio", "median", "min", "max", title="CPU time, within this run", title_justify="left")
    label = f"tapped session without selected attention / untapped (limit {TAPPED_LIMIT})"
    table.add_row(label, *(f"{ratio[figure]:.3f}" for figure in ("median", "min", "max")))
    console.print(table)
    wire = report["bytes_on_wire"]
    table = Table(
        "selection", "bytes", "share of all maps", title=f"Answer, {WIRE_TOKENS} tokens", title_justify="left"
    )
    for name, size in wire.items():
        table.add_row(name, f"{size:,}", f"{size / wire['all maps']:.4%}")
    console.print(table)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, required=True, help="folder of bundles, with MiniLM as minilm")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each comparison")
    parser.add_argument("--sequences", type=int, default=400, help="sequences in a round")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    model = minilm_of(options.repository)
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "tapped_over_untapped": tapped_over_untapped(model, options.rounds, options.sequences),
        "bytes_on_wire": bytes_on_wire(options.repository),
    }
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        show(Console(), report)
    ratio = report["tapped_over_untapped"]["ratio"]["median"]
    if ratio > TAPPED_LIMIT:
        raise SystemExit(f"unused taps take {ratio:.3f} of the untapped session's time; the limit is {TAPPED_LIMIT}")


if __name__ == "__main__":
    main()
