"""The types that describe how a graph quantizes: scales and zero points of a value, and the numbers these represent.

They name values of a graph. This module reads and changes no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Quantized:
    """Scales and zero points of a quantized projection: a number is (integer - zero) * scale.

    Scale and zero point of the weights are one number, or one for each column. A zero point that is None is 0.
    """

    input_scale: ir.Value
    weight_scale: ir.Value
    input_zero: ir.Value | None = None
    weight_zero: ir.Value | None = None


@dataclass(frozen=True, slots=True)
class Quantizer:
    """The quantizer of a value that the graph has in integers: a number is (integer - zero) * scale.

    Scale and zero point are one number each; a zero point that is None is 0. `domain` is that of the graph's own
    DequantizeLinear, if it has one.
    """

    scale: ir.Value
    zero: ir.Value | None = None
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Levels:
    """The numbers that a quantizer rounds to: those from `low` to `high` that are one `step` apart."""

    step: float
    low: float
    high: float
