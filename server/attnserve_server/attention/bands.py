"""A band's columns: which key each stands for, when a map comes as a band, and laying one out over the keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from attnserve_server.attention.reduce import Weights
from attnserve_server.attention.units import Indices
from attnserve_server.domain.selection import AttentionUnit, EffectiveSelection, LayerReduction, SpecialTokens
from attnserve_server.model.bands import BandSpec, BlockBand, GridBand, SlidingBand, TableBand
from attnserve_server.model.manifest import SiteSpec

BandKeys = npt.NDArray[np.int32]


def band_of(effective: EffectiveSelection, joined: Sequence[SiteSpec], keys: int) -> BandSpec | None:
    """The band that the map of one site, or of several joined ones, comes as; None: it is over all keys.

    Words, special tokens left out and rollout need whole rows, and so does the mean over bands that differ. Of S keys
    or more columns than that, whole rows are the smaller map.
    """
    bands = {site.band for site in joined}
    whole_rows = (
        effective.unit is AttentionUnit.WORD
        or effective.special_tokens is SpecialTokens.DROP
        or effective.layer_reduction is LayerReduction.ROLLOUT
    )
    band = None if whole_rows or len(bands) > 1 else bands.pop()
    return band if band is not None and band.width < keys else None


def band_keys(spec: BandSpec, queries: int, keys: int, rows: Indices | None = None) -> BandKeys:
    """The key position of each column of the asked rows, int32 (L, W); -1 where a column stands for none.

    Args:
        spec: the site's band.
        queries: length of the query axis.
        keys: S, length of the key axis.
        rows: L positions along the query axis; None: all of them.

    Returns:
        A table in which no row names a key twice.
    """
    asked = np.arange(queries) if rows is None else rows
    if isinstance(spec, SlidingBand):
        steps = np.arange(-spec.before, spec.after + 1) * spec.dilation
        return _local(asked[:, np.newaxis] + steps, keys, spec.global_keys)
    if isinstance(spec, BlockBand):
        offsets = np.arange(-spec.before * spec.block, (spec.after + 1) * spec.block)
        return _local((asked // spec.block * spec.block)[:, np.newaxis] + offsets, keys, spec.global_keys)
    if isinstance(spec, GridBand):
        return _in_grid(asked, spec)
    return _in_table(asked, keys, spec)


def key_counts(spec: BandSpec, queries: int, keys: int, rows: Indices | None = None) -> Indices:
    """How many columns of each asked row stand for a key, (L,). Costs time and memory in proportion to L alone."""
    asked = np.arange(queries) if rows is None else rows
    if isinstance(spec, GridBand | TableBand):
        written: Indices = np.count_nonzero(band_keys(spec, queries, keys, asked) >= 0, axis=1)
        return written
    if isinstance(spec, BlockBand):
        starts = asked // spec.block * spec.block
        first, last, step = starts - spec.before * spec.block, starts + (spec.after + 1) * spec.block - 1, 1
    else:
        step = spec.dilation
        first, last = asked - spec.before * step, asked + spec.after * step
    seen = min(spec.global_keys, keys)
    # From the first step at or behind the global keys to the last one before the end.
    low = np.maximum(0, -((first - seen) // step))
    high = np.minimum((last - first) // step, (keys - 1 - first) // step)
    counts: Indices = seen + np.maximum(0, high - low + 1)
    return counts


def lay_out(band: Weights, columns: BandKeys, keys: int) -> Weights:
    """A band over all keys: (H, L, W) to (H, L, S), with zeros where a row has no column for a key.

    Args:
        band: (H, L, W).
        columns: (L, W), as `band_keys` gives it.
        keys: S.
    """
    dense = np.zeros((*band.shape[:2], keys), dtype=np.float32)
    rows, places = np.nonzero(columns >= 0)
    dense[:, rows, columns[rows, places]] = band[:, rows, places]
    return dense


def columns_of(dense: Weights, columns: BandKeys) -> Weights:
    """The columns of a band, (H, L, S) to (H, L, W); 0 where one stands for no key. `columns` as for `lay_out`."""
    taken = np.take_along_axis(dense, np.maximum(columns, 0)[np.newaxis], axis=2)
    band: Weights = np.where(columns >= 0, taken, np.float32(0))
    return band


def by_key(band: Weights, columns: BandKeys) -> tuple[Weights, BandKeys]:
    """The same band with each row's columns in ascending order of their keys; those that stand for none last, as 0."""
    none = columns < 0
    order = np.argsort(np.where(none, np.iinfo(np.int32).max, columns), axis=1, kind="stable")
    cleared = np.where(none, np.float32(0), band)
    return np.take_along_axis(cleared, order[np.newaxis], axis=2), np.take_along_axis(columns, order, axis=1)


def _local(places: Indices, keys: int, global_keys: int) -> BandKeys:
    """Places around each query, (L, W'), behind the columns of the global keys; what is no place of a key is -1."""
    local = np.where((places >= global_keys) & (places < keys), places, -1)
    first = np.arange(global_keys)
    first = np.broadcast_to(np.where(first < keys, first, -1), (len(places), global_keys))
    table: BandKeys = np.concatenate([first, local], axis=1).astype(np.int32)
    return table


def _in_grid(asked: Indices, spec: GridBand) -> BandKeys:
    down, across = _window(asked // spec.columns, spec.rows, spec), _window(asked % spec.columns, spec.columns, spec)
    down, across = down[:, :, np.newaxis], across[:, np.newaxis, :]
    patches = np.where((down >= 0) & (across >= 0), down * spec.columns + across, -1)
    table: BandKeys = patches.reshape(len(asked), spec.width).astype(np.int32)
    return table


def _window(places: Indices, extent: int, spec: GridBand) -> Indices:
    """Along one side of the grid: the places of the window that each place is in, (L, window); -1 for padding.

    A side that is no multiple of the window is padded at its end before it is shifted, as the model does it.
    """
    padded = -(-extent // spec.window) * spec.window
    shifted = (places - spec.shift) % padded
    mates = (shifted // spec.window * spec.window)[:, np.newaxis] + np.arange(spec.window)
    mates = (mates + spec.shift) % padded
    return np.where(mates < extent, mates, -1)


def _in_table(asked: Indices, keys: int, spec: TableBand) -> BandKeys:
    windows = np.array(spec.windows, dtype=np.int32)
    found: BandKeys = windows[np.array(spec.window_of)[asked]]
    return np.where(found < keys, found, np.int32(-1))
