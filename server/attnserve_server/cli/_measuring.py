"""Measures of one way to serve a bundle, for `recommend`: speed, memory, and how far its answers move.

Each way is measured in its own process, so that memory is its own, and a provider that ends the process ends nothing
else. The model is opened as the server opens it: with its golden answers, on the provider that serves.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np

from attnserve_server.config import Settings
from attnserve_server.conversion.precision.comparison import Subject, answers, compared_output, cosine, groups
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.machine import resident_bytes
from attnserve_server.domain.values import Array, PreparedSequence
from attnserve_server.engine.collation import CollatedBatch, collate
from attnserve_server.engine.golden import lengths_of, read_golden
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.engine.warmup import synthetic
from attnserve_server.loading import Opened, open_bundle
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import BundleInvalid, Repository
from attnserve_server.observability.logs import configure
from attnserve_server.wanted import under_policy

_SENTENCES: Final = 24
"""The most sentences that are compared and timed: three batches of the comparison."""
_LENGTHS: Final = (8, 24, 64)
"""Lengths of the synthetic sequences of a model without text."""
_ALONE: Final = 15
"""The most sequences that are timed alone."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to serve a bundle: its folder, and settings of the server."""

    bundle: Path
    provider: str
    precision: str
    threads: int
    instances: int

    @property
    def flags(self) -> str:
        """The flags of `serve` that differ from the defaults."""
        precision = "" if self.precision == "bundle" else f" --precision {self.precision}"
        threads = "" if self.threads == 1 else f" --intra-op-threads {self.threads}"
        return f"--provider {self.provider}{precision} --instances {self.instances}{threads}"


@dataclass(frozen=True, slots=True)
class Answered:
    """What the answers of other ways are compared with, by sequence: the output, and each row's strongest key.

    Args:
        output: name of the compared output.
        values: its values, without the batch axis.
        strongest: by layer, the index of the strongest key of each row, (H, L).
        inputs: what the sequences are, for people.
    """

    output: str
    values: tuple[Array, ...]
    strongest: tuple[dict[int, Array], ...]
    inputs: str


@dataclass(frozen=True, slots=True)
class Measured:
    """The measures of one way.

    Args:
        way: what was measured.
        model: name and version of the bundle.
        precision: the precision that serves.
        sequences_s: sequences a second, with every instance busy.
        alone_ms: milliseconds of a sequence that runs alone, the median.
        memory_bytes: resident memory that the model added.
        others: nodes that the provider leaves to other providers, by operator.
        answered: its answers.
    """

    way: Way
    model: str
    precision: str
    sequences_s: float
    alone_ms: float
    memory_bytes: int
    others: dict[str, int]
    answered: Answered


@dataclass(frozen=True, slots=True)
class Refused:
    """A way that does not serve here, the kind of the error, and the reason."""

    way: Way
    kind: str
    why: str


