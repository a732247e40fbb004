"""Makes the golden answers of a bundle: a few sequences, and the answers of the checked graph to them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from attnserve_server.conversion.base.steps import Steps
from attnserve_server.conversion.probing.feeds import Sampler
from attnserve_server.conversion.verify.continuing import Continuing
from attnserve_server.domain.values import Array
from attnserve_server.engine.golden import GOLDEN_FILE, GoldenSequence, answers, write_golden
from attnserve_server.engine.session import CPU, RunFailed, RuntimeSession
from attnserve_server.model.bands import SlidingBand
from attnserve_server.model.certificate import Batching
from attnserve_server.model.manifest import GoldenSpec, InputRole, Manifest

GOLDEN_LENGTHS = (5, 12, 8)
"""Mixed, so that two of the three sequences are padded. Each further axis begins one place later, so that a provider
that aligns the queries of one axis with the keys of another in another way is found."""
_MOST_FOR_A_WINDOW = 256
"""The second length reaches beyond the widest window of the model, up to this."""
MAX_GOLDEN_BYTES = 256 * 2**10
_HIDDEN = 2
"""Positions at the end of the last sequence that its mask hides, so that a mask is read also where sequences run alone,
as those of many causal models do."""
_LONG_INPUT = 4096
"""An input of more numbers than this repeats itself, so that the file stays small."""
_PERIOD = 509
"""The number after which it repeats: a prime, so that rows and channels of an image differ."""

TOLERANCES = {
    # Another provider or processor sums in another order. Measured: 1e-6 among CPUs, some 1e-4 on GPUs without TF32.
    "fp32": (1e-3, 1e-3),
    # 11 bits, and kernels that round between operations where others do not.
    "fp16": (2e-2, 2e-2),
    # Integer sums are exact, but a last bit before rounding moves a number by 1/127, and every later one with it.
    # Processors that saturate 16-bit sums (x86 before VNNI) may exceed even this: they compute another model.
    "int8": (1e-1, 1e-1),
}
"""Tolerances of outputs and of weights, relative to the greatest number, by precision."""


def with_golden(
    manifest: Manifest,
    session: RuntimeSession,
    sampler: Sampler,
    work: Path,
    steps: Steps,
    batching: Batching = "proved",
    continuing: Continuing | None = None,
) -> tuple[Manifest, dict[str, Path]]:
    """Return the manifest with its golden answers described, and the file of these answers.

    Args:
        manifest: complete but for the files.
        session: the checked tapped graph, opened as the server opens it.
        sampler: draws sequences for the graph.
        work: a folder for the file.
        steps: receives a warning where the graph does not run on such sequences; the bundle has no golden answers then.
        batching: the policy by which the sequences share a batch, or not.
        continuing: the graph of sequences with a past, which get golden answers too; None: there is none.

    Raises:
        LoadFailed: the runtime cannot load the graph of sequences with a past.
        RunFailed: that graph does not run.
    """
    arrays = len(GOLDEN_LENGTHS) * (len(manifest.outputs) + len(manifest.sites))
    output_tolerance, weight_tolerance = TOLERANCES[manifest.precision]
    golden = GoldenSpec(
        sequences=len(GOLDEN_LENGTHS),
        sample=int(np.clip(MAX_GOLDEN_BYTES // (4 * max(arrays, 1)), 16, 4096)),
        output_tolerance=output_tolerance,
        weight_tolerance=weight_tolerance,
    )
    described = manifest.model_copy(update={"golden": golden})
    if manifest.past is not None:
        past = manifest.past.model_copy(update={"golden": golden.model_copy(update={"sequences": 1})})
        described = described.model_copy(update={"past": past})
    lengths = _lengths(manifest)
    answered: list[GoldenSequence] = []
    # The axes of some models do not take every pair of lengths, or their masks not every number of ones.
    for hide, step in product((True, False), (1, 0)):
        drawn = _sequences(manifest, sampler, lengths, step)
        drawn[-1] = _with_hidden_end(described.under(batching), drawn[-1]) if hide else drawn[-1]
        with contextlib.suppress(RunFailed):
            answered = answers(session, described.under(batching), drawn)
            break
    if not answered:
        steps.warn(f"no golden answers: the model does not run on lengths of {', '.join(map(str, lengths))}")
        return manifest, {}
    continued: list[GoldenSequence] = []
    if continuing is not None and described.continuing is not None:
        past_session = RuntimeSession.load(continuing.path, provider=CPU, left_out=manifest.left_out)
        continued = answers(past_session, described.continuing, [continuing.sequence])
    write_golden(work / GOLDEN_FILE, answered, described, continued)
    return described, {GOLDEN_FILE: work / GOLDEN_FILE}


def _lengths(manifest: Manifest) -> tuple[int, ...]:
    """Return the lengths of the sequences; the second one reaches beyond the widest window."""
    bands = [site.band for site in manifest.sites if isinstance(site.band, SlidingBand)]
    widest = max((band.dilation * max(band.before, band.after) for band in bands), default=0)
    first, second, third = GOLDEN_LENGTHS
    return first, max(second, min(widest + 2, _MOST_FOR_A_WINDOW)), third


def _sequences(manifest: Manifest, sampler: Sampler, lengths: Sequence[int], step: int) -> list[dict[str, Array]]:
    """Draw the sequences; each further axis has the lengths from `step` places later on."""
    symbols = sampler.signature.symbols
    longest = {symbol: manifest.axis(symbol).max_length for symbol in symbols}
    drawn = (
        sampler.sequence(
            {
                symbol: min(lengths[(row + step * place) % len(lengths)], longest[symbol])
                for place, symbol in enumerate(symbols)
            },
            row,
        )
        for row in range(len(lengths))
    )
    return [{name: _repeating(array) for name, array in inputs.items()} for inputs in drawn]


def _with_hidden_end(manifest: Manifest, inputs: dict[str, Array]) -> dict[str, Array]:
    """Return a sequence whose masks hide its last positions; as it is, if it could then share no padded batch.

    A graph that counts a mask's ones may leave anything in the positions behind them.
    """
    padded = manifest.max_batch_size > 1 and all(axis.paddable for axis in manifest.axes if axis.free)
    hidden = dict(inputs)
    for spec in manifest.inputs:
        mask = inputs[spec.name]
        if spec.role is InputRole.ATTENTION_MASK and not spec.counted and mask.ndim == 1 and len(mask) > _HIDDEN:
            hidden[spec.name] = np.where(np.arange(len(mask)) < len(mask) - _HIDDEN, mask, 1 - spec.data_value)
            hidden[spec.name] = hidden[spec.name].astype(mask.dtype)
    return inputs if padded and manifest.breaks_masks(hidden) else hidden


def _repeating(array: Array) -> Array:
    if array.size <= _LONG_INPUT or not np.issubdtype(array.dtype, np.floating):
        return array
    return np.resize(array.reshape(-1)[:_PERIOD], array.shape)
