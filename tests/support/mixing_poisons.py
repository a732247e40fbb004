"""Pieces of generated graphs that let padding into a sequence's own part.

A poison takes the graph in construction (`Context`) and a `Stream`: a value (B, T, width) with what is known of it. It
adds nodes, and returns a stream whose state names the fault. Without a mask, those of `OF_PADDING_WITH_MASK` raise
AssertionError, and `wrongly_masked` raises KeyError unless `wrong_masks` has one for the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from mixing_along import recurrent, scanned
from mixing_attention import HIDING, Plan, attend, fused
from mixing_masked import convolution, numbered, shifted
from mixing_values import Context, Stream, tainted
from onnx import TensorProto, helper

Poison = Callable[[Context, Stream], Stream]


def _added(context: Context, stream: Stream, number: str, *faults: tuple[str, str]) -> Stream:
    """The stream plus a number, or one for each row (B, 1, 1), times a drawn vector, which no norm removes."""
    writer = context.writer
    vector = writer.const(writer.drawn(stream.width, scale=1.0))
    return tainted(stream, writer.op("Add", stream.name, writer.op("Mul", number, vector)), *faults)


def _length(context: Context, stream: Stream, axis: int = 1) -> str:
    return context.writer.cast(context.writer.length(stream.name, axis), TensorProto.FLOAT)


# Of padding.


def unmasked_attention(context: Context, stream: Stream) -> Stream:
    """Every key counts, padded ones too."""
    if context.writer.rng.random() < 0.5:
        return fused(context, stream, poison=True)
    return attend(context, stream, stream, Plan())


def small_mask(context: Context, stream: Stream) -> Stream:
    """A finite mask of -10: some hundred padded keys get weight."""
    return attend(context, stream, stream, Plan(hiding="add -1e4", filler=context.writer.pick(-5.0, -10.0)))


def raw_mask(context: Context, stream: Stream) -> Stream:
    """A finite mask over scores of any size."""
    return attend(context, stream, stream, Plan(hiding=context.writer.pick("add -1e4", "where -1e4", "add -1e9")))


def wrong_softmax(context: Context, stream: Stream) -> Stream:
    """A softmax over queries."""
    hiding = context.writer.pick("", *HIDING[:5]) if stream.symbol in context.masks else ""
    return attend(context, stream, stream, Plan(hiding=hiding, wrong_softmax=True))


def log_length(context: Context, stream: Stream) -> Stream:
    """Scores times the logarithm of the padded length.

    Not under a causal frontier: the first position has one key, whose weight is 1 at any scale.
    """
    if stream.symbol not in context.masks:
        return length_scalar(context, stream)
    return attend(context, stream, stream, Plan(hiding="add -inf", log_length=True))


def unmasked_pool(context: Context, stream: Stream) -> Stream:
    """A mean, sum, maximum or last element over all positions, added to each."""
    writer, value = context.writer, stream.name
    kinds = ["Mean", "Max", "Min", "last", "LogSumExp", "global", "L2", "Sum"]
    kind = writer.pick(*kinds)
    if kind in {"L2", "Sum"}:
        value = shifted(context, stream).name
    elif kind in {"Max", "Min", "last", "global"}:
        value = numbered(context, stream).name
    if kind == "last":
        pool = writer.op("Gather", value, writer.ints(-1), axis=1)
    elif kind == "global":
        turned = writer.op("Transpose", value, perm=[0, 2, 1])
        pooled = writer.op(writer.pick("GlobalAveragePool", "GlobalMaxPool"), turned)
        pool = writer.op("Transpose", pooled, perm=[0, 2, 1])
    else:
        pool = writer.reduce(kind, value, 1)
    name = writer.op("Add", value, writer.matmul(pool, stream.width, stream.width, scale=1.0))
    return tainted(stream, name, (stream.symbol, "unmasked pool"))


def softmax_over_positions(context: Context, stream: Stream) -> Stream:
    """A softmax along the sequence."""
    writer, value = context.writer, stream.name
    turned = writer.op("Transpose", value, perm=[0, 2, 1])
    share = writer.op("Transpose", writer.op("Softmax", turned, axis=2), perm=[0, 2, 1])
    name = writer.op("Add", value, writer.op("Mul", share, writer.const(2.0)))
    return tainted(stream, name, (stream.symbol, "softmax over positions"))


def length_scalar(context: Context, stream: Stream) -> Stream:
    """The padded length as a number: its logarithm, its root, or its side of a threshold."""
    writer = context.writer
    length = _length(context, stream)
    kind = writer.pick("Log", "Sqrt", "Reciprocal", "where", "if", "loop")
    if kind == "where":
        above = writer.op("Greater", length, writer.const(float(writer.pick(9, 30, 64))))
        number = writer.op("Where", above, writer.const(1.0), writer.const(0.25))
    elif kind == "if":
        above = writer.op("Greater", length, writer.const(float(writer.pick(9, 30, 64))))
        number = writer.op("If", above, then_branch=_branch(context, 1.0), else_branch=_branch(context, -0.5))
    elif kind == "loop":
        number = _halved(context, stream)
    else:
        number = writer.op(kind, length)
    return _added(context, stream, number, (stream.symbol, f"number from the length ({kind})"))


def _branch(context: Context, number: float) -> object:
    name = context.writer.fresh("branch")
    node = helper.make_node("Constant", [], [name], value=helper.make_tensor(name, TensorProto.FLOAT, [], [number]))
    return helper.make_graph([node], f"{name}_graph", [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, [])])


def _halved(context: Context, stream: Stream) -> str:
    """A Loop with one iteration for each position, padded ones included."""
    writer = context.writer
    names = {key: writer.fresh(key) for key in ("turn", "go", "number", "next", "on", "half", "sum", "one")}
    body = helper.make_graph(
        [
            helper.make_node("Add", [names["number"], names["one"]], [names["sum"]]),
            helper.make_node("Mul", [names["sum"], names["half"]], [names["next"]]),
            helper.make_node("Identity", [names["go"]], [names["on"]]),
        ],
        writer.fresh("body"),
        [
            helper.make_tensor_value_info(names["turn"], TensorProto.INT64, []),
            helper.make_tensor_value_info(names["go"], TensorProto.BOOL, []),
            helper.make_tensor_value_info(names["number"], TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info(names["on"], TensorProto.BOOL, []),
            helper.make_tensor_value_info(names["next"], TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor(names[key], TensorProto.FLOAT, [], [number])
            for key, number in (("half", 0.5), ("one", 1))
        ],
    )
    return writer.op("Loop", writer.length(stream.name), "", writer.const(0.0), body=body)


def back_to_front(context: Context, stream: Stream) -> Stream:
    """A recurrence that runs from the padded end."""
    writer, value = context.writer, stream.name
    kinds = ["slice", "reverse sequence", "LSTM", "GRU", "next", "cumsum", "scan"]
    kind = writer.pick(*kinds)
    if kind in {"cumsum", "scan"}:
        stream = shifted(context, stream)
        value = stream.name
    if kind == "slice":
        name = writer.slice(value, 1, -1, -(2**31), -1)
    elif kind == "reverse sequence":
        batch = writer.extent(value, 0)
        lengths = writer.op("Expand", writer.extent(value, 1), batch)
        name = writer.op("ReverseSequence", value, lengths, batch_axis=0, time_axis=1)
    elif kind == "cumsum":
        name = writer.op("CumSum", value, writer.const(1, np.int64), reverse=1)
    elif kind == "scan":
        name = scanned(context, stream, backwards=True)
    elif kind == "next":
        moved = writer.op("Concat", writer.slice(value, 1, 1, 2**31), writer.slice(value, 1, 0, 1), axis=1)
        # Through a matrix, because a norm removes a sum of two equal terms.
        name = writer.op("Add", value, writer.matmul(moved, stream.width, stream.width, scale=1.0))
    else:
        name = recurrent(context, stream, kind, "reverse")
    return tainted(stream, name, (stream.symbol, f"from the end ({kind})"))


def statistics(context: Context, stream: Stream) -> Stream:
    """A normalisation with mean and deviation over positions."""
    writer, width = context.writer, stream.width
    turned = writer.op("Transpose", stream.name, perm=[0, 2, 1])
    kind = writer.pick("instance", "written out", *(["group"] if writer.opset >= 21 else []))
    if kind == "instance":
        tables = [writer.const(1 + writer.drawn(width, scale=0.1)), writer.const(writer.drawn(width))]
        made = writer.op("InstanceNormalization", turned, *tables)
    elif kind == "group":
        tables = [writer.const(1 + writer.drawn(width, scale=0.1)), writer.const(writer.drawn(width))]
        made = writer.op("GroupNormalization", turned, *tables, num_groups=2)
    else:
        centred = writer.op("Sub", turned, writer.reduce("Mean", turned, 2))
        spread = writer.reduce("Mean", writer.op("Mul", centred, centred), 2)
        made = writer.op("Div", centred, writer.op("Sqrt", writer.op("Add", spread, writer.const(1e-5))))
    name = writer.op("Add", stream.name, writer.op("Transpose", made, perm=[0, 2, 1]))
    return tainted(stream, name, (stream.symbol, f"statistics over positions ({kind})"))


def contraction(context: Context, stream: Stream) -> Stream:
    """A sum over positions of products, none of them hidden."""
    writer, value = context.writer, stream.name
    share = writer.op("Sigmoid", value)
    if writer.opset >= 12 and writer.rng.random() < 0.6:
        summary = writer.op("Einsum", share, share, equation="btd,bte->bde")
    else:
        summary = writer.op("MatMul", writer.op("Transpose", share, perm=[0, 2, 1]), share)
    # The sum of numbers between 0 and 1 grows with the positions. Its logarithm keeps it small.
    mixed = writer.op("MatMul", value, writer.op("Log", writer.op("Add", summary, writer.const(1.0))))
    return tainted(stream, writer.op("Add", value, mixed), (stream.symbol, "contraction over positions"))


def from_the_end(context: Context, stream: Stream) -> Stream:
    """Positions counted from the padded end."""
    writer = context.writer
    length = writer.length(stream.name)
    if writer.rng.random() < 0.5:
        last = writer.op("Sub", length, writer.const(1, np.int64))
        place = writer.cast(writer.op("Sub", last, writer.range(length)), TensorProto.FLOAT)
        number = writer.unsqueeze(writer.op("Mul", place, writer.const(0.1)), 0, 2)
    else:
        last = writer.op("Sub", length, writer.const(1, np.int64))
        marked = writer.op("OneHot", writer.unsqueeze(last, 0), length, writer.const([0.0, 1.0]), axis=-1)
        number = writer.unsqueeze(marked, 2)
    return _added(context, stream, number, (stream.symbol, "position from the end"))


def wide_convolution(context: Context, stream: Stream) -> Stream:
    """A convolution whose last windows reach padded positions that are not zero."""
    return convolution(context, shifted(context, stream))


def edge_padding(context: Context, stream: Stream) -> Stream:
    """An average over neighbours, with the last one repeated at the end: the padded end, not the sequence's own."""
    writer = context.writer
    padded = writer.op("Concat", stream.name, writer.slice(stream.name, 1, -1, 2**31), axis=1)
    beside = writer.matmul(writer.slice(padded, 1, 1, 2**31), stream.width, stream.width, scale=1.0)
    name = writer.op("Add", stream.name, beside)
    return tainted(stream, name, (stream.symbol, "the end's neighbour"))


OF_PADDING: dict[str, Poison] = {
    "unmasked attention": unmasked_attention,
    "wrong softmax": wrong_softmax,
    "log length": log_length,
    "unmasked pool": unmasked_pool,
    "softmax over positions": softmax_over_positions,
    "length scalar": length_scalar,
    "back to front": back_to_front,
    "statistics": statistics,
    "contraction": contraction,
    "from the end": from_the_end,
    "wide convolution": wide_convolution,
    "edge padding": edge_padding,
}
OF_PADDING_WITH_MASK: dict[str, Poison] = {"small mask": small_mask, "raw mask": raw_mask}


def wrongly_masked(context: Context, stream: Stream) -> Stream:
    """A mask that hides allowed positions, or a test for an id that is not the padding id."""
    symbol = stream.symbol
    context.masks[symbol] = context.wrong_masks[symbol]
    try:
        made = attend(context, stream, stream, Plan(hiding=context.writer.pick(*HIDING[:6])))
    finally:
        del context.masks[symbol]
    made = replace(made, state=made.state.tainted(symbol, "mask of another polarity or padding id"))
    context.attends(made.state, stream)
    return made
