"""Operators that move elements about without changing them: Reshape, Transpose, Squeeze, Concat, Split, Slice, Pad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from attnserve_server.build.proof.context import (
    MICROSOFT,
    Context,
    attribute,
    constant,
    joined,
    numbers,
    optional,
    required,
    rule,
    sizes_of,
)
from attnserve_server.build.proof.intervals import Interval, interval_of, number
from attnserve_server.build.proof.layout import (
    PLAIN_ONE,
    Factor,
    Layout,
    NotFollowed,
    Places,
    is_one,
    is_plain,
    ordinals,
    plain,
    reshaped,
    size_of,
    transposed,
    varying,
    without_axes,
)
from attnserve_server.build.proof.rules.sized import SizesArray, of_sizes_array, sizes_array
from attnserve_server.build.proof.sizes import ONE, Size, greater, lesser, product
from attnserve_server.build.proof.values import Entry, Region, Standing, Value


@rule("Reshape")
def reshape(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """The same elements, in row-major order, in another shape."""
    value = required(inputs, 0)
    wanted = sizes_of(required(inputs, 1))
    zeros_are_zero = bool(attribute(node, "allowzero", 0))
    sizes: list[Size | None] = []
    for at, size in enumerate(wanted):
        copies = size.number == 0 and not zeros_are_zero
        sizes.append(size_of(value.axes[at]) if copies else None if size.number == -1 else size)
    total = product(size_of(axis) for axis in value.axes)
    if None in sizes:
        known = product(size for size in sizes if size is not None)
        rest = total.over(known)
        if rest is None:
            raise NotFollowed("the size that a reshape infers is no product of known ones")
        sizes = [rest if size is None else size for size in sizes]
    return into(ctx, value, [size for size in sizes if size is not None])


def into(ctx: Context, value: Value, sizes: Sequence[Size]) -> Value:
    """A value in another shape."""
    if value.sizes is not None:
        return replace(value, layout=tuple(plain(size) for size in sizes), constant=None)
    layout = reshaped(value.axes, sizes)
    same = {place: place for place in range(len(varying(value.axes)))}
    result = value.moved(layout, same)
    result = replace(result, raw=value.raw, offset=value.offset, valid=value.valid, count=value.count)
    if value.constant is not None and all(size.number is not None for size in sizes) and is_plain_all(value.axes):
        result = replace(result, constant=value.constant.reshape([size.number or 0 for size in sizes]))
    return _with_norm(value, result)


def is_plain_all(layout: Layout) -> bool:
    """Whether no axis varies."""
    return all(is_plain(axis) for axis in layout)


def _with_norm(value: Value, result: Value) -> Value:
    """Parts of a vector are no longer than the vector."""
    if value.norm < math.inf and value.layout and result.layout and value.norm_axis == len(value.layout) - 1:
        last, new = size_of(value.layout[-1]), size_of(result.layout[-1])
        if last.over(new) is not None:
            return replace(result, norm=value.norm, norm_axis=len(result.layout) - 1)
    return result


@rule("Flatten")
def flatten(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Two axes: those before one, and those from it on."""
    value = required(inputs, 0)
    axis = attribute(node, "axis", 1)
    at = axis if axis >= 0 else axis + len(value.axes)
    sizes = [product(size_of(each) for each in part) for part in (value.axes[:at], value.axes[at:])]
    return into(ctx, value, sizes)


