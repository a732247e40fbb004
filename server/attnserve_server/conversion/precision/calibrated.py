"""Eight-bit products behind a normalisation whose range was seen: one step for all rows, and none of the work per row.

x = LayerNormalization(h; gamma, beta)     ->     LayerNormalization(h; gamma / s, beta / s), rounded to uint8
y = x @ W + bias                           ->     MatMulIntegerToFloat(rounded, diag(s) W, bias)

The factors s divide what is hard to round between a channel's numbers and its weights. Source: Xiao et al. 2023,
SmoothQuant, eq. 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from attnserve_server.domain.values import Array

HEADROOM = 1.25
"""How far beyond the greatest number that was seen there still are steps; what goes further is cut off."""
SHARE = 0.65
"""How much of what is hard to round goes into the weights; MiniLM keeps the most at this, of 0.5 to 1."""
_LEAST = 1e-5


@dataclass(frozen=True, slots=True)
class Normalisation:
    """A LayerNormalization with constant gain and offset, (K,) each."""

    node: ir.Node
    gain: npt.NDArray[np.float32]
    offset: npt.NDArray[np.float32]


def normalisation_of(value: ir.Value) -> Normalisation | None:
    """The normalisation that gives a value; None where it is not one, or not one over the last axis alone."""
    node = value.producer()
    if node is None or node.op_type != "LayerNormalization" or node.outputs[0] is not value:
        return None
    constants = [operand.const_value for operand in node.inputs[1:] if operand is not None]
    if not constants or any(tensor is None or len(tensor.shape) != 1 for tensor in constants):
        return None
    axis = node.attributes.get_int("axis", -1)
    if axis != -1 and (value.shape is None or axis != len(value.shape) - 1):
        return None
    gain, *offset = (tensor.numpy() for tensor in constants if tensor is not None)
    return Normalisation(node, gain, offset[0] if offset else np.zeros_like(gain))


def factors_of(seen: Array, weights: Sequence[Array]) -> npt.NDArray[np.float32]:
    """What each channel is divided by, float32 (K,), so that all of it lies within 127 steps of 1.

    Args:
        seen: the greatest |x| of each channel, (K,).
        weights: of all products of x, (K, N) each.
    """
    reach = np.maximum(HEADROOM * seen.astype(np.float64), _LEAST)
    heaviest = np.maximum(np.maximum.reduce([np.abs(own).max(axis=1) for own in weights]), _LEAST)
    shared = reach**SHARE / heaviest ** (1 - SHARE)
    factors: npt.NDArray[np.float32] = (shared * (reach / shared).max() / 127).astype(np.float32)
    return factors


def normalised_values(graph: ir.Graph) -> list[ir.Value]:
    """Values that are normalised and go into a product with constant weights: those whose range is worth seeing."""
    found: dict[ir.Value, None] = {}
    for node in graph:
        if node.op_type == "MatMul" and node.inputs[0] is not None and node.inputs[1] is not None:
            source, weights = node.inputs[0], node.inputs[1].const_value
            if weights is not None and len(weights.shape) == 2 and normalisation_of(source) is not None:
                found[source] = None
    return list(found)


def bias_behind(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The addition of a constant row behind a product, if nothing else takes the product, and that row."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0].node.op_type != "Add":
        return None
    addition = uses[0].node
    other = addition.inputs[1 - uses[0].idx]
    if other is None or other.const_value is None or len(other.const_value.shape) != 1:
        return None
    weights = node.inputs[1]
    assert weights is not None
    assert weights.const_value is not None
    return (addition, other) if other.const_value.shape[0] == weights.const_value.shape[1] else None


Ranges = Mapping[str, Array]
"""The greatest |x| of each channel, (K,), by the name of the value."""
