"""Repeating one sequence of a batch alone: which of its values are compared, and by how much they may differ.

The values are compared as they left the runtime, cropped to the sequence and before attention is reduced. Reductions
hide what this check looks for: a mean averages a difference away, uint8 rounds it away, and near-equal weights swap
places in top-k links although nothing is wrong. Before them, a site has the one unit that `model.equality` knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnserve_server.domain.values import Array
from attnserve_server.model.equality import WEIGHTS_PREFIX, Equality
from attnserve_server.model.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Difference:
    """The greatest difference between a served answer and the sequence alone."""

    name: str
    """The output, or `attention.` and the site's name; empty where there was nothing to compare."""
    error: float
    """In parts of what counts as equal: above 1 the answers differ. Infinity for unequal shapes or a lone NaN."""


def equality_of(manifest: Manifest) -> Equality:
    """How far two answers of a model may differ: by its precision, and by the noise that conversion measured."""
    return Equality(manifest.precision, {} if manifest.certificate is None else manifest.certificate.noise)


def values_of(outputs: Mapping[str, Array], weights: Mapping[int, Array], manifest: Manifest) -> dict[str, Array]:
    """Name one sequence's values as `model.equality` does.

    Args:
        outputs: cropped outputs by name.
        weights: cropped weights, (H, L, S) by layer.
        manifest: of the model.
    """
    named = {f"{WEIGHTS_PREFIX}{manifest.sites[layer].name}": values for layer, values in weights.items()}
    return {**outputs, **named}


def copied(values: Mapping[str, Array]) -> dict[str, Array]:
    """Copy values out of a run's arrays, so that they do not keep a whole batch in memory."""
    return {name: array.copy() for name, array in values.items()}


def greatest_difference(served: Mapping[str, Array], alone: Mapping[str, Array], equality: Equality) -> Difference:
    """Compare two answers of one sequence, value by value.

    Args:
        served: what its batch gave.
        alone: what it gives alone, by the same names: the reference.
        equality: how far the two may differ.
    """
    errors = ((equality.error(name, served[name], alone[name]), name) for name in served)
    error, name = max(errors, default=(0.0, ""))
    return Difference(name, error)
