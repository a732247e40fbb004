"""Reductions of attention weights: join heads, layers and pieces of words, keep the strongest links, convert the dtype.

The inputs are the weights of one sequence and the parts of a resolved selection, with which nothing here fails. Every
function returns a new array or a view, and modifies no argument. The reductions of maps run in float32, the dtype of
the nodes that return weights. They sum at most a few hundred weights of at most 1, so results stay within 1e-6 of the
same formulas in float64 (checked by tests/numerics/test_reductions.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from attnserve_server.attention.bands import BandKeys, Weights
from attnserve_server.attention.units import Indices
from attnserve_server.domain.values import Array, HeadReduction, Links, WeightDtype

F = TypeVar("F", bound=np.floating[Any])
"""Element type of weights: float32 for maps, float64 for features."""

LONG_WORD = 8
"""Maximum number of pieces of a word that is averaged together with other words; longer ones use float64."""
_LOW_HALF = np.uint64(0xFFFFFFFF)
_HALF_BITS = np.uint64(32)


def take(array: npt.NDArray[Any], indices: Indices | None, axis: int) -> Array:
    """Return the entries of one axis in the order of `indices`; None: all. A view if the indices are consecutive."""
    if indices is None:
        return array
    count = len(indices)
    if count and indices[-1] - indices[0] == count - 1 and bool((np.diff(indices) == 1).all()):
        run = slice(int(indices[0]), int(indices[0]) + count)
        return array[(slice(None),) * axis + (run,)]
    return np.take(array, indices, axis=axis)


def join_heads(weights: Weights, heads: Indices, reduction: HeadReduction, rows: Indices | None) -> Weights:
    """Select heads and rows of one site, and join the heads.

    Rows are selected first. This changes no number, because the joins work element by element.

    Args:
        weights: (H, L, S).
        heads: indices of the heads, in order.
        reduction: how to join them.
        rows: indices of the rows, in order; None: all L.

    Returns:
        (heads, rows, S), or (1, rows, S) if joined. A new array or a view, never `weights` itself.
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
    """Return the arithmetic mean of maps of one shape, (H, L, S). Only one of them is held at a time."""
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
    """Return attention rollout: the product over the layers of (A + I) / 2, later layers on the left.

    A is a layer's map with every row scaled to sum 1. A row of zeros (fully masked) passes on the residual connection
    only, so (A + I) / 2, scaled to sum 1 as in the paper, has the row of I there. Rows of the result sum to 1.

    The product is taken from the left. A row of a product depends on that row of its left factor only, so only the
    selected rows are multiplied.

    Args:
        maps: the layers' maps with heads joined, (1, rows, T), last layer first, each with the indices of its rows;
            None: all T. Every map but the first has all rows.

    Returns:
        (1, rows, T), with the rows of the last layer's map.

    Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3.
    """
    joined, rows = next(maps)
    result = _with_rows_of_sum_1(joined[0], rows)
    result *= np.float32(0.5)
    result[np.arange(len(result)), np.arange(len(result)) if rows is None else rows] += np.float32(0.5)
    for joined, _ in maps:
        # R (A + I) / 2 = (R A + R) / 2, without storing the identity
        product = result @ _with_rows_of_sum_1(joined[0], None)
        product += result
        product *= np.float32(0.5)
        result = product
    return result[np.newaxis]


def _with_rows_of_sum_1(weights: Weights, rows: Indices | None) -> Weights:
    """A copy of (rows, T) weights with each row divided by its sum; a row of zeros gets 1 at its own position."""
    sums = weights.sum(axis=1, keepdims=True)
    empty = np.flatnonzero(sums[:, 0] == 0)
    sums[empty] = 1
    scaled: Weights = np.divide(weights, sums)
    scaled[empty, empty if rows is None else rows[empty]] = 1
    return scaled


