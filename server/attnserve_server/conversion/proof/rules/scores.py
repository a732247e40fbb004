"""The parts of attention operators: scores, masks, Softmax and the sum over values, in that order.

The rules take each attention operator apart into the MatMul and Softmax of its definition, so that they know no more of
it than of attention that a graph writes out. Onnxruntime's kernels give zeros, or finite numbers, in a row that a mask
empties, so no NaN comes out of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from attnserve_server.conversion.proof.context import Context
from attnserve_server.conversion.proof.functions import BINARY, as_truth, chosen
from attnserve_server.conversion.proof.helpers import joined, without_nan
from attnserve_server.conversion.proof.hiding import softmaxed
from attnserve_server.conversion.proof.intervals import Interval, add, number
from attnserve_server.conversion.proof.layout import NotFollowed, ordinals, plain, size_of
from attnserve_server.conversion.proof.positions import index_value
from attnserve_server.conversion.proof.rules.arithmetic import distance
from attnserve_server.conversion.proof.rules.masking import counted
from attnserve_server.conversion.proof.rules.pointwise import pointwise
from attnserve_server.conversion.proof.rules.products import product, scaled
from attnserve_server.conversion.proof.rules.reshaping import into, permuted, with_axes
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Value

LOWEST: Final = -3.4028234663852886e38
"""What stands in the place of minus infinity: these kernels make no NaN of a row that is masked from end to end."""


@dataclass(frozen=True)
class Scores:
    """Attention scores on their way: (B, H, L, S)."""

    ctx: Context
    value: Value

    def added(self, mask: Value) -> Scores:
        """With a mask or a bias added."""
        return Scores(self.ctx, pointwise(self.ctx, add, [self.value, mask], op="Add"))

    def kept(self, allowed: Value, filler: float = LOWEST) -> Scores:
        """With the filler where a mask of truth values says no."""
        low = Value((), span=number(filler), lit=number(filler))
        zero = Value((), span=number(0), lit=number(0))
        bias = pointwise(self.ctx, chosen, [pointwise(self.ctx, as_truth, [allowed]), zero, low], op="Where")
        return self.added(bias)

    def positions(self, axis: int) -> Value | None:
        """Positions along queries (2) or keys (3), if these vary."""
        layout = self.value.axes
        own = ordinals(layout, axis)
        if not own or len(layout[axis]) != 1:
            return None
        if layout[axis][0].tail:
            raise NotFollowed("masks keys by their positions, some of which stand behind padded ones")
        alone = (layout[axis], plain(Size.of(1))) if axis == 2 else (layout[axis],)
        return index_value(self.ctx, alone, {0: Size.of(1)}, Size.of(0))

    def causal(self, before: int = 0) -> Scores:
        """With keys hidden that stand behind their query; `before`: positions that keys have in front of queries."""
        if self.ctx.is_batch:
            return self
        queries, keys = self.positions(2), self.positions(3)
        if queries is None or keys is None:
            return self
        difference = distance(self.ctx, queries, keys)
        zero = Value((), span=number(-before), lit=number(-before))
        allowed = pointwise(self.ctx, BINARY["GreaterOrEqual"], [difference, zero])
        return self.kept(allowed)

    def shares(self) -> Value:
        """Softmax over the keys."""
        found = softmaxed(self.ctx, self.ctx.as_data(self.value), [3])
        return without_nan(found)


def heads_first(ctx: Context, value: Value, heads: int) -> Value:
    """(B, H, T, D) of (B, T, H * D), or of what has four axes already."""
    if len(value.axes) == 4:
        return value
    if len(value.axes) != 3:
        raise NotFollowed("attention over a value of unexpected rank")
    batch, length, width = (size_of(axis) for axis in value.axes)
    size = width.over(Size.of(heads))
    if size is None:
        raise NotFollowed("a width that heads do not divide")
    split = into(value, [batch, length, Size.of(heads), size])
    return permuted(split, [0, 2, 1, 3])


def heads_last(ctx: Context, value: Value) -> Value:
    """(B, L, H * D) of (B, H, L, D)."""
    turned = permuted(value, [0, 2, 1, 3])
    batch, length, heads, size = (size_of(axis) for axis in turned.axes)
    return into(turned, [batch, length, heads * size])


def scores_of(ctx: Context, query: Value, key: Value, scale: float) -> Scores:
    """Query times key; heads of keys are repeated for the queries that share them."""
    key = _repeated(key, query)
    return Scores(ctx, scaled(ctx, product(ctx, query, "bhqd", key, "bhkd", "bhqk"), scale))


def _repeated(value: Value, like: Value) -> Value:
    return replace(value, layout=(value.axes[0], like.axes[1], *value.axes[2:]), constant=None)


def weighted(ctx: Context, shares: Value, value: Value) -> Value:
    """The sum over values by their shares."""
    return product(ctx, shares, "bhqk", _repeated(value, shares), "bhkd", "bhqd")


def head_size(value: Value) -> int:
    """D. Raises NotFollowed where it is not a number."""
    found = size_of(value.axes[-1]).number
    if found is None:
        raise NotFollowed("splits heads of an unknown size")
    return found


def lowest_for_infinite(mask: Value) -> Value:
    """An added mask whose infinities the kernel answers as if they were the lowest number."""

    def finite(interval: Interval) -> Interval:
        low = LOWEST if math.isinf(interval.low) and interval.wild & 1 else interval.low
        high = LOWEST if interval.only is not None and math.isinf(interval.only) else interval.high
        return Interval(low, high, interval.wild & ~1, interval.masked)

    regions = {
        region: replace(entry, interval=finite(entry.interval), lit=finite(entry.lit))
        for region, entry in mask.regions.items()
    }
    return replace(mask, span=finite(mask.span), lit=finite(mask.lit), regions=regions)


def up_to(ctx: Context, scores: Scores, ends: Value, op: str) -> Scores:
    """Keys before an end that each row has; behind the sequence, where the end is a count of allowed positions."""
    if ctx.is_batch:
        standing, cause = joined([scores.value, ctx.as_data(ends)])
        return Scores(ctx, replace(scores.value, standing=standing, cause=cause))
    keys = scores.positions(3)
    rank = len(ends.axes)
    wide = with_axes(ends, range(rank, 4)) if rank < 4 else ends
    if keys is None:
        standing, cause = joined([scores.value, ctx.as_data(ends)])
        return Scores(ctx, replace(scores.value, standing=standing, cause=cause))
    allowed = counted(ctx, op, [keys, wide])
    if allowed is None:
        allowed = pointwise(ctx, BINARY[op], [keys, wide])
    return scores.kept(allowed)


def without_bounds(value: Value) -> Value:
    """A value of which only its axes and its standing are known."""
    return Value(value.layout, value.standing, value.cause)
