"""Fits a band in closed form to tables that hold the key of each column of each query.

A band states which key each column of attention weights is, where each query attends to few keys. `fitted` returns None
where no band gives the tables.

For example, [[-1, 0, 1], [0, 1, 2], [1, 2, -1]] is a SlidingBand of one key before and one after; -1 is no key. Pure
functions of tables; no graph is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attnserve_server.attention.bands import band_keys
from attnserve_server.model.bands import BandSpec, BlockBand, GridBand, SlidingBand, TableBand

MAX_TABLE_ENTRIES = 1 << 16
"""The most numbers of a band without a closed form, because the manifest holds them and is read whole."""

Table = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class KeyTable:
    """The keys of one run.

    Attributes:
        keys: the key position of each column of each query, (L, W); -1 for none.
        length: S, the number of keys.
        block: how many queries the graph puts into one window; 1 where it makes no windows.
    """

    keys: Table
    length: int
    block: int = 1


def fitted(tables: Sequence[KeyTable], *, fixed: bool) -> BandSpec | None:
    """Return the first band that gives every table; None where none does.

    Args:
        tables: at least one, all of one width, and of several lengths where lengths are dynamic.
        fixed: whether both axes always have these lengths, so that a GridBand or a TableBand may serve.
    """
    named_once = [KeyTable(_without_doubles(each.keys), each.length, each.block) for each in tables]
    for spec in _candidates(named_once, fixed=fixed):
        if all(np.array_equal(band_keys(spec, len(each.keys), each.length), each.keys) for each in named_once):
            return spec
    return None


def _without_doubles(keys: Table) -> Table:
    """Keep the first column of a row that names a key, and set the others to -1."""
    order = np.argsort(keys, axis=1, kind="stable")
    ordered = np.take_along_axis(keys, order, axis=1)
    doubled = np.zeros_like(keys, dtype=bool)
    doubled[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    back = np.empty_like(doubled)
    np.put_along_axis(back, order, doubled, axis=1)
    return np.where(back, -1, keys)


def _candidates(tables: Sequence[KeyTable], *, fixed: bool) -> Iterator[BandSpec]:
    width = tables[0].keys.shape[1]
    for leading in range(_leading(tables) + 1):
        yield from _sliding(tables, width, leading)
        yield from _blocks(tables, width, leading)
    if fixed:
        yield from _grids(tables[0], width)
        yield from _table(tables[0])


def _leading(tables: Sequence[KeyTable]) -> int:
    """Return how many of the first columns hold, in every row, the key with the column's number: global keys."""
    width = tables[0].keys.shape[1]
    numbers = np.arange(width)
    own = np.ones(width, dtype=bool)
    for each in tables:
        own &= (each.keys == np.where(numbers < each.length, numbers, -1)).all(axis=0)
    return width if own.all() else int(np.argmin(own))


def _sliding(tables: Sequence[KeyTable], width: int, leading: int) -> Iterator[BandSpec]:
    """Yield the sliding band behind the global keys, if any: each column has one distance from its query.

    The distances of two columns give the dilation.
    """
    known: dict[int, int] = {}
    for each in tables:
        rows, columns = np.nonzero(each.keys[:, leading:] >= 0)
        distances = each.keys[rows, columns + leading] - rows
        known.update(zip(columns.tolist(), distances.tolist(), strict=True))
    if not known:
        return
    (first, distance), last = min(known.items()), max(known)
    dilation = (known[last] - distance) // (last - first) if last > first else 1
    if dilation < 1 or distance % dilation:
        return
    before = first - distance // dilation
    after = width - leading - 1 - before
    if before >= 0 and after >= 0:
        yield SlidingBand(before=before, after=after, dilation=dilation, global_keys=leading)


def _blocks(tables: Sequence[KeyTable], width: int, leading: int) -> Iterator[BandSpec]:
    block = tables[0].block
    blocks, rest = divmod(width - leading, block)
    if rest or blocks < 1 or block == 1:
        return
    for before in range(blocks):
        yield BlockBand(block=block, before=before, after=blocks - 1 - before, global_keys=leading)


def _grids(table: KeyTable, width: int) -> Iterator[BandSpec]:
    """Yield square windows over every grid of as many patches, the squarest grid first."""
    window, patches = math.isqrt(width), table.length
    if window * window != width or len(table.keys) != patches:
        return
    sides = sorted((side for side in range(1, patches + 1) if patches % side == 0), key=lambda s: abs(s - patches // s))
    for rows in sides:
        for shift in range(window):
            yield GridBand(rows=rows, columns=patches // rows, window=window, shift=shift)


def _table(table: KeyTable) -> Iterator[BandSpec]:
    windows, window_of = np.unique(table.keys, axis=0, return_inverse=True)
    if windows.size + window_of.size <= MAX_TABLE_ENTRIES:
        yield TableBand(windows=tuple(map(tuple, windows.tolist())), window_of=tuple(window_of.reshape(-1).tolist()))
