"""Joining heads, layers and pieces of words. Every function returns a new array or a view, and writes to no argument.

All of it runs in float32, the dtype of the taps: sums are of at most a few hundred weights of at most 1, so results
stay within 1e-6 of the same formulas in float64 (tests/numerics/test_reductions.py holds them to it).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from attnserve_server.attention.units import Indices
from attnserve_server.domain.selection import HeadReduction
from attnserve_server.domain.values import Array

Weights = npt.NDArray[np.float32]

LONG_WORD = 8
"""Pieces past which a word is averaged by itself, and in float64."""


def take(array: Array, indices: Indices | None, axis: int) -> Array:
    """The entries of an axis, in the order of the indices, of an array of any shape; None: all.

    A view where they stand in one run.
    """
    if indices is None:
        return array
    count = len(indices)
    if count and indices[-1] - indices[0] == count - 1 and bool((np.diff(indices) == 1).all()):
        run = slice(int(indices[0]), int(indices[0]) + count)
        return array[(slice(None),) * axis + (run,)]
    return np.take(array, indices, axis=axis)


def join_heads(weights: Weights, heads: Indices, reduction: HeadReduction, rows: Indices | None) -> Weights:
    """Choose heads and rows of one site, and join the heads as asked.

    Rows are chosen first: the joins work element by element, so the rows that are left out cannot show in the others.

    Args:
        weights: (H, L, S).
        heads: which heads, in order.
        reduction: how to join them.
        rows: which of the L rows, in order; None: all.

    Returns:
        (heads, rows, S), or (1, rows, S) where joined. An array of its own or a view, never `weights` itself.
    """
    chosen = take(take(weights, rows, axis=1), heads, axis=0)
    if reduction is HeadReduction.MEAN:
        mean: Weights = np.mean(chosen, axis=0, keepdims=True)
        return mean
    if reduction is HeadReduction.MAX:
        greatest: Weights = np.max(chosen, axis=0, keepdims=True)
        return greatest
    return chosen


def mean_of_layers(maps: Iterable[Weights]) -> Weights:
    """The arithmetic mean of maps of one shape, (H, L, S), of which only one need be held at a time."""
    total: Weights | None = None
    count = 0
    for each in maps:
        count += 1
        if total is None:
            total = np.array(each, dtype=np.float32)
        else:
            total += each
    assert total is not None, "a resolved selection has at least one site"
    total /= np.float32(count)
    return total


def rollout(maps: Iterator[tuple[Weights, Indices | None]]) -> Weights:
    """Attention rollout: the product over the layers of (A + I) / 2, later layers on the left.

    A is a layer's map with its rows brought to sum 1. A row that is all zeros (fully masked) passes on nothing but the
    residual connection, so (A + I) / 2, brought to sum 1 as the paper has it, is the row of I there. The rows of the
    result thus always sum to 1.

    The product is taken from the left, so only the rows asked for are ever multiplied: a row of a product depends on
    that row of its left factor alone.

    Args:
        maps: the layers' maps with heads joined, (1, rows, T), last layer first. Each comes with the indices of its
            rows; None: all T. All but the first hold all rows.

    Returns:
        (1, rows, T), with the rows of the last layer's map.

    Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3.
    """
    joined, rows = next(maps)
    result = _with_rows_of_sum_1(joined[0], rows)
    result *= np.float32(0.5)
    result[np.arange(len(result)), np.arange(len(result)) if rows is None else rows] += np.float32(0.5)
    for joined, _ in maps:
        # R (A + I) / 2 = (R A + R) / 2, without writing down the identity
        product = result @ _with_rows_of_sum_1(joined[0], None)
        product += result
        product *= np.float32(0.5)
        result = product
    return result[np.newaxis]


def _with_rows_of_sum_1(weights: Weights, rows: Indices | None) -> Weights:
    """A copy of (rows, T) weights with each row divided by its sum; a row without weight looks at itself alone."""
    sums = weights.sum(axis=1, keepdims=True)
    empty = np.flatnonzero(sums[:, 0] == 0)
    sums[empty] = 1
    scaled: Weights = np.divide(weights, sums)
    scaled[empty, empty if rows is None else rows[empty]] = 1
    return scaled


def merge_queries(weights: Weights, sizes: Indices | None) -> Weights:
    """The mean over the pieces of each query unit, (H, L, S) to (H, units, S). `sizes`: how many pieces each has.

    Source: Clark et al. 2019, "What Does BERT Look At? An Analysis of BERT's Attention", section 4.1, also for keys.
    """
    if sizes is None or not len(sizes) or bool((sizes == 1).all()):
        return weights
    firsts = np.cumsum(sizes) - sizes
    merged: Weights = np.take(weights, firsts, axis=1)
    # Whole rows are added piece by piece, for all words at once: six times as fast as `reduceat` along this axis.
    for piece in range(1, min(int(sizes.max()), LONG_WORD)):
        longer = np.flatnonzero(sizes > piece)
        merged[:, longer] += weights[:, firsts[longer] + piece]
    merged /= sizes[:, np.newaxis].astype(np.float32)
    for unit in np.flatnonzero(sizes > LONG_WORD):
        pieces = weights[:, firsts[unit] : firsts[unit] + sizes[unit]]
        merged[:, unit] = pieces.mean(axis=1, dtype=np.float64)  # hundreds of terms of 1 would lose digits in float32
    return merged


def merge_keys(weights: Weights, starts: Indices | None) -> Weights:
    """The sum over the pieces of each key unit, (H, L, S) to (H, L, units). `starts`: first position of each unit."""
    if starts is None or not weights.size:
        return weights if starts is None else np.zeros((*weights.shape[:2], len(starts)), dtype=np.float32)
    merged: Weights = np.add.reduceat(weights, starts, axis=2)
    return merged


def renormalise(weights: Weights, columns: Indices | None) -> Weights:
    """Keep some columns of (H, L, S), and divide each row by what is left of its sum: (H, L, columns).

    A row with nothing left is all zeros. `columns`: ascending positions among the S; None: all.
    """
    kept = take(weights, columns, axis=2)
    sums = kept.sum(axis=2, keepdims=True)
    sums[sums == 0] = 1
    scaled: Weights = np.divide(kept, sums)
    return scaled
