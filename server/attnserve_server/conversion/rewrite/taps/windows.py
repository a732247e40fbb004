"""The tap of a site whose weights the graph has window by window: takes the rows asked for, in the queries' order.

weights of the graph -> Gather(items) -> Transpose -> Reshape (n, H, rows of all windows, W) -> rows (n, H, L, W)
"""

from __future__ import annotations

import math

import onnx_ir as ir

from attnserve_server.conversion.base.sites import Layout, Windows
from attnserve_server.conversion.rewrite.taps.nodes import TapNodes
from attnserve_server.conversion.rewrite.taps.probabilities import asked_rows, without_nan


def weights_of_windows(
    tap: TapNodes, weights: ir.Value, layout: Layout, windows: Windows, anchor: ir.Value
) -> ir.Value:
    """The graph's weights for the rows that ask, float32 (n, H, L, W); NaN is 0.

    Args:
        tap: under construction.
        weights: the graph's own.
        layout: the factors of their axes.
        windows: which row is which query's.
        anchor: (B, L, C), whose second axis says how many of the rows are queries' and not padding's.
    """
    rows, factors = asked_rows(tap, weights, layout)
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
    return without_nan(tap, rows)
