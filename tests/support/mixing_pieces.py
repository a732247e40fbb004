"""Pieces of generated graphs that keep sequences apart, because they work on each position alone.

A piece takes the graph in construction (`Context`) and a `Stream`: a value (B, T, width) with what is known of it. It
adds nodes, and returns the new stream. None needs a mask, and none checks a width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from mixing_values import Context, Stream

Piece = Callable[[Context, Stream], Stream]


def by_position(stream: Stream, name: str, norm: float | None = None) -> Stream:
    return replace(stream, name=name, state=stream.state.finite(norm))


def pointwise(context: Context, stream: Stream) -> Stream:
    """One function of each number."""
    writer = context.writer
    kinds = ["Tanh", "Sigmoid", "Softplus", "Elu", "scaled", "shifted", "clipped", "gelu", "gate"]
    kinds += ["Gelu"] if writer.opset >= 20 else []
    kinds += ["Mish", "HardSwish"] if writer.opset >= 18 else []
    kinds += ["BiasGelu", "FastGelu", "QuickGelu"]
    kind = writer.pick(*kinds)
    value, name = stream.name, ""
    if kind == "scaled":
        name = writer.op("Mul", value, writer.const(writer.rng.uniform(0.5, 1.5)))
    elif kind == "shifted":
        name = writer.op("Sub", value, writer.const(writer.drawn(stream.width)))
    elif kind == "clipped":
        name = writer.op("Clip", value, writer.const(-20.0), writer.const(20.0))
    elif kind == "gelu":
        erf = writer.op("Erf", writer.op("Div", value, writer.const(math.sqrt(2))))
        half = writer.op("Mul", value, writer.op("Add", erf, writer.const(1.0)))
        name = writer.op("Mul", half, writer.const(0.5))
    elif kind == "gate":
        name = writer.op("Mul", value, writer.op("Sigmoid", writer.matmul(value, stream.width, stream.width)))
    elif kind == "BiasGelu":
        name = writer.op(kind, value, writer.const(writer.drawn(stream.width)), domain="com.microsoft")
    elif kind in {"FastGelu", "QuickGelu"}:
        name = writer.op(kind, value, domain="com.microsoft")
    else:
        name = writer.op(kind, value)
    return by_position(stream, name)


def normalised(context: Context, stream: Stream) -> Stream:
    """A normalisation over the width, as an operator or decomposed."""
    writer, width = context.writer, stream.width
    gain = (1 + writer.drawn(width, scale=0.1)).astype(np.float32)
    shift = writer.drawn(width, scale=0.1)
    norm = math.sqrt(width) * float(np.abs(gain).max()) + float(np.linalg.norm(shift))
    kinds = ["written out", "rms", "skip"] + (["LayerNormalization"] * 2 if writer.opset >= 17 else [])
    kinds += ["RMSNormalization"] if writer.opset >= 23 else []
    kind = writer.pick(*kinds)
    value, weight, bias = stream.name, writer.const(gain), writer.const(shift)
    if kind == "LayerNormalization":
        name = writer.op(kind, value, weight, bias, axis=-1, epsilon=1e-5)
    elif kind == "RMSNormalization":
        name = writer.op(kind, value, weight, axis=-1, epsilon=1e-5)
    elif kind == "skip":
        skip = writer.matmul(value, width, width)
        name = writer.op("SkipLayerNormalization", value, skip, weight, bias, domain="com.microsoft", epsilon=1e-5)
    else:
        name = _written_out(context, value, weight, bias, centred=kind == "written out")
    return by_position(stream, name, norm)


def _written_out(context: Context, value: str, weight: str, bias: str, *, centred: bool) -> str:
    writer = context.writer
    if centred:
        value = writer.op("Sub", value, writer.reduce("Mean", value, -1))
    square = writer.op("Pow", value, writer.const(2.0)) if centred else writer.op("Mul", value, value)
    spread = writer.op("Add", writer.reduce("Mean", square, -1), writer.const(1e-5))
    unit = writer.op("Div", value, writer.op("Sqrt", spread))
    scaled = writer.op("Mul", unit, weight)
    return writer.op("Add", scaled, bias) if centred else scaled


def projected(context: Context, stream: Stream) -> Stream:
    """A product with a constant matrix, in one of its spellings."""
    writer, width = context.writer, stream.width
    kind = writer.pick("matmul", "gemm", "einsum", "conv", "transposed", "feed forward")
    value = stream.name
    if kind == "gemm":
        weights, bias = writer.const(writer.drawn(width, width)), writer.const(writer.drawn(width))
        flat = writer.op("Gemm", writer.reshape(value, -1, width), weights, bias, transB=writer.pick(0, 1))
        name = writer.reshape(flat, writer.extent(value, 0), writer.extent(value, 1), width)
    elif kind == "einsum" and writer.opset >= 12:
        name = writer.op("Einsum", value, writer.const(writer.drawn(width, width)), equation="btd,de->bte")
    elif kind == "conv":
        turned = writer.op("Transpose", value, perm=[0, 2, 1])
        weights, bias = writer.const(writer.drawn(width, width, 1)), writer.const(writer.drawn(width))
        name = writer.op("Transpose", writer.op("Conv", turned, weights, bias), perm=[0, 2, 1])
    elif kind == "transposed":
        turned = writer.op("Transpose", value, perm=[1, 0, 2])
        name = writer.op("Transpose", writer.matmul(turned, width, width, bias=True), perm=[1, 0, 2])
    elif kind == "feed forward":
        wide = writer.op("Relu", writer.matmul(value, width, 2 * width, bias=True))
        name = writer.op("Add", value, writer.matmul(wide, 2 * width, width, scale=0.3))
    else:
        name = writer.matmul(value, width, width, bias=writer.pick(True, False))
    return by_position(stream, name)


def folded(context: Context, stream: Stream) -> Stream:
    """Heads, or positions, folded into the batch and out again, with a function by head in between."""
    writer, width = context.writer, stream.width
    heads, value = 2, stream.name
    kind = writer.pick("heads", "batch x heads", "batch x positions", "channels")
    if kind == "heads":
        apart = writer.op("Transpose", writer.reshape(value, 0, 0, heads, width // heads), perm=[0, 2, 1, 3])
        scaled = writer.op("Mul", apart, writer.const(1 + writer.drawn(heads, 1, 1, scale=0.2)))
        name = writer.reshape(writer.op("Transpose", scaled, perm=[0, 2, 1, 3]), 0, 0, width)
    elif kind == "batch x heads":
        batch, length = writer.extent(value, 0), writer.extent(value, 1)
        apart = writer.op("Transpose", writer.reshape(value, batch, length, heads, width // heads), perm=[0, 2, 1, 3])
        flat = writer.matmul(writer.reshape(apart, -1, length, width // heads), width // heads, width // heads)
        back = writer.reshape(writer.op("Tanh", flat), batch, heads, length, width // heads)
        name = writer.reshape(writer.op("Transpose", back, perm=[0, 2, 1, 3]), batch, length, width)
    elif kind == "batch x positions":
        flat = writer.op("Softmax", writer.reshape(value, -1, width), axis=1)
        name = writer.op("Reshape", flat, writer.op("Shape", value))
    else:
        first, second = writer.split(value, -1, width // 2, width // 2)
        name = writer.op("Concat", second, writer.op("Neg", first), axis=-1)
    return by_position(stream, name)


def by_width(context: Context, stream: Stream) -> Stream:
    """A reduction, a softmax or a choice over the width alone."""
    writer, value = context.writer, stream.name
    kind = writer.pick("softmax", "mean", "max", "top", "batch norm", "if")
    if kind == "softmax":
        # Before opset 13 softmax flattens the axes behind its own, so the last axis means the same in all opsets.
        name = writer.op("Softmax", value, axis=2)
    elif kind == "mean":
        name = writer.op("Sub", value, writer.reduce("Mean", value, -1))
    elif kind == "max":
        name = writer.op("Sub", value, writer.reduce("Max", value, 2))
    elif kind == "top":
        best = writer.ops("TopK", value, writer.ints(1), outputs=2, axis=-1)[0]
        name = writer.op("Add", value, best)
    elif kind == "batch norm":
        turned = writer.op("Transpose", value, perm=[0, 2, 1])
        spread = writer.const(np.abs(writer.drawn(stream.width)) + 0.5)
        tables = [writer.const(writer.drawn(stream.width)) for _ in range(3)]
        name = writer.op("Transpose", writer.op("BatchNormalization", turned, *tables, spread), perm=[0, 2, 1])
    else:
        chosen = writer.op("Greater", value, writer.const(0.5))
        name = writer.op("Where", chosen, writer.op("Mul", value, writer.const(0.5)), value)
    return by_position(stream, name)


def dead_end(context: Context, stream: Stream) -> Stream:
    """A mixture that reaches no served output."""
    writer = context.writer
    lost = writer.op("Add", writer.reduce("Mean", stream.name, 0, 1), writer.const(1.0))
    writer.op("Mul", stream.name, lost)
    return by_position(stream, writer.op("Identity", stream.name), stream.state.norm)


BY_POSITION: dict[str, Piece] = {
    "pointwise": pointwise,
    "normalised": normalised,
    "projected": projected,
    "folded": folded,
    "by width": by_width,
    "dead end": dead_end,
}
