"""Golden answers: a few sequences with samples of their answers, stored in the bundle and checked again at every load.

The check finds what a digest cannot: a file that was swapped and sealed again, or a provider, processor or version of
the runtime that computes something else. In the file, arrays are named by position, such as `output.1.0` for the first
output of the second sequence, because a graph may use any name.

An answer that differs by more than the manifest allows raises GoldenMismatch, and a file that cannot be read
BundleInvalid. A bundle is the folder of one converted model.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import Array, HeadReduction, PreparedSequence
from attnserve_server.engine.collation import collate, outputs_of, past_length, weights_of
from attnserve_server.engine.session import RunFailed, RuntimeSession
from attnserve_server.engine.warmup import selection_of_all
from attnserve_server.model.equality import WEIGHTS_PREFIX, Equality
from attnserve_server.model.manifest import NUMPY_DTYPES, Manifest
from attnserve_server.model.repository import MODEL_FILE, Bundle, BundleInvalid

GOLDEN_FILE = "golden.npz"
_PAST = "past."
"""Prefix of the names of the continuing graph's arrays."""
MAX_UNPACKED_BYTES = 64 * 2**20
"""Maximum size of the unpacked arrays. Inputs may be images that compress well."""
_UNREADABLE = (
    OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error, tokenize.TokenError
)  # fmt: skip
"""What NumPy and zipfile raise for a changed archive: the header of an array is parsed as Python."""
_MEAN_TOLERANCE = 2e-3
"""Greatest difference of a mean over heads from the mean of the weights of the same run, relative to the greatest mean.
Both are float32 in every precision. A sum of heads differs by 1e-6; by 1e-3 if an option of the provider turns on TF32,
which keeps 10 bits."""
_MIN_SCALE = 1e-6
"""Errors of answers that are smaller than this everywhere are not scaled up: such numbers are rounding."""


class GoldenMismatch(AttnserveError):
    """A loaded model does not repeat the golden answers of its bundle; it must not be served."""

    reason = "GOLDEN_MISMATCH"

    def __init__(self, what: str, error: float, allowed: float, provider: str) -> None:
        self.what, self.error, self.allowed, self.provider = what, error, allowed, provider
        super().__init__(
            f"{what} is off by {error:.3g} of its greatest number from the golden answers of the bundle on {provider}; "
            f"{allowed:g} is allowed"
        )

    def metadata(self) -> dict[str, str]:
        """The output or site, its error, the allowed error, and the execution provider."""
        named = {"what": self.what, "provider": self.provider}
        return {**named, "error": f"{self.error:g}", "allowed": f"{self.allowed:g}"}


