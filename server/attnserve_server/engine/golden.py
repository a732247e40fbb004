"""Golden answers asked for again: whether a loaded session still answers as the bundle did when it was checked.

It catches what digests cannot: a file that was swapped and sealed anew, a provider or a processor whose kernels compute
something else, a runtime whose new version does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import Array, PreparedSequence
from attnserve_server.engine.collation import collate, outputs_of, weights_of
from attnserve_server.engine.session import RunFailed, RuntimeSession
from attnserve_server.engine.warmup import selection_of_all
from attnserve_server.model.golden import GoldenSequence, sample_of
from attnserve_server.model.manifest import NUMPY_DTYPES, Manifest

_LEAST_SCALE = 1e-6
"""Answers smaller than this in every number are rounding, and told as they are."""


class GoldenMismatch(AttnserveError):
    """A loaded model does not answer as its bundle did when it was checked; it must not be served."""

    reason = "GOLDEN_MISMATCH"

    def __init__(self, what: str, error: float, allowed: float) -> None:
        self.what, self.error, self.allowed = what, error, allowed
        super().__init__(
            f"{what} is off by {error:.3g} of its greatest number from the golden answers of the bundle; "
            f"{allowed:g} is allowed"
        )

    def metadata(self) -> dict[str, str]:
        """Which output, by how much, and what is allowed."""
        return {"what": self.what, "error": f"{self.error:g}", "allowed": f"{self.allowed:g}"}


def verify_golden(session: RuntimeSession, manifest: Manifest, golden: Sequence[GoldenSequence]) -> float:
    """Ask the session for the golden answers again, on the calling thread.

    Returns:
        The greatest error, in parts of what is allowed: at most 1.

    Raises:
        GoldenMismatch: an answer is another one, or there is none.
    """
    if manifest.golden is None or not golden:
        return 0.0
    try:
        found = answers(session, manifest, [sequence.inputs for sequence in golden])
    except (RunFailed, ValueError) as fault:
        raise GoldenMismatch("the run on the golden inputs failed: every output", float("inf"), 0.0) from fault
    worst = 0.0
    sites = {site.layer: site.name for site in manifest.sites}
    for expected, own in zip(golden, found, strict=True):
        named = [(f"output {name}", array, own.outputs[name]) for name, array in expected.outputs.items()]
        for what, before, now in named:
            worst = max(worst, _judged(what, before, now, manifest.golden.output_tolerance))
        for layer, before in expected.weights.items():
            what = f"attention of {sites[layer]}"
            worst = max(worst, _judged(what, before, own.weights[layer], manifest.golden.weight_tolerance))
    return worst


def answers(
    session: RuntimeSession, manifest: Manifest, sequences: Sequence[Mapping[str, Array]]
) -> list[GoldenSequence]:
    """Samples of what a session answers to sequences of inputs, padded into one batch where the manifest allows it."""
    if manifest.golden is None:
        raise ValueError("the manifest has no golden answers")
    count = manifest.golden.sample
    everything = selection_of_all(manifest)
    names = tuple(spec.name for spec in manifest.outputs if np.issubdtype(NUMPY_DTYPES[spec.dtype], np.floating))
    prepared = [PreparedSequence(inputs, lengths_of(inputs, manifest), names, everything) for inputs in sequences]
    given = [axis for axis in manifest.axes if axis.derived is None and not axis.fixed]
    together = len(prepared) <= manifest.max_batch_size and all(axis.paddable for axis in given)
    together = together and not any(manifest.breaks_masks(inputs) for inputs in sequences)
    answered: list[GoldenSequence] = []
    for group in [prepared] if together else [[sequence] for sequence in prepared]:
        batch = collate(group, manifest)
        fetched = dict(zip(batch.fetches, session.run(batch.feeds, batch.fetches), strict=True))
        for row, sequence in enumerate(group):
            outputs = outputs_of(batch, fetched, row, sequence, manifest)
            weights = weights_of(batch, fetched, row, sequence, manifest)
            answered.append(
                GoldenSequence(
                    sequence.tensors,
                    {name: sample_of(array, count) for name, array in outputs.items()},
                    {layer: sample_of(array, count) for layer, array in weights.items()},
                )
            )
    return answered


def lengths_of(inputs: Mapping[str, Array], manifest: Manifest) -> dict[str, int]:
    """The length of each axis symbol, from the shapes of one sequence's inputs."""
    given = {
        extent: length
        for spec in manifest.inputs
        for extent, length in zip(spec.shape, inputs[spec.name].shape, strict=True)
        if isinstance(extent, str)
    }
    return {**manifest.fixed_lengths, **given}


def error_of(before: Array, now: Array) -> float:
    """The greatest difference in parts of the greatest number before; infinity where shapes or infinities differ."""
    if before.shape != now.shape:
        return float("inf")
    wide, other = before.astype(np.float64), now.astype(np.float64)
    same = (wide == other) | (np.isnan(wide) & np.isnan(other))
    scale = max(float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0)), _LEAST_SCALE)
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(wide - other))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0)) / scale


def _judged(what: str, before: Array, now: Array, allowed: float) -> float:
    error = error_of(before, now)
    if not error <= allowed:
        raise GoldenMismatch(what, error, allowed)
    return error / allowed
