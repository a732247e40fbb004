"""Masks that a graph computes: ids compared with the padding id, or positions with a count of allowed positions.

The functions return None for comparisons that make no mask. The caller then computes intervals. Operands whose axes are
not known to agree raise `NotFollowed`.

The proof compares a sequence alone with the same sequence in a batch (or padded); a varying axis differs in length
between the two, and `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from attnserve_server.conversion.proof.context import Context
from attnserve_server.conversion.proof.functions import BINARY
from attnserve_server.conversion.proof.helpers import aligned
from attnserve_server.conversion.proof.intervals import BOOLEAN, Interval, number
from attnserve_server.conversion.proof.values import Entry, Value


def counted(ctx: Context, op: str, operands: Sequence[Value]) -> Value | None:
    """Return the mask that a comparison of two values makes, of ids or of a count. None for other comparisons."""
    return _padding_ids(ctx, op, operands) or _up_to_count(ctx, op, operands)


def _padding_ids(ctx: Context, op: str, operands: Sequence[Value]) -> Value | None:
    """Return the mask of ids compared with the padding id. All other ids are allowed positions."""
    one, other = operands
    if one.raw and not other.raw:
        ids, against, flipped = one, other, False
    elif other.raw and not one.raw:
        ids, against, flipped = other, one, True
    else:
        return None
    bound = against.span.only
    if bound is None or against.varies or ids.raw not in ctx.mask_values:
        return None
    padding = next((entry.only for (kind, _, _), entry in ids.regions.items() if kind == "pad"), None)
    if padding is None:
        return None
    allowed = _allowed(op, padding, bound, flipped=flipped, least=ids.span.low)
    behind = BINARY[op](*((number(bound), number(padding)) if flipped else (number(padding), number(bound))))
    if allowed is None or behind.only is None or behind.only == allowed:
        return None
    layout, placed = aligned([ids, against])
    places = placed[0][1]
    regions = {
        (kind, places[first], places[last]): Entry(behind, lit=behind)
        for (kind, first, last) in ids.regions
        if kind == "pad"
    }
    return Value(
        layout,
        ids.standing,
        ids.cause,
        span=BOOLEAN,
        lit=number(allowed),
        regions=regions,
        masks=frozenset({ids.raw}),
        along=frozenset(places.values()),
    )


def _allowed(op: str, padding: float, bound: float, *, flipped: bool, least: float) -> float | None:
    """Return the comparison's result for every id but the padding id. None where it differs among ids."""
    if op == "Equal":
        return 0.0 if bound == padding else None
    behind = (bound, "Less") if flipped else (bound, "Greater")
    if op in {"Greater", "Less"} and op == behind[1] and padding == bound and least >= padding:
        return 1.0
    if op in {"GreaterOrEqual", "LessOrEqual"}:
        matches = op.removesuffix("OrEqual") == behind[1]
        return 1.0 if matches and padding == bound - 1 and least >= padding else None
    return None


_MIRRORED: Final = {
    "Less": "Greater",
    "LessOrEqual": "GreaterOrEqual",
    "Greater": "Less",
    "GreaterOrEqual": "LessOrEqual",
    "Equal": "Equal",
}
"""The same comparison with its operands exchanged."""
_OPPOSITES: Final = {"Greater": "LessOrEqual", "GreaterOrEqual": "Less"}
"""The comparison that holds exactly where the first does not."""


def _up_to_count(ctx: Context, op: str, operands: Sequence[Value]) -> Value | None:
    """Return positions compared with the number of allowed positions, which is at most the number of own positions."""
    one, other = operands
    if one.index is not None and other.count is not None:
        position, count, relation = one, other, op
    elif other.index is not None and one.count is not None:
        position, count, relation = other, one, _MIRRORED[op]
    else:
        return None
    if ctx.is_batch or position.counts != 1:
        return None
    opposite = _OPPOSITES.get(relation)
    plus = None if position.offset is None else position.offset.number
    if plus is None or count.count is None:
        return None
    # position + plus < sum - back, or <=. Behind the end the position is no less than the sum.
    strict = (opposite or relation) == "Less"
    room = plus + count.count
    if room < (0 if strict else 1):
        return None
    layout, placed = aligned([position, count])
    (factor,) = position.index or {}
    place = placed[0][1][factor]
    # With every position allowed, each is among those that the count includes.
    allowed = relation != "Equal" and room == (0 if strict else 1)
    hidden = number(0 if opposite is None else 1)
    lit = number(1 if opposite is None else 0) if allowed else BOOLEAN
    return Value(
        layout,
        max(position.standing, count.standing),
        position.cause if position.standing >= count.standing else count.cause,
        span=BOOLEAN,
        lit=lit,
        regions={("pad", place, place): Entry(hidden, lit=hidden)},
        masks=count.masks,
        along=frozenset({place}),
        structured=frozenset({place}),
    )


def as_count(value: Value, sums: Value) -> Value:
    """Return the sum of a mask of zeros and ones, as a count of at most the sequence's own length."""
    if not value.masks or value.span != Interval(0, 1) or value.lit.only != 1 or value.structured:
        return sums
    return replace(sums, count=0, masks=value.masks)
