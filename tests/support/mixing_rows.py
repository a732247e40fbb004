"""Pieces of generated graphs that let other rows of the batch into a sequence's own part.

A poison takes the graph in construction (`Context`) and a `Stream`: a value (B, T, width) with what is known of it. It
adds nodes, and returns a stream whose state names the fault. `longest_mask` raises KeyError without a mask.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from attnserve_server.model.manifest import BATCH
from mixing_values import UNSAID, Context, Stream, tainted
from onnx import TensorProto

Poison = Callable[[Context, Stream], Stream]


def _through(stream: Stream, name: str, poison: str) -> Stream:
    """The stream mixed over the batch. The grammar leaves open what padding does to the mixed value."""
    return tainted(stream, name, (BATCH, poison), (stream.symbol, UNSAID))


def _clean(stream: Stream, name: str, poison: str) -> Stream:
    """The stream mixed over the batch by a value that padding does not change."""
    return tainted(stream, name, (BATCH, poison))


def _times_vector(context: Context, stream: Stream, number: str) -> str:
    writer = context.writer
    vector = writer.const(writer.drawn(stream.width, scale=1.0))
    return writer.op("Add", stream.name, writer.op("Mul", number, vector))


def reduced(context: Context, stream: Stream) -> Stream:
    """A reduction over the rows, added to each."""
    writer = context.writer
    kind = writer.pick("Max", "Mean", "Sum", "Min")
    share = writer.op("Tanh", writer.reduce(kind, stream.name, 0))
    return _clean(stream, writer.op("Add", stream.name, share), f"reduction over the batch ({kind})")


def longest_mask(context: Context, stream: Stream) -> Stream:
    """A scale by the greatest length of the batch, from its masks."""
    writer, mask = context.writer, context.masks[stream.symbol]
    count = writer.reduce("Sum", mask.ones, 1, keep=False)
    greatest = writer.reduce("Max", count, 0)
    number = writer.op("Div", greatest, writer.const(8.0))
    return _clean(stream, _times_vector(context, stream, number), "greatest length of the batch")


def row_softmax(context: Context, stream: Stream) -> Stream:
    """A softmax over rows."""
    writer = context.writer
    turned = writer.op("Transpose", stream.name, perm=[1, 2, 0])
    share = writer.op("Transpose", writer.op("Softmax", turned, axis=2), perm=[2, 0, 1])
    return _clean(stream, writer.op("Add", stream.name, share), "softmax over the batch")


def running_rows(context: Context, stream: Stream) -> Stream:
    """A running sum over rows."""
    writer = context.writer
    name = writer.op("CumSum", stream.name, writer.const(0, np.int64), reverse=writer.pick(0, 1))
    return _clean(stream, name, "running sum over the batch")


def first_row(context: Context, stream: Stream) -> Stream:
    """The first, or last, row of the batch added to each, or all but one place of the first row kept."""
    writer, value = context.writer, stream.name
    kind = writer.pick("gather", "slice", "scatter", "number", "flip")
    if kind == "gather":
        one = writer.op("Gather", value, writer.ints(writer.pick(0, -1)), axis=0)
        name = writer.op("Add", value, writer.op("Tanh", one))
    elif kind == "slice":
        name = writer.op("Add", value, writer.op("Tanh", writer.slice(value, 0, 0, 1)))
    elif kind == "scatter":
        update = writer.const(writer.drawn(1, stream.width, scale=3.0))
        name = writer.op("ScatterND", value, writer.const([[0, 0]], np.int64), update)
    elif kind == "number":
        rows = writer.cast(writer.range(writer.length(value, 0)), TensorProto.FLOAT)
        name = _times_vector(context, stream, writer.unsqueeze(rows, 1, 2))
    else:
        name = writer.op("Add", value, writer.slice(value, 0, -1, -(2**31), -1))
    return _clean(stream, name, f"a row by its place ({kind})")


def batch_size(context: Context, stream: Stream) -> Stream:
    """The number of rows as a number, or a threshold of it."""
    writer = context.writer
    size = writer.cast(writer.length(stream.name, 0), TensorProto.FLOAT)
    kind = writer.pick("Sqrt", "Reciprocal", "where")
    if kind == "where":
        above = writer.op("Greater", size, writer.const(float(writer.pick(1, 2, 6))))
        number = writer.op("Where", above, writer.const(1.0), writer.const(-0.5))
    else:
        number = writer.op(kind, size)
    return _clean(stream, _times_vector(context, stream, number), f"number from the batch size ({kind})")


def dynamic_quantization(context: Context, stream: Stream) -> Stream:
    """One int8 scale for all rows."""
    writer, width = context.writer, stream.width
    kind = writer.pick("DynamicQuantizeLinear", "MatMulInteger", "DynamicQuantizeMatMul")
    if kind == "DynamicQuantizeMatMul":
        weights = writer.const(writer.arrays.integers(-60, 60, (width, width)), np.int8)
        made = writer.op(kind, stream.name, weights, writer.const(0.01), domain="com.microsoft")
    else:
        whole, scale, zero = writer.ops("DynamicQuantizeLinear", stream.name, outputs=3)
        if kind == "DynamicQuantizeLinear":
            made = writer.op("DequantizeLinear", whole, scale, zero)
        else:
            weights = writer.const(writer.arrays.integers(-60, 60, (width, width)), np.int8)
            product = writer.cast(writer.op("MatMulInteger", whole, weights, zero), TensorProto.FLOAT)
            made = writer.op("Mul", product, writer.op("Mul", scale, writer.const(0.01)))
    return _through(stream, made, "dynamic quantization")


def capacity(context: Context, stream: Stream) -> Stream:
    """Only a fixed number of first positions of the flattened batch pass, like an expert's capacity."""
    writer, width = context.writer, stream.width
    flat = writer.reshape(stream.name, -1, width)
    score = writer.op("Sigmoid", writer.matmul(flat, width, 1, scale=1.0))
    chosen = writer.cast(writer.op("Greater", score, writer.const(0.0)), TensorProto.FLOAT)
    place = writer.op("CumSum", chosen, writer.const(0, np.int64))
    fits = writer.cast(writer.op("Less", place, writer.const(float(writer.pick(4, 20)))), TensorProto.FLOAT)
    kept = writer.op("Mul", writer.op("Mul", chosen, fits), score)
    named = writer.op("Mul", kept, writer.const(writer.drawn(1, width, scale=2.0)))
    passed = writer.op("Reshape", writer.op("Add", flat, named), writer.op("Shape", stream.name))
    return _through(stream, passed, "capacity over the flattened batch")


