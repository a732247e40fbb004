"""The rules of operators that change only the shape or the order of axes: Reshape, Transpose, Squeeze, Unsqueeze.

A reshape that splits the varying axis, and shapes or axes that are not known, raise `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.proof.context import MICROSOFT, Context, rule
from attnserve_server.conversion.proof.helpers import attribute, numbers, optional, required, sizes_of
from attnserve_server.conversion.proof.layout import (
    PLAIN_ONE,
    NotFollowed,
    is_one,
    is_plain,
    is_plain_all,
    plain,
    reshaped,
    size_of,
    transposed,
    varying,
    without_axes,
)
from attnserve_server.conversion.proof.rules.sized import of_sizes_array, sizes_array
from attnserve_server.conversion.proof.sizes import ONE, Size, product
from attnserve_server.conversion.proof.values import Value


@rule("Reshape")
def reshape(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the same elements, in row-major order, in another shape."""
    value = required(inputs, 0)
    shape = sizes_of(required(inputs, 1))
    zeros_are_zero = bool(attribute(node, "allowzero", 0))
    sizes: list[Size | None] = []
    for at, size in enumerate(shape):
        copies = size.number == 0 and not zeros_are_zero
        sizes.append(size_of(value.axes[at]) if copies else None if size.number == -1 else size)
    total = product(size_of(axis) for axis in value.axes)
    if None in sizes:
        known = product(size for size in sizes if size is not None)
        rest = total.over(known)
        if rest is None:
            raise NotFollowed("the size that a reshape infers is not known")
        sizes = [rest if size is None else size for size in sizes]
    return into(value, [size for size in sizes if size is not None])


def into(value: Value, sizes: Sequence[Size]) -> Value:
    """Return a value in another shape."""
    if value.sizes is not None:
        return replace(value, layout=tuple(plain(size) for size in sizes), constant=None)
    layout = reshaped(value.axes, sizes)
    same = {place: place for place in range(len(varying(value.axes)))}
    result = value.moved(layout, same)
    result = replace(result, raw=value.raw, offset=value.offset, valid=value.valid, count=value.count)
    if value.constant is not None and all(size.number is not None for size in sizes) and is_plain_all(value.axes):
        result = replace(result, constant=value.constant.reshape([size.number or 0 for size in sizes]))
    return _with_norm(value, result)


def _with_norm(value: Value, result: Value) -> Value:
    """Return the result with the norm of the value: a part of a vector is no longer than the vector."""
    if value.norm < math.inf and value.layout and result.layout and value.norm_axis == len(value.layout) - 1:
        last, new = size_of(value.layout[-1]), size_of(result.layout[-1])
        if last.over(new) is not None:
            return replace(result, norm=value.norm, norm_axis=len(result.layout) - 1)
    return result


@rule("Flatten")
def flatten(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the value with two axes: those before one, and those from it on."""
    value = required(inputs, 0)
    axis = attribute(node, "axis", 1)
    at = axis if axis >= 0 else axis + len(value.axes)
    sizes = [product(size_of(each) for each in part) for part in (value.axes[:at], value.axes[at:])]
    return into(value, sizes)


@rule("Transpose")
def transpose(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the value with its axes in another order."""
    value = required(inputs, 0)
    order = attribute(node, "perm") or list(range(len(value.axes)))[::-1]
    return permuted(value, order)


def permuted(value: Value, order: Sequence[int]) -> Value:
    """Return a value with its axes in another order."""
    sizes = sizes_array(value)
    if sizes is not None and sizes.ndim == len(order):
        return of_sizes_array(sizes.transpose(order), floating=value.floating)
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
            raise NotFollowed("the proof cannot follow computed axes")
    return None if given is None else [axis + rank if axis < 0 else axis for axis in given]


@rule("Squeeze")
def squeeze(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the value without axes of one position."""
    value = required(inputs, 0)
    gone = _axes_of(node, inputs, len(value.axes))
    if gone is None:
        if any(size_of(axis).number is None for axis in value.axes):
            raise NotFollowed("squeezes every axis of one position, which may include a dynamic axis")
        gone = [at for at, axis in enumerate(value.axes) if is_one(axis)]
    if any(not is_one(value.axes[at]) for at in gone):
        raise NotFollowed("squeezes an axis that is not known to have one position")
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
    """Return the value with additional axes of one position."""
    value = required(inputs, 0)
    given = attribute(node, "axes") or numbers(optional(inputs, 1))
    if given is None:
        raise NotFollowed("the proof cannot follow computed axes")
    return with_axes(value, given)


def with_axes(value: Value, given: Sequence[int]) -> Value:
    """Return a value with additional axes of one position."""
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


@rule("Identity", "StopGradient", domain=MICROSOFT)
def identity(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the value itself."""
    return required(inputs, 0)


@rule("DepthToSpace", "SpaceToDepth")
def spaces(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return channels moved to places or back, in each row separately."""
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
        raise NotFollowed("splits channels that are not divisible by the block")
    layout = (batch, plain(less), plain(more[0]), plain(more[1]))
    return Value(layout, value.standing, value.cause, span=value.span)
