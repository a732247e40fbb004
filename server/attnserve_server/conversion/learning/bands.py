"""From seen tables of which key each column stands for to a band in closed form. Sees no graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attnserve_server.attention.bands import band_keys
from attnserve_server.model.bands import BandSpec, BlockBand, GridBand, SlidingBand, TableBand

MAX_TABLE_ENTRIES = 1 << 16
"""Of a band that has no closed form; a manifest is read whole, by people too."""

Table = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SeenBand:
    """What one run says: key position of each column, (L, W), -1 for none, over S keys.

    `block`: how many queries the graph puts into one window; 1 where it makes none.
    """

    keys: Table
    length: int
    block: int = 1


def fitted(seen: Sequence[SeenBand], *, fixed: bool) -> BandSpec | None:
    """The band that explains every table seen; None where there is none.

    Args:
        seen: tables of one width, of several lengths where lengths are dynamic.
        fixed: whether both axes always have the lengths seen, so that a table of its own will do.
    """
    named_once = [SeenBand(_without_doubles(each.keys), each.length, each.block) for each in seen]
    for spec in _candidates(named_once, fixed=fixed):
        if all(np.array_equal(band_keys(spec, len(each.keys), each.length), each.keys) for each in named_once):
            return spec
    return None


def _without_doubles(keys: Table) -> Table:
    """The first column of a row that names a key keeps it."""
    order = np.argsort(keys, axis=1, kind="stable")
    ordered = np.take_along_axis(keys, order, axis=1)
    doubled = np.zeros_like(keys, dtype=bool)
    doubled[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    back = np.empty_like(doubled)
    np.put_along_axis(back, order, doubled, axis=1)
    return np.where(back, -1, keys)


def _candidates(seen: Sequence[SeenBand], *, fixed: bool) -> Iterator[BandSpec]:
    width = seen[0].keys.shape[1]
    for leading in range(_leading(seen) + 1):
        yield from _sliding(seen, width, leading)
        yield from _blocks(seen, width, leading)
    if fixed:
        yield from _grids(seen[0], width)
        yield from _table(seen[0])


def _leading(seen: Sequence[SeenBand]) -> int:
    """How many of the first columns stand for the key of their own number in every row."""
    width = seen[0].keys.shape[1]
    numbers = np.arange(width)
    own = np.ones(width, dtype=bool)
    for each in seen:
        own &= (each.keys == np.where(numbers < each.length, numbers, -1)).all(axis=0)
    return width if own.all() else int(np.argmin(own))


def _sliding(seen: Sequence[SeenBand], width: int, leading: int) -> Iterator[BandSpec]:
    """Each column of the local part is at one distance from its query; two of them tell the dilation."""
    known: dict[int, int] = {}
    for each in seen:
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


def _blocks(seen: Sequence[SeenBand], width: int, leading: int) -> Iterator[BandSpec]:
    block = seen[0].block
    blocks, rest = divmod(width - leading, block)
    if rest or blocks < 1 or block == 1:
        return
    for before in range(blocks):
        yield BlockBand(block=block, before=before, after=blocks - 1 - before, global_keys=leading)


def _grids(seen: SeenBand, width: int) -> Iterator[BandSpec]:
    """Square windows over every grid of as many patches, the squarest first."""
    window, patches = math.isqrt(width), seen.length
    if window * window != width or len(seen.keys) != patches:
        return
    sides = sorted((side for side in range(1, patches + 1) if patches % side == 0), key=lambda s: abs(s - patches // s))
    for rows in sides:
        for shift in range(window):
            yield GridBand(rows=rows, columns=patches // rows, window=window, shift=shift)


def _table(seen: SeenBand) -> Iterator[BandSpec]:
    windows, window_of = np.unique(seen.keys, axis=0, return_inverse=True)
    if windows.size + window_of.size <= MAX_TABLE_ENTRIES:
        yield TableBand(windows=tuple(map(tuple, windows.tolist())), window_of=tuple(window_of.reshape(-1).tolist()))
