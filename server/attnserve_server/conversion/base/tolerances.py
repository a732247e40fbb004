"""Checks before a bundle is written: a tapped graph against its source, and weights against what the graph does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnserve_server.conversion.base.errors import CheckFailed
from attnserve_server.conversion.base.sites import Linear, Operand, Scores
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import CheckReport

CHECK_LENGTHS = (3, 21, 9, 34)
"""Mixed lengths, so that three of the four sequences are padded."""


@dataclass(frozen=True, slots=True)
class Tolerances:
    """What differences are laid to rounding. float32 sums in another order differ by 1e-6; the rest is headroom."""

    output: float
    weight: float
    row_sum: float = 1e-5

    @property
    def company(self) -> float:
        """What padding and batch mates may change."""
        return max(self.output, self.weight)

    @classmethod
    def of(cls, precision: str) -> Tolerances:
        """By the precision of the model: float16 keeps 11 bits, and int8 kernels round as coarsely.

        Weights that a graph itself has in float16 are each rounded by up to one part in 2048, and so are their sums.
        """
        return cls(1e-4, 1e-5) if precision == "fp32" else cls(2e-2, 1e-2, row_sum=1e-3)


def judge(report: CheckReport, row_sum_tolerance: float) -> None:
    """Raise CheckFailed, with the first thing found wrong, unless everything is within its tolerance."""
    seen = (
        ("outputs", report.output_max_abs_error, report.output_tolerance),
        ("attention weights", report.weight_max_abs_error, report.weight_tolerance),
        ("sums of attention rows", report.row_sum_max_abs_error, row_sum_tolerance),
    )
    for what, error, tolerance in seen:
        if not error <= tolerance:
            raise CheckFailed(
                f"check failed: {what} differ from {report.against} by {error:.3g}, more than {tolerance:g}; "
                "no bundle was written"
            )


def reported(**seen: Any) -> CheckReport:
    """The report of what a check saw. Raises CheckFailed where a difference is no finite number."""
    if any(isinstance(value, float) and not math.isfinite(value) for value in seen.values()):
        raise CheckFailed("check failed: NaN or an infinity stands in one of two answers alone; no bundle was written")
    return CheckReport(**seen)


def row_sum_error(weights: Array) -> float:
    """How far any row's sum is from 1; rows of zeros (fully masked ones) are right as they are."""
    sums = weights.astype(np.float64).sum(axis=-1)
    return float(np.abs(np.where(weights.any(axis=-1), sums, 1.0) - 1.0).max(initial=0.0))


def product_error(attention: Scores | Linear, weights: Array, value: Array, output: Array) -> float:
    """The greatest difference of weights @ value from the operator's own output, over rows that are not fully masked.

    In parts of the greatest value, where that is beyond 1: rounding grows with it, and errors of weights do too.

    Args:
        attention: has the layout of both.
        weights: (B, H, L, S).
        value: as the graph has it.
        output: as the graph has it.
    """
    values = _heads_first(value, attention.value)
    own = _heads_first(output, attention.output)
    values = np.repeat(values, attention.output.heads // attention.value.heads, axis=1)
    product = weights.astype(np.float64) @ values
    seen = weights.any(axis=-1, keepdims=True)
    return float(np.abs(np.where(seen, product - own, 0.0)).max(initial=0.0)) / max(1.0, float(np.abs(values).max()))


def _heads_first(array: Array, operand: Operand) -> Array:
    """Float64 (B, H, T, D)."""
    wide = array.astype(np.float64)
    if operand.order:
        wide = wide.transpose(operand.order)
        return wide if wide.ndim == 4 else wide[:, None]
    if not operand.packed:
        return wide
    batch, length, width = wide.shape
    return wide.reshape(batch, length, operand.heads, width // operand.heads).transpose(0, 2, 1, 3)
