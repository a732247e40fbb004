"""Measure whether any answer depends on its batch: `python -m bench.batching`, or `make batching`.

Each model of `bench.batching_subjects` is converted and served with default flags to separate callers. Every answer is
compared with the same sequence alone in the bare runtime. A certificate is the part of a bundle that states which
sequences may share a run. The positive control serves the same bundles with one that claims everything is proved, on
one instance that gathers all pending requests. There answers must be wrong, or the bench could not detect an error.

Exit code 1 where a server does not start, where a model is wrong by default, where a control that may share runs does
not, or where the positive control finds nothing; 2 for an unknown model in `--only`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from attnserve_client import AsyncClient, AttnserveError, InferenceResult
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.model.certificate import Verdict
from attnserve_server.model.equality import WEIGHTS_PREFIX, Equality
from attnserve_server.model.manifest import BATCH, Manifest
from attnserve_server.model.repository import MODEL_FILE, Bundle, write_bundle
from rich.console import Console
from rich.table import Table

from bench import service
from bench.batching_graphs import Array, Feeds
from bench.batching_subjects import SUBJECTS, Subject

CALLERS = 32
FORCING = ("--instances", "1", "--run-overhead-tokens", "1000000")
"""Flags of the control's server: it gathers all pending requests, at any padding."""
TOGETHER = 16
"""Sequences in a call whose runs must be shared on a busy machine too."""
LENGTHS = (*range(2, 24), *range(24, 100, 5))
"""Mixed, most of them short; some above each threshold of the graphs."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table. All counts are of `calls` sequences.

    Args:
        model: What the model is, in words.
        policy: What is shared by default, in words.
        wrong: Wrong answers to separate callers, by default.
        together_wrong: Wrong answers to calls of `TOGETHER` sequences, by default.
        mean_batch: Sequences that shared a run in these calls.
        forced_wrong: Wrong answers to the same calls, with everything claimed proved.
        forced_mean_batch: Sequences that shared a run there.
        batches: Whether the model must share runs by default; False: forcing it to must change an answer.
        reason: Why not more is shared by default; empty if everything is.
    """

    model: str
    policy: str
    calls: int
    wrong: int
    together_wrong: int
    forced_wrong: int
    mean_batch: float
    forced_mean_batch: float
    batches: bool
    reason: str

    @property
    def holds(self) -> bool:
        """Return whether no answer is wrong, safe models share runs, and unsafe ones are wrong when forced to."""
        right = not self.wrong and not self.together_wrong
        return right and (self.mean_batch > 1 if self.batches else self.forced_wrong > 0)


class Alone:
    """The bare runtime over a source and over its tapped graph, one sequence at a time."""

    def __init__(self, source: Path, bundle: Bundle) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._source = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._tapped = ort.InferenceSession(bundle.path / MODEL_FILE, options, providers=["CPUExecutionProvider"])
        self._manifest = bundle.manifest

    def answer(self, feeds: Feeds) -> dict[str, Array]:
        """Return outputs of the source and weights of the taps, as `attention.<site>`, without the batch axis."""
        rows = {name: values[None] for name, values in feeds.items()}
        names = [spec.name for spec in self._manifest.outputs]
        answer = dict(zip(names, self._source.run(names, rows), strict=True))
        sites = [site for site in self._manifest.sites if site.available]
        items = {site.items_input: np.zeros(1, np.int64) for site in sites}
        weights = self._tapped.run([site.weights_output for site in sites], rows | items) if sites else []
        answer |= {WEIGHTS_PREFIX + site.name: each for site, each in zip(sites, weights, strict=True)}
        return {name: values[0] for name, values in answer.items()}


def equality_of(manifest: Manifest) -> Equality:
    """Return the rule of equality for a bundle's answers."""
    certificate = getattr(manifest, "certificate", None)
    return Equality(manifest.precision, certificate.noise if certificate else {})


def differs(result: InferenceResult | AttnserveError, alone: Mapping[str, Array], equality: Equality) -> bool:
    """Return whether an answer differs from the sequence alone. An error is no answer."""
    if isinstance(result, AttnserveError):
        return True
    found = dict(result.outputs) | {WEIGHTS_PREFIX + each.sites[0]: each.weights for each in result.attention}
    return found.keys() != alone.keys() or any(
        equality.error(name, values, alone[name]) > 1 for name, values in found.items()
    )


def forced(bundle: Bundle, repository: Path) -> Bundle:
    """Return the same bundle with everything claimed: each clause proved, each axis padded, 32 rows a run.

    It has no golden answers, which a graph that mixes its batch might not repeat.
    """
    manifest = bundle.manifest
    axes = tuple(axis.model_copy(update={"paddable": not axis.fixed}) for axis in manifest.axes)
    update: dict[str, Any] = {"axes": axes, "max_batch_size": CALLERS, "golden": None}
    certificate = getattr(manifest, "certificate", None)
    if certificate is not None:
        claimed = {"verdict": Verdict.PROVED, "reason": "", "path": (), "attack": None}
        clauses = tuple(clause.model_copy(update=claimed) for clause in certificate.clauses)
        update["certificate"] = certificate.model_copy(update={"clauses": clauses, "masks": ()})
    kept = {name: bundle.path / name for name in manifest.files if manifest.golden is None or name == MODEL_FILE}
    return write_bundle(repository, manifest.model_copy(update=update), kept or {MODEL_FILE: bundle.path / MODEL_FILE})


