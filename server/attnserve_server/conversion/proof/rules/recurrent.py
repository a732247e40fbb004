"""The rules of operators that run over positions with a state: LinearAttention and CausalConvWithState.

Each position depends on itself, on earlier ones, and on the state before the first. Padding is behind the sequence's
own positions, so that only the state after the last position depends on it. A folded axis of positions, and positions
behind the padding, raise `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import onnx_ir as ir

from attnserve_server.conversion.proof.context import MICROSOFT, Context, rule
from attnserve_server.conversion.proof.helpers import attribute, joined, optional, required
from attnserve_server.conversion.proof.layout import Layout, NotFollowed, alike, is_plain, merged, plain, size_of
from attnserve_server.conversion.proof.rules.reshaping import into
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Standing, Value


@rule("LinearAttention")
@rule("LinearAttention", domain=MICROSOFT)
def linear_attention(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return sums of values up to each position, and the state after the last. Source: ONNX LinearAttention-27."""
    given = [ctx.as_data(value) for value in inputs if value is not None]
    query, value = ctx.as_data(required(inputs, 0)), ctx.as_data(required(inputs, 2))
    summed = [one for at in (0, 1, 4, 5) if (one := optional(inputs, at)) is not None]
    _require_same_positions(ctx, [*summed, value], 1)
    if not all(is_plain(one.axes[2]) for one in summed):
        raise NotFollowed("sums over features that are padded")
    heads, kv_heads = int(attribute(node, "q_num_heads")), int(attribute(node, "kv_num_heads"))
    width = size_of(value.axes[2]).over(Size.of(kv_heads))
    if width is None:
        raise NotFollowed("the width is not divisible by the number of heads")
    batch, positions = query.axes[:2]
    columns = into(value, [size_of(batch), size_of(positions), Size.of(kv_heads), width]).axes[3]
    standing, cause = joined(given)
    found = Value((batch, positions, merged((*plain(Size.of(heads)), *columns))), standing, cause)
    features = size_of(query.axes[2]).over(Size.of(heads))
    if features is None or attribute(node, "state_window", 0):
        state = ctx.unknown("returns states in a form that the proof does not support")
    else:
        state = _state(ctx, found, (batch, plain(Size.of(kv_heads)), plain(features), columns))
    return [found, state][: len(node.outputs)]


@rule("CausalConvWithState", domain=MICROSOFT)
def causal_convolution(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return a convolution of each channel that ends at each position, and its last positions.

    Source: onnxruntime's contrib operator CausalConvWithState.
    """
    if attribute(node, "ndim", 1) != 1 or attribute(node, "channels_last", 0) or attribute(node, "input_channels", 0):
        raise NotFollowed("the proof does not support a convolution over several axes, or with channels last")
    source = ctx.as_data(required(inputs, 0))
    _require_same_positions(ctx, [source], 2)
    weights = required(inputs, 1)
    if not is_plain(source.axes[1]) or weights.varies:
        raise NotFollowed("convolves padded channels, or by computed weights")
    standing, cause = joined([ctx.as_data(value) for value in inputs if value is not None])
    found = Value(source.layout, standing, cause)
    kept = (size_of(weights.axes[2]) - Size.of(1)) * Size.of(attribute(node, "dilation", 1))
    state = _state(ctx, found, (*source.axes[:2], plain(kept)))
    return [found, state, ctx.unknown("returns updates of its state")][: len(node.outputs)]


def _require_same_positions(ctx: Context, values: list[Value], axis: int) -> None:
    """Raise NotFollowed unless the values share one axis of rows, and one of positions that are padded at the end."""
    first = values[0].axes
    for value in values:
        if len(value.axes) != 3 or not all(alike(value.axes[at], first[at]) for at in (0, axis)):
            raise NotFollowed("combines values whose positions are not known to be the same")
    positions = first[axis]
    if ctx.is_batch and not is_plain(positions):
        raise NotFollowed("carries a state over the rows of the batch")
    if not is_plain(positions) and (len(positions) != 1 or positions[0].tail):
        raise NotFollowed("carries a state over a folded axis")


def _state(ctx: Context, found: Value, layout: Layout) -> Value:
    """Return the state after the last position."""
    if ctx.is_batch or not found.varies:
        return Value(layout, found.standing, found.cause)
    return Value(layout, Standing.DIFFERENT, ctx.cause("returns its state after padded positions"))
