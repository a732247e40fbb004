"""Writes all masks of a plain site as one bias, with the rows of hidden keys as the graph has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.rewrite.fuse.carried import constant
from attnserve_server.conversion.rewrite.fuse.nodes import Extent, NewNodes, typed
from attnserve_server.conversion.rewrite.fuse.plain import MaskStep


def bias_of(
    masks: Sequence[MaskStep], query: ir.Value, key: ir.Value, new: NewNodes, *, axis: int, spare_lowest: bool
) -> ir.Value | None:
    """What all masks together add to the scores, (B or 1, H or 1, L, S); None where there are none.

    Args:
        masks: in the order in which they are applied.
        query: has L as the extent of `axis`.
        key: has S.
        new: makes the nodes.
        axis: of positions, in both.
        spare_lowest: raise the lowest number by a trifle, for a kernel that takes it for minus infinity and makes rows
            of nothing else zero, where softmax makes them uniform.
    """
    if not masks:
        return None
    dtype = query.dtype or ir.DataType.FLOAT
    lowest = float(np.finfo(dtype.numpy()).min)
    spared = float(np.nextafter(dtype.numpy().type(lowest), dtype.numpy().type(0))) if spare_lowest else lowest
    # Any number this low hides a key; one that swallows the scores also leaves rows of hidden keys uniform.
    swallows = max(lowest / 2, -1e30)
    bias: ir.Value | None = None
    for step in masks:
        value = new.rank_4(step.value)
        if step.fill is None:
            value = value if value.dtype is dtype else new.once("Cast", [value], to=int(dtype))
            bias = value if bias is None else new.once("Add", [bias, value])
            continue
        number = step.fill if np.isinf(step.fill) else max(min(step.fill, swallows), spared)
        fill, shown = new.number(number, dtype), bias if bias is not None else new.number(0, dtype)
        bias = new.once("Where", [value, *((fill, shown) if step.inverted else (shown, fill))])
    assert bias is not None
    if spare_lowest and _may_reach(masks, lowest):
        reaches = new.once("Equal", [bias, new.number(lowest, dtype)])
        bias = new.once("Where", [reaches, new.number(spared, dtype), bias])
    front: Sequence[Extent] = (None, None)
    shape = masks[0].value.shape
    if len(masks) == 1 and shape is not None:
        front = [1] * (4 - len(shape)) + list(shape)
    lengths = (_axis(query, axis), _axis(key, axis))
    if len(masks) > 1 or not _spans(front[-2:], lengths):
        # Kernels broadcast over batch and heads alone.
        extents = [new.ints(1, 1), new.extent(query, axis), new.extent(key, axis)]
        bias = new.once("Expand", [bias, new.once("Concat", extents, axis=0)])
    return typed(bias, dtype, [*front[:2], *lengths])


def _may_reach(masks: Sequence[MaskStep], number: float) -> bool:
    """Whether a bias may hold a number: a choice between two numbers holds those two, and sums may hold anything."""
    added = [step.value for step in masks if step.fill is None]
    if not added or len(masks) > 1:
        return bool(added)
    node = added[0].producer()
    chosen = [constant(one) for one in node.inputs[1:]] if node is not None and node.op_type == "Where" else [None]
    return None in chosen or number in chosen


def _axis(value: ir.Value, axis: int) -> Extent:
    return value.shape[axis] if value.shape is not None else None


def _spans(extents: Sequence[Extent], lengths: Sequence[Extent]) -> bool:
    """Whether a mask is known to have a row for every query and a column for every key."""
    pairs = zip(extents, lengths, strict=True)
    return all(one == other and not (isinstance(one, ir.SymbolicDim) and one.value is None) for one, other in pairs)
