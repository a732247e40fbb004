"""The selected rows of masks, biases and lengths of keys, each in a shape that broadcasts to (n, H, L, S).

A site is a place in the graph that computes attention. A tap is the nodes that return its weights for the rows of the
batch that its input `items` selects. A site that its finder did not refuse raises nothing here.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.base.sites import KeyPadding, Mask
from attnserve_server.conversion.rewrite.taps.tap import Tap

LOWEST = float(np.finfo(np.float32).min)


class MaskRows:
    """The masks of one site's scores.

    Args:
        tap: receives the nodes.
        source: the value that the query is computed from; its first axis is the batch.
        query: the selected rows, (n, H, L, D).
        key: the selected rows, (n, H, S, D).
        counts: `Scores.key_counts`.
        last: the position of each row's last query, (B,), with `Scores.behind_past` and `Scores.key_ends`; else None.
        at_end: whether the last query stands at the last key, as with `Scores.behind_past` alone.
    """

    def __init__(
        self,
        tap: Tap,
        source: ir.Value,
        query: ir.Value,
        key: ir.Value,
        counts: ir.Value | None = None,
        last: ir.Value | None = None,
        *,
        at_end: bool = False,
    ) -> None:
        self._tap, self._source, self._query, self._key = tap, source, query, key
        self._counts, self._last, self._at_end = counts, last, at_end

    def of(self, mask: Mask) -> ir.Value:
        """Return the selected rows of a mask, rank 4. A mask of one row serves every row of the batch."""
        full = mask.value
        if mask.rank == 4 and _same_batch(full, self._source):
            return self._tap.rows_of(full)
        if mask.rank < 4:
            added = range(4 - mask.rank)
            full = self._tap.unsqueeze(full, *added, shared=True)
        rows = self._tap.shape(full, 0, 1, shared=True)
        last_row = self._tap.op("Sub", [rows, self._tap.ints(1)], shared=True)
        return self._tap.op("Gather", [full, self._tap.lesser(self._tap.items, last_row)], axis=0)

    def counted(self, padding: KeyPadding) -> ir.Value:
        """Return bool, rank 4: whether each key counts. The rank of `padding` is from 1 to 4."""
        tap = self._tap
        if padding.rank == 1:
            return self._between(padding.value)
        rows = tap.rows_of(padding.value)
        if padding.rank == 4:
            starts, axes = tap.ints(0, 0), tap.ints(2, 3)
            ends = tap.op("Concat", [self._length(), self._keys()], axis=0)
            rows = tap.op("Slice", [rows, starts, ends, axes])
        rows = tap.unsqueeze(rows, *{2: (1, 2), 3: (1,), 4: ()}[padding.rank]) if padding.rank < 4 else rows
        return tap.op("Greater", [tap.op("Cast", [rows], to=int(ir.DataType.INT64)), tap.scalar(0)])

    def _between(self, bounds: ir.Value) -> ir.Value:
        """Return bool (n, 1, 1, S): keys before each row's end, and from its start on where `bounds` has starts."""
        tap = self._tap
        wide = tap.op("Cast", [bounds], to=int(ir.DataType.INT64))
        ends = tap.unsqueeze(tap.op("Gather", [wide, tap.items], axis=0), 1, 2, 3)
        positions = self._positions(self._key)
        before = tap.op("Less", [positions, ends])
        batch, count = tap.shape(self._source, 0, 1), tap.shape(bounds, 0, 1)
        last = tap.op("Sub", [count, tap.ints(1)])
        places = tap.lesser(tap.op("Add", [tap.items, batch]), last)
        starts = tap.unsqueeze(tap.op("Gather", [wide, places], axis=0), 1, 2, 3)
        has_starts = tap.op("Equal", [count, tap.op("Add", [batch, batch])])
        starts = tap.op("Where", [has_starts, starts, tap.ints(0)])
        return tap.op("And", [before, tap.not_less(positions, starts)])

    def causal(self) -> ir.Value:
        """Return bool (n, 1, L, S): key j is kept for query i where j <= i. It has n, to be empty where n is 0."""
        return self._tap.not_less(self._query_positions(), self._positions(self._key))

    def window(self, width: int) -> ir.Value:
        """Return bool (n, 1, L, S): key j is kept for query i where j > i - width."""
        first = self._tap.op("Sub", [self._query_positions(), self._tap.scalar(width)])
        return self._tap.op("Less", [first, self._positions(self._key)])

    def ahead(self, count: int) -> ir.Value:
        """Return bool (n, 1, L, S): key j is kept for query i where j <= i + count."""
        last = self._tap.op("Add", [self._query_positions(), self._tap.scalar(count)])
        return self._tap.not_less(last, self._positions(self._key))

    def keys_up_to(self, ends: ir.Value) -> ir.Value:
        """Return bool (n, 1, 1, S): keys up to and with each row's end."""
        return self._tap.not_less(self._ends(ends), self._positions(self._key))

    def keys_before(self, counts: ir.Value) -> ir.Value:
        """Return bool (n, 1, 1, S): keys before each row's count."""
        return self._tap.op("Less", [self._positions(self._key), self._ends(counts)])

    def queries_up_to(self, ends: ir.Value) -> ir.Value:
        """Return bool (n, 1, L, 1): queries up to and with each row's end."""
        return self._tap.not_less(self._ends(ends), self._query_positions())

    def _ends(self, ends: ir.Value) -> ir.Value:
        """Return int64 (n, 1, 1, 1). The kernel reads B numbers in any shape: (B,), (B, 1) or (1, B)."""
        tap = self._tap
        if ends.shape is None or len(ends.shape) != 1:
            ends = tap.op("Reshape", [ends, tap.ints(-1)], shared=True)
        rows = tap.op("Cast", [tap.rows_of(ends)], to=int(ir.DataType.INT64))
        return tap.unsqueeze(rows, 1, 2, 3)

    def causal_or_last(self) -> ir.Value:
        """Return bool (n, 1, L, S): key j is kept for query i where j <= i, and for the last query."""
        tap = self._tap
        last = tap.op("Sub", [self._keys() if self._at_end else self._length(), tap.ints(1)])
        return tap.op("Or", [self.causal(), tap.op("Equal", [self._query_positions(), last])])

    def _length(self) -> ir.Value:
        return self._tap.shape(self._query, 2, 3)

    def _keys(self) -> ir.Value:
        return self._tap.shape(self._key, 2, 3)

    def _positions(self, rows: ir.Value) -> ir.Value:
        """Return int64 (T,): 0, 1, 2, ... along the third axis of query or key."""
        tap = self._tap
        count = tap.op("Squeeze", [tap.shape(rows, 2, 3)])
        return tap.op("Range", [tap.scalar(0), count, tap.scalar(1)])

    def _query_positions(self) -> ir.Value:
        """Return the positions of the queries, int64 (n, 1, L, 1)."""
        tap = self._tap
        one = tap.ints(1)
        positions = tap.unsqueeze(self._positions(self._query), 1)
        if self._counts is not None:
            return tap.op("Add", [positions, tap.op("Sub", [self._ends(self._counts), self._length()])])
        if self._last is not None:
            counts = tap.op("Add", [self._ends(self._last), one])
            return tap.op("Add", [positions, tap.op("Sub", [counts, self._length()])])
        if self._at_end:
            positions = tap.op("Add", [positions, tap.op("Sub", [self._keys(), self._length()])])
        shape = tap.op("Concat", [tap.shape(self._query, 0, 1), one, self._length(), one], axis=0)
        return tap.op("Expand", [positions, shape])


def _same_batch(mask: ir.Value, query: ir.Value) -> bool:
    """Return whether the axis symbols state that a mask has a row for every row of the batch."""
    if mask.shape is None or query.shape is None:
        return False
    one, other = mask.shape[0], query.shape[0]
    return isinstance(one, ir.SymbolicDim) and one.value is not None and one == other