def measured_apart(way: Way, seconds: float) -> Measured | Refused:
    """Measure one way in its own process. `seconds`: how long all instances are kept busy."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, way, seconds).result()
        except BrokenProcessPool:
            return Refused(way, "BrokenProcessPool", "it ended the process, or ran out of memory")


def measure(way: Way, seconds: float) -> Measured | Refused:
    """Measure one way in this process."""
    configure("error")
    try:
        return _measured(way, seconds)
    except AttnserveError as fault:
        return Refused(way, type(fault).__name__, str(fault))


def agreement(own: Answered, true: Answered) -> tuple[float, float | None]:
    """Return the mean cosine of the outputs, and the share of rows of attention with the same strongest key.

    The share is None where the two have no site in common.
    """
    cosines = [cosine(one, other) for one, other in zip(own.values, true.values, strict=True)]
    agreed = rows = 0
    for one, other in zip(own.strongest, true.strongest, strict=True):
        for layer in one.keys() & other.keys():
            if one[layer].shape == other[layer].shape:
                agreed, rows = agreed + int((one[layer] == other[layer]).sum()), rows + one[layer].size
    return float(np.mean(cosines)), agreed / rows if rows else None


def _measured(way: Way, seconds: float) -> Measured:
    place = way.bundle.resolve()
    if not (place / "manifest.json").is_file():
        raise BundleInvalid(place.parent.name, place.name, "the folder has no manifest.json")
    flags = {"provider": way.provider, "precision": way.precision, "instances": way.instances}
    settings = Settings.load({**flags, "repository": place.parents[1], "intra_op_threads": way.threads})
    bundle = under_policy(Repository(place.parents[1]).bundle(place.parent.name, place.name), settings)
    before = resident_bytes()
    opened = open_bundle(bundle, settings)
    session, manifest = opened.sessions[0], opened.bundle.manifest
    inputs, sequences = _material(opened)
    answered = _answered(Subject(session, manifest), inputs, sequences)
    batches = [_collated(group, manifest, answered.output) for group in groups(manifest, sequences)]
    memory = max(0, resident_bytes() - before)
    alone = [_collated([inputs], manifest, answered.output) for inputs in sequences[:_ALONE]]
    others = {name: nodes for name, nodes in session.nodes_by_provider().items() if name != session.provider}
    return Measured(
        way,
        f"{manifest.name}/{manifest.version}",
        manifest.precision,
        _sequences_s(session, batches, way.instances, seconds),
        _alone_ms(session, alone),
        memory,
        {operator: count for nodes in others.values() for operator, count in nodes.items()},
        answered,
    )


def _material(opened: Opened) -> tuple[str, list[dict[str, Array]]]:
    """What the sequences are, and their inputs: sentences if the model takes text, else golden and synthetic ones."""
    manifest = opened.bundle.manifest
    if opened.tokenizer is not None and manifest.text is not None:
        try:
            from attnserve_server.conversion.precision import sentences  # noqa: PLC0415 - it needs the extra `convert`
        except ModuleNotFoundError:
            sentences = None  # type: ignore[assignment]
        if sentences is not None:
            texts = sentences.sentences()[:_SENTENCES]
            known = sentences.as_inputs(texts, manifest.inputs, manifest.text, opened.tokenizer)
            if known:
                return f"{len(known)} English sentences", known
    golden = [dict(sequence.inputs) for sequence in read_golden(opened.bundle)]
    made = [dict(synthetic(manifest, length).tensors) for length in _LENGTHS]
    return f"{len(golden)} golden and {len(made)} synthetic sequences", golden + made


def _answered(subject: Subject, inputs: str, sequences: Sequence[dict[str, Array]]) -> Answered:
    name = compared_output(subject.manifest)
    found = [
        answer
        for group in groups(subject.manifest, sequences)
        for answer in answers(subject, group, name, tap=any(site.available for site in subject.manifest.sites))
    ]
    strongest = tuple({layer: own.argmax(axis=-1) for layer, own in weights.items()} for _, weights in found)
    return Answered(name, tuple(values.copy() for values, _ in found), strongest, inputs)


def _collated(group: Sequence[dict[str, Array]], manifest: Manifest, output: str) -> CollatedBatch:
    prepared = [PreparedSequence(inputs, lengths_of(inputs, manifest), (output,), None) for inputs in group]
    return collate(prepared, manifest)


def _sequences_s(session: RuntimeSession, batches: Sequence[CollatedBatch], instances: int, seconds: float) -> float:
    """Sequences a second of `instances` threads, each with its own place in the batches."""
    done = [0] * instances
    for batch in batches:
        session.run(batch.feeds, batch.fetches)
    began = time.perf_counter()

    def work(instance: int) -> None:
        at = instance
        while time.perf_counter() - began < seconds:
            batch = batches[at % len(batches)]
            session.run(batch.feeds, batch.fetches)
            done[instance] += batch.size
            at += 1

    threads = [threading.Thread(target=work, args=(instance,)) for instance in range(instances)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - began)


def _alone_ms(session: RuntimeSession, batches: Sequence[CollatedBatch]) -> float:
    spent = []
    for turn in range(2):  # the first turn prepares each shape
        for batch in batches:
            began = time.perf_counter()
            session.run(batch.feeds, batch.fetches)
            if turn:
                spent.append(time.perf_counter() - began)
    return statistics.median(spent) * 1e3
