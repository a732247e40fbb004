"""When two answers of one model count as equal.

Conversion, `check`, the shadow check, benches and tests share this rule. Answers are compared as they leave the
runtime: cropped to the sequence, and before attention is reduced. A reduction would hide a difference: a mean averages
it away, uint8 rounds it away, and top-k links of nearly equal weights may swap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import numpy as np

from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import Manifest

WEIGHTS_PREFIX: Final = "attention."
"""Start of the names of weights; the site's name follows."""
SCORES_PREFIX: Final = "attention_scores."
"""Start of the names of scores; the site's name follows."""
MEAN_PREFIX: Final = "attention_mean."
"""Start of the names of means over all heads; the site's name follows. They differ at most as the weights do."""
FLOORS: Final[Mapping[str, tuple[float, float]]] = {
    "fp32": (1e-4, 1e-5),
    "fp16": (2e-2, 1e-2),
    "bf16": (2e-2, 1e-2),
    "bf16-scores": (2e-2, 6e-2),
    "int8": (1 / 127, 1 / 127),
}
"""By precision, the minimum tolerance of outputs (relative to the greatest value) and of weights (absolute). Sums of
float32 in another order differ by 1e-6, the rest is headroom; float16 keeps 11 bits; int8: one symmetric quantization
step. `bf16-scores`: the provider rounds the scores of attention to 8 bits too."""


@dataclass(frozen=True, slots=True)
class Equality:
    """How far two answers of one model may differ and still count as equal.

    Args:
        precision: one of `FLOORS`.
        noise: by name, how far the model's answers differ between batch shapes, as the certificate measured it.
    """

    precision: str
    noise: Mapping[str, float] = field(default_factory=dict)

    def allowed(self, name: str, reference: Array) -> float:
        """Return the greatest difference that counts as equal, in the reference's own unit.

        Args:
            name: of an output, or of weights: `attention.` and the site's name; of a mean: `attention_mean.` and that.
            reference: the values of the sequence alone, of any shape.

        Raises:
            KeyError: the precision is none of `FLOORS`.
        """
        output, weight = FLOORS[self.precision]
        if name.startswith(MEAN_PREFIX):
            name = WEIGHTS_PREFIX + name.removeprefix(MEAN_PREFIX)
        noise = self.noise.get(name, 0.0)
        if name.startswith(WEIGHTS_PREFIX):
            return max(weight, noise)
        magnitudes = np.abs(reference.astype(np.float64))
        greatest = float(magnitudes[np.isfinite(magnitudes)].max(initial=0.0))
        return max(output, noise) * greatest

    def error(self, name: str, found: Array, reference: Array) -> float:
        """Return the greatest difference divided by the allowed one: above 1, the answers are not equal.

        Infinity if the shapes differ, or if one of the two has an infinity or a NaN where the other has none.
        """
        if found.shape != reference.shape:
            return float("inf")
        one, other = found.astype(np.float64), reference.astype(np.float64)
        same = (one == other) | (np.isnan(one) & np.isnan(other))
        with np.errstate(invalid="ignore"):
            difference = np.where(same, 0.0, np.abs(one - other))
        greatest = float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))
        return 0.0 if greatest == 0 else greatest / max(self.allowed(name, reference), np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True)
class Difference:
    """The greatest difference between a served answer and the same sequence alone."""

    name: str
    """The output, or `attention.` and the site's name; empty if there was nothing to compare."""
    error: float
    """The difference divided by the allowed one: above 1, the answers differ. Infinity as for `Equality.error`."""


def equality_of(manifest: Manifest) -> Equality:
    """Return the rule for a model, from its precision and the noise in its certificate."""
    return Equality(manifest.precision, {} if manifest.certificate is None else manifest.certificate.noise)


def values_of(
    outputs: Mapping[str, Array],
    weights: Mapping[int, Array],
    manifest: Manifest,
    *,
    means: Mapping[int, Array] = MappingProxyType({}),
    scores: bool = False,
) -> dict[str, Array]:
    """Return one sequence's values by the names that `Equality` uses.

    Args:
        outputs: cropped outputs by name.
        weights: cropped weights, or scores, by layer, (H, L, S).
        manifest: of the model.
        means: cropped means over heads by layer, (1, L, S).
        scores: whether `weights` are scores, which have no bound and are compared as outputs are.
    """
    prefix = SCORES_PREFIX if scores else WEIGHTS_PREFIX
    named = {f"{prefix}{manifest.sites[layer].name}": values for layer, values in weights.items()}
    joined = {f"{MEAN_PREFIX}{manifest.sites[layer].name}": values for layer, values in means.items()}
    return {**outputs, **named, **joined}


def copied(values: Mapping[str, Array]) -> dict[str, Array]:
    """Copy values out of a run's arrays, so that they do not keep a whole batch in memory."""
    return {name: array.copy() for name, array in values.items()}


def greatest_difference(served: Mapping[str, Array], alone: Mapping[str, Array], equality: Equality) -> Difference:
    """Compare two answers of one sequence, value by value.

    Args:
        served: values from its batch, by name.
        alone: values of the sequence alone, by the same names: the reference.
        equality: the tolerances.

    Raises:
        KeyError: `alone` lacks a name of `served`.
    """
    errors = ((equality.error(name, served[name], alone[name]), name) for name in served)
    error, name = max(errors, default=(0.0, ""))
    return Difference(name, error)
