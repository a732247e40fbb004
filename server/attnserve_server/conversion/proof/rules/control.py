"""The rules of operators with subgraphs, and of recurrent operators: If, Loop, Scan, LSTM, GRU, RNN.

A state that is carried over padded positions, or over rows of the batch, makes the result different. A loop whose
states find no bound raises `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import onnx_ir as ir

from attnserve_server.conversion.proof.context import Context, rule
from attnserve_server.conversion.proof.helpers import attribute, joined, numbers, optional, required, wild_anywhere
from attnserve_server.conversion.proof.intervals import Interval
from attnserve_server.conversion.proof.layout import (
    Layout,
    NotFollowed,
    Places,
    is_plain,
    plain,
    varying,
    without_axes,
)
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Entry, Standing, Value

_ROUNDS: Final = 6
"""The maximum number of interpretations of a body until the abstract values of its states no longer change."""


def _graph(node: ir.Node, name: str) -> ir.Graph:
    graph = node.attributes[name].value
    assert isinstance(graph, ir.Graph)
    return graph


def _run(ctx: Context, graph: ir.Graph, given: Sequence[Value]) -> list[Value]:
    assert ctx.run_graph is not None
    node = ctx.node
    found = ctx.run_graph(graph, dict(zip(graph.inputs, given, strict=True)))
    ctx.node = node
    return found


def either(ctx: Context, one: Value, other: Value) -> Value:
    """Return what holds of both of two values. The actual value is one of them."""
    if one == other:
        return one
    if one.sizes is not None and one.sizes == other.sizes and one.layout == other.layout:
        return replace(_plain(one), sizes=one.sizes, symbols=one.symbols | other.symbols)
    one, other = _plain(ctx.as_data(one)), _plain(ctx.as_data(other))
    standing, cause = joined([one, other])
    if one.layout is None or other.layout is None or one.layout != other.layout:
        return Value(None, max(standing, Standing.UNKNOWN), cause or ctx.cause("joins values of unequal axes"))
    span = one.span.hull(other.span)
    regions = {region: _hull(one.regions[region], other.regions[region]) for region in one.regions}
    return Value(one.layout, standing, cause, span=span, lit=span, regions=regions, symbols=one.symbols | other.symbols)


def _plain(value: Value) -> Value:
    """Return the facts that hold for any content: axes, standing and intervals."""
    if value.layout is None:
        return Value(None, value.standing, value.cause, symbols=value.symbols)
    wild = wild_anywhere(value)
    span = replace(value.span, wild=wild)
    regions = {}
    for at in range(len(varying(value.layout))):
        entry = value.pad(at)
        interval = entry.interval if not entry.lowered else Interval(wild=entry.interval.wild)
        regions["pad", at, at] = Entry(interval, lit=interval)
    return Value(value.layout, value.standing, value.cause, span=span, lit=span, regions=regions, symbols=value.symbols)


def _hull(one: Entry, other: Entry) -> Entry:
    interval = one.interval.hull(other.interval)
    return Entry(interval, lit=interval)


@rule("If", shapes_only=True)
def if_(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return the outputs of one of two graphs, by a condition. A condition that differs makes the outputs different."""
    condition = ctx.as_data(required(inputs, 0))
    then, other = (_graph(node, name) for name in ("then_branch", "else_branch"))
    if condition.span.only is not None and condition.standing is Standing.EQUAL:
        return _run(ctx, then if condition.span.only else other, [])
    known = numbers(condition)
    if known is not None and len(known) == 1:
        return _run(ctx, then if known[0] else other, [])
    both = [either(ctx, *pair) for pair in zip(_run(ctx, then, []), _run(ctx, other, []), strict=True)]
    if condition.standing is Standing.EQUAL:
        return both
    kind = condition.standing
    reason = condition.cause.reason if condition.cause else ""
    cause = ctx.cause(f"chooses between two graphs by a condition that {reason or 'differs'}")
    return [replace(value.bare(), standing=max(kind, value.standing), cause=cause) for value in both]


