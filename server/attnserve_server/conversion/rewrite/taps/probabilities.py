"""The tap of a site whose weights the graph has anyway: takes the rows asked for out of the graph's own.

weights of the graph, any layout -> Gather(items) -> Transpose -> Reshape (n, H, L, S) -> float32, NaN to 0
"""

from __future__ import annotations

import math

import onnx_ir as ir

from attnserve_server.conversion.base.sites import Factor, Layout
from attnserve_server.conversion.rewrite.taps.nodes import TapNodes

_ORDER = {"batch": 0, "head": 1, "one": 2, "window": 3, "query": 4, "key": 5}


def weights_of_probabilities(tap: TapNodes, weights: ir.Value, layout: Layout) -> ir.Value:
    """The graph's weights for the rows that ask, float32 (n, H, L, S).

    A fully masked row, of which softmax makes NaN where the mask is minus infinity, is 0.
    """
    rows, factors = asked_rows(tap, weights, layout)
    if [factor.role for factor in factors] != ["batch", "head", "query", "key"]:
        heads = math.prod(factor.size or 1 for factor in factors if factor.role == "head")
        last = len(factors)
        extents = [tap.shape(rows, 0, 1), tap.ints(heads), tap.shape(rows, last - 2, last)]
        rows = tap.reshape(rows, extents)
    return without_nan(tap, rows)


def asked_rows(tap: TapNodes, weights: ir.Value, layout: Layout) -> tuple[ir.Value, list[Factor]]:
    """The graph's weights for the rows that ask, axes in the order of `_ORDER`, and the factors in that order.

    The first node gathers, so that all behind it is as small as what was asked for.
    """
    axes = layout.axes
    at = next(place for place, factors in enumerate(axes) if any(factor.role == "batch" for factor in factors))
    rows = tap.op("Gather", [weights, _batch_index(tap, weights, at, axes[at])], axis=at)
    found = [
        factor
        for place, factors in enumerate(axes)
        for factor in (_gathered_factors(factors) if place == at else factors)
    ]
    if any(len(factors) > 1 for place, factors in enumerate(axes) if place != at):
        rows = tap.reshape(rows, _apart(tap, rows, axes, at))
    order = sorted(range(len(found)), key=lambda place: _ORDER[found[place].role])
    if order != list(range(len(found))):
        rows = tap.op("Transpose", [rows], perm=order)
    return rows, [found[place] for place in order]


def _apart(tap: TapNodes, rows: ir.Value, axes: tuple[tuple[Factor, ...], ...], at: int) -> list[ir.Value]:
    """The extents of all factors, once the rows are gathered: those on the batch's axis have axes of their own then."""
    extents: list[ir.Value] = []
    start = 0
    for place, factors in enumerate(axes):
        end = start + (len(factors) if place == at else 1)
        if place == at or len(factors) == 1:
            extents.append(tap.shape(rows, start, end))
        else:
            known = tap.ints(math.prod(factor.size or 1 for factor in factors))
            left = tap.op("Div", [tap.shape(rows, start, end), known])
            extents += [left if factor.size is None else tap.ints(factor.size) for factor in factors]
        start = end
    return extents


def without_nan(tap: TapNodes, rows: ir.Value) -> ir.Value:
    """Weights as float32, and 0 for NaN."""
    weights = tap.float32(rows)
    return tap.op("Where", [tap.op("IsNaN", [weights]), tap.float(0.0), weights])


def _gathered_factors(factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
    """The factors of the batch's axis once its rows are gathered: the batch comes first, whatever it was before."""
    return tuple(sorted(factors, key=lambda factor: factor.role != "batch"))


def _batch_index(tap: TapNodes, value: ir.Value, axis: int, factors: tuple[Factor, ...]) -> ir.Value:
    """Where along the batch's axis the items are: (n,), or with an axis more for each factor folded into the batch.

    Heads, windows or both may be folded, before the batch or behind it. One of them may be as many as the inputs make.
    """
    if len(factors) == 1:
        return tap.items
    at = [factor.role for factor in factors].index("batch")
    inner = [factor for factor in factors if factor.role != "batch"]
    faster = _count(tap, value, axis, factors[at + 1 :], factors)
    index = tap.unsqueeze(tap.op("Mul", [tap.items, faster]), *range(1, len(inner) + 1))
    for place, factor in enumerate(inner, start=1):
        behind = factors[factors.index(factor) + 1 :]
        numbers = tap.op(
            "Mul", [_numbers(tap, value, axis, factor, factors), _count(tap, value, axis, behind, factors)]
        )
        rest = [number for number in range(len(inner) + 1) if number != place]
        index = tap.op("Add", [index, tap.unsqueeze(numbers, *rest)])
    return index


def _count(
    tap: TapNodes, value: ir.Value, axis: int, some: tuple[Factor, ...], factors: tuple[Factor, ...]
) -> ir.Value:
    """How many entries some factors of an axis make together, int64 of rank 1."""
    if not some:
        return tap.ints(1)
    count = tap.ints(math.prod(factor.size or 1 for factor in some))
    for factor in some:
        if factor.size is None:
            count = tap.op("Mul", [count, _extent(tap, value, axis, factor, factors)])
    return count


def _numbers(tap: TapNodes, value: ir.Value, axis: int, factor: Factor, factors: tuple[Factor, ...]) -> ir.Value:
    """0, 1, ... of a factor, int64 of rank 1."""
    if factor.size is not None:
        return tap.ints(*range(factor.size))
    end = tap.op("Reshape", [_extent(tap, value, axis, factor, factors), tap.ints()])
    return tap.op("Range", [tap.scalar(0), end, tap.scalar(1)])


def _extent(tap: TapNodes, value: ir.Value, axis: int, factor: Factor, factors: tuple[Factor, ...]) -> ir.Value:
    """The extent of a factor that has no fixed one, int64 of rank 1: the batch's, or what all others leave."""
    open_ = [each for each in factors if each.size is None]
    if factor.role == "batch" and len(open_) > 1:
        return tap.batch()
    known = tap.ints(math.prod(each.size or 1 for each in factors))
    left = tap.op("Div", [tap.shape(value, axis, axis + 1), known])
    return tap.op("Div", [left, tap.batch()]) if len(open_) > 1 else left
