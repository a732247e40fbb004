"""The tap of a site whose weights the graph has anyway: takes the rows asked for out of the graph's own.

weights of the graph, any layout -> Gather(items) -> Transpose -> Reshape (n, H, L, S) -> float32, NaN to 0
"""

from __future__ import annotations

import math

import onnx_ir as ir

from attnserve_server.build.sites import Factor, Probabilities
from attnserve_server.build.taps.nodes import TapNodes

_ORDER = {"batch": 0, "head": 1, "one": 2, "window": 3, "query": 4, "key": 5}


def weights_of_probabilities(tap: TapNodes, probabilities: Probabilities) -> ir.Value:
    """The graph's weights for the rows that ask, float32 (n, H, L, S).

    A fully masked row, of which softmax makes NaN where the mask is minus infinity, is 0.
    """
    rows, factors = asked_rows(tap, probabilities)
    if [factor.role for factor in factors] != ["batch", "head", "query", "key"]:
        heads = math.prod(factor.extent or 1 for factor in factors if factor.role == "head")
        last = len(factors)
        extents = [tap.shape(rows, 0, 1), tap.ints(heads), tap.shape(rows, last - 2, last)]
        rows = tap.reshape(rows, extents)
    return without_nan(tap, rows)


def asked_rows(tap: TapNodes, probabilities: Probabilities) -> tuple[ir.Value, list[Factor]]:
    """The graph's weights for the rows that ask, axes in the order of `_ORDER`, and the factors in that order.

    The first node gathers, so that all behind it is as small as what was asked for.
    """
    axes = probabilities.axes
    at = next(place for place, factors in enumerate(axes) if any(factor.role == "batch" for factor in factors))
    rows = tap.op("Gather", [probabilities.value, _batch_index(tap, probabilities.value, at, axes[at])], axis=at)
    found = [
        factor
        for place, factors in enumerate(axes)
        for factor in (_gathered_factors(factors) if place == at else factors)
    ]
    order = sorted(range(len(found)), key=lambda place: _ORDER[found[place].role])
    if order != list(range(len(found))):
        rows = tap.op("Transpose", [rows], perm=order)
    return rows, [found[place] for place in order]


def without_nan(tap: TapNodes, rows: ir.Value) -> ir.Value:
    """Weights as float32, and 0 for NaN."""
    weights = tap.float32(rows)
    return tap.op("Where", [tap.op("IsNaN", [weights]), tap.float(0.0), weights])


def _gathered_factors(factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
    """The factors of the batch's axis once its rows are gathered: the batch comes first, whatever it was before."""
    return tuple(sorted(factors, key=lambda factor: factor.role != "batch"))


def _batch_index(tap: TapNodes, value: ir.Value, axis: int, factors: tuple[Factor, ...]) -> ir.Value:
    """Where along the batch's axis the items are: (n,), or (n, H) where heads are folded into the batch."""
    if len(factors) == 1:
        return tap.items
    inner = next(factor.extent for factor in factors if factor.role != "batch")
    assert inner is not None
    column = tap.unsqueeze(tap.items, 1)
    if factors[0].role == "batch":
        return tap.op("Add", [tap.op("Mul", [column, tap.ints(inner)]), tap.ints(*range(inner))])
    batch = tap.op("Div", [tap.shape(value, axis, axis + 1), tap.ints(inner)])
    return tap.op("Add", [column, tap.op("Mul", [batch, tap.ints(*range(inner))])])
