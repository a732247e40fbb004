"""Golden answers as a file of a bundle: a few sequences, and samples of what the model answered when it was checked.

Arrays are named by position, as in `output.1.0` for the second sequence's first output: names of a graph may be any.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import NUMPY_DTYPES, Manifest
from attnserve_server.model.repository import Bundle, BundleInvalid

GOLDEN_FILE = "golden.npz"
MAX_UNPACKED_BYTES = 64 * 2**20
"""Inputs may be images, which repeat themselves and so take little room in the file."""


@dataclass(frozen=True, slots=True)
class GoldenSequence:
    """One sequence, without the batch axis, and samples of its answers.

    Args:
        inputs: by name, each in the model's dtype.
        outputs: samples by name, (N,), of outputs that are floating.
        weights: samples by layer, (N,), of each available site's weights.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    weights: Mapping[int, Array]


def sample_of(array: Array, count: int) -> Array:
    """At most `count` numbers of an array, evenly spread over its flat order, (N,)."""
    flat = array.reshape(-1)
    # An odd step is no divisor of the even widths that models have, so no column is left out.
    step = math.ceil(flat.size / count) | 1 if flat.size > count else 1
    return flat[::step]


def write_golden(path: Path, sequences: Sequence[GoldenSequence], manifest: Manifest) -> None:
    """Write sequences into a file; the same ones always give the same bytes."""
    arrays: dict[str, Array] = {}
    for row, sequence in enumerate(sequences):
        for at, spec in enumerate(manifest.inputs):
            arrays[f"input.{row}.{at}"] = sequence.inputs[spec.name]
        for at, output in enumerate(manifest.outputs):
            if output.name in sequence.outputs:
                arrays[f"output.{row}.{at}"] = sequence.outputs[output.name]
        for layer, weights in sequence.weights.items():
            arrays[f"weights.{row}.{layer}"] = weights
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_golden(bundle: Bundle) -> tuple[GoldenSequence, ...]:
    """The golden sequences of a bundle whose files were verified; none for a bundle that was made without.

    Raises:
        BundleInvalid: the file is missing, is no such file, or contradicts the manifest.
    """
    manifest = bundle.manifest
    if manifest.golden is None:
        return ()

    def fault(why: str) -> BundleInvalid:
        return BundleInvalid(manifest.name, manifest.version, f"{GOLDEN_FILE}: {why}")

    if GOLDEN_FILE not in manifest.files:
        raise fault("is not listed in the manifest, which has golden answers")
    try:
        arrays = _arrays(bundle.path / GOLDEN_FILE)
        return tuple(_sequence(arrays, manifest, row) for row in range(manifest.golden.sequences))
    except KeyError as missing:
        raise fault(f"has no {missing.args[0]}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as why:
        raise fault(f"cannot be read: {why}") from None


def _arrays(path: Path) -> dict[str, Array]:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MAX_UNPACKED_BYTES:
        raise ValueError(f"{unpacked} bytes exceed {MAX_UNPACKED_BYTES}")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _sequence(arrays: Mapping[str, Array], manifest: Manifest, row: int) -> GoldenSequence:
    inputs: dict[str, Array] = {}
    for at, spec in enumerate(manifest.inputs):
        array = arrays[f"input.{row}.{at}"]
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
        outputs={name: arrays[f"output.{row}.{at}"] for at, name in floating},
        weights={site.layer: arrays[f"weights.{row}.{site.layer}"] for site in manifest.sites if site.available},
    )
