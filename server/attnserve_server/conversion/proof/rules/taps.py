"""Rows of the batch that a tap selects, as its input lists them. A tap is the nodes that return attention weights.

Index arithmetic that taps do not use returns None, or `unknown` for rows of a tensor without the batch.

The proof compares a sequence alone with the same sequence in a batch (or padded); a varying axis differs in length
between the two, and `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnserve_server.conversion.proof.context import Context
from attnserve_server.conversion.proof.layout import Axis, Layout, Places, plain, size_of, varying
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Value


def places_of_rows(op: str, operands: Sequence[Value]) -> Value | None:
    """Return the places of a tap's rows in an axis of rows, or of rows and heads. None for other operands."""
    rows = next((value for value in operands if value.items), None)
    if rows is None or len(operands) != 2:
        return None
    other = operands[1] if rows is operands[0] else operands[0]
    if other.sizes is None or other.items:
        return None
    sizes = list(other.sizes)
    if op == "Min" and len(sizes) == 1 and rows.items == "rows":
        return rows
    first = sizes[0].number if sizes and sizes[0] is not None else None
    if op == "Mul" and len(sizes) == 1 and rows.items == "rows" and first:
        return replace(rows.bare(), items=f"times:{first}")
    if op != "Add" or rows.layout is None or len(rows.axes) != 2 or size_of(rows.axes[1]).number != 1:
        return None
    layout = (rows.axes[0], plain(Size.of(len(sizes))))
    if rows.items == f"times:{len(sizes)}" and sizes == [Size.of(at) for at in range(len(sizes))]:
        return replace(rows.bare(), layout=layout, items=f"outer:{len(sizes)}")
    step = sizes[1] if len(sizes) > 1 else None
    steps = step is not None and all(size == step * Size.of(at) for at, size in enumerate(sizes))
    if rows.items == "rows" and (steps or len(sizes) == 1):
        return replace(rows.bare(), layout=layout, items=f"inner:{len(sizes)}")
    return None


def rows_of_items(ctx: Context, data: Value, index: Value, axis: int) -> Value:
    """Return the rows of a tap: the selected rows of the batch. In one row's own answer, this is the row itself."""
    data = ctx.as_data(data)
    if ctx.is_batch and not _has_items(data.axes[axis], index.items):
        return ctx.unknown("takes rows of a tensor that has no row for each sequence of the batch")
    layout = (*data.axes[:axis], *index.axes, *data.axes[axis + 1 :])
    if len(varying(layout)) != len(varying(data.axes)):
        places = inserted(data.axes, layout, axis)
    else:
        places = {place: place for place in range(len(varying(data.axes)))}
    result = data.moved(layout, places)
    return replace(result, norm=data.norm, norm_axis=data.norm_axis)


def _has_items(axis: Axis, items: str) -> bool:
    """Return whether indices of rows are places of rows along this axis."""
    if size_of(axis).number == 1:
        return items == "rows"
    kind, _, heads = items.partition(":")
    if kind == "rows":
        return len(axis) == 1 and axis[0].varies
    if len(axis) != 2 or kind == "times":
        return False
    row, head = axis if kind == "outer" else axis[::-1]
    return row.varies and not head.varies and head.size.number == int(heads)


def inserted(old: Layout, new: Layout, axis: int) -> Places:
    """Return the places of varying factors after an axis was replaced by others."""
    before = sum(1 for at, _ in varying(old) if at < axis)
    gone = sum(1 for at, _ in varying(old) if at == axis)
    more = sum(1 for at, _ in varying(new) if at == axis)
    return {
        place: place if place < before else place - gone + more
        for place in range(len(varying(old)))
        if not before <= place < before + gone
    }
