"""Measures of error and their tolerances: differences of arrays, sums of rows, and weights @ value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnserve_server.conversion.base.errors import CheckFailed
from attnserve_server.conversion.base.sites import Linear, Operand, Recurrent, Scores
from attnserve_server.domain.values import Array
from attnserve_server.model.manifest import CheckReport

CHECK_LENGTHS = (3, 21, 9, 34)
"""Mixed lengths, so that three of the four sequences are padded."""


@dataclass(frozen=True, slots=True)
class Tolerances:
    """The greatest absolute differences that rounding explains.

    float32 sums in another order differ by 1e-6; the rest is headroom.
    """

    output: float
    weight: float
    row_sum: float = 1e-5

    @property
    def neighbours(self) -> float:
        """The greatest change by padding and batch neighbours."""
        return max(self.output, self.weight)

    @classmethod
    def of(cls, precision: str) -> Tolerances:
        """Return the tolerances of a precision: those of "fp32", and coarser ones for any other.

        float16 keeps 11 bits, and int8 kernels round as coarsely.

        A graph's own weights in float16 are each rounded by up to one part in 2048, and so are their sums.
        """
        return cls(1e-4, 1e-5) if precision == "fp32" else cls(2e-2, 1e-2, row_sum=1e-3)


def judge(report: CheckReport, row_sum_tolerance: float) -> None:
    """Raise CheckFailed for the first error of a report that exceeds its tolerance."""
    measured = (
        ("outputs", report.output_max_abs_error, report.output_tolerance),
        ("attention weights", report.weight_max_abs_error, report.weight_tolerance),
        ("sums of attention rows", report.row_sum_max_abs_error, row_sum_tolerance),
    )
    for what, error, tolerance in measured:
        if not error <= tolerance:
            raise CheckFailed(
                f"check failed: {what} differ from {report.against} by {error:.3g}, more than {tolerance:g}; "
                "no bundle was written"
            )


def check_report(**measured: Any) -> CheckReport:
    """Return the report of a check. Raise CheckFailed if a difference is not finite."""
    if any(isinstance(value, float) and not math.isfinite(value) for value in measured.values()):
        raise CheckFailed(
            "check failed: the answers' shapes differ, or only one of the two holds a NaN or an infinity; "
            "no bundle was written"
        )
    return CheckReport(**measured)


def max_abs(one: Array, other: Array) -> float:
    """Return the greatest absolute difference of two arrays.

    Equal infinities differ by 0. The result is infinity where shapes differ, or only one array has an infinity or NaN.
    """
    if one.shape != other.shape:
        return float("inf")
    wide, beside = one.astype(np.float64), other.astype(np.float64)
    same = (wide == beside) | (np.isnan(wide) & np.isnan(beside))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(wide - beside))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))


def row_sum_error(weights: Array) -> float:
    """Return the greatest difference of a row's sum from 1; rows of zeros (fully masked) have no error."""
    sums = weights.astype(np.float64).sum(axis=-1)
    return float(np.abs(np.where(weights.any(axis=-1), sums, 1.0) - 1.0).max(initial=0.0))


def product_error(attention: Scores | Linear | Recurrent, weights: Array, value: Array, output: Array) -> float:
    """Return the greatest difference of weights @ value from the operator's own output, without fully masked rows.

    The difference is relative to the greatest value where that exceeds 1, because rounding grows with it.

    Args:
        attention: the layouts of value and output.
        weights: (B, H, L, S).
        value: in the graph's layout.
        output: in the graph's layout.

    Raises:
        ValueError: the shapes of weights, value and output do not fit.
    """
    values = _heads_first(value, attention.value)
    own = _heads_first(output, attention.output)
    values = np.repeat(values, attention.output.heads // attention.value.heads, axis=1)
    product = weights.astype(np.float64) @ values
    kept = weights.any(axis=-1, keepdims=True)
    return float(np.abs(np.where(kept, product - own, 0.0)).max(initial=0.0)) / max(1.0, float(np.abs(values).max()))


def _heads_first(array: Array, operand: Operand) -> Array:
    """Return float64 (B, H, T, D)."""
    wide = array.astype(np.float64)
    if operand.order:
        wide = wide.transpose(operand.order)
        return wide if wide.ndim == 4 else wide[:, None]
    if not operand.packed:
        return wide
    batch, length, width = wide.shape
    return wide.reshape(batch, length, operand.heads, width // operand.heads).transpose(0, 2, 1, 3)
