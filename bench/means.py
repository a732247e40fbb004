"""Means over heads as outputs of taps, against means of all weights: `python -m bench.means --repository FOLDER`.

A tap is a graph's output with the attention weights of one place that computes attention. The newest MiniLM of the
repository is compared with the same graph without means over heads, which is what an earlier release wrote. Both run
the same batches in turn, in this process: collation, run, checks of the numbers, and reduction. Reported are medians of
the processor time as ratios, and the bytes that the runtime returns. `--json FILE` writes the figures. Exit code 1 if
the repository has no bundle of MiniLM, with the remedy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from attnserve_server import attention
from attnserve_server.domain.values import AttentionSelection, AxisUnits, HeadReduction, PreparedSequence
from attnserve_server.engine.collation import collate, is_finite, weights_of
from attnserve_server.engine.session import CPU, RuntimeSession
from attnserve_server.engine.warmup import synthetic
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import Repository
from rich.console import Console
from rich.table import Table

from bench.runtime import minilm_of

MEAN_PREFIX: Final = "attention_mean."
SHAPES: Final = ((1, 8), (8, 40), (1, 128), (4, 128), (1, 512))
"""Rows and tokens of the batches."""
SELECTIONS: Final[dict[str, AttentionSelection | None]] = {
    "no attention": None,
    "last layer's mean": AttentionSelection(layers=(-1,), head_reduction=HeadReduction.MEAN),
    "mean of each layer": AttentionSelection(head_reduction=HeadReduction.MEAN),
    "every head": AttentionSelection(),
}


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded graph and its manifest."""

    session: RuntimeSession
    manifest: Manifest


def without_means(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph without means over heads."""
    old = onnx.ModelProto()
    old.CopyFrom(model)
    graph = old.graph
    kept = [value for value in graph.output if not value.name.startswith(MEAN_PREFIX)]
    nodes = [node for node in graph.node if not node.name.startswith(MEAN_PREFIX)]
    read = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    for field, values in (("output", kept), ("node", nodes), ("initializer", tensors)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    return old


def subjects(repository: Path, work: Path) -> dict[str, Subject]:
    """Return the graph of the repository's newest MiniLM, with means over heads and without."""
    path = minilm_of(repository)
    manifest = Repository(repository).bundle("minilm", path.parent.name).manifest.under("proved")
    old = manifest.model_copy(
        update={"sites": tuple(site.model_copy(update={"mean_output": None}) for site in manifest.sites)}
    )
    onnx.save(without_means(onnx.load(path)), work / "without.onnx")

    def loaded(graph: Path, described: Manifest) -> Subject:
        return Subject(RuntimeSession.load(graph, provider=CPU, left_out=manifest.left_out), described)

    return {"means": loaded(path, manifest), "weights": loaded(work / "without.onnx", old)}


def sequence_of(manifest: Manifest, tokens: int, selection: AttentionSelection | None) -> PreparedSequence:
    """Return a sequence of a length, with the pooled embedding as its output."""
    made = synthetic(manifest, tokens)
    units = {symbol: AxisUnits(symbol, length) for symbol, length in made.lengths.items()}
    chosen = None if selection is None else attention.resolve(selection, manifest.sites, manifest.name)
    return replace(made, outputs=("embedding",), attention=chosen, units=units)


def run(subject: Subject, sequences: list[PreparedSequence]) -> int:
    """Run a batch as the executor does, reduce its attention, and return the bytes that the runtime returned."""
    batch = collate(sequences, subject.manifest)
    outputs = subject.session.run(batch.feeds, batch.fetches)
    assert all(map(is_finite, outputs))
    fetched = dict(zip(batch.fetches, outputs, strict=True))
    for row, sequence in enumerate(sequences):
        if sequence.attention is not None:
            weights = weights_of(batch, fetched, row, sequence, subject.manifest)
            attention.answer(weights, sequence.attention, subject.manifest.sites, sequence.units)
    return sum(output.nbytes for output in outputs)


def seconds_of(work: Callable[[], object]) -> float:
    """Return the processor time of this thread."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def measured(pair: dict[str, Subject], rows: int, tokens: int, what: str, seconds: float) -> dict[str, Any]:
    """Compare both graphs over one batch, in turn, until the time is over."""
    batches = {name: [sequence_of(subject.manifest, tokens, SELECTIONS[what])] * rows for name, subject in pair.items()}
    moved = {name: run(subject, batches[name]) for name, subject in pair.items()}
    times: dict[str, list[float]] = {name: [] for name in pair}
    until, turn = time.monotonic() + seconds, 0
    while time.monotonic() < until or len(times["means"]) < 10:
        # In reverse order every second time, so that drift affects both equally.
        for name in list(pair)[:: 1 if turn % 2 else -1]:
            times[name].append(seconds_of(lambda name=name: run(pair[name], batches[name])))  # type: ignore[misc]
        turn += 1
    ratios = [one / other for one, other in zip(times["means"], times["weights"], strict=True)]
    return {
        "rows": rows,
        "tokens": tokens,
        "selection": what,
        "ms": 1e3 * statistics.median(times["weights"]),
        "ratio": statistics.median(ratios),
        "quartiles": [float(np.quantile(ratios, share)) for share in (0.25, 0.75)],
        "runs": len(ratios),
        "bytes": moved["means"],
        "bytes_without": moved["weights"],
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, default=Path(".demo/models"), help="folder of bundles with `minilm`")
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of each measurement")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    found = []
    table = Table(
        "rows x tokens", "selection", "ms without means", "time with / without", "quartiles", "bytes", "without"
    )
    with tempfile.TemporaryDirectory() as work:
        pair = subjects(options.repository, Path(work))
        for rows, tokens in SHAPES:
            for what in SELECTIONS:
                one = measured(pair, rows, tokens, what, options.seconds)
                found.append(one)
                quartiles = " to ".join(f"{value:.3f}" for value in one["quartiles"])
                moved = (f"{one[name]:,}" for name in ("bytes", "bytes_without"))
                table.add_row(f"{rows} x {tokens}", what, f"{one['ms']:.2f}", f"{one['ratio']:.3f}", quartiles, *moved)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