def merge_queries(weights: npt.NDArray[F], sizes: Indices | None) -> npt.NDArray[F]:
    """Average the rows of the pieces of each query unit, (H, L, S) to (H, units, S).

    Args:
        weights: (H, L, S).
        sizes: number of pieces of each unit, (units,); None: 1 each.

    Source: Clark et al. 2019, "What Does BERT Look At? An Analysis of BERT's Attention", section 4.1, also for keys.
    """
    if sizes is None or not len(sizes) or bool((sizes == 1).all()):
        return weights
    firsts = np.cumsum(sizes) - sizes
    merged: npt.NDArray[F] = np.take(weights, firsts, axis=1)
    # Adding rows piece by piece, for all words at once, is six times as fast as `reduceat` along this axis.
    for piece in range(1, min(int(sizes.max()), LONG_WORD)):
        longer = np.flatnonzero(sizes > piece)
        merged[:, longer] += weights[:, firsts[longer] + piece]
    merged /= sizes[:, np.newaxis].astype(weights.dtype)
    for unit in np.flatnonzero(sizes > LONG_WORD):
        pieces = weights[:, firsts[unit] : firsts[unit] + sizes[unit]]
        merged[:, unit] = pieces.mean(axis=1, dtype=np.float64)  # float32 would lose digits over hundreds of terms
    return merged


def merge_keys(weights: npt.NDArray[F], starts: Indices | None) -> npt.NDArray[F]:
    """Sum the columns of the pieces of each key unit, (H, L, S) to (H, L, units).

    Args:
        weights: (H, L, S).
        starts: first position of each unit, (units,); None: every position is a unit.
    """
    if starts is None or not weights.size:
        return weights if starts is None else np.zeros((*weights.shape[:2], len(starts)), dtype=weights.dtype)
    merged: npt.NDArray[F] = np.add.reduceat(weights, starts, axis=2)
    return merged


def renormalise(weights: npt.NDArray[F], columns: Indices | None) -> npt.NDArray[F]:
    """Keep some columns of (H, L, S), and divide each row by its remaining sum: (H, L, columns).

    A row without remaining weight becomes zeros.

    Args:
        weights: (H, L, S).
        columns: ascending positions of the columns to keep; None: all.
    """
    kept = take(weights, columns, axis=2)
    sums = kept.sum(axis=2, keepdims=True)
    sums[sums == 0] = 1
    scaled: npt.NDArray[F] = np.divide(kept, sums)
    return scaled


def encode(weights: Weights, dtype: WeightDtype) -> Array:
    """Convert weights of any shape, from 0 to 1, to a dtype. The result is C-contiguous.

    uint8 is the weight times 255, rounded to nearest even. A view is copied, so that an answer does not keep the
    arrays of a whole batch in memory.
    """
    if dtype is WeightDtype.UINT8:
        scaled = np.multiply(weights, np.float32(255), order="C")
        np.rint(scaled, out=scaled)
        np.clip(scaled, 0, 255, out=scaled)
        return scaled.astype(np.uint8)
    if dtype is WeightDtype.FLOAT16:
        return _half(weights)
    return weights if weights.flags.owndata and weights.flags.c_contiguous else np.array(weights, order="C")


def encode_scores(scores: Weights, dtype: WeightDtype) -> Array:
    """Convert scores of any shape to float32 or float16, C-contiguous. Float16 rounds beyond 65,504 to infinity."""
    if dtype is WeightDtype.FLOAT32:
        return encode(scores, dtype)
    with np.errstate(over="ignore"):
        return scores.astype(np.float16, order="C")


def _half(weights: Weights) -> Array:
    """Convert float32 from 0 to 65504 to float16, rounded to nearest even, with the same bits as `astype`.

    NumPy's conversion takes twenty times as long for weights below 2^-14, and most weights of a long sequence are.
    """
    bits = np.ascontiguousarray(weights, dtype=np.float32).view(np.uint32)
    # Normal numbers: drop 13 bits of the fraction, rounding half to even, and move the exponent's bias from 127 to 15.
    half = bits >> np.uint32(13)
    half &= np.uint32(1)
    half += bits
    half += np.uint32(0xFFF + 2**32 - ((127 - 15) << 23))  # modulo 2^32: a subtraction
    half >>= np.uint32(13)
    # Subnormal numbers are multiples of 2^-24; the one that rounds up to 1024 of them has the bits of 2^-14.
    steps = np.multiply(weights, np.float32(2**24), order="C")
    np.copyto(half, np.rint(steps, out=steps).astype(np.uint32), where=weights < np.float32(2**-14))
    return half.astype(np.uint16).view(np.float16)