def _fixed_point(
    ctx: Context, body: ir.Graph, first: Sequence[Value], states: list[Value], last: Sequence[Value]
) -> list[Value]:
    """Return all outputs of a body, once the values of its states hold before and after each iteration."""
    states[:] = [_plain(ctx.as_data(state)) for state in states]
    for iteration in range(_ROUNDS):
        outputs = _run(ctx, body, [*first, *states, *last])
        own = outputs[1 if first else 0 :][: len(states)]
        joint = [_plain(either(ctx, state, new)) for state, new in zip(states, own, strict=True)]
        if joint == states:
            return outputs
        states[:] = [_widened(value) if iteration > 1 else value for value in joint]
    raise NotFollowed("carries a state for which no bound is found")


def _widened(value: Value) -> Value:
    wild = Interval(wild=value.span.wild | 7 if value.span.wild else 0)
    regions = {region: Entry(wild, lit=wild) for region in value.regions}
    return replace(value, span=wild, lit=wild, regions=regions)


@rule("Loop", shapes_only=True)
def loop(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return the outputs of a repeated graph.

    Its number of iterations must not depend on the batch or the padded length.
    """
    body = _graph(node, "body")
    most, condition = optional(inputs, 0), optional(inputs, 1)
    given = [value for value in (most, condition) if value is not None]
    standing, cause = joined([ctx.as_data(value) for value in given])
    states = [required(inputs, at) for at in range(2, len(inputs))]
    iteration = Value((), span=Interval(0, float("inf")), lit=Interval(0, float("inf")))
    truth = Value((), span=Interval(0, 1), lit=Interval(0, 1))
    outputs = _fixed_point(ctx, body, [iteration, truth], states, [])
    if outputs[0].standing > standing:
        standing, cause = outputs[0].standing, outputs[0].cause
    if standing is Standing.DIFFERENT:
        cause = ctx.cause(
            f"repeats a graph a number of times that depends on {'the batch' if ctx.is_batch else 'the padded length'}"
        )
    found = [_worse(either(ctx, state, new), standing, cause) for state, new in zip(states, outputs[1:], strict=False)]
    scans = outputs[1 + len(states) :]
    count = most.sizes[0] if most is not None and most.sizes else None
    always = condition is None or condition.span.only == 1
    for value in scans:
        if count is None or not always or ctx.depends(count) or value.layout is None:
            found.append(ctx.unknown("collects one result for each iteration of a loop"))
        else:
            found.append(_worse(_stacked(value, plain(count), 0), standing, cause))
    return found


def _worse(value: Value, standing: Standing, cause: object) -> Value:
    if standing <= value.standing:
        return value
    return replace(value, standing=standing, cause=cause)  # type: ignore[arg-type]


def _stacked(value: Value, axis: Layout | tuple[object, ...], at: int) -> Value:
    layout = (*value.axes[:at], axis, *value.axes[at:])
    before = len(varying(value.axes[:at]))
    added = sum(1 for factor in axis if getattr(factor, "varies", False))
    places: Places = {place: place if place < before else place + added for place in range(len(varying(value.axes)))}
    return value.bare().moved(layout, places)  # type: ignore[arg-type]


@rule("Scan", shapes_only=True)
def scan(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return the outputs of a graph that runs over the positions of an axis.

    Its final states depend on all positions.
    """
    body, count = _graph(node, "body"), int(attribute(node, "num_scan_inputs"))
    given = [ctx.as_data(required(inputs, at)) for at in range(len(inputs))]
    states, sources = list(given[: len(given) - count]), given[len(given) - count :]
    axes = attribute(node, "scan_input_axes") or [0] * count
    backwards = attribute(node, "scan_input_directions") or [0] * count
    scanned = [(value, axis % len(value.axes)) for value, axis in zip(sources, axes, strict=True)]
    axis = scanned[0][0].axes[scanned[0][1]]
    if any(value.axes[at] != axis for value, at in scanned) or any(factor.tail for factor in axis):
        raise NotFollowed("scans axes that are not known to have the same positions")
    outputs = _fixed_point(ctx, body, [], states, [_without(value, at) for value, at in scanned])
    finals = [either(ctx, state, new) for state, new in zip(states, outputs, strict=False)]
    scans = outputs[len(states) :]
    places = attribute(node, "scan_output_axes") or [0] * len(scans)
    output_directions = attribute(node, "scan_output_directions") or [0] * len(scans)
    stacked = []
    for value, at, direction in zip(scans, places, output_directions, strict=True):
        where = at if at >= 0 else len(value.axes) + 1 + at
        result = _stacked(value, axis, where)
        if direction and not is_plain(axis):
            result = _worse(result, Standing.DIFFERENT, ctx.cause("reverses the order of positions"))
        stacked.append(result)
    if is_plain(axis):
        return [*finals, *stacked]
    if ctx.is_batch:
        cause = ctx.cause("carries a state from one row of the batch to the next")
        return [_worse(value, Standing.DIFFERENT, cause) for value in (*finals, *stacked)]
    if any(backwards):
        cause = ctx.cause("runs over positions from the end, where the padding is")
        return [_worse(value, Standing.DIFFERENT, cause) for value in (*finals, *stacked)]
    cause = ctx.cause("carries a state over padded positions before it is read")
    return [*(_worse(value, Standing.DIFFERENT, cause) for value in finals), *stacked]


def _without(value: Value, axis: int) -> Value:
    """Return one position of a scanned axis."""
    layout, places = without_axes(value.axes, {axis})
    return value.bare().moved(layout, places)


@rule("LSTM", "GRU", "RNN")
def recurrent(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return the outputs of a recurrent layer over (T, B, D), or (B, T, D) with layout 1.

    Rows are independent. Each position depends on those before it.
    """
    value = ctx.as_data(required(inputs, 0))
    time, batch = (1, 0) if attribute(node, "layout", 0) else (0, 1)
    hidden = int(attribute(node, "hidden_size"))
    direction = attribute(node, "direction", "forward")
    both = direction == "bidirectional"
    others = [ctx.as_data(other) for at, other in enumerate(inputs[1:], 1) if other is not None and at != 4]
    standing, cause = joined([value, *others])
    if not is_plain(value.axes[2]):
        standing, cause = Standing.DIFFERENT, ctx.cause(f"sums over {ctx.others} too")
    if not is_plain(value.axes[time]) and (len(value.axes[time]) != 1 or value.axes[time][0].tail):
        raise NotFollowed("runs over a folded axis")
    count = plain(Size.of(2 if both else 1))
    rows, steps, width = value.axes[batch], value.axes[time], plain(Size.of(hidden))
    if time == 0:
        layouts: list[Layout] = [(steps, count, rows, width), (count, rows, width), (count, rows, width)]
    else:
        layouts = [(rows, steps, count, width), (rows, count, width), (rows, count, width)]
    lengths = optional(inputs, 4)
    counted = lengths is not None and lengths.count == 0
    if counted and lengths is not None:
        ctx.need(lengths.masks, everything=False)
    verdicts = [(standing, cause)] * 3
    if not is_plain(steps) and not ctx.is_batch and not counted:
        why = "carries a state over padded positions before it is read"
        verdicts[1:] = [(Standing.DIFFERENT, ctx.cause(why))] * 2
        if direction != "forward":
            verdicts = [(Standing.DIFFERENT, ctx.cause("runs over positions from the end, where the padding is"))] * 3
    elif lengths is not None and not counted and ctx.as_data(lengths).standing > standing:
        verdicts = [(ctx.as_data(lengths).standing, ctx.as_data(lengths).cause)] * 3
    if not is_plain(steps) and ctx.is_batch:
        verdicts = [(Standing.DIFFERENT, ctx.cause("carries a state from one row of the batch to the next"))] * 3
    span = Interval()
    found = [Value(layout, *verdict, span=span, lit=span) for layout, verdict in zip(layouts, verdicts, strict=True)]
    return found[: len(node.outputs)]
