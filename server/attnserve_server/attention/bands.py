"""Columns of a band: the key of each column, and conversion between a band and rows over all keys.

A band is the weights of a site whose queries have few keys each: W columns for each query in place of all S keys. Only
a `TableBand` fails: with IndexError, for a query that its table does not have. A site is a place in a model that
computes attention.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from attnserve_server.attention.units import Indices
from attnserve_server.model.bands import BandSpec, BlockBand, GridBand, SlidingBand, TableBand

Weights = npt.NDArray[np.float32]
BandKeys = npt.NDArray[np.int32]


def band_keys(spec: BandSpec, queries: int, keys: int, rows: Indices | None = None) -> BandKeys:
    """Return the key position of each column of the selected rows.

    Args:
        spec: the site's band.
        queries: length of the query axis.
        keys: S, length of the key axis.
        rows: L positions along the query axis; None: all of them.

    Returns:
        int32 (L, W); -1 for a column without a key. No row has a key twice.
    """
    selected = np.arange(queries) if rows is None else rows
    if isinstance(spec, SlidingBand):
        steps = np.arange(-spec.before, spec.after + 1) * spec.dilation
        return _local(selected[:, np.newaxis] + steps, keys, spec.global_keys)
    if isinstance(spec, BlockBand):
        offsets = np.arange(-spec.before * spec.block, (spec.after + 1) * spec.block)
        return _local((selected // spec.block * spec.block)[:, np.newaxis] + offsets, keys, spec.global_keys)
    if isinstance(spec, GridBand):
        return _in_grid(selected, spec)
    return _in_table(selected, keys, spec)


def key_counts(spec: BandSpec, queries: int, keys: int, rows: Indices | None = None) -> Indices:
    """Return how many columns of each selected row have a key, (L,). Arguments as for `band_keys`.

    For sliding and block bands, time and memory grow with L alone.
    """
    selected = np.arange(queries) if rows is None else rows
    if isinstance(spec, GridBand | TableBand):
        written: Indices = np.count_nonzero(band_keys(spec, queries, keys, selected) >= 0, axis=1)
        return written
    if isinstance(spec, BlockBand):
        starts = selected // spec.block * spec.block
        first, last, step = starts - spec.before * spec.block, starts + (spec.after + 1) * spec.block - 1, 1
    else:
        step = spec.dilation
        first, last = selected - spec.before * step, selected + spec.after * step
    seen = min(spec.global_keys, keys)
    # From the first step at or after the last global key to the last step before the end.
    low = np.maximum(0, -((first - seen) // step))
    high = np.minimum((last - first) // step, (keys - 1 - first) // step)
    counts: Indices = seen + np.maximum(0, high - low + 1)
    return counts


def lay_out(band: Weights, columns: BandKeys, keys: int) -> Weights:
    """Convert a band to rows over all keys, (H, L, W) to (H, L, S), with 0 for a key without a column.

    Args:
        band: (H, L, W).
        columns: (L, W), as `band_keys` gives it.
        keys: S.
    """
    dense = np.zeros((*band.shape[:2], keys), dtype=np.float32)
    rows, places = np.nonzero(columns >= 0)
    dense[:, rows, columns[rows, places]] = band[:, rows, places]
    return dense


def columns_of(dense: Weights, columns: BandKeys, missing: float = 0) -> Weights:
    """Convert rows over all keys to a band, (H, L, S) to (H, L, W), with `missing` for a column without a key."""
    taken = np.take_along_axis(dense, np.maximum(columns, 0)[np.newaxis], axis=2)
    band: Weights = np.where(columns >= 0, taken, np.float32(missing))
    return band


def by_key(band: Weights, columns: BandKeys) -> tuple[Weights, BandKeys]:
    """Sort each row's columns by key. Columns without a key come last, with weight 0.

    Args:
        band: (H, L, W).
        columns: (L, W), as `band_keys` gives it.

    Returns:
        The sorted band and the sorted columns.
    """
    none = columns < 0
    order = np.argsort(np.where(none, np.iinfo(np.int32).max, columns), axis=1, kind="stable")
    cleared = np.where(none, np.float32(0), band)
    return np.take_along_axis(cleared, order[np.newaxis], axis=2), np.take_along_axis(columns, order, axis=1)


def _local(places: Indices, keys: int, global_keys: int) -> BandKeys:
    """Columns of the global keys, then the positions around each query, (L, W'); -1 for a position outside the keys."""
    local = np.where((places >= global_keys) & (places < keys), places, -1)
    first = np.arange(global_keys)
    first = np.broadcast_to(np.where(first < keys, first, -1), (len(places), global_keys))
    table: BandKeys = np.concatenate([first, local], axis=1).astype(np.int32)
    return table


def _in_grid(selected: Indices, spec: GridBand) -> BandKeys:
    down = _window(selected // spec.columns, spec.rows, spec)[:, :, np.newaxis]
    across = _window(selected % spec.columns, spec.columns, spec)[:, np.newaxis, :]
    patches = np.where((down >= 0) & (across >= 0), down * spec.columns + across, -1)
    table: BandKeys = patches.reshape(len(selected), spec.width).astype(np.int32)
    return table


def _window(places: Indices, side: int, spec: GridBand) -> Indices:
    """Along one side of the grid, the positions in each position's window, (L, window); -1 for padding.

    A side that is not a multiple of the window is padded at its end before it is shifted, as the model does.
    """
    padded = -(-side // spec.window) * spec.window
    shifted = (places - spec.shift) % padded
    members = (shifted // spec.window * spec.window)[:, np.newaxis] + np.arange(spec.window)
    members = (members + spec.shift) % padded
    return np.where(members < side, members, -1)


def _in_table(selected: Indices, keys: int, spec: TableBand) -> BandKeys:
    windows = np.array(spec.windows, dtype=np.int32)
    found: BandKeys = windows[np.array(spec.window_of)[selected]]
    return np.where(found < keys, found, np.int32(-1))
