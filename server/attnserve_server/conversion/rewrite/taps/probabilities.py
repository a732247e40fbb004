"""The tap of a site whose weights the graph has as a value: reads the selected rows.

weights of the graph, any layout -> Gather(items) -> Transpose -> Reshape (n, H, L, S) -> float32, NaN to 0

Weights that the graph has window by window are put into the queries' order:

weights of the graph -> Gather(items) -> Transpose -> Reshape (n, H, rows of all windows, W) -> rows (n, H, L, W)

An axis may have several factors folded into it. For an axis of (batch, 4 heads), the index of item b gathers the rows
4 b, 4 b + 1, 4 b + 2 and 4 b + 3, with an axis for the heads.

A site is a place in the graph that computes attention. A tap is the nodes that return its weights for the rows of the
batch that its input `items` selects. A site that its finder did not refuse raises nothing here.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from attnserve_server.conversion.base.sites import Factor, Layout, Probabilities, Windows
from attnserve_server.conversion.rewrite.taps.tap import Tap

_ORDER = {"batch": 0, "head": 1, "one": 2, "window": 3, "query": 4, "key": 5}


def weights_of_probabilities(tap: Tap, site: Probabilities, layout: Layout) -> ir.Value:
    """Return the graph's weights of the selected rows, float32 (n, H, L, S).

    A fully masked row is 0, also where softmax of minus infinities gives NaN.
    """
    rows, factors = _selected_rows(tap, site, layout)
    if [factor.role for factor in factors] != ["batch", "head", "query", "key"]:
        heads = math.prod(factor.size or 1 for factor in factors if factor.role == "head")
        last = len(factors)
        rows = tap.reshape(rows, [tap.shape(rows, 0, 1), tap.ints(heads), tap.shape(rows, last - 2, last)])
    return _without_nan(tap, rows)


def weights_of_windows(tap: Tap, site: Probabilities, layout: Layout, windows: Windows, anchor: ir.Value) -> ir.Value:
    """Return the graph's weights of the selected rows, float32 (n, H, L, W); NaN is 0.

    Args:
        tap: under construction.
        site: has the graph's own weights.
        layout: the factors of their axes.
        windows: which row belongs to which query.
        anchor: (B, L, C); rows beyond L are padding.
    """
    rows, factors = _selected_rows(tap, site, layout)
    heads = math.prod(factor.size or 1 for factor in factors if factor.role == "head")
    first = next(place for place, factor in enumerate(factors) if factor.role in {"window", "query"})
    last = len(factors) - 1
    count = tap.shape(rows, first, first + 1)
    for place in range(first + 1, last):
        count = tap.op("Mul", [count, tap.shape(rows, place, place + 1)])
    rows = tap.reshape(rows, [tap.shape(rows, 0, 1), tap.ints(heads), count, tap.shape(rows, last, last + 1)])
    if windows.order:
        rows = tap.op("Gather", [rows, tap.ints(*windows.order)], axis=2)
    else:
        rows = tap.op("Slice", [rows, tap.ints(0), tap.shape(anchor, 1, 2), tap.ints(2)])
    return _without_nan(tap, rows)


def _selected_rows(tap: Tap, site: Probabilities, layout: Layout) -> tuple[ir.Value, list[Factor]]:
    """Return the graph's weights of the selected rows, axes in the order of `_ORDER`, and the factors in that order.

    The first node gathers, so that all nodes behind it are as small as the selection.
    """
    axes, weights = layout.axes, site.weights
    at = next(place for place, factors in enumerate(axes) if any(factor.role == "batch" for factor in factors))
    rows = tap.op("Gather", [weights, _batch_index(tap, weights, at, axes[at])], axis=at)
    rows = tap.dequantized(rows, site.of_weights)
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


def _apart(tap: Tap, rows: ir.Value, axes: tuple[tuple[Factor, ...], ...], at: int) -> list[ir.Value]:
    """Return the sizes of all factors after the rows are gathered; those of the batch's axis then have an axis each."""
    sizes: list[ir.Value] = []
    start = 0
    for place, factors in enumerate(axes):
        end = start + (len(factors) if place == at else 1)
        if place == at or len(factors) == 1:
            sizes.append(tap.shape(rows, start, end))
        else:
            known = tap.ints(math.prod(factor.size or 1 for factor in factors))
            left = tap.op("Div", [tap.shape(rows, start, end), known])
            sizes += [left if factor.size is None else tap.ints(factor.size) for factor in factors]
        start = end
    return sizes


def _without_nan(tap: Tap, rows: ir.Value) -> ir.Value:
    """Return weights as float32, with 0 for NaN."""
    weights = tap.float32(rows)
    return tap.op("Where", [tap.op("IsNaN", [weights]), tap.number(0.0), weights])


def _gathered_factors(factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
    """Return the factors of the batch's axis after its rows are gathered: the batch first."""
    return tuple(sorted(factors, key=lambda factor: factor.role != "batch"))


def _batch_index(tap: Tap, value: ir.Value, axis: int, factors: tuple[Factor, ...]) -> ir.Value:
    """Return the places of the items along the batch's axis: (n,), with one more axis for each factor folded into it.

    Heads, windows or both may be folded, before the batch or behind it. The size of one of them may be dynamic.
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


def _count(tap: Tap, value: ir.Value, axis: int, some: tuple[Factor, ...], factors: tuple[Factor, ...]) -> ir.Value:
    """Return the product of the sizes of some factors of an axis, int64 of rank 1."""
    if not some:
        return tap.ints(1)
    count = tap.ints(math.prod(factor.size or 1 for factor in some))
    for factor in some:
        if factor.size is None:
            count = tap.op("Mul", [count, _size(tap, value, axis, factor, factors)])
    return count


def _numbers(tap: Tap, value: ir.Value, axis: int, factor: Factor, factors: tuple[Factor, ...]) -> ir.Value:
    """Return 0, 1, ... up to the size of a factor, int64 of rank 1."""
    if factor.size is not None:
        return tap.ints(*range(factor.size))
    end = tap.op("Reshape", [_size(tap, value, axis, factor, factors), tap.ints()])
    return tap.op("Range", [tap.scalar(0), end, tap.scalar(1)])


def _size(tap: Tap, value: ir.Value, axis: int, factor: Factor, factors: tuple[Factor, ...]) -> ir.Value:
    """Return the size of a dynamic factor, int64 of rank 1: the batch's, or the axis divided by all other factors."""
    dynamic = [each for each in factors if each.size is None]
    if factor.role == "batch" and len(dynamic) > 1:
        return tap.batch()
    known = tap.ints(math.prod(each.size or 1 for each in factors))
    left = tap.op("Div", [tap.shape(value, axis, axis + 1), known])
    return tap.op("Div", [left, tap.batch()]) if len(dynamic) > 1 else left