def best_of_all(context: Context, stream: Stream) -> Stream:
    """The best score of the flattened batch, by TopK, subtracted from each."""
    writer, width = context.writer, stream.width
    score = writer.reshape(writer.matmul(stream.name, width, 1, scale=1.0), -1)
    best = writer.ops("TopK", score, writer.ints(1), outputs=2, axis=0)[0]
    number = writer.op("Tanh", best)
    return _through(stream, _times_vector(context, stream, number), "top of the flattened batch")


def counted(context: Context, stream: Stream) -> Stream:
    """The number of values of the batch above a threshold, or of different ones."""
    writer = context.writer
    kind = writer.pick("NonZero", "Unique", "Compress")
    turned = writer.matmul(stream.name, stream.width, stream.width, scale=1.0)
    above = writer.op("Greater", turned, writer.const(0.0))
    if kind == "NonZero":
        count = writer.length(writer.op("NonZero", writer.cast(above, TensorProto.FLOAT)), 1)
    elif kind == "Unique":
        count = writer.length(writer.op("Unique", stream.name, sorted=1), 0)
    else:
        flat = writer.reshape(stream.name, -1)
        count = writer.length(writer.op("Compress", flat, writer.reshape(above, -1)), 0)
    number = writer.op("Log", writer.op("Add", writer.cast(count, TensorProto.FLOAT), writer.const(1.0)))
    return _through(stream, _times_vector(context, stream, number), f"count over the batch ({kind})")


def swapped(context: Context, stream: Stream) -> Stream:
    """Reshaped to (T, B, W) without a transpose, where positions are then added."""
    writer, value, width = context.writer, stream.name, stream.width
    batch, length = writer.extent(value, 0), writer.extent(value, 1)
    turned = writer.reshape(value, length, batch, width)
    table = writer.slice(writer.const(writer.drawn(520, 1, width)), 0, 0, length)
    name = writer.op("Reshape", writer.op("Add", turned, table), writer.op("Shape", value))
    return _through(stream, name, "reshape in place of a transpose")


def row_contraction(context: Context, stream: Stream) -> Stream:
    """A contraction over rows, or attention with rows as positions."""
    writer, value, width = context.writer, stream.name, stream.width
    if writer.opset >= 12 and writer.rng.random() < 0.5:
        scores = writer.op("Einsum", value, value, equation="btd,ctd->tbc")
    else:
        turned = writer.op("Transpose", value, perm=[1, 0, 2])
        scores = writer.op("MatMul", turned, writer.op("Transpose", value, perm=[1, 2, 0]))
    weights = writer.op("Softmax", writer.op("Div", scores, writer.const(float(width))), axis=2)
    mixed = writer.op("MatMul", weights, writer.op("Transpose", value, perm=[1, 0, 2]))
    name = writer.op("Add", writer.op("Transpose", mixed, perm=[1, 0, 2]), value)
    return _clean(stream, name, "attention over the batch")


def tiled(context: Context, stream: Stream) -> Stream:
    """Rows by head, where the mask or the bias is tiled in another order than heads are folded."""
    writer, value, width = context.writer, stream.name, stream.width
    bias = writer.matmul(writer.op("Gather", value, writer.const(0, np.int64), axis=1), width, 1, scale=1.0)
    doubled = writer.op("Concat", bias, bias, axis=0)
    batch, length = writer.extent(value, 0), writer.extent(value, 1)
    apart = writer.op("Transpose", writer.reshape(value, batch, length, 2, width // 2), perm=[0, 2, 1, 3])
    flat = writer.reshape(apart, -1, length, width // 2)
    # Rows of `flat` are (B, 2); those of `doubled` (2, B): right for a single row alone.
    moved = writer.op("Add", flat, writer.unsqueeze(writer.op("Tanh", doubled), 2))
    back = writer.op("Transpose", writer.reshape(moved, batch, 2, length, width // 2), perm=[0, 2, 1, 3])
    name = writer.reshape(back, batch, length, width)
    return _clean(stream, name, "tiled in another order")


OF_ROWS: dict[str, Poison] = {
    "reduced": reduced,
    "row softmax": row_softmax,
    "running rows": running_rows,
    "first row": first_row,
    "batch size": batch_size,
    "dynamic quantization": dynamic_quantization,
    "capacity": capacity,
    "best of all": best_of_all,
    "counted": counted,
    "swapped": swapped,
    "row contraction": row_contraction,
    "tiled": tiled,
}
OF_ROWS_WITH_MASK: dict[str, Poison] = {"longest mask": longest_mask}
