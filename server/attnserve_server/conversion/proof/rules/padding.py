"""The rule of Pad: constants, or copies of elements, before and after the elements of an axis.

Copies at the end of the varying axis make the result different. A merged axis, or an unknown amount, raises
`NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from attnserve_server.conversion.proof.context import Context, rule
from attnserve_server.conversion.proof.helpers import attribute, joined, numbers, optional, required, sizes_of
from attnserve_server.conversion.proof.intervals import Interval, number
from attnserve_server.conversion.proof.layout import Factor, NotFollowed, is_plain, ordinals, plain, size_of, varying
from attnserve_server.conversion.proof.rules.slicing import selected, with_new_axis
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Entry, Value


@rule("Pad")
def pad(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return a value with constants, or copies, added before and behind along axes."""
    value = ctx.as_data(required(inputs, 0))
    given = attribute(node, "pads")
    amounts = [Size.of(n) for n in given] if given is not None else sizes_of(required(inputs, 1))
    filler = optional(inputs, 2)
    fill = 0.0 if filler is None and attribute(node, "value") is None else None
    if attribute(node, "value") is not None:
        fill = float(attribute(node, "value"))
    if filler is not None:
        filler = ctx.as_data(filler)
        fill = filler.span.only
        standing, cause = joined([value, filler])
        value = replace(value, standing=standing, cause=cause)
    axes = numbers(optional(inputs, 3)) or list(range(len(value.axes)))
    mode = attribute(node, "mode", "constant")
    half = len(amounts) // 2
    for at, axis in enumerate(axes):
        before, behind = amounts[at], amounts[at + half]
        if before.number == 0 and behind.number == 0:
            continue
        value = padded(ctx, value, axis % len(value.axes), before, behind, fill if mode == "constant" else None)
    return value


def padded(ctx: Context, value: Value, axis: int, before: Size, behind: Size, fill: float | None) -> Value:
    """Return a value with numbers added before and behind along one axis.

    Args:
        ctx: The interpretation.
        value: The value.
        axis: The axis.
        before: The number of positions added before.
        behind: The number of positions added behind; negative ones are removed.
        fill: The number that is added. None: not known, or copies of the value's elements.
    """
    parts = value.axes[axis]
    total = size_of(parts) + before + behind
    span = value.span if fill is None else value.span.hull(number(fill))
    if is_plain(parts):
        if ctx.depends(total):
            return ctx.unknown("fills an axis up to the padded length")
        return replace(with_new_axis(value, axis, plain(total)), span=span, lit=value.lit.hull(span))
    if ctx.is_batch:
        return selected(ctx, value, "adds rows before or behind the batch")
    if len(parts) != 1 or parts[0].real is None or parts[0].tail or ctx.depends(before):
        raise NotFollowed("pads an axis that was merged with others")
    cuts = behind.bounds()[0] < 0
    if before.bounds()[0] < 0 or (cuts and behind.number is None):
        raise NotFollowed("a Pad cuts off an unknown number of positions")
    if fill is None:
        return selected(ctx, value, "repeats positions at the end, where the padding is")
    own = ordinals(value.axes, axis)[0]
    entry = value.pad(own)
    same = entry.only == fill
    # Where the filling equals the padding, it is the same in both runs.
    real = parts[0].real + before + (behind if same or cuts else Size.of(0))
    layout = (*value.axes[:axis], (Factor(total, real),), *value.axes[axis + 1 :])
    places = {place: place for place in range(len(varying(value.axes)))}
    moved = value.moved(layout, places)
    regions = dict(moved.regions)
    regions["pad", own, own] = Entry(entry.interval.hull(number(fill)), 0.0, entry.lit.hull(number(fill)))
    if not same and entry.lowered:
        regions["pad", own, own] = Entry(Interval(wild=entry.interval.wild))
    if cuts:  # the sequence's own last positions are now in the padding
        regions["pad", own, own] = Entry(span.hull(entry.interval))
    # Each row keeps its visible elements beside the filling, in the same places if nothing is added before them.
    keeps = (value.masks or value.structured) and not cuts and not (before.terms and own in value.structured)
    lit = value.lit if keeps else value.lit.hull(span)
    dropped = replace(moved, index=None, offset=None, outer=None, below=None, symbols=value.dependence)
    return replace(dropped, span=span, lit=lit, regions=regions)