def links_of(
    weights: Weights, columns: Indices | BandKeys | None, top_k: int, min_weight: float, dtype: WeightDtype
) -> Links:
    """Keep the greatest weights of each row.

    Args:
        weights: (H, L, S), not negative.
        columns: the key unit of each column, ascending, (S,), or (L, S) if rows differ; -1 for a column without a key,
            which must come last and have weight 0. None: the column's index.
        top_k: maximum number of links per row; 0: no limit.
        min_weight: minimum weight of a link, compared in float32 before rounding to `dtype`.
        dtype: of the weights in the result.

    Returns:
        Links, each row's greatest weight first, equal weights by ascending key. `residual` (H, L) is the sum of the
        dropped weights before rounding; it is never negative, and 0 if none was dropped.
    """
    heads, queries, keys = weights.shape
    flat = weights.reshape(heads * queries, keys)
    limit = min(top_k, keys) if top_k else keys
    whole = np.full(len(flat), keys, dtype=np.intp)
    if columns is not None and columns.ndim == 2:
        whole = np.tile(np.count_nonzero(columns >= 0, axis=1), heads)
    counts = np.minimum(whole, limit)
    if min_weight > 0:
        counts = np.minimum(counts, np.count_nonzero(flat >= np.float32(min_weight), axis=1))
    limit = int(counts.max(initial=0))
    values, order = _greatest(flat, limit)
    offsets = np.zeros(len(flat) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    # Rows are sorted, so weights that reach `min_weight` come first.
    kept = np.arange(limit) < counts[:, np.newaxis]
    # In float64 the difference is exact to 1e-15. Where nothing was dropped, the rounding error is replaced by 0.
    residual = flat.sum(axis=1, dtype=np.float64) - np.where(kept, values, 0).sum(axis=1, dtype=np.float64)
    residual = np.where(counts == whole, 0, np.maximum(residual, 0))
    chosen = order[kept]
    if columns is not None:
        row_of = np.repeat(np.arange(len(flat)) % max(queries, 1), counts)
        chosen = columns[chosen] if columns.ndim == 1 else columns[row_of, chosen]
    return Links(
        row_offsets=offsets,
        keys=chosen.astype(np.int32),
        weights=encode(values[kept], dtype),
        residual=residual.astype(np.float32).reshape(heads, queries),
    )


def _greatest(flat: Weights, limit: int) -> tuple[Weights, Indices]:
    """The `limit` greatest of each row, (R, limit), greatest first, equal ones by ascending column; and their columns.

    The bits of a non-negative float32 sort like the number. With the column's complement as low bits, every entry of a
    row is distinct, so an unstable selection also orders ties.
    """
    rows, keys = flat.shape
    if not limit:
        return np.zeros((rows, 0), dtype=np.float32), np.zeros((rows, 0), dtype=np.intp)
    # Adding 0 converts -0 to 0, whose bits sort first.
    ranked = (flat + np.float32(0)).view(np.uint32).astype(np.uint64)
    ranked <<= _HALF_BITS
    ranked |= _LOW_HALF - np.arange(keys, dtype=np.uint64)
    if limit < keys:
        ranked = np.partition(ranked, keys - limit, axis=1)[:, keys - limit :]
    ranked = np.sort(ranked, axis=1)[:, ::-1]
    values = (ranked >> _HALF_BITS).astype(np.uint32).view(np.float32)
    return values, (_LOW_HALF - (ranked & _LOW_HALF)).astype(np.intp)
