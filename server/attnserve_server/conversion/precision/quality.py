"""Measure what a reduced precision costs in accuracy and gains in speed, against the graph that it was made from.

Both graphs run on English sentences where the model takes text, else on random inputs. The result is a `QualityReport`
of the manifest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from attnserve_server.conversion.assemble import assemble
from attnserve_server.conversion.base.errors import CheckFailed
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.base.tolerances import max_abs
from attnserve_server.conversion.precision.sentences import as_inputs, sentences
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.domain.values import Array, PreparedSequence
from attnserve_server.engine.collation import collate, outputs_of, weights_of
from attnserve_server.engine.golden import lengths_of
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.engine.warmup import selection_of_all
from attnserve_server.model.certificate import Batching
from attnserve_server.model.manifest import NUMPY_DTYPES, Manifest
from attnserve_server.model.report import QualityReport
from attnserve_server.model.tokenizer import TextTokenizer

COSINE_TARGET = 0.99
TOP1_TARGET = 0.95
"""The least mean cosine of the output, and share of attention rows with the same strongest key, without a warning."""
COSINE_FLOOR = 0.9
"""The least mean cosine at which a bundle is written."""
BATCH_SIZE = 8
"""The server also makes batches of nearly equal length."""
_RANDOM_LENGTHS = tuple(range(4, 68, 2))
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


@dataclass(frozen=True, slots=True)
class Material:
    """Sequences, without the batch axis, and a description of them."""

    description: str
    sequences: tuple[dict[str, Array], ...]


def material_of(manifest: Manifest, tokenizer: TextTokenizer | None, sampler: Sampler) -> Material:
    """Return sentences where text can fill all inputs of a model, else random inputs."""
    if tokenizer is not None and manifest.text is not None:
        known = as_inputs(sentences(), manifest.inputs, manifest.text, tokenizer)
        if known:
            return Material(f"{len(known)} English sentences", tuple(known))
    symbols = sampler.signature.symbols
    longest = {symbol: manifest.axis(symbol).max_length for symbol in symbols}
    drawn = tuple(
        sampler.sequence({symbol: min(length, longest[symbol]) for symbol in symbols}, row)
        for row, length in enumerate(_RANDOM_LENGTHS)
    )
    return Material(f"{len(drawn)} random inputs", drawn)


def measure(
    reduced: Subject, reference: Subject, material: Material, against: str, *, alone: bool = False
) -> QualityReport:
    """Compare two graphs on the same sequences, and time them in turns.

    Args:
        reduced: the graph to measure.
        reference: the graph that it was made from. Sites are matched in their order.
        material: the sequences.
        against: a description of the reference, for the report.
        alone: run each sequence of the reference alone, because a batch would change its answers. Both are timed on the
            same batches.

    Raises:
        RunFailed: a graph does not run on the sequences.
    """
    name = _compared_output(reduced.manifest)
    cosines: list[float] = []
    agreed = rows = 0
    greatest = 0.0
    sites = _paired_sites(reduced.manifest, reference.manifest)
    for group in _groups(reduced.manifest, material.sequences):
        found = _answers(reduced, group, name, tap=bool(sites))
        turns = [[inputs] for inputs in group] if alone else [group]
        expected = [answer for turn in turns for answer in _answers(reference, turn, name, tap=bool(sites))]
        for (own, own_weights), (true, true_weights) in zip(found, expected, strict=True):
            cosines.append(_cosine(own, true))
            greatest = max(greatest, max_abs(own, true))
            for layer, twin in sites:
                same, of = _top1(own_weights[layer], true_weights[twin])
                agreed, rows = agreed + same, rows + of
    return QualityReport(
        against=against,
        inputs=material.description,
        sequences=len(material.sequences),
        output=name,
        cosine_mean=float(np.mean(cosines)),
        cosine_worst=min(cosines),
        top1_agreement=agreed / rows if rows else None,
        attention_rows=rows,
        speed_ratio=_speed_ratio(reduced, reference, material.sequences, name),
        output_max_abs_error=greatest if np.isfinite(greatest) else None,
    )


def _compared_output(manifest: Manifest) -> str:
    floating = [spec.name for spec in manifest.outputs if np.issubdtype(NUMPY_DTYPES[spec.dtype], np.floating)]
    return next((name for name in _COMPARED_FIRST if name in floating), (floating or [manifest.outputs[0].name])[0])


def _paired_sites(reduced: Manifest, reference: Manifest) -> list[tuple[int, int]]:
    """Return the layers of sites that both have; none where their numbers of sites differ."""
    if len(reduced.sites) != len(reference.sites):
        return []
    pairs = zip(reduced.sites, reference.sites, strict=True)
    return [(one.layer, other.layer) for one, other in pairs if one.available and other.available]


def _groups(manifest: Manifest, sequences: Sequence[dict[str, Array]]) -> Iterator[list[dict[str, Array]]]:
    """Yield batches of nearly equal length; of one sequence each where the manifest does not allow padding."""
    given = [axis for axis in manifest.axes if axis.derived is None and not axis.fixed]
    padded = all(axis.paddable for axis in given) and not any(manifest.breaks_masks(inputs) for inputs in sequences)
    size = min(BATCH_SIZE, manifest.max_batch_size) if padded else 1
    ordered = sorted(sequences, key=lambda inputs: sum(lengths_of(inputs, manifest).values()))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _prepared(subject: Subject, group: Sequence[dict[str, Array]], name: str, *, tap: bool) -> list[PreparedSequence]:
    everything = selection_of_all(subject.manifest) if tap else None
    lengths = (lengths_of(inputs, subject.manifest) for inputs in group)
    return [PreparedSequence(inputs, own, (name,), everything) for inputs, own in zip(group, lengths, strict=True)]


def _answers(
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


def _cosine(one: Array, other: Array) -> float:
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


def _top1(own: Array, true: Array) -> tuple[int, int]:
    """Return how many rows have the same strongest key, and how many rows have any weight."""
    if own.shape != true.shape or not own.size:
        return 0, 0
    weighted = true.any(axis=-1)
    return int((own.argmax(axis=-1) == true.argmax(axis=-1))[weighted].sum()), int(weighted.sum())


def _speed_ratio(
    reduced: Subject, reference: Subject, sequences: Sequence[dict[str, Array]], name: str
) -> float | None:
    """Return the CPU time of the reference over that of the reduced graph, the median of interleaved rounds."""
    manifest = reduced.manifest
    tokens = sum(sum(lengths_of(inputs, manifest).values()) or 1 for inputs in sequences)
    chosen = sequences[:: max(1, tokens // _TIMED_TOKENS)]
    batches = [
        [collate(_prepared(subject, group, name, tap=False), subject.manifest) for group in _groups(manifest, chosen)]
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


def with_quality(  # noqa: PLR0913 - what two commands know of one model
    manifest: Manifest,
    model_path: Path,
    reference: onnx.ModelProto,
    sampler: Sampler,
    tokenizer: Path | None,
    work: Path,
    steps: Steps,
    batching: Batching = "proved",
    *,
    alone: bool = False,
) -> Manifest:
    """Measure a reduced model and return its manifest with the quality report.

    Args:
        manifest: of the reduced model.
        model_path: its tapped graph.
        reference: the graph that it was made from.
        sampler: draws sequences for both.
        tokenizer: its tokenizer.json, if it has one.
        work: a folder for files.
        steps: receives warnings of missed targets.
        batching: the policy by which sequences share a batch.
        alone: see `measure`.

    Raises:
        CheckFailed: the mean cosine is below `COSINE_FLOOR`.
    """
    place = work / "reference"
    place.mkdir()
    true = assemble(reference, sampler, place, Steps.silent())
    ruled = manifest.under(batching)
    unreduced = ruled.model_copy(update={"sites": true.sites, "outputs": true.outputs, "precision": true.precision})
    one, other = (
        Subject(RuntimeSession.load(path, provider="CPUExecutionProvider", intra_op_threads=1), own)
        for path, own in ((model_path, ruled), (true.model_path, unreduced))
    )
    text = manifest.text
    written = manifest.text_as_written
    known = TextTokenizer.load(tokenizer, text.axis, written) if tokenizer is not None and text is not None else None
    against = "the file itself, each sequence alone" if alone else f"the same graph in {true.precision}"
    report = measure(one, other, material_of(manifest, known, sampler), against, alone=alone)
    judge_quality(report, manifest.precision, steps)
    return manifest.model_copy(update={"check": manifest.check.model_copy(update={"quality": report})})


def judge_quality(report: QualityReport, precision: str, steps: Steps) -> None:
    """Warn of missed targets. Raises CheckFailed where the mean cosine is below `COSINE_FLOOR`."""
    if not report.cosine_mean >= COSINE_FLOOR:
        raise CheckFailed(
            f"check failed: in {precision} the mean cosine of {report.output} with {report.against} is "
            f"{report.cosine_mean:.3f}, less than {COSINE_FLOOR:g}; no bundle was written"
        )
    if report.cosine_mean < COSINE_TARGET:
        steps.warn(f"{precision}: the mean cosine {report.cosine_mean:.4f} is below {COSINE_TARGET:g}")
    if report.top1_agreement is not None and report.top1_agreement < TOP1_TARGET:
        steps.warn(
            f"{precision}: {report.top1_agreement:.1%} of attention rows keep their strongest key, "
            f"fewer than {TOP1_TARGET:.0%}"
        )
