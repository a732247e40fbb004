"""How generated graphs end: from a stream (B, T, width) to an output, whole, pooled, or of a derived length.

A head takes the graph in construction (`Context`) and a stream. Those of `POISONED` let padding change the output.
Those of `WITH_MASK` raise KeyError for a stream without a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from attnserve_server.model.manifest import DerivedLength
from mixing_masked import numbered, pooled, shifted, zeroed
from mixing_values import Context, State, Stream, over
from onnx import TensorProto


@dataclass(frozen=True, slots=True)
class Head:
    """An output: its value, its shape without the batch, and the forms of symbols that no input has."""

    name: str
    shape: tuple[str | int, ...]
    state: State
    derived: dict[str, DerivedLength] = field(default_factory=dict)


def whole(context: Context, stream: Stream) -> Head:
    """Every position."""
    name = context.writer.op("Identity", stream.name)
    return Head(name, (stream.symbol, stream.width), stream.state)


def logits(context: Context, stream: Stream) -> Head:
    """Every position, projected to three numbers."""
    name = context.writer.matmul(stream.name, stream.width, 3, bias=True)
    return Head(name, (stream.symbol, 3), stream.state)


def first(context: Context, stream: Stream) -> Head:
    """The first position, used as a class token."""
    writer = context.writer
    if writer.rng.random() < 0.5:
        name = writer.op("Gather", stream.name, writer.const(0, np.int64), axis=1)
    else:
        name = writer.squeeze(writer.slice(stream.name, 1, 0, 1), 1)
    return Head(name, (stream.width,), stream.state)


def masked_pool(context: Context, stream: Stream) -> Head:
    """The mean, sum or maximum of allowed positions."""
    name, state = pooled(context, stream)
    return Head(name, (stream.width,), state)


def last_allowed(context: Context, stream: Stream) -> Head:
    """The position of the mask's sum minus one."""
    writer, mask = context.writer, context.masks[stream.symbol]
    whole_ = writer.cast(mask.keep, TensorProto.INT64)
    state = stream.state.needing(mask.need("some"))
    spelling = writer.pick("rows", "rows", "one of all", "batch axes")
    if spelling == "batch axes" and writer.opset >= 12:
        count = writer.reduce("Sum", whole_, 1)
        place = writer.op("Sub", count, writer.const(1, np.int64))
        name = writer.op("GatherND", stream.name, place, batch_dims=1)
        return Head(name, (stream.width,), state)
    if spelling == "rows":
        # x[arange(B), length - 1], as exporters write it.
        count = writer.reduce("Sum", whole_, 1, keep=False)
        place = writer.unsqueeze(writer.op("Sub", count, writer.const(1, np.int64)), 1)
        rows = writer.unsqueeze(writer.range(writer.length(stream.name, 0)), 1)
        name = writer.op("GatherND", stream.name, writer.op("Concat", rows, place, axis=1))
        return Head(name, (stream.width,), state)
    count = writer.reduce("Sum", whole_, 1)
    place = writer.op("Sub", count, writer.const(1, np.int64))
    chosen = writer.op("Equal", writer.unsqueeze(writer.range(writer.length(stream.name)), 0), place)
    kept = writer.op("Where", writer.unsqueeze(chosen, 2), stream.name, writer.const(0.0))
    return Head(writer.reduce("Sum", kept, 1, keep=False), (stream.width,), state)


def with_front(context: Context, stream: Stream) -> Head:
    """One constant position before all others."""
    writer, width = context.writer, stream.width
    one = writer.const(writer.drawn(1, 1, width))
    shape = writer.op("Concat", writer.extent(stream.name, 0), writer.ints(1, width), axis=0)
    name = writer.op("Concat", writer.op("Expand", one, shape), stream.name, axis=1)
    symbol = f"{stream.symbol} + 1"
    return Head(name, (symbol, width), stream.state, {symbol: DerivedLength(source=stream.symbol, stride=1, offset=1)})