@dataclass(frozen=True, slots=True)
class GoldenSequence:
    """One sequence, without the batch axis, and samples of its answers.

    Args:
        inputs: by name, each in the model's dtype.
        outputs: samples by name, (N,), of the floating-point outputs.
        weights: samples by layer, (N,), of each available site's weights.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    weights: Mapping[int, Array]


def verify_golden(session: RuntimeSession, manifest: Manifest, golden: Sequence[GoldenSequence]) -> float:
    """Run the golden sequences on the calling thread, and compare the answers.

    Args:
        session: the loaded model.
        manifest: of the model.
        golden: the sequences of its bundle.

    Returns:
        The greatest error divided by the allowed one: at most 1.

    Raises:
        GoldenMismatch: an answer differs by more than is allowed, or the run failed. It names the output that differs
            most; where all outputs agree, the site.
    """
    if manifest.golden is None or not golden:
        return 0.0
    try:
        found = answers(session, manifest, [sequence.inputs for sequence in golden])
    except (RunFailed, ValueError) as fault:
        what = "the run on the golden inputs failed: every output"
        raise GoldenMismatch(what, float("inf"), 0.0, session.provider) from fault
    sites = {site.layer: site.name for site in manifest.sites}
    outputs: dict[str, _Off] = {}
    weights: dict[str, _Off] = {}
    for expected, own in zip(golden, found, strict=True):
        for name, before in expected.outputs.items():
            error, allowed = error_of(before, own.outputs[name]), manifest.golden.output_tolerance
            _keep_worst(outputs, f"output {name}", error, _allowed(name, before, allowed, session.precision))
        for layer, before in expected.weights.items():
            error, allowed = error_of(before, own.weights[layer]), manifest.golden.weight_tolerance
            allowed = _allowed(f"{WEIGHTS_PREFIX}{sites[layer]}", before, allowed, session.precision)
            _keep_worst(weights, f"attention of {sites[layer]}", error, allowed)
    worst = 0.0
    for found_off in (outputs, weights):
        what = max(found_off, key=found_off.__getitem__, default="")
        share, error, allowed = found_off.get(what, (0.0, 0.0, 0.0))
        if not share <= 1:
            raise GoldenMismatch(what, error, allowed, session.provider)
        worst = max(worst, share)
    return worst


_Off = tuple[float, float, float]
"""An error divided by the allowed one, the error, and the allowed one."""


def _keep_worst(found: dict[str, _Off], what: str, error: float, allowed: float) -> None:
    share = error / allowed if allowed else (float("inf") if error else 0.0)
    found[what] = max(found.get(what, (0.0, 0.0, 0.0)), (share, error, allowed))


def _allowed(name: str, before: Array, tolerance: float, precision: str) -> float:
    """Return the allowed error, relative to the greatest number: more in a precision below that of the bundle."""
    if not precision:
        return tolerance
    wide = np.abs(before.astype(np.float64))
    scale = max(float(wide[np.isfinite(wide)].max(initial=0.0)), _MIN_SCALE)
    return max(tolerance, Equality(precision).allowed(name, before) / scale)


def answers(
    session: RuntimeSession, manifest: Manifest, sequences: Sequence[Mapping[str, Array]]
) -> list[GoldenSequence]:
    """Return samples of a session's answers, from one padded batch if the manifest allows that.

    Means over heads have no samples: each is compared with the weights of the same run.

    Args:
        session: the loaded model.
        manifest: of the model, with `golden`.
        sequences: the inputs of each sequence by name, without the batch axis.

    Raises:
        ValueError: the manifest has no golden answers, or the inputs contradict it.
        RunFailed: the model cannot run on these inputs.
        GoldenMismatch: a mean over heads is not that of its weights.
    """
    if manifest.golden is None:
        raise ValueError("the manifest has no golden answers")
    count = manifest.golden.sample
    everything = selection_of_all(manifest, HeadReduction.MEAN)
    names = tuple(spec.name for spec in manifest.outputs if np.issubdtype(NUMPY_DTYPES[spec.dtype], np.floating))
    prepared = []
    for inputs in sequences:
        lengths = lengths_of(inputs, manifest)
        past = past_length(lengths, manifest)
        prepared.append(PreparedSequence(inputs, lengths, names, everything, past=past, keep_values=True))
    given = [axis for axis in manifest.axes if axis.free]
    together = len(prepared) <= manifest.max_batch_size and all(axis.paddable for axis in given)
    together = together and not any(manifest.breaks_masks(inputs) for inputs in sequences)
    answered: list[GoldenSequence] = []
    for group in [prepared] if together else [[sequence] for sequence in prepared]:
        batch = collate(group, manifest)
        fetched = dict(zip(batch.fetches, session.run(batch.feeds, batch.fetches), strict=True))
        for row, sequence in enumerate(group):
            outputs = outputs_of(batch, fetched, row, sequence, manifest)
            weights = weights_of(batch, fetched, row, sequence, manifest, whole=True)
            _check_means(weights, weights_of(batch, fetched, row, sequence, manifest), manifest, session.provider)
            answered.append(
                GoldenSequence(
                    sequence.tensors,
                    {name: sample_of(array, count) for name, array in outputs.items()},
                    {layer: sample_of(array, count) for layer, array in weights.items()},
                )
            )
    return answered


def _check_means(weights: Mapping[int, Array], means: Mapping[int, Array], manifest: Manifest, provider: str) -> None:
    """Raise GoldenMismatch if a mean over heads, (1, L, S), is not that of the weights, (H, L, S)."""
    for layer, mean in means.items():
        site = manifest.sites[layer]
        if site.mean_output is None:
            continue
        error = error_of(weights[layer].mean(axis=0, keepdims=True, dtype=np.float64), mean)
        if not error <= _MEAN_TOLERANCE:
            raise GoldenMismatch(f"mean over heads of {site.name}", error, _MEAN_TOLERANCE, provider)


def sample_of(array: Array, count: int) -> Array:
    """Return at most `count` numbers of an array, evenly spread over its flat order, (N,)."""
    flat = array.reshape(-1)
    # Widths of models are even. An odd step does not divide them, so that every column is sampled.
    step = math.ceil(flat.size / count) | 1 if flat.size > count else 1
    return flat[::step]


def lengths_of(inputs: Mapping[str, Array], manifest: Manifest) -> dict[str, int]:
    """Return the length of each axis symbol that is not derived, from the shapes of one sequence's inputs."""
    given = {
        symbol: length
        for spec in manifest.inputs
        for symbol, length in zip(spec.shape, inputs[spec.name].shape, strict=True)
        if isinstance(symbol, str)
    }
    derived = {axis.symbol for axis in manifest.axes if axis.derived is not None}
    return {**manifest.fixed_lengths, **{symbol: given[symbol] for symbol in given if symbol not in derived}}


