"""Measure what a reduced precision costs in accuracy and gains in speed, against the graph that it was made from.

Both graphs run on English sentences where the model takes text, else on random inputs. The result is a `QualityReport`
of the manifest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from attnserve_server.conversion.assemble import assemble
from attnserve_server.conversion.base.errors import CheckFailed
from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.base.tolerances import max_abs
from attnserve_server.conversion.precision.comparison import (
    Subject,
    answers,
    compared_output,
    cosine,
    groups,
    paired_sites,
    speed_ratio,
    top1,
)
from attnserve_server.conversion.precision.sentences import Material, material_of
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.engine.session import RuntimeSession
from attnserve_server.model.certificate import Batching
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.report import QualityReport
from attnserve_server.model.tokenizer import TextTokenizer

COSINE_TARGET = 0.99
TOP1_TARGET = 0.95
"""The least mean cosine of the output, and share of attention rows with the same strongest key, without a warning."""
COSINE_FLOOR = 0.9
"""The least mean cosine at which a bundle is written."""


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
    name = compared_output(reduced.manifest)
    cosines: list[float] = []
    agreed = rows = 0
    greatest = 0.0
    sites = paired_sites(reduced.manifest, reference.manifest)
    for group in groups(reduced.manifest, material.sequences):
        found = answers(reduced, group, name, tap=bool(sites))
        turns = [[inputs] for inputs in group] if alone else [group]
        expected = [answer for turn in turns for answer in answers(reference, turn, name, tap=bool(sites))]
        for (own, own_weights), (true, true_weights) in zip(found, expected, strict=True):
            cosines.append(cosine(own, true))
            greatest = max(greatest, max_abs(own, true))
            for layer, twin in sites:
                same, of = top1(own_weights[layer], true_weights[twin])
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
        speed_ratio=speed_ratio(reduced, reference, material.sequences, name),
        output_max_abs_error=greatest if np.isfinite(greatest) else None,
    )


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
        BuildRefused: the reference does not run.
        RunFailed: a graph does not run on the sequences.
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
