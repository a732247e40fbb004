"""When two answers are equal: the one rule that conversion, `check`, the shadow check, benches and tests share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]

WEIGHTS_PREFIX: Final = "attention."
FLOORS: Final[Mapping[str, tuple[float, float]]] = {
    "fp32": (1e-4, 1e-5),
    "fp16": (2e-2, 1e-2),
    "bf16": (2e-2, 1e-2),
    "int8": (1 / 127, 1 / 127),
}
"""Of outputs in parts of the greatest value, and of weights: float32 sums in another order differ by 1e-6, the rest is
headroom; float16 keeps 11 bits; of int8 one step of a symmetric quantizer."""


@dataclass(frozen=True, slots=True)
class Equality:
    """How far two answers of one model may differ and still count as equal.

    Args:
        precision: `fp32`, `fp16`, `bf16` or `int8`.
        noise: what the model's own answers differ by among batch shapes, as the certificate has it.
    """

    precision: str
    noise: Mapping[str, float] = field(default_factory=dict)

    def allowed(self, name: str, reference: Array) -> float:
        """The greatest difference that counts as equal, in the reference's own unit.

        Args:
            name: of an output, or of a tap, which begins with `attention.`.
            reference: the answer of the sequence alone, of any shape.
        """
        output, weight = FLOORS[self.precision]
        noise = self.noise.get(name, 0.0)
        if name.startswith(WEIGHTS_PREFIX):
            return max(weight, noise)
        finite = np.abs(reference.astype(np.float64))
        greatest = float(finite[np.isfinite(finite)].max(initial=0.0))
        return max(output, noise) * greatest

    def error(self, name: str, found: Array, reference: Array) -> float:
        """The greatest difference in parts of what is allowed: above 1 the answers are not equal.

        Infinity where shapes differ, or where an infinity or a NaN stands in one of the two alone.
        """
        if found.shape != reference.shape:
            return float("inf")
        one, other = found.astype(np.float64), reference.astype(np.float64)
        same = (one == other) | (np.isnan(one) & np.isnan(other))
        with np.errstate(invalid="ignore"):
            difference = np.where(same, 0.0, np.abs(one - other))
        greatest = float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))
        return 0.0 if greatest == 0 else greatest / max(self.allowed(name, reference), np.finfo(np.float64).tiny)
