"""Pieces of generated graphs that read along the sequence, and hide padded positions by a mask.

A piece takes the graph in construction (`Context`) and a `Stream`: a value (B, T, width) with what is known of it. It
adds nodes, and returns the new stream. These raise KeyError for a stream without a mask, but for `convolution`,
`numbered` and `shifted`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from mixing_pieces import Piece, by_position
from mixing_values import Context, State, Stream, over
from onnx import TensorProto


def zeroed(context: Context, stream: Stream) -> Stream:
    """Padded positions replaced by zeros. Multiplied by 0, a NaN stays NaN."""
    writer, mask = context.writer, context.masks[stream.symbol]
    if writer.rng.random() < 0.5:
        name = writer.op("Where", writer.unsqueeze(mask.keep, 2), stream.name, writer.const(0.0))
        return replace(stream, name=name, state=replace(stream.state, behind="zero", norm=None))
    name = writer.op("Mul", stream.name, writer.unsqueeze(mask.ones, 2))
    behind = "nan" if stream.state.behind == "nan" else "zero"
    return replace(stream, name=name, state=replace(stream.state, behind=behind, norm=None))


def pooled(context: Context, stream: Stream) -> tuple[str, State]:
    """(B, width) of all allowed positions: their mean, maximum or sum."""
    writer, mask, value = context.writer, context.masks[stream.symbol], stream.name
    keep = writer.unsqueeze(mask.keep, 2)
    kind = writer.pick("mean", "mean", "max", "chosen sum", "product")
    if kind == "max":
        hidden = writer.op("Where", keep, value, writer.const(writer.pick(-np.inf, -3.0e38)))
        state = over(stream.state, stream.symbol, "", hidden="where")
        return writer.reduce("Max", hidden, 1, keep=False), state
    ones = writer.unsqueeze(mask.ones, 2)
    count = writer.op("Clip", writer.reduce("Sum", ones, 1, keep=False), writer.const(1e-9))
    if kind == "product":
        row = writer.unsqueeze(mask.ones, 1)
        total = writer.squeeze(writer.op("MatMul", row, value), 1)
        return writer.op("Div", total, count), over(stream.state, stream.symbol, "", hidden="product")
    if kind == "chosen sum":
        total = writer.reduce("Sum", writer.op("Where", keep, value, writer.const(0.0)), 1, keep=False)
        return writer.op("Div", total, count), over(stream.state, stream.symbol, "", hidden="where")
    total = writer.reduce("Sum", writer.op("Mul", value, ones), 1, keep=False)
    return writer.op("Div", total, count), over(stream.state, stream.symbol, "", hidden="product")


def shared_mean(context: Context, stream: Stream) -> Stream:
    """The masked pool added to each position."""
    writer = context.writer
    pool, state = pooled(context, stream)
    mixed = writer.matmul(pool, stream.width, stream.width)
    name = writer.op("Add", stream.name, writer.unsqueeze(mixed, 1))
    return replace(stream, name=name, state=stream.state.joined(state))


def zero_convolution(context: Context, stream: Stream) -> Stream:
    """A convolution over both neighbours of positions that are zero where padded."""
    stream = zeroed(context, stream)
    return convolution(context, stream)


def convolution(context: Context, stream: Stream) -> Stream:
    """A convolution of width 3 with padding.

    It is equal only where padded positions are zero, as its own padding is.
    """
    writer, width = context.writer, stream.width
    turned = writer.op("Transpose", stream.name, perm=[0, 2, 1])
    weights, bias = writer.const(writer.drawn(width, width, 3)), writer.const(writer.drawn(width))
    convolved = writer.op("Conv", turned, weights, bias, pads=[1, 1])
    name = writer.op("Add", stream.name, writer.op("Transpose", convolved, perm=[0, 2, 1]))
    hidden = "" if stream.state.behind == "finite" else "zero"
    state = over(stream.state, stream.symbol, "convolution over padding", hidden=hidden)
    return replace(stream, name=name, state=state)


def numbered(context: Context, stream: Stream) -> Stream:
    """Positions added, so that no padded position equals one of the sequence's own by chance."""
    writer = context.writer
    table = writer.slice(writer.const(writer.drawn(520, stream.width, scale=1.0)), 0, 0, writer.extent(stream.name, 1))
    return by_position(stream, writer.op("Add", stream.name, writer.unsqueeze(table, 0)))


def shifted(context: Context, stream: Stream) -> Stream:
    """A constant added everywhere, so that no padded position is zero by chance."""
    writer = context.writer
    name = writer.op("Add", stream.name, writer.const(1 + np.abs(writer.drawn(stream.width))))
    return by_position(stream, name)


def linear_attention(context: Context, stream: Stream) -> Stream:
    """Attention without a softmax, whose keys are zero where padded."""
    writer, mask, width = context.writer, context.masks[stream.symbol], stream.width
    ones = writer.unsqueeze(mask.ones, 2)
    query = writer.op("Sigmoid", writer.matmul(stream.name, width, width))
    keys = writer.op("Mul", writer.op("Sigmoid", writer.matmul(stream.name, width, width)), ones)
    value = writer.matmul(stream.name, width, width)
    state = over(stream.state, stream.symbol, "", hidden="product")
    if writer.opset >= 12 and writer.rng.random() < 0.5:
        summary = writer.op("Einsum", keys, value, equation="btd,bte->bde")
        total = writer.op("Einsum", query, summary, equation="btd,bde->bte")
    else:
        summary = writer.op("MatMul", writer.op("Transpose", keys, perm=[0, 2, 1]), value)
        total = writer.op("MatMul", query, summary)
    context.attends(state, stream)
    weight = writer.op("MatMul", query, writer.op("Transpose", writer.reduce("Sum", keys, 1), perm=[0, 2, 1]))
    name = writer.op("Add", stream.name, writer.op("Div", total, writer.op("Add", weight, writer.const(1e-3))))
    return replace(stream, name=name, state=stream.state.joined(state))


def reversed_by_length(context: Context, stream: Stream) -> Stream:
    """Each row's own positions reversed, by its own length. Padded positions keep their places."""
    writer, mask = context.writer, context.masks[stream.symbol]
    lengths = writer.reduce("Sum", writer.cast(mask.keep, TensorProto.INT64), 1, keep=False)
    name = writer.op("ReverseSequence", stream.name, lengths, batch_axis=0, time_axis=1)
    return by_position(stream, name)


WITH_MASK: dict[str, Piece] = {
    "zeroed": zeroed,
    "shared mean": shared_mean,
    "zero convolution": zero_convolution,
    "linear attention": linear_attention,
    "reversed by length": reversed_by_length,
}