def error_of(before: Array, now: Array) -> float:
    """Return the greatest difference divided by the greatest finite number of `before`.

    Infinity if the shapes differ, or if one of the two has an infinity or a NaN where the other has none.
    """
    if before.shape != now.shape:
        return float("inf")
    wide, other = before.astype(np.float64), now.astype(np.float64)
    same = (wide == other) | (np.isnan(wide) & np.isnan(other))
    scale = max(float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0)), _MIN_SCALE)
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(wide - other))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0)) / scale


def write_golden(
    path: Path, sequences: Sequence[GoldenSequence], manifest: Manifest, continued: Sequence[GoldenSequence] = ()
) -> None:
    """Write sequences to a file. The same sequences always give the same bytes.

    Args:
        path: the file.
        sequences: those of the prompt graph.
        manifest: of the model.
        continued: those of the continuing graph, each with a past.
    """
    arrays = _named(sequences, manifest, "")
    if manifest.continuing is not None:
        arrays |= _named(continued, manifest.continuing, _PAST)
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_golden(bundle: Bundle) -> tuple[GoldenSequence, ...]:
    """Return the golden sequences of a bundle's graph, whose files were verified; empty if it has none.

    Raises:
        BundleInvalid: the file is missing, cannot be read, or contradicts the manifest.
    """
    manifest = bundle.manifest
    if manifest.golden is None:
        return ()

    def fault(why: str) -> BundleInvalid:
        return BundleInvalid(manifest.name, manifest.version, f"{GOLDEN_FILE}: {why}")

    if GOLDEN_FILE not in manifest.files:
        raise fault("is not listed in the manifest, which has golden answers")
    try:
        arrays = _arrays(bundle.file(GOLDEN_FILE))
        prefix = "" if bundle.graph == MODEL_FILE else _PAST
        return tuple(_sequence(arrays, manifest, row, prefix) for row in range(manifest.golden.sequences))
    except KeyError as missing:
        raise fault(f"has no {missing.args[0]}") from None
    except _UNREADABLE as why:
        raise fault(f"cannot be read: {why}") from None


def _arrays(path: Path) -> dict[str, Array]:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_UNPACKED_BYTES:
        raise ValueError(f"{unpacked} bytes exceed {MAX_UNPACKED_BYTES}")
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError("it has a member that is no array")
    return arrays


def _named(sequences: Sequence[GoldenSequence], manifest: Manifest, prefix: str) -> dict[str, Array]:
    """The arrays of one graph's sequences by their names in the file."""
    arrays: dict[str, Array] = {}
    for row, sequence in enumerate(sequences):
        for at, spec in enumerate(manifest.inputs):
            arrays[f"{prefix}input.{row}.{at}"] = sequence.inputs[spec.name]
        for at, output in enumerate(manifest.outputs):
            if output.name in sequence.outputs:
                arrays[f"{prefix}output.{row}.{at}"] = sequence.outputs[output.name]
        for layer, weights in sequence.weights.items():
            arrays[f"{prefix}weights.{row}.{layer}"] = weights
    return arrays


def _sequence(arrays: Mapping[str, Array], manifest: Manifest, row: int, prefix: str) -> GoldenSequence:
    inputs: dict[str, Array] = {}
    for at, spec in enumerate(manifest.inputs):
        array = arrays[f"{prefix}input.{row}.{at}"]
        if array.dtype != NUMPY_DTYPES[spec.dtype] or array.ndim != len(spec.shape):
            raise ValueError(f"input {spec.name} is {array.dtype} of {array.ndim} axes")
        inputs[spec.name] = array
    floating = [
        (at, spec.name)
        for at, spec in enumerate(manifest.outputs)
        if np.issubdtype(NUMPY_DTYPES[spec.dtype], np.floating)
    ]
    return GoldenSequence(
        inputs=inputs,
        outputs={name: arrays[f"{prefix}output.{row}.{at}"] for at, name in floating},
        weights={
            site.layer: arrays[f"{prefix}weights.{row}.{site.layer}"] for site in manifest.sites if site.available
        },
    )
