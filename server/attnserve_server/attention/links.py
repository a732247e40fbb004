"""The strongest weights of each row as links, and how weights are written."""

from __future__ import annotations

import numpy as np

from attnserve_server.attention.bands import BandKeys
from attnserve_server.attention.reduce import Weights
from attnserve_server.attention.units import Indices
from attnserve_server.domain.selection import WeightDtype
from attnserve_server.domain.values import Array, Links

LOW_HALF = np.uint64(0xFFFFFFFF)
HALF_BITS = np.uint64(32)


def encode(weights: Weights, dtype: WeightDtype) -> Array:
    """Weights of any shape, from 0 to 1, in the dtype asked for, C-contiguous.

    uint8 is the weight times 255, rounded to nearest even. A view is copied, so that an answer owns its
    numbers and does not keep a whole batch's in memory.
    """
    if dtype is WeightDtype.UINT8:
        scaled = np.multiply(weights, np.float32(255), order="C")
        np.rint(scaled, out=scaled)
        np.clip(scaled, 0, 255, out=scaled)
        return scaled.astype(np.uint8)
    if dtype is WeightDtype.FLOAT16:
        return _half(weights)
    return weights if weights.flags.owndata and weights.flags.c_contiguous else np.array(weights, order="C")


def _half(weights: Weights) -> Array:
    """float32 from 0 to 65504 to float16, rounded to nearest even: what `astype` gives, bit by bit.

    NumPy's own conversion takes twenty times as long for weights below 2^-14, which a long sequence is full of.
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
        columns: the key unit of each of the S columns, ascending, (S,), or (L, S) where it differs from row to row; -1
            for columns that stand for none, which come last and weigh nothing. None: the column's own index.
        top_k: how many a row keeps at most; 0: any number.
        min_weight: the least weight kept, compared in float32 and before rounding to `dtype`.
        dtype: how kept weights are written.

    Returns:
        Links, each row's greatest weight first, equal weights by ascending key. `residual` (H, L) is the sum of the
        weights left out, before rounding; it is never negative, and 0 where nothing was left out.
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
    # Rows are sorted, so those that reach `min_weight` come first in each.
    kept = np.arange(limit) < counts[:, np.newaxis]
    # In float64 the difference is exact to 1e-15; what rounding leaves of it where it must be 0 is taken off.
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

    The bits of a float32 that is not negative sort as the number does. With the column's complement behind them every
    entry of a row is distinct, so one unstable selection settles ties as well.
    """
    rows, keys = flat.shape
    if not limit:
        return np.zeros((rows, 0), dtype=np.float32), np.zeros((rows, 0), dtype=np.intp)
    # Adding 0 turns -0 into 0, whose bits sort first.
    ranked = (flat + np.float32(0)).view(np.uint32).astype(np.uint64)
    ranked <<= HALF_BITS
    ranked |= LOW_HALF - np.arange(keys, dtype=np.uint64)
    if limit < keys:
        ranked = np.partition(ranked, keys - limit, axis=1)[:, keys - limit :]
    ranked = np.sort(ranked, axis=1)[:, ::-1]
    values = (ranked >> HALF_BITS).astype(np.uint32).view(np.float32)
    return values, (LOW_HALF - (ranked & LOW_HALF)).astype(np.intp)