@rule("Transpose")
def transpose(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Axes in another order."""
    value = required(inputs, 0)
    order = attribute(node, "perm") or list(range(len(value.axes)))[::-1]
    return permuted(value, order)


def permuted(value: Value, order: Sequence[int]) -> Value:
    """A value with its axes in another order."""
    sizes = sizes_array(value)
    if sizes is not None and sizes.ndim == len(order):
        return of_sizes_array(sizes.transpose(order))
    layout, places = transposed(value.axes, order)
    result = value.moved(layout, places)
    axis = list(order).index(value.norm_axis) if value.norm < math.inf and value.norm_axis in order else -1
    content = None
    if value.constant is not None and is_plain_all(value.axes):
        content = value.constant.transpose(order)
    keeps = replace(result, raw=value.raw, offset=value.offset, valid=value.valid, constant=content)
    return replace(keeps, norm=value.norm if axis >= 0 else math.inf, norm_axis=axis)


def _axes_of(node: ir.Node, inputs: list[Value | None], rank: int) -> list[int] | None:
    given = attribute(node, "axes")
    if given is None and optional(inputs, 1) is not None:
        given = numbers(inputs[1])
        if given is None:
            raise NotFollowed("axes that are computed cannot be followed")
    return None if given is None else [axis + rank if axis < 0 else axis for axis in given]


@rule("Squeeze")
def squeeze(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Axes of one position left out."""
    value = required(inputs, 0)
    gone = _axes_of(node, inputs, len(value.axes))
    if gone is None:
        gone = [at for at, axis in enumerate(value.axes) if is_one(axis)]
    if any(not is_one(value.axes[at]) for at in gone):
        raise NotFollowed("an axis is squeezed that is not known to have one position")
    kept = [size_of(axis) for at, axis in enumerate(value.axes) if at not in gone]
    if value.sizes is not None:
        return replace(value, layout=tuple(plain(size) for size in kept), constant=None)
    layout, places = without_axes(value.axes, set(gone))
    content = None
    if value.constant is not None and is_plain_all(value.axes):
        content = value.constant.squeeze(tuple(gone))
    result = replace(value.moved(layout, places), raw=value.raw, offset=value.offset, constant=content)
    return replace(result, valid=value.valid, count=value.count)


@rule("Unsqueeze")
def unsqueeze(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Axes of one position put in."""
    value = required(inputs, 0)
    given = attribute(node, "axes") or numbers(optional(inputs, 1))
    if given is None:
        raise NotFollowed("axes that are computed cannot be followed")
    return with_axes(value, given)


def with_axes(value: Value, given: Sequence[int]) -> Value:
    """A value with axes of one position put in."""
    rank = len(value.axes) + len(given)
    added = {axis + rank if axis < 0 else axis for axis in given}
    rest = iter(range(len(value.axes)))
    old = [None if at in added else next(rest) for at in range(rank)]
    layout = tuple(PLAIN_ONE if at is None else value.axes[at] for at in old)
    if value.sizes is not None:
        return replace(value, layout=layout, constant=None)
    same = {place: place for place in range(len(varying(value.axes)))}
    result = replace(value.moved(layout, same), raw=value.raw, offset=value.offset, valid=value.valid)
    if value.constant is not None:
        result = replace(result, constant=np.expand_dims(value.constant, tuple(sorted(added))))
    axis = old.index(value.norm_axis) if value.norm < math.inf and value.norm_axis in old else -1
    return replace(result, norm=value.norm if axis >= 0 else math.inf, norm_axis=axis, count=value.count)


@rule("Concat", "ConcatFromSequence")
def concat(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Values one behind the other along an axis."""
    if node.op_type != "Concat":
        raise NotFollowed("sequences of tensors are not followed")
    values = [value for value in inputs if value is not None]
    rank = len(values[0].axes)
    axis = attribute(node, "axis", 0)
    axis = axis + rank if axis < 0 else axis
    arrays = [sizes_array(value) for value in values]
    if all(array is not None for array in arrays):
        return of_sizes_array(np.concatenate([array for array in arrays if array is not None], axis))
    return together(ctx, values, axis)


def together(ctx: Context, values: Sequence[Value], axis: int) -> Value:
    """Values one behind the other along an axis."""
    if len(values) == 1:
        return values[0]
    columns = tuple(values) if axis == len(values[0].axes) - 1 and all(is_one(v.axes[-1]) for v in values) else None
    # Places are only looked at column by column: whether they differ is asked where they are used.
    plain_values = list(values) if columns else [ctx.as_data(value) for value in values]
    parts = [value.axes[axis] for value in plain_values]
    moving = [at for at, part in enumerate(parts) if not is_plain(part)]
    joint = _joined_axis(ctx, parts, moving)
    rests = [value.axes[:axis] + (PLAIN_ONE,) + value.axes[axis + 1 :] for value in plain_values]
    wide = rests[0]
    for rest in rests[1:]:
        if [size_of(a) for a in rest] != [size_of(a) for a in wide]:
            raise NotFollowed("values of unequal shapes are joined")
        wide = tuple(one if not is_plain(one) else other for one, other in zip(wide, rest, strict=True))
    layout = wide[:axis] + (joint,) + wide[axis + 1 :]
    standing, cause = joined(plain_values)
    span, lit = plain_values[0].span, plain_values[0].lit
    for value in plain_values[1:]:
        span, lit = span.hull(value.span), lit.hull(value.lit)
    regions = _joined_regions(plain_values, layout, axis, moving)
    if joint[0].tail or (len(joint) > 1):
        lit = plain_values[moving[0]].lit if moving else lit
    masks: frozenset[str] = frozenset().union(*(value.masks for value in plain_values))
    structured = _moved_factors(plain_values, layout, axis)
    result = Value(layout, standing, cause, span=span, lit=lit, regions=regions, columns=columns)
    if any(entry.only is not None or entry.lowered for entry in regions.values()):
        result = replace(result, masks=masks, structured=structured, along=_along(plain_values, layout, axis))
    return _joined_norm(plain_values, result, axis)


def _joined_axis(ctx: Context, parts: Sequence[tuple[Factor, ...]], moving: Sequence[int]) -> tuple[Factor, ...]:
    total = size_of(parts[0])
    for part in parts[1:]:
        total += size_of(part)
    if not moving:
        return plain(total)
    if len(moving) > 1:
        raise Mixed(f"joins parts whose second one stands behind {ctx.others} of the first")
    if ctx.is_batch:
        raise Mixed("joins rows of the batch with others")
    part = parts[moving[0]]
    if len(part) != 1 or part[0].real is None:
        raise NotFollowed("a folded axis is joined with others")
    before = sum((size_of(one) for one in parts[: moving[0]]), Size.of(0))
    behind = sum((size_of(one) for one in parts[moving[0] + 1 :]), Size.of(0))
    tail = part[0].tail
    if behind.terms:
        if behind.number is None or before.terms or tail:
            raise Mixed(f"appends positions behind {ctx.others}")
        tail = behind.number
    return (Factor(total, part[0].real + before, tail),)


class Mixed(Exception):
    """A layout in which the sequence's own positions no longer stand where they stand alone. Carries the reason."""


def _joined_regions(values: Sequence[Value], layout: Layout, axis: int, moving: Sequence[int]) -> dict[Region, Entry]:
    """What all parts agree on, and along the joined axis what its varying part says."""
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
    """Where a varying factor of the joined layout is in a part's."""
    axis = varying(wide)[place][0]
    before = sum(1 for at, _ in varying(wide)[:place] if at == axis)
    own = ordinals(layout, axis)
    return own[before] if before < len(own) else None


def _moved_factors(values: Sequence[Value], layout: Layout, axis: int) -> frozenset[int]:
    found: set[int] = set()
    for value in values:
        for place in range(len(varying(layout))):
            if _place_in(value.axes, layout, place) in value.structured:
                found.add(place)
    return frozenset(found)


def _along(values: Sequence[Value], layout: Layout, axis: int) -> frozenset[int]:
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


@rule("Split", "SplitToSequence")
def split(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Parts along an axis."""
    if node.op_type != "Split":
        raise NotFollowed("sequences of tensors are not followed")
    value = required(inputs, 0)
    axis = attribute(node, "axis", 0)
    axis = axis + len(value.axes) if axis < 0 else axis
    whole = size_of(value.axes[axis])
    given = attribute(node, "split")
    count = len(node.outputs)
    if given is not None:
        parts = [Size.of(part) for part in given]
    elif optional(inputs, 1) is not None:
        parts = sizes_of(inputs[1])
    else:
        each = whole.number
        if each is None:
            raise NotFollowed("an axis of unknown length is split into equal parts")
        step = -(-each // count)
        parts = [Size.of(min(step, each - step * at)) for at in range(count)]
    results, start = [], Size.of(0)
    for part in parts:
        results.append(sliced(ctx, value, axis, start, start + part, 1))
        start += part
    return results


@rule("Slice")
def slice_(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Parts along some axes, from a start to an end, with a step."""
    value = required(inputs, 0)
    rank = len(value.axes)
    if attribute(node, "starts") is not None:
        starts, ends = ([Size.of(n) for n in attribute(node, name)] for name in ("starts", "ends"))
        axes, steps = attribute(node, "axes"), None
    else:
        starts, ends = sizes_of(required(inputs, 1)), sizes_of(required(inputs, 2))
        axes, steps = numbers(optional(inputs, 3)), numbers(optional(inputs, 4))
    axes = list(range(len(starts))) if axes is None else [axis + rank if axis < 0 else axis for axis in axes]
    steps = steps or [1] * len(starts)
    sizes = sizes_array(value)
    if sizes is not None and all(size.number is not None for size in (*starts, *ends)):
        return _sliced_sizes(sizes, starts, ends, axes, steps)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        value = sliced(ctx, value, axis, start, end, step)
    return value


def _sliced_sizes(
    sizes: SizesArray, starts: Sequence[Size], ends: Sequence[Size], axes: Sequence[int], steps: Sequence[int]
) -> Value:
    cuts = [slice(None)] * sizes.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        first, last = start.number, end.number
        cuts[axis] = slice(first, None if step < 0 and last is not None and last < -(1 << 30) else last, step)
    return of_sizes_array(sizes[tuple(cuts)])


def sliced(ctx: Context, value: Value, axis: int, start: Size, end: Size, step: int) -> Value:
    """A value from a start to an end along one axis."""
    whole = size_of(value.axes[axis])
    if step < 0:
        return _reversed(ctx, value, axis, start, end, step)
    first, last = _place(start, whole), _place(end, whole)
    if first is None or last is None:
        raise NotFollowed("it is not known where a slice begins or ends")
    if first.number == 0 and last == whole and step == 1:
        return value
    if is_plain(value.axes[axis]):
        return _of_plain(ctx, value, axis, first, last, step)
    if ctx.is_batch:
        return _selected(ctx, value, axis, "takes certain rows of the batch")
    return _of_varying(ctx, value, axis, first, last, step)


def _place(at: Size, whole: Size) -> Size | None:
    """A place along an axis, counted from its start and within it."""
    low, high = at.bounds()
    if low < 0 and high < 0:
        found = whole + at
        return greater(found, Size.of(0)) if found.bounds()[0] < 0 else found
    if low < 0:
        return None
    if at.number is not None and at.number >= 1 << 30:
        return whole
    return lesser(at, whole)


def _reversed(ctx: Context, value: Value, axis: int, start: Size, end: Size, step: int) -> Value:
    if not is_plain(value.axes[axis]):
        return _selected(ctx, value, axis, f"turns the order around, so that {ctx.others} come first")
    whole = size_of(value.axes[axis])
    if step == -1 and start.number in {-1, (1 << 63) - 1} and (end.number or 0) < -(1 << 30):
        places = {at: at for at in range(len(varying(value.axes)))}
        return value.moved(value.axes, places)
    if whole.number is None or start.number is None or end.number is None:
        raise NotFollowed("a slice backwards cannot be followed")
    count = len(range(whole.number)[slice(start.number, end.number, step)])
    return _with_axis(value, axis, plain(Size.of(count)))


def _selected(ctx: Context, value: Value, axis: int, reason: str) -> Value:
    return replace(value.bare(), layout=None, standing=Standing.DIFFERENT, cause=ctx.cause(reason), regions={})


def _of_plain(ctx: Context, value: Value, axis: int, first: Size, last: Size, step: int) -> Value:
    count = last - first
    if ctx.depends(first):
        return ctx.unknown("cuts a table at a place that depends on the padded length")
    if step != 1:
        if count.number is None:
            raise NotFollowed("a slice with a step cannot be followed")
        count = Size.of(-(-count.number // step))
    new = ctx.axis_of(count)
    result = _with_axis(value, axis, new)
    if value.constant is not None and first.number is not None and step == 1:
        result = _cut_constant(value, result, axis, first.number, count)
    if value.norm < math.inf:
        result = replace(result, norm=value.norm, norm_axis=value.norm_axis)
    return result


def _cut_constant(value: Value, result: Value, axis: int, first: int, count: Size) -> Value:
    """A part of a constant; where its length varies, all of it from the start on, of which lengths tell the rest."""
    assert value.constant is not None
    index = [slice(None)] * value.constant.ndim
    index[axis] = slice(first, first + count.number if count.number is not None else None)
    content = value.constant[tuple(index)]
    if count.number is not None and is_plain_all(value.axes):
        whole = constant(content)
        return whole if whole.layout == result.layout else replace(result, constant=content)
    return _of_triangle(replace(result, constant=content))


def _of_triangle(value: Value) -> Value:
    """What the triangles of a constant say that was cut to the sequence's length on its last two axes."""
    content, layout = value.constant, value.axes
    factors = varying(layout)
    if content is None or content.ndim < 2 or len(factors) != 2 or content.dtype.kind not in "biuf":
        return value
    axes = [axis for axis, _ in factors]
    if axes != [len(layout) - 2, len(layout) - 1] or factors[0][1].real != factors[1][1].real or content.size > 1 << 25:
        return value
    above = content[..., np.triu(np.ones(content.shape[-2:], bool), 1)]
    below = content[..., np.tril(np.ones(content.shape[-2:], bool), -1)]
    diagonal = interval_of(np.diagonal(content, axis1=-2, axis2=-1))
    regions = {
        ("above", 0, 1): Entry(interval_of(above), lit=interval_of(above)),
        ("above", 1, 0): Entry(interval_of(below), lit=interval_of(below)),
        ("pad", 1, 1): Entry(interval_of(above), lit=interval_of(above)),
        ("pad", 0, 0): Entry(interval_of(below), lit=interval_of(below)),
    }
    if interval_of(above).only is None:
        return value
    return replace(value, regions=regions, lit=diagonal, structured=frozenset({0, 1}))


def _with_axis(value: Value, axis: int, new: tuple[Factor, ...]) -> Value:
    """A value with another axis in the place of a plain one."""
    layout = (*value.axes[:axis], new, *value.axes[axis + 1 :])
    before = sum(1 for at, _ in varying(value.axes) if at < axis)
    added = sum(factor.varies for factor in new)
    places: Places = {place: place if place < before else place + added for place in range(len(varying(value.axes)))}
    raw = value.raw if value.raw.startswith("top of ") else ""
    return replace(value.moved(layout, places), raw=raw, offset=value.offset if value.index is None else None)


def _of_varying(ctx: Context, value: Value, axis: int, first: Size, last: Size, step: int) -> Value:
    parts = value.axes[axis]
    if len(parts) != 1 or parts[0].real is None:
        raise NotFollowed("a folded axis is cut")
    factor, real = parts[0], parts[0].real
    assert real is not None
    whole = factor.size
    if factor.tail:
        return _of_tailed(ctx, value, axis, first, last, step)
    places = {place: place for place in range(len(varying(value.axes)))}
    own = ordinals(value.axes, axis)[0]
    if not ctx.depends(first) and not ctx.depends(last) and (last - first).number == 1 and first.number == 0:
        return _first_position(value, axis)
    if ctx.depends(first):
        said = f"takes positions from the end, which {ctx.others} move"
        return _selected(ctx, value, axis, said)
    count, kept = last - first, _kept(ctx, real, whole, first, last)
    if step != 1:
        count, kept = (_steps(size, step) for size in (count, kept))
    if not ctx.depends(count):
        return ctx.unknown("takes so many positions, which a short sequence does not have")
    layout = (*value.axes[:axis], (Factor(count, kept),), *value.axes[axis + 1 :])
    result = value.moved(layout, places)
    if last != whole:
        # What is behind the end now were the sequence's own positions, or padding.
        entry = Entry(value.span.hull(value.pad(own).interval))
        gone = {region: known for region, known in result.regions.items() if own not in region[1:]}
        result = replace(result, regions={**gone, ("pad", own, own): entry})
    if value.index is not None and own in value.index and step == 1 and value.outer is None:
        index, offset = value.index, value.offset
        plus = index[own] * first
        return replace(result, index=index, offset=plus if offset is None else offset + plus, regions={})
    return replace(result, index=None, norm=value.norm, norm_axis=value.norm_axis)


def _kept(ctx: Context, real: Size, whole: Size, first: Size, last: Size) -> Size:
    """How many of the sequence's own positions a slice keeps, as it would alone."""
    return (real if last == whole else lesser(real, last)) - first


def _steps(size: Size, step: int) -> Size:
    from attnserve_server.build.proof.sizes import floor_div  # noqa: PLC0415 - only here

    return floor_div(size + Size.of(step - 1), Size.of(step))


def _first_position(value: Value, axis: int) -> Value:
    layout = (*value.axes[:axis], PLAIN_ONE, *value.axes[axis + 1 :])
    gone = set(ordinals(value.axes, axis))
    left = [place for place in range(len(varying(value.axes))) if place not in gone]
    result = value.moved(layout, {place: at for at, place in enumerate(left)})
    return replace(result, norm=value.norm, norm_axis=value.norm_axis)


def _of_tailed(ctx: Context, value: Value, axis: int, first: Size, last: Size, step: int) -> Value:
    """Of an axis with plain positions behind the padded ones: all but these, or only these."""
    factor = value.axes[axis][0]
    assert factor.real is not None
    own = factor.size - Size.of(factor.tail)
    places = {place: place for place in range(len(varying(value.axes)))}
    if step == 1 and first.number == 0 and last == own:
        layout = (*value.axes[:axis], (Factor(own, factor.real),), *value.axes[axis + 1 :])
        return value.moved(layout, places)
    if step == 1 and first == own and last == factor.size:
        layout = (*value.axes[:axis], plain(Size.of(factor.tail)), *value.axes[axis + 1 :])
        gone = set(ordinals(value.axes, axis))
        left = [place for place in range(len(varying(value.axes))) if place not in gone]
        return value.moved(layout, {place: at for at, place in enumerate(left)})
    raise NotFollowed("an axis with positions behind the padded ones is cut")


@rule("Pad")
def pad(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Constants, or copies, put before and behind along axes."""
    value = ctx.as_data(required(inputs, 0))
    given = attribute(node, "pads")
    amounts = [Size.of(n) for n in given] if given is not None else sizes_of(required(inputs, 1))
    filler = optional(inputs, 2)
    fill = 0.0 if filler is None and attribute(node, "value") is None else None
    if attribute(node, "value") is not None:
        fill = float(attribute(node, "value"))
    if filler is not None:
        fill = filler.span.only
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
    """Numbers put before and behind along one axis; `fill` None: not known, or copies of the value's own."""
    parts = value.axes[axis]
    total = size_of(parts) + before + behind
    span = value.span if fill is None else value.span.hull(number(fill))
    if is_plain(parts):
        if ctx.depends(total):
            return ctx.unknown("fills an axis up to the padded length")
        return replace(_with_axis(value, axis, plain(total)), span=span, lit=value.lit.hull(span))
    if ctx.is_batch:
        return _selected(ctx, value, axis, "puts rows before or behind the batch")
    if len(parts) != 1 or parts[0].real is None or parts[0].tail or ctx.depends(before):
        raise NotFollowed("a folded axis is filled up")
    if fill is None:
        return _selected(ctx, value, axis, "repeats positions at the end, where padding stands")
    own = ordinals(value.axes, axis)[0]
    entry = value.pad(own)
    same = entry.only == fill
    # Where padding is what the axis is filled up with, the filling is the same in both runs.
    real = parts[0].real + before + (behind if same else Size.of(0))
    layout = (*value.axes[:axis], (Factor(total, real),), *value.axes[axis + 1 :])
    places = {place: place for place in range(len(varying(value.axes)))}
    moved = value.moved(layout, places)
    regions = dict(moved.regions)
    regions["pad", own, own] = Entry(entry.interval.hull(number(fill)), 0.0, entry.lit.hull(number(fill)))
    if not same and entry.lowered:
        regions["pad", own, own] = Entry(Interval(wild=entry.interval.wild))
    # What every row had, it still has beside what it is filled up with.
    lit = value.lit if value.masks or value.structured else value.lit.hull(span)
    return replace(moved, span=span, lit=lit, regions=regions, index=None)


@rule("Identity", "StopGradient", domain=MICROSOFT)
def identity(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """The value itself."""
    return required(inputs, 0)


@rule("ReverseSequence")
def reverse_sequence(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Each row turned around up to its own length: what stands behind that stays where it is."""
    value, lengths = required(inputs, 0), required(inputs, 1)
    rows, time = attribute(node, "batch_axis", 1), attribute(node, "time_axis", 0)
    if ctx.is_batch and (not is_plain(value.axes[time]) or value.axes[rows] != lengths.axes[0]):
        return ctx.bad(Standing.DIFFERENT, "turns the order of the batch around")
    if not is_plain(value.axes[time]) and (lengths.count is None or lengths.count < 0):
        return ctx.unknown("turns the order of positions around, up to a length that the request gives")
    standing, cause = joined([value, ctx.as_data(replace(lengths, count=None))])
    return replace(value.bare(), standing=standing, cause=cause)


@rule("DepthToSpace", "SpaceToDepth")
def spaces(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Channels to places and back, in each row by itself."""
    value = required(inputs, 0)
    if not all(is_plain(axis) for axis in value.axes[1:]):
        return ctx.unknown("moves channels to places along the padded axis")
    block = attribute(node, "blocksize")
    batch, channels, height, width = value.axes
    by = Size.of(block * block)
    sizes = [size_of(axis) for axis in (channels, height, width)]
    if node.op_type == "DepthToSpace":
        less = sizes[0].over(by)
        more = [size * Size.of(block) for size in sizes[1:]]
    else:
        less = sizes[0] * by
        more = [size.over(Size.of(block)) or ONE for size in sizes[1:]]
    if less is None:
        raise NotFollowed("channels are no multiple of the block")
    layout = (batch, plain(less), plain(more[0]), plain(more[1]))
    return Value(layout, value.standing, value.cause, span=value.span)
