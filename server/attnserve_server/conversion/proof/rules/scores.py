"""The parts of attention operators: scores, masks, Softmax and the sum over values, in that order.

The rules decompose each attention operator into the MatMul and Softmax of its definition, so that decomposed attention
and operators have the same rules. Onnxruntime's kernels give zeros, or finite numbers, in a row that a mask
empties, so the results hold no NaN. Unknown head sizes and ranks raise `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
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
"""The kernels' replacement of minus infinity, so that a fully masked row does not become NaN."""


@dataclass(frozen=True)
class Scores:
    """Attention scores before the softmax: (B, H, L, S)."""

    ctx: Context
    value: Value

    def added(self, mask: Value) -> Scores:
        """Return the scores plus a mask or a bias."""
        return Scores(self.ctx, pointwise(self.ctx, add, [self.value, mask], op="Add"))

    def kept(self, allowed: Value, filler: float = LOWEST) -> Scores:
        """Return the scores with the filler where a boolean mask is False."""
        low = Value((), span=number(filler), lit=number(filler))
        zero = Value((), span=number(0), lit=number(0))
        bias = pointwise(self.ctx, chosen, [pointwise(self.ctx, as_truth, [allowed]), zero, low], op="Where")
        return self.added(bias)

    def positions(self, axis: int) -> Value | None:
        """Return the positions along queries (2) or keys (3), if these vary."""
        layout = self.value.axes
        own = ordinals(layout, axis)
        if not own or len(layout[axis]) != 1:
            return None
        if layout[axis][0].tail:
            raise NotFollowed("masks keys by their positions, some of which are behind the padding")
        alone = (layout[axis], plain(Size.of(1))) if axis == 2 else (layout[axis],)
        return index_value(self.ctx, alone, {0: Size.of(1)}, Size.of(0))

    def causal(self, before: int = 0) -> Scores:
        """Return the scores with keys behind their query hidden.

        `before` is the number of keys in front of the first query.
        """
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
        """Return the softmax over the keys."""
        found = softmaxed(self.ctx, self.ctx.as_data(self.value), [3])
        return without_nan(found)


def heads_first(ctx: Context, value: Value, heads: int) -> Value:
    """Return (B, H, T, D) of a value (B, T, H * D), or the value where it has four axes."""
    if len(value.axes) == 4:
        return value
    if len(value.axes) != 3:
        raise NotFollowed("attention over a value of unexpected rank")
    batch, length, width = (size_of(axis) for axis in value.axes)
    size = width.over(Size.of(heads))
    if size is None:
        raise NotFollowed("the width is not divisible by the number of heads")
    split = into(value, [batch, length, Size.of(heads), size])
    return permuted(split, [0, 2, 1, 3])


def heads_last(ctx: Context, value: Value) -> Value:
    """Return (B, L, H * D) of a value (B, H, L, D)."""
    transposed = permuted(value, [0, 2, 1, 3])
    batch, length, heads, size = (size_of(axis) for axis in transposed.axes)
    return into(transposed, [batch, length, heads * size])


def scores_of(ctx: Context, query: Value, key: Value, scale: float) -> Scores:
    """Return query times key. Heads of keys are repeated for the queries that share them."""
    key = _repeated(key, query)
    return Scores(ctx, scaled(ctx, product(ctx, query, "bhqd", key, "bhkd", "bhqk"), scale))


def _repeated(value: Value, like: Value) -> Value:
    return replace(value, layout=(value.axes[0], like.axes[1], *value.axes[2:]), constant=None)


def weighted(ctx: Context, shares: Value, value: Value) -> Value:
    """Return the sum over values by their weights."""
    return product(ctx, shares, "bhqk", _repeated(value, shares), "bhkd", "bhqd")


def head_size(value: Value) -> int:
    """Return D. Raise NotFollowed where it is not a number."""
    found = size_of(value.axes[-1]).number
    if found is None:
        raise NotFollowed("splits heads of an unknown size")
    return found


def lowest_for_infinite(mask: Value) -> Value:
    """Return an added mask with the lowest number instead of infinities, as the kernel treats them."""

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
    """Return scores with the keys from a row's end on hidden.

    Where the end is a count of allowed positions, these are padding.
    """
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
    """Return a value with its axes and its standing only."""
    return Value(value.layout, value.standing, value.cause)
