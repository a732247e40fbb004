"""Further forms of attention in generated graphs: rotary, folded heads, windows, a softmax by its definition.

A piece takes the graph in construction (`Context`) and a `Stream`: a value (B, T, width) with what is known of it. It
adds nodes, and returns the new stream. The tables at the end sort them: safe ones, and those that let padding or other
rows change a sequence's own positions. For a stream without a mask, those of tables `..._WITH_MASK` raise KeyError, but
for `rotary_switch`, whose stated fault may not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from attnserve_server.model.manifest import BATCH
from mixing_values import NAN_BEHIND, UNSAID, Context, State, Stream
from onnx import TensorProto

Piece = Callable[[Context, Stream], Stream]
HEADS = 2


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys and values (B, H, T, D) of one stream."""

    query: str
    key: str
    value: str
    size: int


def heads_of(context: Context, stream: Stream) -> Heads:
    """Projected, and split into heads."""
    writer, width = context.writer, stream.width
    split = []
    for _ in range(3):
        apart = writer.reshape(writer.matmul(stream.name, width, width), 0, 0, HEADS, width // HEADS)
        split.append(writer.op("Transpose", apart, perm=[0, 2, 1, 3]))
    return Heads(*split, width // HEADS)


def scores_of(context: Context, heads: Heads) -> str:
    """(B, H, T, T), scaled."""
    writer = context.writer
    product = writer.op("MatMul", heads.query, writer.op("Transpose", heads.key, perm=[0, 1, 3, 2]))
    return writer.op("Mul", product, writer.const(1 / math.sqrt(heads.size)))


def joined(context: Context, stream: Stream, weights: str, heads: Heads, state: State) -> Stream:
    """Weights x value, heads joined, with a residual."""
    writer, width = context.writer, stream.width
    context.attends(state, stream)
    product = writer.op("Transpose", writer.op("MatMul", weights, heads.value), perm=[0, 2, 1, 3])
    mixed = writer.matmul(writer.reshape(product, 0, 0, width), width, width)
    behind = "nan" if stream.state.behind == "nan" else "finite"
    return replace(stream, name=writer.op("Add", stream.name, mixed), state=replace(state, behind=behind))


def _reads_all(stream: Stream) -> State:
    """The state of a value that multiplies every position by a weight, and padded ones by 0: a NaN stays."""
    if stream.state.behind == "nan":
        return stream.state.tainted(stream.symbol, NAN_BEHIND)
    return stream.state.finite()


def _distance(context: Context, stream: Stream) -> str:
    """Query minus key, int64 (T, T)."""
    writer = context.writer
    place = writer.range(writer.length(stream.name))
    return writer.op("Sub", writer.unsqueeze(place, 1), writer.unsqueeze(place, 0))


def _ahead(context: Context, stream: Stream, most: int) -> str:
    """Boolean (T, T): keys more than `most` positions behind the query."""
    writer = context.writer
    return writer.op("Less", _distance(context, stream), writer.const(-most, np.int64))


def _softmax(context: Context, scores: str) -> str:
    """A softmax over keys, as an operator or by its definition."""
    writer = context.writer
    if writer.rng.random() < 0.8:
        return writer.op("Softmax", scores, axis=3)
    powers = writer.op("Exp", writer.op("Sub", scores, writer.reduce("Max", scores, 3)))
    return writer.op("Div", powers, writer.reduce("Sum", powers, 3))


def _hidden(context: Context, stream: Stream, scores: str) -> str:
    """Scores with padded keys at -inf."""
    writer, mask = context.writer, context.masks[stream.symbol]
    keep = writer.unsqueeze(mask.keep, 1, 2)
    if writer.rng.random() < 0.5:
        return writer.op("Where", keep, scores, writer.const(-np.inf))
    return writer.op("Add", scores, writer.op("Where", keep, writer.const(0.0), writer.const(-np.inf)))


def _forward(context: Context, stream: Stream, scores: str, most: int = 0) -> str:
    """Scores with later keys at -inf, but for `most` of them."""
    writer = context.writer
    return writer.op("Where", _ahead(context, stream, most), writer.const(-np.inf), scores)


def _masked(context: Context, stream: Stream, scores: str) -> str:
    """Hidden by the mask or, without one, by a frontier."""
    return _hidden(context, stream, scores) if stream.symbol in context.masks else _forward(context, stream, scores)


def spelled_out(context: Context, stream: Stream) -> Stream:
    """Attention by its definition."""
    heads = heads_of(context, stream)
    weights = _softmax(context, _masked(context, stream, scores_of(context, heads)))
    return joined(context, stream, weights, heads, _reads_all(stream))


def _rotated(context: Context, heads: str, size: int, angles: str) -> str:
    """(B, H, T, D) rotated by angles (..., T, D / 2)."""
    writer, half = context.writer, size // 2
    doubled = writer.op("Concat", angles, angles, axis=-1)
    first, second = writer.split(heads, -1, half, half)
    turned = writer.op("Concat", writer.op("Neg", second), first, axis=-1)
    still = writer.op("Mul", heads, writer.op("Cos", doubled))
    return writer.op("Add", still, writer.op("Mul", turned, writer.op("Sin", doubled)))


def _rotary(context: Context, stream: Stream, base: str, state: State) -> Stream:
    writer = context.writer
    heads = heads_of(context, stream)
    place = writer.cast(writer.range(writer.length(stream.name)), TensorProto.FLOAT)
    angles = writer.op("Mul", writer.unsqueeze(place, 1), base)
    turned = [_rotated(context, each, heads.size, angles) for each in (heads.query, heads.key)]
    heads = replace(heads, query=turned[0], key=turned[1])
    weights = _softmax(context, _masked(context, stream, scores_of(context, heads)))
    return joined(context, stream, weights, heads, state)


def _base(stream: Stream, number: float) -> np.ndarray:
    half = stream.width // HEADS // 2
    return number ** -((np.arange(half) + 1) / half)


def rotary(context: Context, stream: Stream) -> Stream:
    """Queries and keys rotated by positions counted from the front."""
    return _rotary(context, stream, context.writer.const(_base(stream, 100.0)), _reads_all(stream))


def window(context: Context, stream: Stream) -> Stream:
    """The last few positions, the query's included."""
    writer = context.writer
    heads = heads_of(context, stream)
    far = writer.op("Greater", _distance(context, stream), writer.const(3, np.int64))
    scores = writer.op("Where", far, writer.const(-np.inf), _forward(context, stream, scores_of(context, heads)))
    return joined(context, stream, _softmax(context, scores), heads, _reads_all(stream))


def folded_heads(context: Context, stream: Stream) -> Stream:
    """Heads folded into the batch, as torch's MultiheadAttention does, its mask repeated for each head."""
    writer, width = context.writer, stream.width
    size = width // HEADS
    batch, length = writer.extent(stream.name, 0), writer.extent(stream.name, 1)
    time_first = writer.op("Transpose", stream.name, perm=[1, 0, 2])
    folded = []
    for _ in range(3):
        apart = writer.reshape(writer.matmul(time_first, width, width), length, -1, size)
        folded.append(writer.op("Transpose", apart, perm=[1, 0, 2]))
    scores = writer.op("MatMul", folded[0], writer.op("Transpose", folded[1], perm=[0, 2, 1]))
    if stream.symbol in context.masks:
        keep = writer.unsqueeze(context.masks[stream.symbol].keep, 1, 2)
        square = writer.op("Concat", batch, writer.ints(HEADS, 1), length, axis=0)
        keep = writer.reshape(writer.op("Expand", keep, square), -1, 1, length)
        scores = writer.op("Where", keep, scores, writer.const(-np.inf))
    else:
        scores = writer.op("Where", _ahead(context, stream, 0), writer.const(-np.inf), scores)
    state = _reads_all(stream)
    context.attends(state, stream)
    product = writer.op("MatMul", writer.op("Softmax", scores, axis=2), folded[2])
    back = writer.reshape(writer.op("Transpose", product, perm=[1, 0, 2]), length, batch, width)
    mixed = writer.op("Transpose", writer.matmul(back, width, width), perm=[1, 0, 2])
    behind = "nan" if stream.state.behind == "nan" else "finite"
    return replace(stream, name=writer.op("Add", stream.name, mixed), state=replace(state, behind=behind))


# Poisons.


def one_too_far(context: Context, stream: Stream) -> Stream:
    """A frontier that lets each query attend to the next key: the last query attends to padding."""
    heads = heads_of(context, stream)
    scores = _forward(context, stream, scores_of(context, heads), most=1)
    state = stream.state.finite().tainted(stream.symbol, "frontier one too far")
    return joined(context, stream, _softmax(context, scores), heads, state)


def open_window(context: Context, stream: Stream) -> Stream:
    """A window to both sides without a mask: the last positions attend to padding."""
    writer = context.writer
    heads = heads_of(context, stream)
    distance = writer.op("Abs", _distance(context, stream))
    far = writer.op("Greater", distance, writer.const(2, np.int64))
    scores = writer.op("Where", far, writer.const(-np.inf), scores_of(context, heads))
    state = stream.state.finite().tainted(stream.symbol, "window without a mask")
    return joined(context, stream, _softmax(context, scores), heads, state)


def queries_masked(context: Context, stream: Stream) -> Stream:
    """The mask applied to queries instead of keys: padded keys count."""
    writer, mask = context.writer, context.masks[stream.symbol]
    heads = heads_of(context, stream)
    keep = writer.unsqueeze(mask.keep, 1, 3)
    scores = writer.op("Where", keep, scores_of(context, heads), writer.const(-1e4))
    state = stream.state.finite().tainted(stream.symbol, "mask of queries alone")
    return joined(context, stream, writer.op("Softmax", scores, axis=3), heads, state)


def rotary_switch(context: Context, stream: Stream) -> Stream:
    """A rotary base that depends on the padded length."""
    writer = context.writer
    far = writer.op("Greater", writer.length(stream.name), writer.const(12, np.int64))
    near, wide = (writer.const(_base(stream, number)) for number in (3.0, 1e4))
    state = stream.state.finite().tainted(stream.symbol, "rotary base by length")
    return _rotary(context, stream, writer.op("Where", far, wide, near), state)


def mask_of_first_row(context: Context, stream: Stream) -> Stream:
    """The first row's mask for every row."""
    writer, mask = context.writer, context.masks[stream.symbol]
    heads = heads_of(context, stream)
    keep = writer.unsqueeze(writer.op("Gather", mask.keep, writer.ints(0), axis=0), 1, 2)
    scores = writer.op("Where", keep, scores_of(context, heads), writer.const(-np.inf))
    state = stream.state.finite().tainted(BATCH, "mask of the first row").tainted(stream.symbol, UNSAID)
    return joined(context, stream, writer.op("Softmax", scores, axis=3), heads, state)


def flat_attention(context: Context, stream: Stream) -> Stream:
    """Attention over all positions of all rows."""
    writer, width = context.writer, stream.width
    flat = writer.op("Tanh", writer.reshape(stream.name, -1, width))
    scores = writer.op("MatMul", flat, writer.op("Transpose", flat, perm=[1, 0]))
    product = writer.op("MatMul", writer.op("Softmax", scores, axis=1), flat)
    back = writer.op("Reshape", writer.matmul(product, width, width, scale=1.0), writer.op("Shape", stream.name))
    state = stream.state.finite().tainted(BATCH, "attention over the flattened batch").tainted(stream.symbol, UNSAID)
    return replace(stream, name=writer.op("Add", stream.name, back), state=state)


SAFE_FORMS: dict[str, Piece] = {
    "spelled out": spelled_out,
    "rotary": rotary,
    "window": window,
    "folded heads": folded_heads,
}
FORMS_OF_PADDING: dict[str, Piece] = {
    "one too far": one_too_far,
    "open window": open_window,
}
# Under a frontier instead of a mask the first position has one key, whose weight no rotation changes.
FORMS_OF_PADDING_WITH_MASK: dict[str, Piece] = {"queries masked": queries_masked, "rotary switch": rotary_switch}
FORMS_OF_ROWS: dict[str, Piece] = {"flat attention": flat_attention}
FORMS_OF_ROWS_WITH_MASK: dict[str, Piece] = {"mask of the first row": mask_of_first_row}
