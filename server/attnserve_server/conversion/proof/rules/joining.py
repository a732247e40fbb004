"""The rule of Concat. At most one part may vary along the joined axis.

A part behind the varying one makes the sequence's own positions move, which raises `Mixed`. Parts of unequal shapes
raise `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.proof.context import Context, rule
from attnserve_server.conversion.proof.helpers import attribute, joined
from attnserve_server.conversion.proof.intervals import Interval
from attnserve_server.conversion.proof.layout import (
    PLAIN_ONE,
    Factor,
    Layout,
    Mixed,
    NotFollowed,
    is_one,
    is_plain,
    ordinals,
    plain,
    size_of,
    varying,
)
from attnserve_server.conversion.proof.rules.sized import of_sizes_array, sizes_array
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Entry, Region, Value


@rule("Concat", "ConcatFromSequence")
def concat(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return values concatenated along an axis."""
    if node.op_type != "Concat":
        raise NotFollowed("uses sequences of tensors, which the proof does not support")
    values = [value for value in inputs if value is not None]
    rank = len(values[0].axes)
    axis = attribute(node, "axis", 0)
    axis = axis + rank if axis < 0 else axis
    arrays = [sizes_array(value) for value in values]
    if all(array is not None for array in arrays):
        joint = np.concatenate([array for array in arrays if array is not None], axis)
        return of_sizes_array(joint, floating=any(value.floating for value in values))
    return together(ctx, values, axis)


def together(ctx: Context, values: Sequence[Value], axis: int) -> Value:
    """Return values concatenated along an axis.

    Raises:
        Mixed: Positions are appended behind padding, or rows behind rows.
        NotFollowed: The parts have unequal shapes, or the axis was merged with others.
    """
    if len(values) == 1:
        return values[0]
    columns = tuple(values) if axis == len(values[0].axes) - 1 and all(is_one(v.axes[-1]) for v in values) else None
    # Indices are read column by column later. Whether they differ is decided where they are used.
    plain_values = list(values) if columns else [ctx.as_data(value) for value in values]
    parts = [value.axes[axis] for value in plain_values]
    moving = [at for at, part in enumerate(parts) if not is_plain(part)]
    joint = _joined_axis(ctx, parts, moving)
    rests = [(*value.axes[:axis], PLAIN_ONE, *value.axes[axis + 1 :]) for value in plain_values]
    wide = rests[0]
    for rest in rests[1:]:
        if [size_of(a) for a in rest] != [size_of(a) for a in wide]:
            raise NotFollowed("concatenates tensors of unequal shapes")
        wide = tuple(one if not is_plain(one) else other for one, other in zip(wide, rest, strict=True))
    layout = (*wide[:axis], joint, *wide[axis + 1 :])
    standing, cause = joined(plain_values)
    span, lit = plain_values[0].span, plain_values[0].lit
    for value in plain_values[1:]:
        span, lit = span.hull(value.span), lit.hull(value.lit)
    regions = _joined_regions(plain_values, layout, axis, moving)
    if joint[0].tail or (len(joint) > 1):
        lit = plain_values[moving[0]].lit if moving else lit
    masks: frozenset[str] = frozenset().union(*(value.masks for value in plain_values))
    structured = _moved_factors(plain_values, layout)
    result = Value(layout, standing, cause, span=span, lit=lit, regions=regions, columns=columns)
    if any(entry.only is not None or entry.lowered for entry in regions.values()):
        result = replace(result, masks=masks, structured=structured, along=_along(plain_values, layout))
    return _joined_norm(plain_values, result, axis)


def _joined_axis(ctx: Context, parts: Sequence[tuple[Factor, ...]], moving: Sequence[int]) -> tuple[Factor, ...]:
    total = size_of(parts[0])
    for part in parts[1:]:
        total += size_of(part)
    if not moving:
        return plain(total)
    if len(moving) > 1:
        raise Mixed(f"appends a varying part behind {ctx.others} of another one")
    if ctx.is_batch:
        raise Mixed("appends rows to the batch")
    part = parts[moving[0]]
    if len(part) != 1 or part[0].real is None:
        raise NotFollowed("concatenates along an axis that was merged with others")
    before = sum((size_of(one) for one in parts[: moving[0]]), Size.of(0))
    behind = sum((size_of(one) for one in parts[moving[0] + 1 :]), Size.of(0))
    tail = part[0].tail
    if behind.terms:
        if behind.number is None or before.terms or tail:
            raise Mixed(f"appends positions behind {ctx.others}")
        tail = behind.number
    return (Factor(total, part[0].real + before, tail),)


def _joined_regions(values: Sequence[Value], layout: Layout, axis: int, moving: Sequence[int]) -> dict[Region, Entry]:
    """Return what all parts have in common and, along the joined axis, what holds of its varying part."""
    regions: dict[Region, Entry] = {}
    for place, (at, _) in enumerate(varying(layout)):
        entries = []
        for number_, value in enumerate(values):
            if at == axis and number_ not in moving:
                continue
            own = _place_in(value.axes, layout, place)
            entries.append(value.pad(own) if own is not None else Entry(value.span, lit=value.lit))
        if not entries:
            continue
        entry = entries[0]
        for other in entries[1:]:
            if other.lowered != entry.lowered:
                entry = Entry(Interval(wild=entry.interval.wild | other.interval.wild))
            else:
                entry = Entry(entry.interval.hull(other.interval), entry.lowered, entry.lit.hull(other.lit))
        regions["pad", place, place] = entry
    return regions


def _place_in(layout: Layout, wide: Layout, place: int) -> int | None:
    """Return the place of a varying factor of the joined layout within a part's layout."""
    axis = varying(wide)[place][0]
    before = sum(1 for at, _ in varying(wide)[:place] if at == axis)
    own = ordinals(layout, axis)
    return own[before] if before < len(own) else None


def _moved_factors(values: Sequence[Value], layout: Layout) -> frozenset[int]:
    found: set[int] = set()
    for value in values:
        for place in range(len(varying(layout))):
            if _place_in(value.axes, layout, place) in value.structured:
                found.add(place)
    return frozenset(found)


def _along(values: Sequence[Value], layout: Layout) -> frozenset[int]:
    found: set[int] = set()
    for value in values:
        for place in range(len(varying(layout))):
            if _place_in(value.axes, layout, place) in value.along:
                found.add(place)
    return frozenset(found)


def _joined_norm(values: Sequence[Value], result: Value, axis: int) -> Value:
    if axis == len(result.axes) - 1 and all(value.norm < math.inf and value.norm_axis == axis for value in values):
        return replace(result, norm=math.hypot(*(value.norm for value in values)), norm_axis=axis)
    return result