def policy_of(manifest: Manifest) -> tuple[str, str]:
    """Return what is shared by default, in words, and why not more."""
    certificate = getattr(manifest, "certificate", None)
    if certificate is None:
        padded = ", ".join(axis.symbol for axis in manifest.axes if axis.paddable) or "nothing"
        return f"by probes: {manifest.max_batch_size} rows, pads {padded}", ""
    words, reasons = [], []
    for clause in certificate.clauses:
        allowed = clause.allows("proved")
        effect = (
            ("joined" if allowed else "alone") if clause.axis == BATCH else ("padded" if allowed else "equal lengths")
        )
        words.append(f"{clause.axis} {clause.status('proved')}: {effect}")
        reasons += [clause.reason] if clause.reason else []
    return "; ".join(words), "; ".join(dict.fromkeys(reasons))


async def called(
    target: str, model: str, requests: Sequence[Feeds], per_call: int
) -> list[InferenceResult | AttnserveError]:
    """Send every request once, `per_call` of them in a call, from all callers.

    Return the answers in the order of the requests; the error of a failed call is the answer to each of its requests.
    """
    answers: dict[int, InferenceResult | AttnserveError] = {}
    waiting = iter(range(0, len(requests), per_call))

    async def caller() -> None:
        async with AsyncClient(target) as client:
            for start in waiting:
                each = requests[start : start + per_call]
                try:
                    answers.update(enumerate(await client.infer(model, each, attention=True), start))
                except AttnserveError as fault:
                    answers.update(dict.fromkeys(range(start, start + len(each)), fault))

    async with asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(caller())
    return [answers[index] for index in range(len(requests))]


def mean_batch(results: Sequence[InferenceResult | AttnserveError]) -> float:
    """Return the mean number of sequences that shared a run with one."""
    sizes = [result.run.batch_size for result in results if isinstance(result, InferenceResult)]
    return sum(sizes) / max(len(sizes), 1)


def measured(subjects: Sequence[Subject], calls: int, folder: Path) -> list[Row]:
    """Convert, serve and compare. One row for each model."""
    bundles: dict[str, Bundle] = {}
    alone: dict[str, Alone] = {}
    for subject in subjects:
        source = folder / f"{subject.name}.onnx"
        source.write_bytes(subject.graph().SerializeToString())
        # Fusion would replace the spelling that the model represents by a fused operator.
        request = PrepareRequest(
            file=source, name=subject.name, repository=folder / "models", max_length=128, fuse=False
        )
        bundles[subject.name] = prepare_bundle(request)
        alone[subject.name] = Alone(source, bundles[subject.name])
        forced(bundles[subject.name], folder / "forced")
    requests = {subject.name: subject.requests(calls, LENGTHS) for subject in subjects}
    answers = {}
    for kind, flags in {"models": (), "forced": FORCING}.items():
        with service.running(folder / kind, *flags) as server:
            for name, each in requests.items():
                if kind == "models":
                    answers["separate", name] = asyncio.run(called(server.target, name, each, 1))
                answers[kind, name] = asyncio.run(called(server.target, name, each, TOGETHER))
    rows = []
    for subject in subjects:
        name, manifest = subject.name, bundles[subject.name].manifest
        equality = equality_of(manifest)
        references = [alone[name].answer(feeds) for feeds in requests[name]]
        wrong = {
            kind: sum(differs(*pair, equality) for pair in zip(answers[kind, name], references, strict=True))
            for kind in ("separate", "models", "forced")
        }
        policy, reason = policy_of(manifest)
        rows.append(
            Row(
                model=subject.what,
                policy=policy,
                calls=calls,
                wrong=wrong["separate"],
                together_wrong=wrong["models"],
                forced_wrong=wrong["forced"],
                mean_batch=mean_batch(answers["models", name]),
                forced_mean_batch=mean_batch(answers["forced", name]),
                batches=subject.batches,
                reason=reason,
            )
        )
    return rows


def shown(rows: Sequence[Row], console: Console) -> None:
    """Print the table."""
    table = Table(
        "model", "policy used", "wrong", f"in calls of {TOGETHER}", "rows a run", "forced: wrong", "rows a run"
    )
    for row in rows:
        wrong = (f"{count} of {row.calls}" for count in (row.wrong, row.together_wrong, row.forced_wrong))
        separate, together, forced_wrong = wrong
        default, forced_runs = f"{row.mean_batch:.2f}", f"{row.forced_mean_batch:.2f}"
        table.add_row(row.model, row.policy, separate, together, default, forced_wrong, forced_runs)
    console.print(table)
    for row in rows:
        if row.reason:
            console.print(f"{row.model}: {row.reason}", markup=False)


def main() -> None:
    """Entry point. Exit code 1 if a row does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200, help="of each model")
    parser.add_argument("--only", default="", help=f"of {', '.join(subject.name for subject in SUBJECTS)}, with commas")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    names = [subject.name for subject in SUBJECTS]
    wanted = options.only.split(",") if options.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"--only has the unknown models {', '.join(sorted(unknown))}; use some of {', '.join(names)}")
    chosen = [subject for subject in SUBJECTS if subject.name in wanted]
    with tempfile.TemporaryDirectory(prefix="attnserve-batching-") as folder:
        rows = measured(chosen, options.calls, Path(folder))
    shown(rows, Console(stderr=options.json))
    if options.json:
        print(json.dumps([asdict(row) | {"holds": row.holds} for row in rows], indent=2))
    sys.exit(not all(row.holds for row in rows))


if __name__ == "__main__":
    main()