def halved(context: Context, stream: Stream) -> Head:
    """Windows of two positions. An incomplete last one is omitted."""
    writer, width = context.writer, stream.width
    turned = writer.op("Transpose", stream.name, perm=[0, 2, 1])
    kind = writer.pick("Conv", "MaxPool", "AveragePool")
    if kind == "Conv":
        made = writer.op("Conv", turned, writer.const(writer.drawn(width, width, 2)), strides=[2])
    else:
        made = writer.op(kind, turned, kernel_shape=[2], strides=[2])
    symbol = f"{stream.symbol} // 2"
    derived = {symbol: DerivedLength(source=stream.symbol, stride=2)}
    return Head(writer.op("Transpose", made, perm=[0, 2, 1]), (symbol, width), stream.state, derived)


def strided(context: Context, stream: Stream) -> Head:
    """A convolution of width 3 and stride 2 with padding, over zeros where padded."""
    return _strided(context, zeroed(context, stream))


def _strided(context: Context, stream: Stream) -> Head:
    writer, width = context.writer, stream.width
    turned = writer.op("Transpose", stream.name, perm=[0, 2, 1])
    weights, bias = writer.const(writer.drawn(width, width, 3)), writer.const(writer.drawn(width))
    made = writer.op("Conv", turned, weights, bias, strides=[2], pads=[1, 1])
    symbol = f"({stream.symbol} + 1) // 2"
    derived = {symbol: DerivedLength(source=stream.symbol, stride=2, offset=1)}
    hidden = "" if stream.state.behind == "finite" else "zero"
    state = over(stream.state, stream.symbol, "stride over padding", hidden=hidden)
    return Head(writer.op("Transpose", made, perm=[0, 2, 1]), (symbol, width), state, derived)


# Poisoned.


def strided_over_padding(context: Context, stream: Stream) -> Head:
    """The same over any values behind the sequence."""
    return _strided(context, shifted(context, stream))


def with_back(context: Context, stream: Stream) -> Head:
    """One constant position behind all others, the padded ones included."""
    writer, width = context.writer, stream.width
    one = writer.const(writer.drawn(1, 1, width))
    shape = writer.op("Concat", writer.extent(stream.name, 0), writer.ints(1, width), axis=0)
    name = writer.op("Concat", stream.name, writer.op("Expand", one, shape), axis=1)
    symbol = f"{stream.symbol} + 1"
    state = stream.state.tainted(stream.symbol, "put behind the padding")
    return Head(name, (symbol, width), state, {symbol: DerivedLength(source=stream.symbol, stride=1, offset=1)})


def last(context: Context, stream: Stream) -> Head:
    """The last position, padded or not."""
    name = context.writer.op("Gather", numbered(context, stream).name, context.writer.const(-1, np.int64), axis=1)
    return Head(name, (stream.width,), stream.state.tainted(stream.symbol, "last position without a mask"))


def unmasked(context: Context, stream: Stream) -> Head:
    """A mean or the maximum of all positions."""
    writer = context.writer
    kind = writer.pick("Mean", "Max")
    name = writer.reduce(kind, numbered(context, stream).name, 1, keep=False)
    return Head(name, (stream.width,), stream.state.tainted(stream.symbol, f"unmasked pool at the end ({kind})"))


WITHOUT_MASK: dict[str, Callable[[Context, Stream], Head]] = {
    "whole": whole,
    "logits": logits,
    "first": first,
    "with front": with_front,
    "halved": halved,
}
WITH_MASK: dict[str, Callable[[Context, Stream], Head]] = {
    "masked pool": masked_pool,
    "last allowed": last_allowed,
    "strided": strided,
}
POISONED: dict[str, Callable[[Context, Stream], Head]] = {
    "strided over padding": strided_over_padding,
    "with back": with_back,
    "last": last,
    "unmasked": unmasked,
}
