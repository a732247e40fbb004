"""Run two graphs on the same batches, and compare their outputs, their strongest keys and their speed.

One graph is a model in a reduced precision, the other its reference. A run that fails raises RunFailed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from attnserve_server.domain.values import Array, PreparedSequence
from attnserve_server.engine.collation import collate, outputs_of, weights_of
from attnserve_server.engine.golden import lengths_of
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.engine.warmup import selection_of_all
from attnserve_server.model.manifest import NUMPY_DTYPES, Manifest

BATCH_SIZE = 8
"""The server also makes batches of nearly equal length."""
_TIMED_TOKENS = 2000
_TIMED_ROUNDS = 5
_COMPARED_FIRST = ("embedding", "sentence_embedding", "last_hidden_state")
_VANISHING = 1e-12
_GREATEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded graph, and the manifest that describes its inputs and outputs."""

    session: RuntimeSession
    manifest: Manifest


def compared_output(manifest: Manifest) -> str:
    """Return the output to compare: an embedding if the model has one, else the first floating-point output."""
    floating = [spec.name for spec in manifest.outputs if np.issubdtype(NUMPY_DTYPES[spec.dtype], np.floating)]
    return next((name for name in _COMPARED_FIRST if name in floating), (floating or [manifest.outputs[0].name])[0])


def paired_sites(reduced: Manifest, reference: Manifest) -> list[tuple[int, int]]:
    """Return the layers of sites that both have; none where their numbers of sites differ."""
    if len(reduced.sites) != len(reference.sites):
        return []
    pairs = zip(reduced.sites, reference.sites, strict=True)
    return [(one.layer, other.layer) for one, other in pairs if one.available and other.available]


def groups(manifest: Manifest, sequences: Sequence[dict[str, Array]]) -> Iterator[list[dict[str, Array]]]:
    """Yield batches of nearly equal length; of one sequence each where the manifest does not allow padding."""
    given = [axis for axis in manifest.axes if axis.free]
    padded = all(axis.paddable for axis in given) and not any(manifest.breaks_masks(inputs) for inputs in sequences)
    size = min(BATCH_SIZE, manifest.max_batch_size) if padded else 1
    ordered = sorted(sequences, key=lambda inputs: sum(lengths_of(inputs, manifest).values()))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _prepared(subject: Subject, group: Sequence[dict[str, Array]], name: str, *, tap: bool) -> list[PreparedSequence]:
    everything = selection_of_all(subject.manifest) if tap else None
    lengths = (lengths_of(inputs, subject.manifest) for inputs in group)
    return [PreparedSequence(inputs, own, (name,), everything) for inputs, own in zip(group, lengths, strict=True)]


def answers(
    subject: Subject, group: Sequence[dict[str, Array]], name: str, *, tap: bool
) -> list[tuple[Array, dict[int, Array]]]:
    """Return the compared output of each sequence, and its weights by layer."""
    prepared = _prepared(subject, group, name, tap=tap)
    batch = collate(prepared, subject.manifest)
    fetched = dict(zip(batch.fetches, subject.session.run(batch.feeds, batch.fetches), strict=True))
    return [
        (
            outputs_of(batch, fetched, row, sequence, subject.manifest)[name],
            weights_of(batch, fetched, row, sequence, subject.manifest),
        )
        for row, sequence in enumerate(prepared)
    ]


def cosine(one: Array, other: Array) -> float:
    """Return the cosine of two outputs, averaged over their positions, without numbers that are infinite in both.

    It is 0 where only one has an infinity, or one has a NaN. For a number beyond float16's range, such as the lowest
    float32, the reduced output may have an infinity of the same sign.
    """
    own, true = one.astype(np.float64), other.astype(np.float64)
    true = np.where(np.isinf(own) & (np.abs(true) > _GREATEST_HALF), np.copysign(np.inf, true), true)
    finite = np.isfinite(true)
    if not np.array_equal(own[~finite], true[~finite]) or not np.isfinite(own[finite]).all():
        return 0.0
    first, second = (_pooled(np.where(finite, array, 0.0)) for array in (own, true))
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms > _VANISHING else float(np.allclose(first, second, atol=1e-6))


def _pooled(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1]).mean(axis=0) if array.ndim > 1 else array.reshape(-1)


def top1(own: Array, true: Array) -> tuple[int, int]:
    """Return how many rows have the same strongest key, and how many rows have any weight."""
    if own.shape != true.shape or not own.size:
        return 0, 0
    weighted = true.any(axis=-1)
    return int((own.argmax(axis=-1) == true.argmax(axis=-1))[weighted].sum()), int(weighted.sum())


def speed_ratio(reduced: Subject, reference: Subject, sequences: Sequence[dict[str, Array]], name: str) -> float | None:
    """Return the CPU time of the reference over that of the reduced graph, the median of interleaved rounds."""
    manifest = reduced.manifest
    tokens = sum(sum(lengths_of(inputs, manifest).values()) or 1 for inputs in sequences)
    chosen = sequences[:: max(1, tokens // _TIMED_TOKENS)]
    batches = [
        [collate(_prepared(subject, group, name, tap=False), subject.manifest) for group in groups(manifest, chosen)]
        for subject in (reference, reduced)
    ]
    ratios: list[float] = []
    for turn in range(_TIMED_ROUNDS + 1):
        spent = []
        for subject, own in zip((reference, reduced), batches, strict=True):
            begun = time.thread_time()
            for batch in own:
                subject.session.run(batch.feeds, batch.fetches)
            spent.append(time.thread_time() - begun)
        if turn:  # the first round warms both up
            ratios.append(spent[0] / max(spent[1], 1e-9))
    return round(statistics.median(ratios), 3)
